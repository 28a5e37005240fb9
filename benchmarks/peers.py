"""Every contrastive loss that the kernel is measured against, behind one call. A peer that is not installed is absent; none is a dependency.

`pip install --no-deps cut-cross-entropy memeff siglip-kernel inf-cl liger-kernel` brings those that have wheels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import installed
from pipeline.kernels import clip_loss, siglip_loss

PACKAGES = ("open_clip_torch", "cut-cross-entropy", "memeff", "siglip-kernel", "inf-cl", "liger-kernel", "triton")


class Loss(NamedTuple):
    """One way to the loss of a batch."""

    dtype: torch.dtype  # of the rows
    call: Callable[[Tensor, Tensor, Tensor], Tensor]  # (image, text, scale) -> loss
    units: float  # products of B x N x D that forward and backward do, by design
    exact: bool = True  # the softmax loss of CLIP; False: another loss, a cost yardstick


def ours(device: str) -> dict[str, Loss]:
    """This project's implementations for a device, "cpu" or "cuda"."""
    impl = {"cpu": "blocked", "cuda": "triton"}[device]
    return {
        f"{impl} bf16": Loss(torch.bfloat16, lambda i, t, s: clip_loss(i, t, s, impl=impl).loss, 4),
        f"{impl} fp32": Loss(torch.float32, lambda i, t, s: clip_loss(i, t, s, impl=impl).loss, 4),
        "reference fp32": Loss(torch.float32, lambda i, t, s: clip_loss(i, t, s, impl="reference").loss, 3),
        f"{impl} sigmoid bf16": Loss(torch.bfloat16, lambda i, t, s: siglip_loss(i, t, s, -10.0, impl=impl).loss, 4, exact=False),
    }


def peers(device: str, scale: float) -> dict[str, Loss]:
    """What others offer on a device, as far as it is installed; `scale` is for the peer that wants its temperature as a Python number."""
    found: dict[str, Loss] = {}
    if installed("open_clip"):
        found |= _open_clip(device)
    if installed("cut_cross_entropy"):
        found |= _cut_cross_entropy(device)
    if device == "cuda":
        found |= _memeff(scale) if installed("memeff") else {}
        for package, make in (("siglip_kernel", _siglip_kernel), ("inf_cl", _inf_cl), ("liger_kernel", _liger)):
            found |= make() if installed(package) else {}
    return found


def _open_clip(device: str) -> dict[str, Loss]:
    from open_clip.loss import ClipLoss, SigLipLoss

    def amp(loss: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return loss(image, text, scale)

        return call

    def sigmoid(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return SigLipLoss()(image, text, scale, torch.tensor(-10.0, device=image.device))

    return {
        "open_clip amp": Loss(torch.bfloat16, amp(ClipLoss()), 6),
        "open_clip fp32": Loss(torch.float32, ClipLoss(), 6),
        "open_clip sigmoid amp": Loss(torch.bfloat16, amp(sigmoid), 3, exact=False),
    }


def _cut_cross_entropy(device: str) -> dict[str, Loss]:
    from cut_cross_entropy import linear_cross_entropy

    impl = "torch_compile" if device == "cpu" else "cce_exact"

    def two_calls(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels, s = torch.arange(image.shape[0], device=image.device), scale.to(image.dtype)
        return (linear_cross_entropy(image * s, text, labels, impl=impl) + linear_cross_entropy(text * s, image, labels, impl=impl)) / 2

    return {"cut-cross-entropy bf16": Loss(torch.bfloat16, two_calls, 8)}


def _memeff(scale: float) -> dict[str, Loss]:
    from memeff import MemoryEfficientCLIPLoss

    # stable=True would scale the gradients, and the scale itself gets none
    loss = MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)
    return {"memeff bf16": Loss(torch.bfloat16, lambda i, t, s: loss(i, t), 5)}


def _siglip_kernel() -> dict[str, Loss]:
    from siglip_kernel import fused_siglip_loss

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return fused_siglip_loss(image, text, scale.log(), torch.full((), -10.0, device=image.device))

    return {"siglip-kernel bf16": Loss(torch.bfloat16, call, 3, exact=False)}


def _inf_cl() -> dict[str, Loss]:
    from inf_cl import cal_inf_loss

    def call(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return (cal_inf_loss(image, text, scale=scale) + cal_inf_loss(text, image, scale=scale)) / 2

    return {"inf-cl": Loss(torch.bfloat16, call, 10)}


def _liger() -> dict[str, Loss]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def two_calls(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels, s = torch.arange(image.shape[0], device=image.device), scale.to(image.dtype)
        return (loss(text, image * s, labels) + loss(image, text * s, labels)) / 2

    return {"liger-kernel bf16": Loss(torch.bfloat16, two_calls, 6)}


def step(loss: Loss, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward on rows in the loss's dtype: (loss, image gradient, text gradient)."""
    image, text = (rows.to(loss.dtype, copy=True).requires_grad_() for rows in (image, text))
    value = loss.call(image, text, scale.detach().requires_grad_())
    value.backward()
    return value.detach(), image.grad, text.grad
