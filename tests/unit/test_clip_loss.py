"""The loss: error budgets against float64, every argument, the edge cases, and that the blocked path never stores B x N numbers."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.kernels import blocked, clip_loss
from pipeline.kernels.blocked import careful

IMPLEMENTATIONS = ["reference", "blocked"]


def pairs(batch: int, width: int = 32, seed: int = 0, matched: float = 0.25) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows in float64 on the bfloat16 grid, so that every dtype holds the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = (normalize(torch.randn(batch, width, generator=generator)) for _ in range(2))
    return tuple(rows.bfloat16().double() for rows in (image, normalize(matched * image + noise)))


def run(
    image: torch.Tensor, text: torch.Tensor, scale: float, dtype: torch.dtype, impl: str, local: slice | None = None, **given: Any
) -> dict:
    """Loss, gradients and per-sample outputs; with `local` the rows are its part and the whole are the columns."""
    image, text = (rows.to(dtype, copy=True).requires_grad_() for rows in (image, text))
    s = torch.tensor([scale], dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    if local is None:
        found = clip_loss(image, text, s, impl=impl, **given)
    else:
        found = clip_loss(image[local], text[local], s, columns=(image, text), offset=local.start, impl=impl, **given)
    found.loss.backward()
    grads = torch.cat([image.grad, text.grad]).double()
    return {"grads": grads, "scale": s.grad.double(), "loss": found.loss.detach().double(), "outputs": found}


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm().clamp_min(1e-300))


def truth_of(image: torch.Tensor, text: torch.Tensor, scale: float, **given: Any) -> dict:
    return run(image, text, scale, torch.float64, "reference", **given)


def test_reference_is_the_mean_of_two_cross_entropies() -> None:
    image, text = pairs(20)
    logits = 14.3 * image @ text.T
    both = [cross_entropy(part, torch.arange(20), reduction="none") for part in (logits, logits.T)]
    found = clip_loss(image, text, 14.3, impl="reference", history=torch.full((20,), 30.0))
    torch.testing.assert_close(found.loss, (both[0].mean() + both[1].mean()) / 2)
    torch.testing.assert_close(found.per_sample, (both[0] + both[1]) / 2)
    torch.testing.assert_close(found.p_row, logits.softmax(1).diagonal())
    torch.testing.assert_close(found.p_col, logits.softmax(0).diagonal())
    torch.testing.assert_close(found.cosine, (image * text).sum(1))
    torch.testing.assert_close(found.delta, 30 - 100 * found.cosine.clamp_min(0))
    assert clip_loss(image, text, 14.3).delta is None


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rectangular", [False, True])
def test_gradcheck(impl: str, rectangular: bool) -> None:
    image, text = (rows.requires_grad_() for rows in pairs(7, 3))
    scale, weights = torch.tensor(9.0, dtype=torch.float64, requires_grad=True), torch.tensor([1, 0, 2, 0.5, 1, 1, 0])

    def loss(i: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if rectangular:
            return clip_loss(i[2:6], t[2:6], s, columns=(i, t), offset=2, weights=weights, impl=impl).loss
        return clip_loss(i, t, s, weights=weights, impl=impl).loss

    assert torch.autograd.gradcheck(loss, (image, text, scale))


@pytest.mark.parametrize("batch", [1, 2, 16, 17, 130, 257, 1025])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_blocked_is_the_reference_for_any_number_of_rows(batch: int, scale: float) -> None:
    image, text = pairs(batch, 24, seed=batch)
    truth, found = truth_of(image, text, scale), run(image, text, scale, torch.float64, "blocked")
    assert abs(found["loss"] - truth["loss"]) <= 1e-12 * max(1.0, truth["loss"])
    torch.testing.assert_close(found["grads"], truth["grads"], atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(found["scale"], truth["scale"], atol=1e-12, rtol=1e-9)
    for name in ("per_sample", "cosine", "p_row", "p_col"):
        torch.testing.assert_close(getattr(found["outputs"], name), getattr(truth["outputs"], name), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_float32_error_budget(impl: str, scale: float) -> None:
    image, text = pairs(1000, 256, matched=0.0)
    truth, found = truth_of(image, text, scale), run(image, text, scale, torch.float32, impl)
    assert error(found["grads"], truth["grads"]) <= 1e-6
    assert error(found["scale"], truth["scale"]) <= 1e-5
    assert error(found["loss"], truth["loss"]) <= 1e-6


@pytest.mark.parametrize("matched", [0.0, 0.25])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bfloat16_error_budget_at_the_clamp(impl: str, matched: float) -> None:
    """At s = 100 at most 0.65 of the error of the usual way: logits and their gradients in bfloat16 under autocast."""
    image, text = pairs(1000, 512, matched=matched)
    truth = truth_of(image, text, 100.0)
    usual = [rows.to(torch.bfloat16, copy=True).requires_grad_() for rows in (image, text)]
    logits, labels = 100.0 * usual[0] @ usual[1].T, torch.arange(1000)
    ((cross_entropy(logits.float(), labels) + cross_entropy(logits.T.float(), labels)) / 2).backward()
    budget = 0.65 * error(torch.cat([rows.grad for rows in usual]).double(), truth["grads"])
    found = run(image, text, 100.0, torch.bfloat16, impl)
    assert error(found["grads"], truth["grads"]) <= budget
    assert error(found["scale"], truth["scale"]) <= 5e-3


def test_float16_rows_are_widened() -> None:
    image, text = pairs(200)
    truth = truth_of(image, text, 14.3)
    for impl in IMPLEMENTATIONS:
        found = run(image, text, 14.3, torch.float16, impl)
        assert error(found["loss"], truth["loss"]) <= 1e-6 and error(found["grads"], truth["grads"]) <= 1e-3


@pytest.mark.parametrize("local", [slice(0, 100), slice(60, 200), slice(250, 301)])
@pytest.mark.parametrize("weighted", ["no", "local", "all"])
def test_columns_with_an_offset(local: slice, weighted: str) -> None:
    image, text = pairs(301)
    every = torch.rand(301, generator=torch.Generator().manual_seed(1)).sub(0.3).clamp_min(0)
    given = {"no": {}, "local": {"weights": every[local]}, "all": {"weights": every}}[weighted]
    truth = truth_of(image, text, 20.0, local=local, **given)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
        found = run(image, text, 20.0, dtype, "blocked", local=local, **given)
        for name in ("loss", "grads", "scale"):
            assert error(found[name], truth[name]) <= bound, (dtype, name)
        torch.testing.assert_close(found["outputs"].p_row.double(), truth["outputs"].p_row, atol=max(bound, 1e-9), rtol=bound)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ranks_add_up_to_the_whole(impl: str) -> None:
    """Each rank's rows against all columns: the mean of the losses and of the gradients is the loss and gradient of the whole."""
    image, text = pairs(120)
    whole = truth_of(image, text, 30.0)
    ranks = [run(image, text, 30.0, torch.float64, impl, local=slice(first, first + 40)) for first in (0, 40, 80)]
    for name in ("loss", "grads", "scale"):
        torch.testing.assert_close(sum(rank[name] for rank in ranks) / 3, whole[name])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("filler", [0.0, float("nan"), float("inf")])
def test_weight_zero_removes_a_row_whatever_it_holds(impl: str, filler: float) -> None:
    image, text = pairs(50)
    weights = torch.ones(50, dtype=torch.float64).index_fill_(0, torch.tensor([0, 7, 49]), 0)
    rest = weights.bool()
    alone = truth_of(image[rest], text[rest], 20.0)
    spoiled = [torch.where(rest[:, None], rows, filler) for rows in (image, text)]
    found = run(*spoiled, 20.0, torch.float64, impl, weights=weights)
    torch.testing.assert_close(found["loss"], alone["loss"] * 47 / 50)
    torch.testing.assert_close(found["grads"][torch.cat([rest, rest])], alone["grads"] * 47 / 50)
    assert found["grads"][torch.cat([~rest, ~rest])].abs().max() == 0
    for name in ("per_sample", "p_row", "p_col"):
        value = getattr(found["outputs"], name)
        assert value[~rest].abs().max() == 0
        torch.testing.assert_close(value[rest], getattr(alone["outputs"], name))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_all_weights_zero_is_a_loss_of_zero_with_gradients_of_zero(impl: str) -> None:
    found = run(*pairs(10), 20.0, torch.float32, impl, weights=torch.zeros(10))
    assert found["loss"] == 0 and found["grads"].abs().max() == 0 and found["scale"] == 0


def far_apart(batch: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around one direction and a few opposite to it: all cosines of those are near -1, their own among them."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.zeros(16).index_fill_(0, torch.tensor([0]), 1.0)
    image, text = (normalize(axis + 0.05 * torch.randn(batch, 16, generator=generator)) for _ in range(2))
    image[::50] *= -1
    return tuple(rows.bfloat16().double() for rows in (image, text))


@pytest.mark.parametrize("rectangular", [False, True])
def test_rows_that_underflow_are_found_and_done_carefully(rectangular: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = careful.log_sums
    monkeypatch.setattr(careful, "log_sums", lambda *given: calls.append(1) or original(*given))
    image, text = far_apart()
    given = {"local": slice(40, 240)} if rectangular else {}
    truth = truth_of(image, text, 100.0, **given)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        found = run(image, text, 100.0, dtype, "blocked", **given)
        assert calls, "this case is meant to need the careful path"
        assert error(found["outputs"].per_sample.double(), truth["outputs"].per_sample) <= bound
        assert error(found["grads"], truth["grads"]) <= bound and error(found["scale"], truth["scale"]) <= bound


def test_rows_longer_than_one_do_not_overflow() -> None:
    image, text = (3 * rows for rows in pairs(100))
    truth, found = truth_of(image, text, 60.0), run(image, text, 60.0, torch.float32, "blocked")
    assert error(found["grads"], truth["grads"]) <= 1e-4


def test_a_confident_pair_keeps_its_gradient_in_bfloat16() -> None:
    """p = 0.9999: in bfloat16 p - 1 would be 0. The own pairs are outside the matrix, so nothing cancels."""
    image, text = pairs(200, 256, matched=0.3)
    truth, found = truth_of(image, text, 80.0), run(image, text, 80.0, torch.bfloat16, "blocked")
    assert truth["outputs"].p_row.median() > 0.999
    assert error(found["grads"], truth["grads"]) <= 0.02


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_inside(impl: str, dtype: torch.dtype) -> None:
    rows = pairs(300)
    plain = run(*rows, 50.0, dtype, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(*rows, 50.0, dtype, impl)
    assert inside["outputs"].loss.dtype == torch.float32
    for name in ("loss", "grads", "scale"):
        assert torch.equal(inside[name], plain[name])


def test_repeats_bit_for_bit_and_backward_can_run_twice() -> None:
    rows = pairs(700, matched=0.0)
    first, second = (run(*rows, 14.3, torch.bfloat16, "blocked") for _ in range(2))
    assert torch.equal(first["grads"], second["grads"]) and torch.equal(first["loss"], second["loss"])
    image, text = (value.float().requires_grad_() for value in rows)
    loss = clip_loss(image, text, 14.3, impl="blocked").loss
    once = torch.autograd.grad(loss, image, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, image)[0], once)


def test_kept_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs(700)
    with_kept = run(*rows, 50.0, torch.bfloat16, "blocked")
    monkeypatch.setattr(blocked, "kept", lambda *_: 0)
    assert torch.equal(run(*rows, 50.0, torch.bfloat16, "blocked")["grads"], with_kept["grads"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_what_needs_a_gradient_gets_one(impl: str) -> None:
    image, text = (rows.float() for rows in pairs(200))
    whole = [image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(20.0, requires_grad=True)]
    clip_loss(*whole, impl=impl).loss.backward()
    for needed in range(3):
        some = [value.detach().clone().requires_grad_(i == needed) for i, value in enumerate(whole)]
        clip_loss(*some, impl=impl).loss.backward()
        torch.testing.assert_close(some[needed].grad, whole[needed].grad)
    detached = clip_loss(*whole, impl=impl)
    assert detached.loss.requires_grad and not any(value.requires_grad for value in detached[1:5])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_gradients_it_gives_the_same(impl: str) -> None:
    image, text = (rows.float() for rows in pairs(200))
    expected = clip_loss(image.clone().requires_grad_(), text, torch.tensor(20.0, requires_grad=True), impl=impl)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = clip_loss(image, text, torch.tensor(20.0), impl=impl)
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.per_sample, expected.per_sample)


def test_no_second_derivative_through_blocked() -> None:
    image, text = (rows.float().requires_grad_() for rows in pairs(20))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(clip_loss(image, text, 14.3, impl="blocked").loss, image, create_graph=True)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() >= value.numel() * value.element_size():
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "data", "share"), [(256, pairs, 0.75), (1100, pairs, 0.75), (400, far_apart, 0.75)])
def test_blocked_never_stores_a_square(dtype: torch.dtype, batch: int, data: Any, share: float) -> None:
    rows = data(batch)
    with Largest() as largest:
        run(*rows, 100.0, dtype, "blocked")
    assert largest.numbers <= share * batch * batch
    with Largest() as everything:
        run(*rows, 100.0, dtype, "reference")
    assert everything.numbers == batch * batch


def test_memory_grows_with_the_rows_and_not_with_their_square() -> None:
    sizes = {}
    for batch in (2048, 4096):
        problem = [torch.zeros(batch, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        with Largest() as largest:
            clip_loss(*problem, 14.3, impl="blocked").loss.backward()
        sizes[batch] = largest.numbers
    assert sizes[4096] <= 2.1 * sizes[2048] * 2 and sizes[4096] <= 1024 * 4096
