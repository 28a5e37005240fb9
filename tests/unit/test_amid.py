"""AMID: bounds, pairing, routing, reductions; and the three kinds of negatives against their definitions."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.distributed.comm import LocalComm
from pipeline.kernels import clip_loss
from pipeline.objectives import amid, crd
from pipeline.objectives._critic import Critic, guesser, squared_error
from pipeline.types import Batch, Selection

DIM = 8
WIDTHS = {"student_width": DIM, "teacher_width": DIM, "auxiliary_width": DIM}
ONLY = dict.fromkeys(("student_weight", "auxiliary_weight", "explicit_weight", "adversarial_weight"), 0.0)
SINGLE = ONLY | {"student_weight": 1.0, "projection": 0, "auxiliary_weight": 0.0} | WIDTHS


def batch(rows: int, first: int = 0, **fields: Tensor) -> Batch:
    ids = first + torch.arange(rows)
    return Batch(ids, ids, ids * 0, torch.ones(rows, dtype=torch.bool), fields)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(rows: int = 12, seed: int = 0, **changes: Tensor) -> dict[str, Tensor]:
    names = ("embedding", "teacher.embedding", "auxiliary.embedding")
    return {name: randn(rows, DIM, seed=seed + place) for place, name in enumerate(names)} | changes


def loss_of(objective: amid.Amid | crd.Crd, given: dict[str, Tensor], data: Batch | None = None) -> Tensor:
    data = data or batch(len(given["embedding"]))
    return objective(given, data, Selection(torch.arange(len(data))), LocalComm())


def gaussian_pair(rows: int, dim: int, rho: float, seed: int) -> tuple[Tensor, Tensor, float]:
    """Unit rows whose product over the temperature is the optimal critic log p(y|x) - log p(y) of correlated Gaussians; and that temperature."""
    x, noise = randn(rows, dim, seed=seed), randn(rows, dim, seed=seed + 1000)
    y = rho * x + math.sqrt(1 - rho**2) * noise
    a, one = rho / (1 - rho**2), torch.ones(rows, 1, dtype=torch.float64)
    ends = [-a * rho / 2 * v.square().sum(1, keepdim=True) for v in (x, y)]
    left, right = torch.cat([a * x, ends[0], one], 1), torch.cat([y, one, ends[1]], 1)
    size = max(float(left.square().sum(1).max()), float(right.square().sum(1).max())) + 1
    pads = [(size - v.square().sum(1, keepdim=True)).sqrt() for v in (left, right)]
    zero = torch.zeros_like(one)
    return torch.cat([left, pads[0], zero], 1) / size**0.5, torch.cat([right, zero, pads[1]], 1) / size**0.5, 1 / size


@pytest.mark.parametrize(("dim", "rho", "rows"), [(4, 0.6, 256), (8, 0.6, 256), (32, 0.9, 64)])
def test_the_estimate_approaches_the_information_and_never_exceeds_log_b(dim: int, rho: float, rows: int) -> None:
    """A-P1."""
    found = []
    for seed in range(4):
        left, right, temperature = gaussian_pair(rows, dim, rho, seed)
        widths = dict.fromkeys(("student_width", "teacher_width"), left.shape[1])
        objective = amid.Config(**SINGLE | widths | {"temperature": temperature}).build()
        loss_of(objective, {"teacher.embedding": left, "embedding": right})
        found.append(objective.telemetry["information_teacher_student"].item())
    truth, estimate = -dim / 2 * math.log(1 - rho**2), sum(found) / len(found)
    assert max(found) <= math.log(rows) + 1e-6
    if truth < math.log(rows):
        assert 0.8 * truth <= estimate <= truth + 0.1
    else:
        assert estimate == pytest.approx(math.log(rows), abs=1e-3)


def test_identities_of_the_contrast() -> None:
    """A-P2: log B for constant features, symmetric in its sides, 0 for orthonormal equal rows, blind to lengths."""
    build = lambda **changes: amid.Config(**SINGLE | changes).build()  # noqa: E731
    constant = {"embedding": torch.ones(12, DIM, dtype=torch.float64), "teacher.embedding": torch.ones(12, DIM, dtype=torch.float64)}
    for temperature in (0.05, 1.0, 20.0):
        assert loss_of(build(temperature=temperature), constant).item() == pytest.approx(math.log(12))
    one = features()
    swapped = {"embedding": one["teacher.embedding"], "teacher.embedding": one["embedding"]}
    assert torch.allclose(loss_of(build(), one), loss_of(build(), swapped), rtol=1e-12)
    basis = torch.eye(DIM, dtype=torch.float64)
    assert loss_of(build(temperature=0.01), {"embedding": basis, "teacher.embedding": basis}) < 1e-12
    longer = {name: value * torch.linspace(0.1, 30, 12)[:, None] for name, value in one.items()}
    assert torch.allclose(loss_of(build(), one), loss_of(build(), longer), rtol=1e-9)


def test_the_length_of_the_teachers_rows_changes_no_term() -> None:
    """A-P10."""
    one = features()
    for changes in ({}, {"adv_mode": "cond"}, {"adv_mode": "marginal"}, {"explicit_weight": 1.0, "h_grad_to_teacher": True}):
        objective = amid.Config(**WIDTHS | changes).build().double()
        ten = one | {"teacher.embedding": 10 * one["teacher.embedding"]}
        assert torch.allclose(loss_of(objective, one), loss_of(objective, ten), rtol=1e-9)


def test_one_row_has_nothing_to_be_contrasted_with() -> None:
    with pytest.raises(ValueError, match="amid: negatives: batch needs 2 rows or more, found 1"):
        loss_of(amid.Config(**WIDTHS).build().double(), features(1))
    queued = amid.Config(**WIDTHS | {"negatives": "queue", "queue": 8}).build().double()
    loss_of(queued, features(1), batch(1))
    queued.after_step()
    assert loss_of(queued, features(1, seed=5), batch(1, first=1)) > 0


@pytest.mark.parametrize(("mode", "low", "high"), [("paired", 0.9, 1.0), ("cond", 0.9, 1.0), ("marginal", 0.4, 0.6)])
def test_only_a_critic_of_pairs_sees_that_guesses_belong_to_other_rows(mode: str, low: float, high: float) -> None:
    """A-P6: the guesses are the teacher's own rows, shuffled; their distribution is right and every one of them is wrong."""
    torch.manual_seed(0)
    critic = Critic(mode, DIM, DIM, 64, {})
    optimizer = torch.optim.AdamW(critic.parameters(), lr=5e-3, betas=(0.5, 0.9), weight_decay=0.0)

    def inputs(seed: int) -> dict[str, Tensor]:
        rows = F.normalize(randn(256, DIM, seed=seed).float())
        return {"teacher": rows, "student": rows, "guess": rows.roll(1, 0), "weight": torch.ones(256)}

    for seed in range(400):
        optimizer.zero_grad()
        critic(inputs(seed)).backward()
        optimizer.step()
    real, fake = critic.judge(inputs(10_000))
    assert low <= ((real > 0).float().mean() + (fake < 0).float().mean()) / 2 <= high


def test_the_explicit_term_of_gaussians_goes_to_the_conditional_variance() -> None:
    """A-P6: d (1 - rho^2) without normalisation."""
    torch.manual_seed(0)
    rho, generator = 0.6, guesser("mlp", DIM, DIM, 64)
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)

    def error(seed: int, rows: int = 512) -> Tensor:
        s = randn(rows, DIM, seed=seed).float()
        t = rho * s + math.sqrt(1 - rho**2) * randn(rows, DIM, seed=seed + 5000).float()
        return squared_error(t, generator(s)).mean()

    for seed in range(400):
        optimizer.zero_grad()
        error(seed).backward()
        optimizer.step()
    assert error(20_000, 20_000).item() == pytest.approx(DIM * (1 - rho**2), rel=0.04)


def test_the_critics_step_changes_the_critic_only() -> None:
    """A-P7; that the model's step does not is in the contract."""
    objective = amid.Config(**WIDTHS).build().double()
    critic = objective.adversary().double()
    loss_of(objective, {name: value.requires_grad_() for name, value in features().items()})
    assert not any(value.requires_grad for value in objective.adversary_inputs.values())
    before, own = [p.clone() for p in objective.parameters()], [p.clone() for p in critic.parameters()]
    optimizer = torch.optim.AdamW(critic.parameters(), **critic.adamw)
    critic(objective.adversary_inputs).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, objective.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(own, critic.parameters()) if a.ndim > 1)


def test_without_the_other_terms_it_is_the_mi_only_baseline_bit_for_bit() -> None:
    """A-P8: the same initial heads whatever else is built, and the loss of CLIP's kernel on them."""
    only, whole = (amid.Config(**WIDTHS | changes).build().double() for changes in (ONLY | {"student_weight": 0.2}, {}))
    assert set(only.state_dict()) == {"heads.student.weight", "heads.teacher_student.weight"}
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in only.state_dict().items())
    assert only.adversary() is None and only.config.reads() == ("embedding", "teacher.embedding")
    one = features()
    left, right = (F.normalize(one[name] @ only.heads[head].weight.T) for name, head in _SIDES)
    expected = 0.2 * clip_loss(left, right, 10.0, weights=torch.ones(12, dtype=torch.float64)).loss
    assert torch.allclose(loss_of(only, one), expected, rtol=1e-14, atol=0)


_SIDES = (("teacher.embedding", "teacher_student"), ("embedding", "student"))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="every weight of amid is 0"):
        amid.Config(**ONLY)
    with pytest.raises(ConfigError, match="needs auxiliary_width"):
        amid.Config(student_width=4, teacher_width=4).build()
    with pytest.raises(ValueError, match="identity needs features of one width, found 4 and 8"):
        amid.Config(**WIDTHS | {"student_width": 4, "generator": "identity"}).build()
    with pytest.raises(ConfigError, match="bank needs `samples`"):
        amid.Config(**WIDTHS, negatives="bank").build()
    bank = amid.Config(**WIDTHS, negatives="bank", samples=5).build().double()
    with pytest.raises(ValueError, match="found sample 11 in the batch and samples: 5"):
        loss_of(bank, features())
