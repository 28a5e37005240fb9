"""ScoreTable: size, state, slices for lanes."""

import pytest
import torch

from pipeline.selection.scores import ScoreTable


def filled(size: int = 10) -> ScoreTable:
    table = ScoreTable(size)
    table.update(torch.arange(size), torch.arange(size).float())
    return table


def test_starts_without_history_in_five_bytes_a_sample() -> None:
    table = ScoreTable(1000)
    assert table.score.dtype == torch.float32 and table.visits.dtype == torch.uint8 and table.visits.sum() == 0
    assert sum(value.nbytes for value in table.state_dict().values()) == 5 * 1000 and len(table) == 1000


def test_state_round_trip() -> None:
    source, target = filled(), ScoreTable(10)
    target.load_state_dict({name: value.clone() for name, value in source.state_dict().items()})
    source.update(torch.tensor([3]), torch.tensor([99.0]))
    assert target.score.tolist() == list(range(10)) and target.visits.tolist() == [1] * 10


def test_rows_of_lanes_put_together_give_the_table() -> None:
    source, target = filled(), ScoreTable(10)
    for first, last in ((0, 4), (4, 4), (4, 10)):
        part = source.rows(first, last)
        source.score[first:last] += 0  # a slice that is saved is a copy
        target.load_rows(first, part)
    assert torch.equal(target.score, source.score) and torch.equal(target.visits, source.visits)
    part = source.rows(0, 2)
    source.score[0] = 77
    assert part["score"].tolist() == [0, 1]


def test_to_keeps_the_values() -> None:
    table = filled()
    assert table.to("cpu") is table and table.score.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"score": torch.zeros(9), "visits": torch.zeros(9, dtype=torch.uint8)}, "found a state of 9 rows, expected 10"),
        ({"score": torch.zeros(10), "visits": torch.zeros(9, dtype=torch.uint8)}, "expected score float32"),
        ({"score": torch.zeros(10), "visits": torch.zeros(10)}, "visits uint8"),
        ({"score": torch.zeros(10)}, "expected the keys score and visits, found"),
    ],
)
def test_refuses_the_state_of_another_table(state: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled().load_state_dict(state)


def test_refuses_rows_that_are_not_there() -> None:
    table = filled()
    for first, last in ((-1, 3), (5, 11), (6, 5)):
        with pytest.raises(ValueError, match="the score table has rows 0 to 10"):
            table.rows(first, last)
    with pytest.raises(ValueError, match="do not fit"):
        table.load_rows(8, filled(3).state_dict())
    with pytest.raises(ValueError, match="at least one row"):
        ScoreTable(0)
