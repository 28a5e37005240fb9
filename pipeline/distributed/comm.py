"""The one object that knows of other processes; everything else takes it as an argument."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

COUNTS_BYTES = 4096


def leads(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one: what needs one process is its work."""
    return environ.get("RANK", "0") == "0"


class Comm(Protocol):
    """What the rest of the code may ask of the other ranks. Every method is collective."""

    rank: int
    size: int
    local_size: int  # ranks on this node
    local_rank: int  # among them

    def gather(self, x: Tensor) -> Tensor:
        """[n, ...] of each rank -> [size * n, ...], in rank order; its backward sums the gradients that all ranks have for `x`."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, without gradient; a new tensor."""

    def scatter_sum(self, x: Tensor) -> Tensor:
        """[size * n, ...] of each rank -> [n, ...], this rank's part of the sum over ranks, without gradient."""

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes. Waits for the device."""

    def barrier(self) -> None:
        """Returns when every rank has come here."""

    def broadcast(self, value: object) -> object:
        """Rank 0's picklable value, on every rank; for a few small facts at start and at checkpoints."""


class LocalComm:
    """Rank 0 of 1: what one process and unit tests use."""

    rank, size, local_size, local_rank = 0, 1, 1, 0

    def gather(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def scatter_sum(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        return None

    def broadcast(self, value: object) -> object:
        return value


class GroupComm:
    """torch.distributed's default group; it must be initialised."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank % self.local_size))

    def gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self)

    def sum(self, x: Tensor) -> Tensor:
        out = x.detach().clone()
        dist.all_reduce(out)
        return out

    def scatter_sum(self, x: Tensor) -> Tensor:
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # torch 2.13 deprecates the name of 2.11
        scatter(out, x.detach().contiguous())
        return out

    def any(self, flag: bool) -> bool:
        vote = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote.item())

    def barrier(self) -> None:
        dist.barrier()

    def broadcast(self, value: object) -> object:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def add_up(counts: Counter[str], comm: Comm, device: torch.device) -> Counter[str]:
    """The counts of all ranks together, whatever their keys. Collective; 4 KB a rank, which is hundreds of keys, and the rarest beyond
    that under "other": an error of one rank alone would leave the others waiting."""
    kept, rest = counts.most_common(), Counter()
    while len(text := json.dumps(Counter(dict(kept)) + rest).encode()) > COUNTS_BYTES:
        rest["other"] += kept.pop()[1]
    mine = torch.frombuffer(bytearray(text.ljust(COUNTS_BYTES)), dtype=torch.uint8).to(device)
    return sum((Counter(json.loads(bytes(row))) for row in comm.gather(mine[None]).cpu().numpy()), Counter())


class _Gather(torch.autograd.Function):
    """All-gather forward, reduce-scatter (sum) backward: each rank's rows receive the gradients of every rank's loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: "GroupComm") -> Tensor:
        ctx.comm = comm
        out = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 deprecates the name of 2.11
        gather(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.comm.scatter_sum(grad), None


def connect(device: torch.device) -> Comm:
    """The Comm of this process: the default group where one was initialised, else this process alone."""
    return GroupComm(device) if dist.is_available() and dist.is_initialized() else LocalComm()
