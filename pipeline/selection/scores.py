"""The score history of a rank's samples: one number and one counter each, nothing else."""

from typing import Any

import torch
from torch import Tensor

from pipeline.kernels.score import update_history

__all__ = ["ScoreTable"]


class ScoreTable:
    """Five bytes a sample. `score` float32 [N] on the 100 cos scale (of a selector that `learns`: its loss), `visits` uint8 [N]: scored visits, 255 standing for more.

    A sample whose visits are 0 has no history and its score means nothing. Rows are a rank's own: see ARCHITECTURE, Lanes.
    """

    def __init__(self, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"a score table needs at least one row, found num_samples={num_samples}")
        self.score = torch.zeros(num_samples, dtype=torch.float32)
        self.visits = torch.zeros(num_samples, dtype=torch.uint8)

    def __len__(self) -> int:
        return self.score.shape[0]

    def update(self, slot: Tensor, current: Tensor, **rule: Any) -> None:
        """Writes scores float32 [g] at `slot` int64 [g]; the rules and what happens to duplicates: `kernels.update_history`."""
        update_history(self.score, self.visits, slot, current, **rule)

    def to(self, device: torch.device | str) -> "ScoreTable":
        """Moves the table in place."""
        self.score, self.visits = self.score.to(device), self.visits.to(device)
        return self

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Rows first..last-1 (one lane) as they are saved: copies on the CPU. Raises ValueError for rows that do not exist."""
        if not 0 <= first <= last <= len(self):
            raise ValueError(f"rows {first} to {last}: the score table has rows 0 to {len(self)}")
        return {name: value[first:last].to("cpu", copy=True) for name, value in self.state_dict().items()}

    def load_rows(self, first: int, state: dict[str, Tensor]) -> None:
        """Puts back what `rows` gave, beginning at row `first`. Raises ValueError when it does not fit."""
        score, visits = _checked(state)
        if not 0 <= first <= first + score.shape[0] <= len(self):
            raise ValueError(f"{score.shape[0]} rows at {first} do not fit into a score table of {len(self)} rows")
        self.score[first : first + score.shape[0]] = score.to(self.score.device)
        self.visits[first : first + score.shape[0]] = visits.to(self.visits.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The table's own tensors, not copies."""
        return {"score": self.score, "visits": self.visits}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies a whole table. Raises ValueError when it is another length: the histories would belong to other samples."""
        score, _ = _checked(state)
        if score.shape[0] != len(self):
            raise ValueError(f"score table: found a state of {score.shape[0]} rows, expected {len(self)}; it is another index's or rank's")
        self.load_rows(0, state)


def _checked(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if set(state) != {"score", "visits"}:
        raise ValueError(f"score table: expected the keys score and visits, found {sorted(state)}")
    score, visits = state["score"], state["visits"]
    if score.dtype != torch.float32 or visits.dtype != torch.uint8 or score.dim() != 1 or score.shape != visits.shape:
        found = f"{score.dtype} {tuple(score.shape)} and {visits.dtype} {tuple(visits.shape)}"
        raise ValueError(f"score table: expected score float32 [N] and visits uint8 [N], found {found}")
    return score, visits
