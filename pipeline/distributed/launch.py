"""Starts accelerate, alone or with DeepSpeed, and checks that it started what the run's YAML asks for; what is it that runs, and where."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from pipeline.config import ConfigError
from pipeline.distributed import zero
from pipeline.distributed.comm import Comm, connect
from pipeline.distributed.engine import EngineConfig

ACCELERATE_NAMES = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def check_launch(environ: Mapping[str, str] = os.environ) -> None:
    """A launch that set half of the usual variables trains as one process in silence. Raises ConfigError for it."""
    if "MASTER_ADDR" in environ and "RANK" not in environ and "SLURM_JOB_ID" not in environ:
        raise ConfigError(
            "the launcher set MASTER_ADDR but no RANK: this would train in one process only. `accelerate launch --cpu --num_processes N` does that; "
            "start CPU ranks with `accelerate launch --multi_gpu --num_processes N -m pipeline ...` or `torchrun --nproc_per_node N -m pipeline ...`"
        )


def check_accelerate(config: EngineConfig, environ: Mapping[str, str] = os.environ) -> None:
    """The run's YAML is the record: what an accelerate config file or the environment says differently is a ConfigError with both values."""
    yours = config.zero
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    deepspeed = environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if deepspeed and yours is None:
        raise ConfigError(
            f"engine.zero is null, but accelerate's own configuration starts DeepSpeed with zero_stage {stage}; "
            f"set engine.zero={{stage: {stage}}} or launch without DeepSpeed"
        )
    offload = yours.offload if yours else "none"
    claims = [
        (
            "ACCELERATE_MIXED_PRECISION",
            "mixed_precision",
            ("no", ACCELERATE_NAMES[config.precision]),
            f"engine.precision is {config.precision}",
        ),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", ("1",), f"engine.micro_batch is {config.micro_batch}"),
        ("ACCELERATE_DYNAMO_BACKEND", "dynamo_backend", ("no", "NO"), f"engine.compile is {config.compile}"),
        ("ACCELERATE_USE_FSDP", "FSDP", ("false",), "the engine shards with engine.zero alone"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", ("false",), "the engine shards with engine.zero alone"),
    ]
    if yours is not None and deepspeed:
        hosts = {"none": ("none", "none"), "optimizer": ("cpu", "none"), "all": ("cpu", "cpu")}[offload]
        claims += [
            ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero_stage", (str(yours.stage),), f"engine.zero.stage is {yours.stage}"),
            ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device", hosts[:1], f"engine.zero.offload is {offload}"),
            ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "offload_param_device", hosts[1:], f"engine.zero.offload is {offload}"),
            ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "deepspeed_config_file", ("none",), "DeepSpeed's configuration is made from engine.zero"),
        ]
    for variable, name, allowed, mine in claims:
        if (found := environ.get(variable, allowed[0])) not in allowed:
            raise ConfigError(
                f"{mine}, but accelerate's own configuration says {name} {found} ({variable}); the run's YAML is the record, make them agree"
            )
    clip = environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto") if deepspeed else "auto"
    if clip not in ("auto", "none") and float(clip) != (config.clip_grad_norm or 0.0):
        raise ConfigError(
            f"engine.clip_grad_norm is {config.clip_grad_norm}, but accelerate's own configuration says gradient_clipping {clip}; "
            f"the run's YAML is the record, make them agree"
        )


def start(config: EngineConfig, folder: Path, trackers: list[str]) -> tuple[Accelerator, Comm]:
    """Starts accelerate and checks that it started what the environment and the YAML asked for. Raises ConfigError."""
    check_launch()
    check_accelerate(config)
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("engine.precision: fp16 needs a GPU, and this machine has none that torch sees; use bf16 or fp32 on a CPU")
    if config.threads:
        torch.set_num_threads(config.threads)
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers"))
    accelerator = _accelerator(config, log_with=trackers or None, project_config=project)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ConfigError(
            f"WORLD_SIZE is {expected}, but accelerate started {accelerator.num_processes} process(es) as {accelerator.distributed_type}"
        )
    allowed = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in ((DistributedType.DEEPSPEED,) if config.zero else allowed):
        raise ConfigError(
            f"accelerate started {accelerator.distributed_type}, but engine.zero is {config.zero}: expected "
            f"{'DEEPSPEED' if config.zero else 'one process, or data-parallel CPU or GPU processes'}"
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a small model 4 % of its step
    return accelerator, connect(accelerator.device)


def _accelerator(config: EngineConfig, **common: object) -> Accelerator:
    cuda = torch.cuda.is_available()
    if config.zero is None:
        # fp16 needs accelerate's loss scaling; autocast is the engine's own in every precision
        return Accelerator(cpu=not cuda, mixed_precision="fp16" if config.precision == "fp16" else "no", **common)
    from transformers.integrations import unset_hf_deepspeed_config

    zero.prepare_process()
    plugin = DeepSpeedPlugin(
        hf_ds_config=zero.deepspeed_config(config.zero, config.dtype, config.clip_grad_norm, config.micro_batch is not None)
    )
    # on the CPU: with cpu=True accelerate ignores the plugin and runs DDP, without a named backend it starts one process, both in silence
    group = [] if cuda else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=group, mixed_precision="no", **common)
    # accelerate has told transformers of stage 3, which would then build its models in pieces, with other initial weights than elsewhere
    unset_hf_deepspeed_config()
    return accelerator


def shutdown() -> None:
    """Ends the process group, if there is one; a process that exits without this may abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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


def commit(folder: Path) -> str | None:
    """The commit of the checkout this code runs from; in a copy of it, as `slurm.launch` makes one, what launch.json in the run folder says."""
    root = Path(__file__).parent.parent.parent
    if (root / ".git").exists():
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        return found.stdout.strip() or None
    launched = folder / "launch.json"
    return json.loads(launched.read_text(encoding="utf-8")).get("commit") if launched.is_file() else None
