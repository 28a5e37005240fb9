"""The selectors that are there to be compared with: each one's rule on numbers small enough to do by hand."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import ConfigError, parse
from pipeline.data.sources import DataConfig, Sources
from pipeline.distributed import checkpoint
from pipeline.selection import dissect, jest, random, rho_loss, scan
from pipeline.selection.groups import GroupSelector
from pipeline.selection.rate import RateSchedule
from pipeline.teachers.cached import FORMAT, write_part
from pipeline.types import Batch, Candidates

ROWS = 20


def group(step: int = 0, keep: int = 10, **values: torch.Tensor) -> Candidates:
    return Candidates(torch.arange(ROWS), values.pop("cosine", None), keep, step=step, **values)


def test_scan_draws_from_between_the_ends_and_fills_up_from_them() -> None:
    selector = scan.Config(drop_lowest=0.2, drop_highest=0.1).build(ROWS)
    cosine = torch.linspace(-0.9, 0.9, ROWS)
    seen = [set(selector.select(group(step, cosine=cosine)).rows.tolist()) for step in range(30)]
    assert set.union(*seen) == set(range(4, 18)) and len({frozenset(rows) for rows in seen}) > 10
    assert set(range(4, 18)) < set(selector.select(group(keep=17, cosine=cosine)).rows.tolist())
    refused = torch.arange(ROWS) >= 10  # the quantiles are of the rows that count
    assert set(selector.select(group(keep=7, cosine=cosine, valid=refused)).rows.tolist()) == set(range(12, 19))


def test_rho_loss_ranks_by_what_is_left_over_the_reference(tmp_path: Path) -> None:
    reference, shuffled = np.linspace(0, 3, ROWS, dtype=np.float32), np.random.default_rng(0).permutation(ROWS)
    pq.write_table(pa.table({"sample": shuffled, "loss": reference[shuffled]}), tmp_path / "table.parquet")
    selector = rho_loss.Config(table=str(tmp_path / "table.parquet")).build(ROWS)
    loss = torch.full((ROWS,), 1.0)
    loss[15] = 9.0
    assert selector.select(group(keep=3, loss=loss)).rows.tolist() == [0, 1, 15]


@pytest.mark.parametrize("samples, losses", [([0, 2], [1.0, 1.0]), ([0, 0], [1.0, 1.0]), ([0, 1], [1.0, float("nan")]), ([], [])])
def test_rho_loss_refuses_a_table_that_is_none(tmp_path: Path, samples: list[int], losses: list[float]) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"sample": pa.array(samples, pa.int64()), "loss": pa.array(losses, pa.float32())}), path)
    for table in (str(path), str(tmp_path / "nowhere.parquet"), None):
        with pytest.raises(ConfigError, match=r"selector.table: .*tools.irreducible_loss"):
            rho_loss.Config(table=table).build(ROWS)


def test_dissect_can_compare_with_a_moving_average_of_the_warm_up() -> None:
    selector = dissect.Config(warmup_visits=3, history="ema", momentum=0.5).build(ROWS, warmup_steps=3)
    for step, cosine in enumerate((0.2, 0.4, 0.8, 0.1)):
        selector.select(group(step, cosine=torch.full((ROWS,), cosine)))
    assert selector.scores.score.tolist() == pytest.approx([0.5 * (0.5 * 20 + 0.5 * 40) + 0.5 * 80] * ROWS)


def teacher(folder: Path, image: torch.Tensor, text: torch.Tensor) -> str:
    """Its rows as tools.cache_teacher writes them."""
    facts = {"format": FORMAT, "index": "none", "samples": len(image), "dtype": "float32", "constants": {}, "teacher": "one"}
    columns = {"image": image.numpy(), "text": text.numpy()}
    facts["features"] = {name: [value.shape[1]] for name, value in columns.items()}
    write_part(folder, 0, columns, np.ones(len(image), bool), facts)
    return str(folder)


def conditional(logits: torch.Tensor, i: int, others: list[int], loss: str) -> float:
    """The loss of row i in a batch of `others` and itself, written out."""
    rest = [j for j in others if j != i]
    if loss == "softmax":
        row, column = (torch.stack([z[i, j] for j in [i, *rest]]) for z in (logits, logits.T))
        return float((torch.logsumexp(row, 0) + torch.logsumexp(column, 0)) / 2 - logits[i, i])
    softplus = torch.nn.functional.softplus
    return float(softplus(-logits[i, i]) + sum(softplus(logits[i, j]) + softplus(logits[j, i]) for j in rest))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_jest_s_losses_are_those_of_a_batch_of_the_drawn_rows(tmp_path: Path, loss: str) -> None:
    image, text = torch.nn.functional.normalize(torch.randn(2, ROWS, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    selector = jest.Config(reference=teacher(tmp_path, image, text), loss=loss).build(ROWS)
    logits = selector._logits(image, text)
    others = torch.zeros(ROWS, dtype=torch.bool)
    others[[2, 5, 11]] = True
    expected = [conditional(logits, i, [2, 5, 11], loss) for i in range(ROWS)]
    assert selector._loss(logits, others).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_jest_takes_what_the_reference_knows_and_the_learner_does_not(tmp_path: Path, loss: str) -> None:
    ids = torch.arange(ROWS)
    image = torch.nn.functional.normalize(torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    learned, hopeless = ids < 5, ids >= 15  # the learner knows the first five, the reference all but the last five
    wrong = image.roll(1, 0)
    selector = jest.Config(
        reference=teacher(tmp_path, image, torch.where(hopeless[:, None], wrong, image)), loss=loss, scale=30.0, chunks=5
    ).build(ROWS)
    text = torch.where(learned[:, None], image, wrong)
    chosen = selector.select(group(keep=10, image=image, text=text))
    assert chosen.rows.tolist() == list(range(5, 15))
    equal = [selector.select(group(step, keep=10, image=image, text=torch.where(hopeless[:, None], wrong, image))) for step in range(20)]
    assert len({row for one in equal for row in one.rows.tolist()}) == ROWS  # nothing to gain anywhere: a lot


def test_jest_refuses_a_reference_without_both_sides(tmp_path: Path) -> None:
    facts = {"format": FORMAT, "index": "none", "samples": 2, "dtype": "float32", "constants": {}, "features": {"image": [2]}}
    write_part(tmp_path, 0, {"image": np.ones((2, 2), np.float32)}, np.ones(2, bool), facts)
    with pytest.raises(ConfigError, match=r"selector.reference: .*has no text of the samples.*tools.cache_teacher"):
        jest.Config(reference=str(tmp_path)).build(ROWS)
    with pytest.raises(ConfigError, match=r"selector.reference: none given"):
        jest.Config().build(ROWS)


@pytest.fixture
def sources(icons_small: Path) -> Sources:
    return Sources.open(parse(DataConfig, {"sources": [{"url": str(icons_small)}], "batch": 8}, "test"))


def rows_of(sources: Sources, folder: Path, held: int, **other: object) -> jest.Config:
    """A reference of those samples, of which the folder holds the first `held` rows, the first one without an output."""
    facts = {"format": FORMAT, "index": sources.digest, "samples": sources.num_samples, "dtype": "float32", "constants": {}, "teacher": "one"}
    facts |= {"features": {"image": [4], "text": [4]}} | other
    present = np.arange(held) > 0
    rows = np.random.default_rng(0).standard_normal((held, 4)).astype(np.float32)
    write_part(folder, 0, {"image": rows, "text": rows}, present, facts)
    return jest.Config(reference=str(folder))


def test_jest_takes_no_reference_of_other_samples_and_no_part_of_one(sources: Sources, tmp_path: Path) -> None:
    count, digests = sources.num_samples, {}
    for name, given in {"whole": {}, "other": {"teacher": "another"}}.items():
        (tmp_path / name).mkdir()
        digests[name] = rows_of(sources, tmp_path / name, count, **given).check(sources)
    assert digests["whole"] != digests["other"]
    for name, held, given, said in (
        ("index", count, {"index": "f00d"}, "was made for other samples"),
        ("fewer", count - 1, {"samples": count - 1}, "was made for other samples"),
        ("part", count - 1, {}, f"holds {count - 1} of {count} rows"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=f"selector.reference: .*{said}"):
            rows_of(sources, tmp_path / name, held, **given).check(sources)


def test_jest_draws_no_row_that_the_reference_has_not_seen(sources: Sources, tmp_path: Path) -> None:
    selector = rows_of(sources, tmp_path, sources.num_samples).build(ROWS)
    image, text = torch.nn.functional.normalize(torch.randn(2, ROWS, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    drawn = [selector.select(group(step, keep=ROWS - 1, image=image, text=text)).rows.tolist() for step in range(5)]
    assert drawn == [list(range(1, ROWS))] * 5


def test_rho_loss_takes_no_table_of_other_samples(sources: Sources, tmp_path: Path) -> None:
    def table(count: int, index: str | None, first: float = 0.0) -> rho_loss.Config:
        loss = np.arange(count, dtype=np.float32)
        loss[0] = first
        metadata = {rho_loss.INDEX: index} if index else None
        pq.write_table(pa.table({"sample": np.arange(count), "loss": loss}, metadata=metadata), tmp_path / "table.parquet")
        return rho_loss.Config(table=str(tmp_path / "table.parquet"))

    count = sources.num_samples
    known = table(count, sources.digest).check(sources)
    assert known == table(count, None).check(sources) != table(count, sources.digest, first=0.5).check(sources)
    for wrong in ((count, "f00d"), (count + 1, None)):
        with pytest.raises(ConfigError, match=r"selector.table: .*is of other samples"):
            table(*wrong).check(sources)


def test_a_run_goes_on_with_no_other_reference_and_an_old_one_with_what_it_did(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "COMMIT").touch()
    now = {"format": checkpoint.FORMAT, "index": "i", "lanes": 1, "groups": 1, "config": {"selector": {"name": "jest"}}, "reference": "one"}

    def agree(was: dict, **change: object) -> None:
        (folder / "run.json").write_text(json.dumps(was), encoding="utf-8")
        checkpoint.agree(tmp_path, now | change)

    agree(now)
    agree({name: value for name, value in now.items() if name != "reference"})  # from before it was known
    with pytest.raises(checkpoint.CheckpointError, match="another reference of the selector"):
        agree(now, reference="two")
    before = now | {"config": {"selector": {"name": "blend"}}}  # always split the scores in two classes
    agree(before, config={"selector": {"name": "blend", "classes": "two"}})
    with pytest.raises(checkpoint.CheckpointError, match="selector.classes was 'two', now 'auto'. Set these back"):
        agree(before, config={"selector": {"name": "blend", "classes": "auto"}})


def test_a_rate_may_change_over_the_visits_after_warm_up() -> None:
    config = random.Config(rate=RateSchedule(start=1.0, end=0.25, visits=3), warmup_visits=2)
    assert [config.rate_at(visits) for visits in (0, 1, 2, 3, 9, float("inf"))] == [1.0, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert random.Config(rate=0.3).rate_at(7) == 0.3
    ids = torch.arange(ROWS)
    batch = Batch(ids, ids, torch.zeros_like(ids), torch.ones(ROWS, dtype=torch.bool), {})
    selector = GroupSelector(config.build(ROWS, warmup_steps=2), ROWS, lambda steps: int(ROWS * config.rate_at(steps)))
    assert [len(selector.select(batch, None, step)[0].rows) for step in range(8)] == [20, 20, 20, 15, 10, 5, 5, 5]
