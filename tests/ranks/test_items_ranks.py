"""The item tower on two ranks, sharded with everything on the host, and killed: the losses of one process, and no step lost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from pipeline.config import to_yaml
from pipeline.towers._item import language_model
from pipeline.towers._prompt import TokensConfig, write_tokenizer
from tests.items import LLM, clip, config, pairs  # noqa: F401, fixtures
from tests.runs import Launcher, assert_same_end, free_port, kill_at, last_checkpoint, losses


def command(shards: Path, out: Path, clip: Path, **given: object) -> list[str]:  # noqa: F811
    """The command line of an item run."""
    path = out.with_suffix(".yaml")
    path.write_text(to_yaml(config(shards, out, clip, **given)), encoding="utf-8")
    return ["train", str(path)]


@pytest.mark.slow
def test_two_ranks_and_all_on_the_host_train_like_one_process(
    launcher: Launcher,
    pairs: Path,  # noqa: F811
    clip: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    launcher.run(command(pairs, tmp_path / "alone", clip))
    expected = losses(tmp_path / "alone")
    assert len(expected) == 6 and expected[-1][1] < expected[0][1]
    everything = {"precision": "fp32", "threads": 1, "zero": {"stage": 3, "persist_below": 100, "offload": "all"}}
    for name, given in {"ranks": {}, "host": {"engine": everything}}.items():
        for child in launcher.ranks(2, command(pairs, tmp_path / name, clip, **given), free_port()):
            child.finish()
        found = losses(tmp_path / name)
        assert [step for step, *_ in found] == [step for step, *_ in expected]
        for (_, loss, norm), (_, other, its_norm) in zip(found, expected):
            assert loss == pytest.approx(other, abs=2e-5) and norm == pytest.approx(its_norm, rel=1e-3), name
        assert json.loads((tmp_path / name / "facts.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_a_saved_language_model_with_added_tokens_is_whole_under_stage_3(
    launcher: Launcher,
    pairs: Path,  # noqa: F811
    clip: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """New rows of the embedding are the mean of the others before the engine parts the weights, and two small steps leave them near it."""
    folder = tmp_path / "llm"
    folder.mkdir()
    write_tokenizer(TokensConfig(vocab_size=420), None, lambda: ["arrow up", "cloud"] * 20, folder / "tokenizer.json")
    torch.manual_seed(0)
    saved = language_model(LLM, None, Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size())
    saved.config.to_json_file(folder / "config.json", use_diff=False)
    save_file(saved.state_dict(), folder / "model.safetensors", {"format": "pt"})
    given = config(pairs, tmp_path / "run", clip).towers["student"].model_dump(mode="json")
    given |= {"pretrained": str(folder), "tokens": {"add": True, "image": "<picture>", "answer": "<slot>", "pad": "<blank>"}}
    zero = {"precision": "fp32", "threads": 1, "zero": {"stage": 3, "persist_below": 100, "offload": "all"}}
    rest = {"towers": {"student": given}, "steps": 2, "engine": zero, "optimizer": {"lr": 1e-4}}
    for child in launcher.ranks(2, command(pairs, tmp_path / "run", clip, **rest), free_port()):
        child.finish()
    found = load_file(last_checkpoint(tmp_path / "run") / "model.safetensors")
    assert all(value.isfinite().all() for value in found.values())
    after, before = found["towers.student.items.llm.embed_tokens.weight"], saved.get_input_embeddings().weight.detach()
    assert len(after) == len(before) + 3 and torch.allclose(after[: len(before)], before, atol=1e-3)
    assert torch.allclose(after[len(before) :], before.mean(0).expand(3, -1), atol=1e-3)


@pytest.mark.slow
def test_a_killed_item_run_resumes_bit_for_bit(launcher: Launcher, pairs: Path, clip: Path, tmp_path: Path) -> None:  # noqa: F811
    saves = {"steps": 30, "checkpoint": {"every": 4}}
    launcher.run(command(pairs, tmp_path / "whole", clip, **saves))
    again = command(pairs, tmp_path / "killed", clip, **saves)
    for steps in (6, 15):
        kill_at(steps, tmp_path / "killed", launcher.start(again, HOLD=str(steps)))
    launcher.run(again)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
