"""What accelerate's own configuration may say beside the run's YAML, and what is refused, with both values."""

import os
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from pipeline.config import ConfigError
from pipeline.distributed.comm import leads
from pipeline.distributed.engine import EngineConfig
from pipeline.distributed.launch import check_accelerate, check_launch, start
from tests.runs import ROOT

# every file of configs/accelerate, and the engine.zero that it is for
FILES = {"cpu_2": None, "one_gpu": None, "zero2_node": {"stage": 2}, "zero3_multinode": {"stage": 3}}


@pytest.fixture(autouse=True)
def without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate hands this process's variables on to those that it starts."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)


def environment(file: str, *options: str) -> dict[str, str]:
    """What `accelerate launch --config_file FILE OPTIONS` sets for the processes that it starts."""
    path = str(ROOT / "configs" / "accelerate" / f"{file}.yaml")
    words = ["--config_file", path, *options, "-m", "pipeline", "train", "CONFIG"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args) if args.multi_gpu else prepare_simple_launcher_cmd_env(args)[1]


def test_every_file_is_known_here() -> None:
    assert {path.stem for path in (ROOT / "configs" / "accelerate").iterdir()} == set(FILES)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_file_agrees_with_the_engine_it_is_for(file: str, precision: str) -> None:
    check_accelerate(EngineConfig(precision=precision, zero=FILES[file]), environment(file))


@pytest.mark.parametrize(
    ("file", "options", "engine", "said"),
    [
        ("zero2_node", (), {}, ("engine.zero is null", "zero_stage 2", "engine.zero={stage: 2}")),
        ("zero2_node", (), {"zero": {"stage": 3}}, ("engine.zero.stage is 3", "zero_stage 2")),
        ("zero3_multinode", (), {"zero": {"stage": 3, "offload": "all"}}, ("engine.zero.offload is all", "offload_optimizer_device none")),
        (
            "zero3_multinode",
            ("--offload_param_device", "cpu"),
            {"zero": {"stage": 3, "offload": "none"}},
            ("engine.zero.offload is none", "offload_param_device cpu"),
        ),
        ("zero2_node", (), {"zero": {"stage": 2}, "clip_grad_norm": 0.5}, ("engine.clip_grad_norm is 0.5", "gradient_clipping 1.0")),
        ("zero2_node", (), {"zero": {"stage": 2}, "clip_grad_norm": None}, ("engine.clip_grad_norm is None", "gradient_clipping 1.0")),
        ("one_gpu", ("--mixed_precision", "bf16"), {"precision": "fp32"}, ("engine.precision is fp32", "mixed_precision bf16")),
        ("cpu_2", ("--mixed_precision", "fp16"), {"precision": "bf16"}, ("engine.precision is bf16", "mixed_precision fp16")),
        (
            "zero2_node",
            ("--gradient_accumulation_steps", "4"),
            {"zero": {"stage": 2}, "micro_batch": 8},
            ("engine.micro_batch is 8", "gradient_accumulation_steps 4"),
        ),
        ("one_gpu", ("--dynamo_backend", "inductor"), {}, ("engine.compile is False", "dynamo_backend INDUCTOR")),
    ],
)
def test_a_conflict_names_both_values(file: str, options: tuple[str, ...], engine: dict, said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_accelerate(EngineConfig(**engine), environment(file, *options))
    for words in said:
        assert words in str(caught.value)


def test_another_sharding_and_another_deepspeed_configuration_are_refused() -> None:
    sharded = environment("zero2_node")
    for variable, words in (("ACCELERATE_USE_FSDP", "FSDP true"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM true")):
        with pytest.raises(ConfigError, match=words):
            check_accelerate(EngineConfig(), {variable: "true"})
    with pytest.raises(ConfigError, match="deepspeed_config_file ds.json"):
        check_accelerate(EngineConfig(zero={"stage": 2}), sharded | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"})


def test_an_environment_without_accelerate_says_nothing() -> None:
    check_accelerate(EngineConfig(zero={"stage": 3, "offload": "all"}, micro_batch=3, compile=True), {})
    check_launch({"MASTER_ADDR": "10.0.0.1", "RANK": "0"})


def test_fp16_without_a_gpu_says_what_to_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for zero in (None, {"stage": 2}):
        with pytest.raises(ConfigError, match="fp16 needs a GPU.*use bf16 or fp32"):
            start(EngineConfig(precision="fp16", zero=zero), tmp_path, [])


def test_of_several_ranks_the_first_does_what_needs_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.__main__ import main
    from tools.cache_teacher import main as cache_teacher
    from tools.export import main as export
    from tools.irreducible_loss import main as irreducible_loss

    assert leads({}) and leads({"RANK": "0"}) and not leads({"RANK": "1"})
    missing = str(tmp_path / "no run")
    for rank, status in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        out = str(tmp_path / "out")
        assert main(["evaluate", missing]) == main(["report", missing]) == main(["curate", missing, out]) == status
        assert export([missing, out]) == cache_teacher([missing, out]) == irreducible_loss([missing, out]) == status
