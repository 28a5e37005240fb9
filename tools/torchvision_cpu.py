"""Lets a CUDA build of torchvision be imported beside a CPU build of torch; `make env` installs it next to them.

torchvision registers fake implementations for two operators of its C++ library. Where that library cannot be loaded (it needs
libcudart) the operators do not exist and the import dies with "operator torchvision::nms does not exist", and with it timm, open_clip
and every `accelerate` command. Declaring the two schemas before the import is enough. What stays absent is what the library brings:
nms and the image decoders, which this project does not use. With a torchvision whose library loads, nothing is declared.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path

_keep = []  # torch.library.Library objects take their definitions back when they are collected


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Acts once, when torchvision is first looked for; costs nothing before that."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision" and not _keep:
            spec = importlib.machinery.PathFinder.find_spec(name)
            if spec is not None and spec.origin is not None:
                _declare(Path(spec.origin).parent)
        return None


def _declare(folder: Path) -> None:
    import torch

    try:
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            fragment.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep.append(fragment)


def install() -> None:
    """Writes the two lines that load this file at every start of this interpreter (a bare start stays as fast as it was)."""
    import shutil
    import sysconfig

    packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copy(__file__, packages / "_torchvision_cpu.py")
    (packages / "_torchvision_cpu.pth").write_text("import _torchvision_cpu\n", encoding="utf-8")


if __name__ == "__main__":
    install()
else:
    sys.meta_path.insert(0, _BeforeTorchvision())
