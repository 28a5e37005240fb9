"""One contract for every selector in the folder: a new file is tested before it has a test of its own."""

import importlib

import pytest
import torch

from pipeline.config import dump, names_in, parse
from pipeline.selection.base import Candidates, Selector
from pipeline.types import Selection
from tests.selector_cases import needed

NAMES = names_in("pipeline.selection")
SIZE, ROWS, KEEP = 200, 48, 12


def build(name: str, **settings: object) -> Selector:
    return importlib.import_module(f"pipeline.selection.{name}").Config(rate=0.25, **needed(name), **settings).build(num_samples=SIZE)


def group(seed: int = 0, **changes: object) -> Candidates:
    """A group of distinct samples with features, so that every selector finds what it reads."""
    generator = torch.Generator().manual_seed(seed)
    slot = torch.randperm(SIZE, generator=generator)[:ROWS]
    image, text = torch.nn.functional.normalize(torch.randn(2, ROWS, 8, generator=generator), dim=2)
    values = {"slot": slot, "sample": slot + 10_000, "cosine": (image * text).sum(1), "loss": torch.rand(ROWS, generator=generator)}
    values |= {"keep": KEEP, "valid": torch.ones(ROWS, dtype=torch.bool), "step": seed, "image": image, "text": text}
    return Candidates(**values | changes)


def permuted(old: Candidates, order: torch.Tensor) -> Candidates:
    return Candidates(**{name: value[order] if isinstance(value, torch.Tensor) else value for name, value in vars(old).items()})


def run(selector: Selector, steps: int = 3) -> list[list[int]]:
    return [selector.select(group(step)).rows.tolist() for step in range(steps)]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_folder_has_the_published_and_the_plain_ones() -> None:
    assert {"dissect", "random", "big_loss", "small_loss", "clip_score", "keep_all"} <= set(NAMES)


def check(selection: Selection, selector: Selector, candidates: Candidates) -> set[int]:
    rows = selection.rows
    expected = ROWS if selector.trains_all(candidates.step) else candidates.keep
    assert rows.dtype == torch.int64 and rows.shape == (expected,)
    assert rows.tolist() == sorted(set(rows.tolist())) and int(rows[0]) >= 0 and int(rows[-1]) < ROWS
    assert all(weight.shape == rows.shape for weight in selection.weights.values())
    assert selection.ranked_by is None or selection.ranked_by.shape == (ROWS,)
    return set(rows.tolist())


@pytest.mark.parametrize("keep", [1, 12, ROWS])
def test_gives_as_many_rows_as_asked_ascending(name: str, keep: int) -> None:
    selector = build(name)
    for step in range(3):
        check(selector.select(group(step, keep=keep)), selector, group(step, keep=keep))


def test_is_deterministic_and_depends_on_the_samples_not_on_their_places(name: str) -> None:
    assert run(build(name)) == run(build(name))
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(9))
    straight, shuffled = build(name), build(name)
    for step in range(3):
        rows = straight.select(group(step)).rows.tolist()
        others = shuffled.select(permuted(group(step), order)).rows
        assert sorted(order[others].tolist()) == rows


def test_refused_rows_are_not_chosen_while_there_are_enough_others(name: str) -> None:
    selector = build(name)
    if selector.trains_all(0):
        pytest.skip("trains every row")
    for bad in (10, ROWS - KEEP):
        valid = torch.arange(ROWS) >= bad
        assert min(check(selector.select(group(1, valid=valid)), selector, group(1))) >= bad
    valid = torch.arange(ROWS) < KEEP - 5  # too few: all of them, and as many others as are missing
    assert set(range(KEEP - 5)) <= check(selector.select(group(1, valid=valid)), selector, group(1))


def test_rows_that_are_not_valid_leave_the_table_alone(name: str) -> None:
    selector = build(name)
    candidates = group(0, valid=torch.arange(ROWS) % 2 == 0)
    selector.select(candidates)
    assert selector.scores.visits[candidates.slot[1::2]].sum() == 0 and selector.scores.score[candidates.slot[1::2]].abs().sum() == 0


def test_works_without_the_optional_fields(name: str) -> None:
    selector = build(name)
    plain = group(0, sample=None, valid=None, **dict.fromkeys({"image", "text"} - selector.needs(0)))
    check(selector.select(plain), selector, plain)


def test_reads_no_more_than_it_says(name: str) -> None:
    selector = build(name)
    needs = selector.needs(0)
    assert needs <= {"cosine", "loss", "image", "text"}
    check(selector.select(group(0, **dict.fromkeys({"cosine", "loss", "image", "text"} - needs))), selector, group(0))
    for field in needs:
        with pytest.raises(ValueError, match=f"needs Candidates.{field}"):
            build(name).select(group(0, **{field: None}))


def test_state_goes_through_a_checkpoint(name: str) -> None:
    first, second = build(name), build(name)
    run(first)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for step in range(3, 6):
        assert torch.equal(second.select(group(step)).rows, first.select(group(step)).rows)


def test_warm_up_trains_all_rows_or_a_random_subset_of_the_same_size(name: str) -> None:
    module = importlib.import_module(f"pipeline.selection.{name}")
    everything = module.Config(warmup_visits=1, **needed(name)).build(num_samples=SIZE, warmup_steps=2)
    assert everything.trains_all(0) and everything.select(group(0)).rows.tolist() == list(range(ROWS))
    subset = module.Config(warmup_visits=1, warmup_data="subset", **needed(name)).build(num_samples=SIZE, warmup_steps=2)
    chosen = [check(subset.select(group(step)), subset, group(step)) for step in range(2)]
    if not subset.trains_all(0):
        assert chosen[0] != chosen[1] and not subset.trains_all(1)


def test_uses_no_random_generator(name: str) -> None:
    selector, before = build(name), torch.get_rng_state()
    run(selector)
    assert torch.equal(torch.get_rng_state(), before)


def test_config_survives_a_dump(name: str) -> None:
    config = build(name, warmup_visits=3, warmup_data="subset").config
    assert config.name == name and parse(type(config), dump(config), "dump") == config
