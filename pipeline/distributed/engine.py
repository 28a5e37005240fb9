"""Optimizer, precision and process wrapping, through accelerate. The trainer sees `features`, `step`, `files`, `load`."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import ConfigError, Strict
from pipeline.distributed import state, zero
from pipeline.distributed.adversaries import Adversaries
from pipeline.distributed.comm import Comm
from pipeline.distributed.host import Files, Host
from pipeline.distributed.optimizer import OptimizerConfig
from pipeline.distributed.replay import accumulate
from pipeline.distributed.zero import ZeroConfig
from pipeline.hashing import hash_ids
from pipeline.types import Batch, Selection


class EngineConfig(Strict):
    """How the model runs."""

    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="bf16 and fp16 are autocast; weights and optimizer stay float32; fp16 scales the loss and needs a GPU"
    )
    zero: ZeroConfig | None = Field(None, description="DeepSpeed's sharding; null: one process, or torch's DDP where there are more")
    micro_batch: int | None = Field(
        None, ge=1, description="rows of a rank that are embedded at once while training; the loss still sees all rows. null: all"
    )
    compile: bool = Field(False, description="torch.compile of each block that repeats (the layers of a transformer)")
    clip_grad_norm: float | None = Field(1.0, gt=0)
    threads: int | None = Field(
        None, ge=1, description="CPU threads of each process; None: torch's choice. Part of bitwise reproducibility"
    )
    deterministic: bool = Field(True, description="torch.use_deterministic_algorithms; costs little here")

    @model_validator(mode="after")
    def _possible(self) -> "EngineConfig":
        if self.precision == "fp16" and self.zero and self.zero.stage == 0:
            raise ValueError("precision: fp16 does not go with zero.stage 0; use zero: null, which trains the same, or stage 1")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What autocast computes in."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


class Trained(NamedTuple):
    """What a step leaves for the record; everything is still on the device."""

    loss: Tensor  # this rank's part, x world size
    terms: dict[str, Tensor]
    grad_norm: Tensor
    cosine: Tensor | None = None  # float32 [k], see StepOutput
    per_sample: Tensor | None = None  # float32 [k], see StepOutput


class Engine:
    """Holds the wrapped task and its optimizer; one process, DDP and every ZeRO stage behind the same four methods."""

    def __init__(
        self, config: EngineConfig, optimizer: OptimizerConfig, accelerator: Accelerator, comm: Comm, task: nn.Module, steps: int, seed: int
    ) -> None:
        self.config, self.optimizer_config, self.accelerator, self.comm = config, optimizer, accelerator, comm
        self.steps, self.seed = steps, seed
        self.forwards = 0  # without training; in a long evaluation the watchdog sees from it that this rank gets on
        self.device = accelerator.device
        self.stage = config.zero.stage if config.zero else 0
        self.raw = task.to(self.device)  # without DDP's hooks: the scoring pass and checkpoints go here
        self.parameters = [p for p in task.parameters() if p.requires_grad]
        self._check_accumulation(task)
        if config.compile:
            compile_blocks(task)
        self.adversaries = Adversaries(task.objectives, self.device, comm)
        # queues and banks are equal on all ranks as they are built; DDP would send them around before every forward
        banks = [name for name, _ in task.named_buffers() if name.startswith("objectives.")]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task, banks)
        self.optimizer = optimizer.build(task)  # torch's own; under ZeRO it holds this rank's share
        self.task, self._stepper = accelerator.prepare(task, self.optimizer)
        self._names = {id(p): name for name, p in task.named_parameters()}
        self.parts = zero.parts(task, self.task, self.stage, comm.rank)
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.untracked: Callable[[], AbstractContextManager] = zero.scoring_trace(self.task) if self.stage == 3 else nullcontext

    def _check_accumulation(self, task: nn.Module) -> None:
        """ZeRO (stage 3, or offloaded) loses the gradients of a parameter that has none in some piece of a step."""
        learned = [name for name, p in task.objectives.named_parameters() if p.requires_grad]
        zero = self.config.zero
        if self.config.micro_batch and learned and zero and (zero.stage == 3 or zero.offload != "none"):
            raise ConfigError(
                f"engine.micro_batch does not go with zero.stage 3 or zero.offload while an objective has parameters of its own "
                f"(objectives.{learned[0]}); use engine.micro_batch=null, or zero.stage 1 or 2 without offload"
            )

    def autocast(self, dtype: torch.dtype | None = None) -> AbstractContextManager:
        """The precision of a forward; None: the run's."""
        dtype = dtype or self.config.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def features(self, batch: Batch, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The scoring pass: eval mode, no graph, autocast to `dtype` (None: the run's precision). Leaves
        training state (BatchNorm, generators) as it is. Collective in stage 3."""
        self.forwards += 1
        self.raw.eval()
        try:
            with self.untracked(), self.autocast(dtype):
                return self.raw(batch, "features")
        finally:
            self.raw.train()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Around work that reads weights, on a GPU beside the training that is queued after it; what it finds is there once a step has updated
        the weights. Its batch has to live as long; on a CPU it is done at once.

        It sees what was queued before, and `_update` waits for it. Nothing else is shared: a stream reuses the memory that was taken on it,
        and the casts that autocast keeps are gone at its end, before training's begins.
        """
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            yield

    def step(self, batch: Batch, selection: Selection, step: int) -> Trained:
        """Forward, backward, clip, update on the selected rows. Waits for nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)

        # dropout and its like draw from (seed, step, rank): no generator state to save, and the scoring pass cannot disturb it
        def seed(piece: int) -> None:
            torch.manual_seed(hash_ids(self.seed, step, self.comm.rank + piece * self.comm.size))

        rows = self.config.micro_batch
        if rows is not None and len(batch) > rows:
            out = accumulate(self, batch, selection, rows, seed)
        else:
            seed(0)
            with self.autocast():
                out = self.task(batch, "train", selection)
            self.backward(out.loss, last=True)
        norm = self._update()
        self.raw.after_step()
        self.adversaries.train(out.adversary)
        return Trained(out.loss.detach(), out.terms, norm, out.cosine, out.per_sample)

    def synchronised(self, last: bool) -> AbstractContextManager:
        """Around a forward and its backward: ranks exchange gradients on the last one of a step only (DDP; ZeRO is told in `backward`)."""
        return nullcontext() if last or self.config.zero else self.accelerator.no_sync(self.task)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of a step's (next) piece."""
        if self.config.zero is None:
            self.accelerator.backward(loss)
            return
        self.task.set_gradient_accumulation_boundary(last)
        self.task.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def _update(self) -> Tensor:
        """Clips, steps, holds parameters to their bounds; gives the gradient's norm before clipping. DeepSpeed too writes weights only here."""
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)  # what runs `beside` reads the weights as they were
        if self.config.zero is None:
            self.accelerator.unscale_gradients()
        if self.stage == 0:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad_norm or math.inf)
        if self.config.zero is None:
            self._stepper.step()
            self._stepper.zero_grad(set_to_none=True)
        else:
            self.task.step()  # sharded: clips too; clears gradients
        if self.stage:
            norm = torch.as_tensor(self.task.get_global_grad_norm(), device=self.device)
        for parameter, low, high in self.raw.bounds():
            zero.write(parameter, lambda values, _, low=low, high=high: values.clamp_(low, high), self.comm.rank)
            for part in self._masters(parameter):
                part.of(part.key).clamp_(low, high)
        return norm

    def _masters(self, parameter: nn.Parameter) -> list[zero.Part]:
        """This rank's parts of a parameter whose values live beside the model's (ZeRO keeps float32 copies of what it updates)."""
        return [part for part in self.parts if self.stage and part.name == self._names[id(parameter)]]

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.optimizer_config.rate_at(step, self.steps)

    def weight_norm(self) -> Tensor:
        """The norm of all trained weights; not finite when one of them is not. Collective in stage 3."""
        if self.stage < 3:
            return torch.nn.utils.get_total_norm([p.detach() for p in self.parameters])
        squares = [part.of(part.key).float().square().sum().to(self.device) for part in self.parts]
        return self.comm.sum(torch.stack([torch.zeros((), device=self.device), *squares]).sum()).sqrt()

    def save_weights(self, path: Path) -> None:
        """All weights, whole, as safetensors; rank 0 writes, at once. Collective in stage 3."""
        for write in state.weights_file(self.raw, Host(keep=False), self.comm.rank).values():
            write(path)

    @torch.no_grad()
    def files(self, host: Host) -> Files:
        """This rank's share of weights and optimizer state, in host memory. Collective."""
        moments = state.optimizer_file(self.optimizer, self.parts, host, self.comm.rank, self.comm.size, replicated=self.stage == 0)
        return state.weights_file(self.raw, host, self.comm.rank) | moments | self.adversaries.file(host)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """What any number of ranks wrote from `files` in any stage; the caller has checked the files against COMMIT. Raises CheckpointError."""
        with state.readable(folder):
            state.load_weights(self.raw, folder / state.WEIGHTS, self.comm.rank)
            if self.stage:
                state.load_master(self.parts, folder / state.WEIGHTS)
            state.load_optimizer(self.optimizer, self.parts, folder)
            self.adversaries.load(folder)


def compile_blocks(model: nn.Module) -> None:
    """Compiles each member of every list of like modules (a transformer's layers): one compilation serves all, and names stay."""
    for module in model.modules():
        children = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len(children) > 1 and len({type(child) for child in children}) == 1:
            for child in children:
                child.compile()
