"""SigLIP's loss: the paper's formula, open_clip's, the tiles against the reference in every shape, and the objective's bias."""

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch.nn.functional import logsigmoid

from pipeline.kernels import siglip_loss
from pipeline.objectives import siglip
from tests.unit.test_clip_loss import error, pairs

IMPLEMENTATIONS = ["reference", "blocked"]


def run(image: torch.Tensor, text: torch.Tensor, dtype: torch.dtype, impl: str, local: slice | None = None, **given) -> dict:
    """Loss, per-sample losses and every gradient; with `local` its rows against all texts."""
    image, text = (rows.to(dtype, copy=True).requires_grad_() for rows in (image, text))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias = (torch.tensor([value], dtype=exact, requires_grad=True) for value in (12.0, -7.0))
    if local is None:
        found = siglip_loss(image, text, scale, bias, impl=impl, **given)
    else:
        found = siglip_loss(image[local], text[local], scale, bias, columns=text, offset=local.start, impl=impl, **given)
    found.loss.backward()
    grads = torch.cat([value.grad.flatten() for value in (image, text)]).double()
    scalars = torch.cat([scale.grad, bias.grad]).double()
    return {"loss": found.loss.detach().double(), "per_sample": found.per_sample.double(), "grads": grads, "scalars": scalars}


def test_reference_is_the_paper_and_open_clip() -> None:
    image, text = pairs(20)
    z = 2 * torch.eye(20, dtype=torch.float64) - 1
    paper = -logsigmoid(z * (12 * image @ text.T - 7)).sum(1)
    found = siglip_loss(image, text, 12.0, -7.0, impl="reference")
    torch.testing.assert_close(found.per_sample, paper)
    peer = SigLipLoss()(image, text, torch.tensor(12.0), torch.tensor(-7.0))
    torch.testing.assert_close(found.loss, peer)
    torch.testing.assert_close(siglip_loss(image, text, 12.0, -7.0, impl="blocked").loss, peer)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(impl: str) -> None:
    image, text = (rows.requires_grad_() for rows in pairs(7, 3))
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (9.0, -3.0))
    weights = torch.tensor([1, 0, 2, 0.5, 1, 1, 0])
    for local in (slice(0, 7), slice(2, 6)):

        def loss(i: torch.Tensor, t: torch.Tensor, s: torch.Tensor, b: torch.Tensor, local: slice = local) -> torch.Tensor:
            return siglip_loss(i[local], t[local], s, b, columns=t, offset=local.start, weights=weights, impl=impl).loss

        assert torch.autograd.gradcheck(loss, (image, text, scale, bias))


@pytest.mark.parametrize("batch", [1, 17, 300, 1025])
@pytest.mark.parametrize("local", [None, slice(1, 12)])
@pytest.mark.parametrize("weighted", [False, True])
def test_blocked_is_the_reference(batch: int, local: slice | None, weighted: bool) -> None:
    if local is not None and batch < 12:
        pytest.skip("fewer rows than the slice has")
    image, text = pairs(batch, 24)
    given = {"local": local}
    if weighted:
        given["weights"] = torch.rand(batch, generator=torch.Generator().manual_seed(1)).sub(0.3).clamp_min(0)
    truth = run(image, text, torch.float64, "reference", **given)
    bounds = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        found = run(image, text, dtype, "blocked", **given)
        for name in truth:
            assert error(found[name], truth[name]) <= bound, (dtype, name)


def test_what_has_no_weight_counts_nowhere() -> None:
    image, text = pairs(30)
    weights = torch.ones(30, dtype=torch.float64).index_fill_(0, torch.tensor([0, 7, 29]), 0)
    rest = weights.bool()
    spoiled = [torch.where(rest[:, None], rows, torch.nan) for rows in (image, text)]
    alone = siglip_loss(image[rest], text[rest], 12.0, -7.0, impl="reference")
    for impl in IMPLEMENTATIONS:
        found = siglip_loss(*spoiled, 12.0, -7.0, weights=weights, impl=impl)
        torch.testing.assert_close(found.per_sample[rest], alone.per_sample)
        assert found.per_sample[~rest].abs().max() == 0


def test_errors_name_the_loss() -> None:
    rows = torch.ones(4, 2)
    with pytest.raises(ValueError, match="siglip_loss: expected logit_bias as a number"):
        siglip_loss(rows, rows, 10.0, torch.ones(2))
    with pytest.raises(ValueError, match="siglip_loss: unknown impl 'fast'"):
        siglip_loss(rows, rows, 10.0, -10.0, impl="fast")


def test_the_objective_learns_its_bias() -> None:
    objective = siglip.Config(bias=-5.0).build()
    assert [(name, value.item()) for name, value in objective.named_parameters()] == [("bias", -5.0)]
