"""DeepSpeed's ZeRO: its configuration, what of each parameter this rank updates, and a scoring pass that its hooks do not track.

The only file that knows DeepSpeed's insides. Where DeepSpeed has no public way, the attribute is named with the reason; the setup file's
range of versions keeps them what they are, and tests/ranks runs every stage.
"""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config import Strict


class ZeroConfig(Strict):
    """What is sharded over the ranks: 0 nothing, 1 the optimizer's state, 2 and gradients, 3 and weights."""

    stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="what lives in the host's memory: nothing, the optimizer's state (stages 1 to 3), and weights too (stage 3)"
    )
    persist_below: int = Field(100_000, ge=0, description="stage 3: parameters with fewer elements stay whole on every rank")

    @model_validator(mode="after")
    def _possible(self) -> "ZeroConfig":
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("offload: optimizer needs stage 1, 2 or 3; stage 0 shards nothing")
        if self.offload == "all" and self.stage != 3:
            raise ValueError(f"offload: all needs stage 3; in stage {self.stage} the weights stay on the device")
        return self


def deepspeed_config(zero: ZeroConfig, dtype: torch.dtype, clip: float | None, accumulate: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration. `accumulate`: a step has several backwards."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    sharding: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        # DeepSpeed's 5e8 elements would hold 2 GB per rank for any model
        "reduce_bucket_size": 25_000_000,
        "allgather_bucket_size": 25_000_000,
        "stage3_param_persistence_threshold": zero.persist_below,
    }
    if zero.offload != "none":
        sharding["offload_optimizer"] = host
    if zero.offload == "all":
        sharding["offload_param"] = host
    return {
        "zero_optimization": sharding,
        # never read: the loader is ours, and how many rows are trained changes when selection begins
        "train_micro_batch_size_per_gpu": 1,
        # the engine says itself which backward is the last one; above 1 an offloaded optimizer adds gradients up instead of overwriting them
        "gradient_accumulation_steps": 2 if accumulate and zero.offload != "none" else 1,
        # with 0 it would not measure the norm; in stage 0 it never does, there the engine clips
        "gradient_clipping": (clip or 1e30) if zero.stage else 0.0,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host as well; DeepSpeed's would be compiled first
        "zero_allow_untested_optimizer": True,
        # never DeepSpeed's own bf16 mode: it holds the logit scale in bf16, and in stage 0 it trains wrong. No module is "safe" for
        # lower precision: gradients travel in float32, as under DDP
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": {torch.float16: "float16"}.get(dtype, "bfloat16"),
            "lower_precision_safe_modules": [],
        },
    }


def prepare_process() -> None:
    """What DeepSpeed needs before accelerate starts it: no build of its shared-memory collectives, the variables of a group of one."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of g++ at the first start, for a collective that gloo has
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)  # DeepSpeed's calls, a line for each of them
    # accelerate refuses a plugin beside a config file that names any of its fields; launch.check_accelerate has compared the values
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


class Part(NamedTuple):
    """The elements of one parameter that this rank updates: [start, start + count) of the flattened parameter."""

    name: str
    start: int
    count: int
    key: Tensor  # what torch's optimizer holds: the parameter itself, or a flat tensor with parts of many
    offset: int  # where the part begins in the flattened key

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that is laid out like the key: its values, or one of its optimizer states. A view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]


def parts(model: nn.Module, engine: Any, stage: int, rank: int) -> list[Part]:
    """What this rank updates. `engine` is DeepSpeed's; in stage 0 (and without DeepSpeed) every rank updates everything."""
    if stage == 0:
        return [Part(name, 0, p.numel(), p, 0) for name, p in model.named_parameters() if p.requires_grad]
    zero = engine.optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    if stage < 3:
        for group, key in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
            for p in group:
                if (link := p._hp_mapping) is not None:  # None: other ranks update it
                    here, there = link.lp_fragment_address, link.hp_fragment_address
                    found.append(Part(names[id(p)], here.start, here.numel, key, there.start))
        return found
    for name, p in model.named_parameters():
        if p.requires_grad:
            group, offset, length = zero.grad_position[zero.get_param_id(p)]
            count = min(length, p.ds_numel - rank * length)  # the last ranks hold padding
            if count > 0:
                found.append(Part(name, rank * length, count, zero.fp32_partitioned_groups_flat[group], offset))
    return found


def whole(parameters: list[nn.Parameter]) -> AbstractContextManager:
    """Inside, these parameters have all their elements on every rank (stage 3; otherwise they always have). Collective."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)


@torch.no_grad()
def write(p: nn.Parameter, change: Callable[[Tensor, int], None], rank: int) -> None:
    """Calls `change(values, first element)` on what this rank holds of a parameter's values: all of them, or its shard in stage 3."""
    if hasattr(p, "ds_tensor"):
        length = p.ds_tensor.ds_numel
        change(p.ds_tensor.data.view(-1)[: max(0, p.ds_numel - rank * length)], rank * length)
        if p.data.numel() != p.ds_numel:
            return  # only the shard is here
    change(p.data.view(-1), 0)


def scoring_trace(engine: Any) -> Callable[[], AbstractContextManager]:
    """A context for forwards that are no training step (stage 3).

    DeepSpeed records in which order modules ask for their weights, and fetches ahead along that trace. A scoring forward between two
    training steps would break the trace at every step; here it records one of its own.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import InflightParamRegistry, PartitionedParameterCoordinator

    offload = engine.optimizer.parameter_offload
    training = offload.param_coordinator
    scoring = PartitionedParameterCoordinator(
        prefetch_bucket_sz=offload._prefetch_bucket_sz,
        max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
        max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
        allgather_stream=offload._DeepSpeedZeRoOffload__allgather_stream,
        inflight_param_registry=InflightParamRegistry(),
        timers=offload.timers,
    )

    @contextmanager
    def context() -> Iterator[None]:
        offload.param_coordinator = scoring
        try:
            yield
        finally:
            offload.param_coordinator = training

    return context
