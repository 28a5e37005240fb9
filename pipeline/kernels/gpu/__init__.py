"""The contrastive tile machinery in Triton: what `pipeline.kernels.similarity` asks of an implementation, and the tail of selection.

    sums(pairs, keep=False, config=None) -> Sums
    gradients(pairs, found, given, need_x=True, need_y=True, wide=False, config=None) -> (dx, dy, ds)
    kept(x, y) -> 0: no logits are kept for backward
    cosine(image, text) -> float32 [B], and score(cosine, *, slot, history, visits, ...) -> Scored: as in `pipeline.kernels.score`

No autograd, no torch.distributed, no wait for the device, no atomics; everything can be captured in a CUDA graph. docs/kernel.md has
the mathematics. Needs the `triton` extra and rows on a CUDA device, or TRITON_INTERPRET=1 before the first import and rows on the CPU.
"""

from importlib.util import find_spec

if find_spec("triton") is None:
    raise ModuleNotFoundError(
        "pipeline.kernels.gpu needs the package triton, which is not installed; pip install 'dissect-pipeline[triton]'", name="triton"
    )

from pipeline.kernels.gpu.launch import gradients, kept, sums
from pipeline.kernels.gpu.score import cosine, score

__all__ = ["cosine", "gradients", "kept", "score", "sums"]
