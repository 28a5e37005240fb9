"""A rank's share of a checkpoint in host memory, and the files it becomes."""

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

Files = dict[str, Callable[[Path], None]]  # file name -> writes that file; called once, from another thread than the one that trains


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that may be read by whom the umask lets; safetensors gives its files to their owner alone. Raises OSError,
    SafetensorError."""
    path.touch()  # os.umask could only be asked by changing it, for all threads
    mode = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata)
    path.chmod(mode)


class Host:
    """Copies that outlive the next training step. `keep`: the memory is held from save to save, for the first touch of fresh pages costs
    several times what the copy does. Without it nothing is copied that can be written from where it is: for a save that training waits for.
    """

    def __init__(self, keep: bool) -> None:
        self.keep, self._held = keep, dict[str, Tensor]()

    def take(self, name: str, tensor: Tensor, copy: bool = False) -> Tensor:
        """`tensor` on the host, contiguous; complete after `arrived`, the same until `name` is taken again.

        copy: always one of its own; for a tensor that is about to go, or shares memory with others, which safetensors refuses.
        """
        tensor = tensor.detach()
        if not self.keep:
            return tensor.to("cpu", copy=copy).contiguous()
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self._held[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return held.copy_(tensor, non_blocking=not copy)

    def arrived(self) -> None:
        """Waits for the copies that a device still makes."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
