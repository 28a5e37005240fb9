"""Which implementation the loss takes, and the loss on bad input: every error says what was expected."""

import pytest
import torch

from pipeline.kernels import blocked, clip_loss


def test_auto_takes_blocked_when_there_is_much_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, original = [], blocked.sums
    monkeypatch.setattr(blocked, "sums", lambda *given: taken.append(1) or original(*given))
    for batch, expected in ((64, 0), (2048, 1)):
        taken.clear()
        clip_loss(torch.eye(8).repeat(batch // 8, 1), torch.eye(8).repeat(batch // 8, 1), 14.3)
        assert len(taken) == expected


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(5, 3), r"image and text of one shape \[B, D\].*float32 \[4, 3\] and float32 \[5, 3\]"),
        (torch.zeros(4), torch.zeros(4), r"one shape \[B, D\]"),
        (torch.zeros(4, 3), torch.zeros(4, 3).bfloat16(), "one floating dtype, found float32"),
        (torch.zeros(4, 3).long(), torch.zeros(4, 3).long(), "one floating dtype, found int64"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "are empty"),
        (torch.zeros(3, 0), torch.zeros(3, 0), "are empty"),
    ],
)
def test_rows(image: torch.Tensor, text: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_loss(image, text, 14.3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"columns": (torch.ones(3, 2), torch.ones(3, 2))}, "outside of 3 columns"),
        ({"columns": (torch.ones(9, 2),) * 2, "offset": 6}, "offset 6 puts 4 local rows outside of 9 columns; expected 0 to 5"),
        ({"columns": (torch.ones(9, 2), torch.ones(9, 2)), "offset": -1}, "expected 0 to 5"),
        ({"columns": (torch.ones(9, 3), torch.ones(9, 3))}, "one width and one dtype"),
        ({"columns": (torch.ones(9, 2), torch.ones(8, 2))}, r"expected columns of one shape \[N, D\]"),
        ({"offset": 1}, "outside of 4 columns"),
        ({"weights": torch.ones(3)}, r"expected weights \[4\] or \[4\], found \(3,\)"),
        ({"weights": torch.tensor([1.0, -1, 1, 1])}, "must be 0 or more, found -1.0"),
        ({"weights": torch.tensor([1.0, float("nan"), 1, 1])}, "must be 0 or more, found nan"),
        ({"history": torch.ones(5)}, r"expected history \[4\], found \(5,\)"),
        ({"impl": "triton"}, "impl 'triton' runs on CUDA devices, the rows are on cpu; use 'reference' or 'auto'"),
        ({"impl": "fast"}, "unknown impl 'fast'; known: auto, reference, blocked, triton"),
    ],
)
def test_arguments(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_loss(torch.ones(4, 2), torch.ones(4, 2), 14.3, **given)


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(1, 1), torch.tensor(14)])
def test_scale(scale: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"number or a floating tensor of shape \(\) or \(1,\), found"):
        clip_loss(torch.ones(4, 2), torch.ones(4, 2), scale)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_what_is_no_number_stays_no_number(impl: str) -> None:
    image, text = torch.nn.functional.normalize(torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    image[3, 0] = float("nan")
    assert clip_loss(image, text, 14.3, impl=impl).loss.isnan()
