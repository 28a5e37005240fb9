"""hash_ids: the same numbers in Python, numpy and torch, and good ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import hashing
from pipeline.hashing import hash_ids

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(seed=st.integers(-(2**70), 2**70), parts=st.lists(INT64, max_size=4))
def test_python_numpy_and_torch_agree(seed: int, parts: list[int]) -> None:
    expected = hash_ids(seed, *parts)
    assert type(expected) is int and 0 <= expected < 2**63
    if parts:
        as_arrays = hash_ids(seed, *(np.array([part]) for part in parts))
        as_tensors = hash_ids(seed, *(torch.tensor([part]) for part in parts))
        assert as_arrays.dtype == np.int64 and as_arrays.tolist() == [expected]
        assert as_tensors.dtype == torch.int64 and as_tensors.tolist() == [expected]


@given(seed=INT64, part=INT64)
def test_the_path_of_other_devices_agrees(seed: int, part: int) -> None:
    """On the CPU torch tensors go through numpy; the torch arithmetic of the other devices is run here on the CPU."""
    state = hashing._signed(hashing._mix_int(seed))
    word = hashing._mix_torch(torch.tensor([part]) ^ state) & hashing._POSITIVE
    assert word.tolist() == [hash_ids(seed, part)]


def test_parts_broadcast_and_types_mix() -> None:
    rows, cols = torch.arange(3)[:, None], np.arange(4, dtype=np.uint8)
    found = hash_ids(7, rows, 5, cols)
    assert isinstance(found, torch.Tensor) and found.shape == (3, 4)
    assert found.tolist() == [[hash_ids(7, i, 5, j) for j in range(4)] for i in range(3)]
    assert hash_ids(7, torch.tensor(3)).shape == () and hash_ids(7, np.int64(3)) == hash_ids(7, 3)
    assert hash_ids(7, torch.tensor([3], dtype=torch.uint8)).tolist() == [hash_ids(7, 3)]


def test_inputs_are_left_alone() -> None:
    ids = torch.arange(5)
    hash_ids(1, ids, 2)
    assert ids.tolist() == [0, 1, 2, 3, 4]


def test_every_part_and_its_place_matter() -> None:
    assert len({hash_ids(0, 1, 2), hash_ids(0, 2, 1), hash_ids(1, 1, 2), hash_ids(0, 1), hash_ids(0, 1, 2, 0), hash_ids(2, 0, 1)}) == 6
    assert len(set(hash_ids(3, np.arange(100_000)).tolist())) == 100_000


def test_bits_are_fair_and_neighbours_differ_in_half_of_them() -> None:
    words = hash_ids(11, np.arange(20_000), 3)
    bits = (words[:, None] >> np.arange(63)) & 1
    assert abs(bits.mean(0) - 0.5).max() < 0.02
    assert abs((bits[1:] != bits[:-1]).mean() - 0.5) < 0.005


def test_known_values_do_not_change() -> None:
    """Order, augmentation and choices of every run hang on these."""
    assert [hash_ids(0), hash_ids(0, 0), hash_ids(1, 2, 3)] == [7070836379803831727, 2812178212566171247, 5797055558538453683]


@pytest.mark.parametrize("part", [1.5, "a", None, np.array([0.5]), torch.tensor([0.5]), [1]])
def test_what_is_no_integer_is_refused(part: object) -> None:
    with pytest.raises(TypeError, match="must be an int or an integer array"):
        hash_ids(0, part)
