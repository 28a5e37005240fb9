"""Queue, bank and masks of false negatives against their definitions."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.objectives import crd
from tests.unit.test_amid import DIM, batch, features, loss_of, randn

PLAIN = {"student_width": DIM, "teacher_width": DIM, "projection": 0, "temperature": 0.2}


def unit(seed: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    given = features(rows, seed)
    return F.normalize(given["teacher.embedding"]), F.normalize(given["embedding"])


def cross_entropy(anchor: Tensor, positive: Tensor, others: Tensor) -> Tensor:
    """One anchor [D] with its positive [D] against negatives [n, D], temperature 0.2."""
    logits = torch.cat([(anchor @ positive)[None], others @ anchor]) / 0.2
    return logits.logsumexp(0) - logits[0]


def test_a_queue_adds_the_rows_of_earlier_steps() -> None:
    objective = crd.Config(**PLAIN, negatives="queue", queue=20).build().double()
    plain = crd.Config(**PLAIN).build().double()
    assert torch.allclose(loss_of(objective, features()), loss_of(plain, features()), rtol=1e-12)  # it is empty
    objective.after_step()
    left, right = unit(3, 4)
    old_left, old_right = unit(0)
    expected = []
    for i in range(4):
        rest = [j for j in range(4) if j != i]
        pairs = ((left, right, old_right), (right, left, old_left))
        expected += [cross_entropy(a[i], b[i], torch.cat([b[rest], old])) for a, b, old in pairs]
    found = loss_of(objective, features(4, 3), batch(4, first=100))
    assert torch.allclose(found, torch.stack(expected).sum() / 2 / 4, rtol=1e-9)
    assert objective.telemetry["information"].item() == pytest.approx(math.log(16) - found.item())


def test_the_queue_is_a_ring_that_forgets_the_oldest_and_takes_no_row_that_does_not_count() -> None:
    objective = crd.Config(**PLAIN, negatives="queue", queue=5).build().double()
    for first in (0, 10, 20):
        data = batch(2, first=first)
        data.valid[0] = first != 10
        loss_of(objective, features(2, first), data)
        objective.after_step()
    assert sorted(objective.contrast.sample.tolist()) == [-1, 1, 11, 20, 21]
    loss_of(objective, features(9), batch(9, first=50))
    objective.after_step()
    assert sorted(objective.contrast.sample.tolist()) == [54, 55, 56, 57, 58]


def test_a_samples_older_self_is_not_its_negative() -> None:
    objective = crd.Config(**PLAIN, negatives="queue", queue=4).build().double()
    loss_of(objective, features(4, 1), batch(4))
    objective.after_step()
    left, right = unit(3, 2)
    old_left, old_right = unit(1, 4)
    expected = []
    for i in range(2):
        others = [j for j in range(4) if j != i]
        for a, b, old in ((left, right, old_right), (right, left, old_left)):
            expected.append(cross_entropy(a[i], b[i], torch.cat([b[1 - i][None], old[others]])))
    assert torch.allclose(loss_of(objective, features(2, 3), batch(2)), torch.stack(expected).sum() / 2 / 2, rtol=1e-9)


def test_rows_of_the_anchors_class_are_no_negatives() -> None:
    label = torch.tensor([0, 0, 1, -1, -1, 2])  # without a label nothing is known
    left, right = unit(0, 6)
    expected = []
    for i in range(6):
        others = [j for j in range(6) if j != i and not (label[j] == label[i] and label[i] >= 0)]
        expected += [cross_entropy(a[i], b[i], b[others]) for a, b in ((left, right), (right, left))]
    found = loss_of(crd.Config(**PLAIN, mask_same_class=True).build().double(), features(6), batch(6, label=label))
    assert torch.allclose(found, torch.stack(expected).sum() / 2 / 6, rtol=1e-12)


def test_a_bank_is_crds_loss_with_its_constant_of_the_first_step() -> None:
    total = 14
    objective = crd.Config(**PLAIN, negatives="bank", samples=total, momentum=0.5).build().double()
    banks = [objective.contrast.left.clone(), objective.contrast.right.clone()]
    share, ids = (total - 1) / total, torch.arange(12)
    constants = None
    for step in range(3):
        left, right = unit(step)
        ratios = [(anchor @ bank.T / 0.2).exp() for anchor, bank in ((left, banks[1]), (right, banks[0]))]
        if constants is None:  # own rows are there twice: as the positive and, for the constant only, among the rest
            constants = [total * (r.sum() + r[ids, ids].sum()) / (12 * (total + 1)) for r in ratios]
        expected = torch.zeros((), dtype=torch.float64)
        for ratio, constant in zip(ratios, constants):
            p = ratio / constant
            own = torch.zeros_like(p, dtype=torch.bool)
            own[ids, ids] = True
            expected -= (p[own] / (p[own] + share)).log().sum() + (share / (p[~own] + share)).log().sum()
        found = loss_of(objective, features(12, step))
        assert torch.allclose(found, expected / 12, rtol=1e-9)
        objective.after_step()
        for bank, new in zip(banks, (left, right)):
            bank[:12] = F.normalize(0.5 * bank[:12] + 0.5 * new)
    assert torch.allclose(objective.contrast.left, banks[0], rtol=1e-12)
    assert torch.allclose(objective.contrast.left[:12].norm(dim=1), torch.ones(12, dtype=torch.float64))


def test_drawn_negatives_are_the_same_at_every_size_of_the_world_and_change_with_the_visit() -> None:
    objective = crd.Config(**PLAIN, negatives="bank", samples=1000, drawn=50).build().double()
    data, given = batch(12), features()
    first = loss_of(objective, given, data)
    assert torch.equal(loss_of(objective, given, data), first)
    data.visit += 1
    assert not torch.equal(loss_of(objective, given, data), first)


def test_a_bank_outlives_a_checkpoint_whatever_the_temperature() -> None:
    config = crd.Config(**PLAIN | {"temperature": 0.005}, negatives="bank", samples=20)  # exp(1 / 0.005) is no float32
    one, other = config.build(), config.build()
    given = {name: value.float() for name, value in features().items()}
    for _ in range(2):
        assert loss_of(one, given).isfinite()
        one.after_step()
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    later = {"embedding": randn(12, DIM, seed=40).float(), "teacher.embedding": randn(12, DIM, seed=41).float()}
    assert torch.equal(loss_of(one, later), loss_of(other, later)) and one.contrast.log_z.isfinite().all()
