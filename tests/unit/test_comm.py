"""What ranks tell each other."""

from collections import Counter

import torch

from pipeline.distributed.comm import LocalComm, add_up


def test_counts_that_do_not_fit_are_told_as_other() -> None:
    many = Counter({f"reason {i:04d}": 2 if i == 7 else 1 for i in range(1000)})
    found = add_up(many, LocalComm(), torch.device("cpu"))
    assert sum(found.values()) == 1001 and found["reason 0007"] == 2 and found["other"] == 1001 - (len(found) - 1) - 1
    assert 100 < len(found) < 1000
    assert add_up(Counter(truncated=2, other=1), LocalComm(), torch.device("cpu")) == Counter(truncated=2, other=1)
