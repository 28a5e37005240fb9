"""Optimizer, precision and process wrapping, through accelerate. The trainer sees `features`, `step`, `save`, `load`."""

import math
import os
import pickle
import platform
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import ConfigError, Strict
from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.comm import Comm, connect
from pipeline.hashing import hash_ids
from pipeline.types import Batch, Selection


class OptimizerConfig(Strict):
    """AdamW with CLIP's recipe: no decay on gains, biases and the logit scale; linear warm-up, then cosine."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = Field((0.9, 0.98), strict=False)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup: float = Field(0.1, ge=0, description="steps of linear warm-up; below 1 a share of all steps")
    final_lr: float = Field(0.0, ge=0, description="where the cosine ends, as a share of lr")

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of `step`, a pure function: nothing to save, nothing to restore."""
        warmup = self.warmup * steps if self.warmup < 1 else self.warmup
        if step < warmup:
            return self.lr * (step + 1) / warmup if warmup >= 1 else self.lr
        progress = (step - warmup) / max(1, steps - warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class EngineConfig(Strict):
    """How the model runs."""

    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16 is autocast; weights and optimizer stay float32")
    clip_grad_norm: float | None = Field(1.0, gt=0)
    threads: int | None = Field(
        None, ge=1, description="CPU threads of each process; None: torch's choice. Part of bitwise reproducibility"
    )
    deterministic: bool = Field(True, description="torch.use_deterministic_algorithms; costs little here")


class Trained(NamedTuple):
    """What a step leaves for the record; everything is still on the device."""

    loss: Tensor  # this rank's part, x world size
    terms: dict[str, Tensor]
    grad_norm: Tensor


def check_launch(environ: dict[str, str] | os._Environ = os.environ) -> None:
    """A launch that set half of the usual variables trains as one process in silence. Raises ConfigError for it."""
    if "MASTER_ADDR" in environ and "RANK" not in environ and "SLURM_JOB_ID" not in environ:
        raise ConfigError(
            "the launcher set MASTER_ADDR but no RANK: this would train in one process only. `accelerate launch --cpu --num_processes N` does that; "
            "start CPU ranks with `accelerate launch --multi_gpu --num_processes N -m pipeline ...` or `torchrun --nproc_per_node N -m pipeline ...`"
        )


def start(config: EngineConfig, folder: Path, trackers: list[str]) -> tuple[Accelerator, Comm]:
    """Starts accelerate and checks that it started what the environment asked for. Raises ConfigError."""
    check_launch()
    if config.threads:
        torch.set_num_threads(config.threads)
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    mine = {"fp32": "no", "bf16": "bf16"}[config.precision]
    if asked not in ("no", mine):
        raise ConfigError(
            f"engine.precision is {config.precision}, but accelerate's own configuration says mixed_precision {asked}; the run's YAML is the record, make them agree"
        )
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers"))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mine, log_with=trackers or None, project_config=project)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ConfigError(
            f"WORLD_SIZE is {expected}, but accelerate started {accelerator.num_processes} process(es) as {accelerator.distributed_type}"
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"accelerate started {accelerator.distributed_type}; this version runs one process, or data-parallel CPU and GPU processes"
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a small model 4 % of its step
    return accelerator, connect(accelerator.device)


def shutdown() -> None:
    """Ends the process group, if there is one; a process that exits without this may abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Engine:
    """Holds the wrapped task and its optimizer."""

    def __init__(
        self, config: EngineConfig, optimizer: OptimizerConfig, accelerator: Accelerator, comm: Comm, task: nn.Module, steps: int, seed: int
    ) -> None:
        self.config, self.optimizer_config, self.accelerator, self.comm = config, optimizer, accelerator, comm
        self.steps, self.seed = steps, seed
        self.device = accelerator.device
        self.raw = task.to(self.device)  # without DDP's hooks: the scoring pass and checkpoints go here
        self.parameters = [p for p in task.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(
            _groups(task, optimizer.weight_decay), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )
        self.task, self.optimizer = accelerator.prepare(task, adam)

    @torch.inference_mode()
    def features(self, batch: Batch) -> dict[str, Tensor]:
        """The scoring pass: eval mode, inference mode, autocast. Leaves training state (BatchNorm, generators) as it is."""
        self.raw.eval()
        try:
            with self.accelerator.autocast():
                return self.raw(batch, "features")
        finally:
            self.raw.train()

    def step(self, batch: Batch, selection: Selection, step: int) -> Trained:
        """Forward, backward, clip, update on the selected rows. Waits for nothing."""
        # dropout and its like draw from (seed, step, rank): no generator state to save, and the scoring pass cannot disturb it
        torch.manual_seed(hash_ids(self.seed, step, self.comm.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        with self.accelerator.autocast():
            out = self.task(batch, "train", selection)
        self.accelerator.backward(out.loss)
        limit = self.config.clip_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.raw.after_step()
        return Trained(out.loss.detach(), out.terms, norm)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.optimizer_config.rate_at(step, self.steps)

    def weight_norm(self) -> Tensor:
        """The norm of all trained weights; not finite when one of them is not."""
        return torch.nn.utils.get_total_norm([p.detach() for p in self.parameters])

    def save(self, folder: Path) -> None:
        """Model (safetensors) and optimizer state of all ranks into `folder`. Collective."""
        self.accelerator.save_state(str(folder), safe_serialization=True)

    def load(self, folder: Path) -> None:
        """What `save` wrote; the caller has checked the files against COMMIT. Collective. Raises CheckpointError."""
        try:
            self.accelerator.load_state(str(folder))
        except pickle.UnpicklingError:  # torch's own words advise to load it all the same
            raise CheckpointError(
                f"{folder}: optimizer.bin holds something other than tensors, and loading that could run code; it was not loaded. "
                f"Find out who wrote it, or delete the folder to resume from the checkpoint before it"
            ) from None


def _groups(task: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters with and without decay; gains, biases and the logit scale have fewer than two dimensions."""
    named = [p for p in task.parameters() if p.requires_grad]
    return [
        {"params": [p for p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def describe_device(device: torch.device) -> str:
    """The device in words, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux; the machine's architecture will do
    return f"{name}, {torch.get_num_threads()} threads"
