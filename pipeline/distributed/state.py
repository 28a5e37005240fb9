"""Weights and optimizer state as files that know no world size and no ZeRO stage: any number of ranks reads what any other wrote.

`model.safetensors` holds the weights whole, by their names in the Task: it is what evaluation and export read. Each rank writes
`optimizer-<rank>-of-<size>.safetensors`: for each part of a parameter that it updates, AdamW's two moments as flat tensors named
`<moment>|<parameter>|<first element>`. A reader opens all of them and takes the slices that overlap its own parts, so nothing is gathered
and no rank needs more memory than its share (weights: rank 0's host holds them once while it writes). safetensors holds numbers only:
a file that somebody else made cannot run code when it is read.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.distributed import zero
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.host import Files, Host, save_file
from pipeline.distributed.zero import Part

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS = "model.safetensors"


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Reading inside: a file that is no safetensors file (torch's pickles, say, which could run code) is a CheckpointError."""
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"{folder}: a file is no safetensors file, and nothing else is loaded ({error}). Find out who wrote it, "
            f"or delete the folder to resume from the checkpoint before it"
        ) from None


def weights_file(model: nn.Module, host: Host, rank: int) -> Files:
    """Rank 0's file of all weights and buffers. Collective in stage 3, where they are gathered one after the other."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with zero.whole([value] if isinstance(value, nn.Parameter) else []):
            if rank == 0:  # a gathered tensor is about to go
                tensors[name] = host.take(f"weight|{name}", value, copy=hasattr(value, "ds_id"))
    return {WEIGHTS: partial(save_file, tensors)} if rank == 0 else {}


def load_weights(model: nn.Module, path: Path, rank: int) -> None:
    """Every rank reads what it holds. Raises CheckpointError where the file is of another model."""
    with safe_open(path, "pt") as file:
        expected, found = model.state_dict(keep_vars=True), set(file.keys())
        if expected.keys() != found:
            differing = sorted(expected.keys() ^ found)
            raise CheckpointError(f"{path}: holds another model: {differing[0]} and {len(differing) - 1} more are in one of the two only")
        for name, value in expected.items():
            stored = file.get_tensor(name)
            if isinstance(value, nn.Parameter):
                flat = stored.view(-1)
                zero.write(value, lambda here, first, flat=flat: here.copy_(flat[first : first + here.numel()]), rank)
            else:
                value.copy_(stored)


def load_master(held: list[Part], path: Path) -> None:
    """The float32 values that the optimizer updates, from the same file as the weights (stages 1 to 3; elsewhere they are the weights)."""
    with safe_open(path, "pt") as file:
        for part in held:
            part.of(part.key).copy_(file.get_tensor(part.name).view(-1)[part.start : part.start + part.count])


def optimizer_file(optimizer: torch.optim.Optimizer, held: list[Part], host: Host, rank: int, size: int, replicated: bool) -> Files:
    """This rank's moments. Where every rank holds everything (`replicated`), each writes its share of every parameter."""
    tensors, steps = {}, {}
    for part in held:
        state = optimizer.state.get(part.key)
        if not state:
            continue  # never had a gradient
        first, last = (rank * part.count // size, (rank + 1) * part.count // size) if replicated else (0, part.count)
        if first == last:
            continue
        for moment in MOMENTS:
            name = f"{moment}|{part.name}|{part.start + first}"
            tensors[name] = host.take(name, part.of(state[moment])[first:last], copy=True)
        steps[part.name] = int(state["step"])
    return {f"optimizer-{rank:05d}-of-{size:05d}.safetensors": partial(save_file, tensors, metadata={"steps": json.dumps(steps)})}


class _Stored(NamedTuple):
    file: object
    key: str
    first: int
    last: int


def load_optimizer(optimizer: torch.optim.Optimizer, held: list[Part], folder: Path) -> None:
    """Fills the optimizer's state for the parts of this rank, whoever wrote them. Raises CheckpointError where one is missing."""
    stored: dict[tuple[str, str], list[_Stored]] = {}
    steps: dict[str, int] = {}
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        file = safe_open(path, "pt")
        steps |= json.loads(file.metadata()["steps"])
        for key in file.keys():  # noqa: SIM118, it is no dict
            moment, name, first = key.split("|")
            length = file.get_slice(key).get_shape()[0]
            stored.setdefault((moment, name), []).append(_Stored(file, key, int(first), int(first) + length))
    for part in held:
        if part.name not in steps:
            continue
        state = optimizer.state[part.key]
        if not state:
            state["step"] = torch.tensor(0.0, device=part.key.device)
            state |= {moment: torch.zeros_like(part.key, memory_format=torch.preserve_format) for moment in MOMENTS}
        state["step"].fill_(float(steps[part.name]))
        for moment in MOMENTS:
            copied = sum(_copy(part.of(state[moment]), part, piece) for piece in stored.get((moment, part.name), []))
            if copied != part.count:
                raise CheckpointError(
                    f"{folder}: the optimizer files hold {copied} of {part.count} elements of {moment} of {part.name} from {part.start} on; "
                    f"one of them is missing. Restore it, or delete the folder to resume from the checkpoint before it"
                )


def _copy(to: Tensor, part: Part, piece: _Stored) -> int:
    """Copies the overlap of a stored slice and a part; gives the number of elements."""
    first, last = max(part.start, piece.first), min(part.start + part.count, piece.last)
    if first >= last:
        return 0
    to[first - part.start : last - part.start] = piece.file.get_slice(piece.key)[first - piece.first : last - piece.first]
    return last - first
