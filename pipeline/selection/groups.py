"""One rank's candidates, cut into selection groups: the selector sees a group at a time and never knows how many there are.

`scope: group` takes top-k inside each group and needs no other rank. `scope: global` takes it over the candidates of all ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.distributed.comm import Comm, LocalComm
from pipeline.selection.base import Selector
from pipeline.types import Batch, Candidates, Selection


class GroupSelector:
    """`size` consecutive rows form a group, of which `keep` are trained: a number, or of the steps since warm-up a function that gives it.

    Equal for every world size that divides the groups.
    """

    comm: Comm = LocalComm()  # whose rows make a group: of this rank alone

    def __init__(self, selector: Selector, size: int, keep: int | Callable[[float], int]) -> None:
        self.selector, self.size, self._keep = selector, size, keep

    def keep(self, step: float) -> int:
        """Rows of a group that are trained at `step` where it selects; math.inf: in the end."""
        return self._keep(max(0, step - self.selector.warmup_steps)) if callable(self._keep) else self._keep

    def select(self, batch: Batch, features: dict[str, Tensor] | None, step: int) -> tuple[Selection, Tensor | None]:
        """The rows of the batch to train, ascending, and the cosine float32 [b] they were judged by (None: no scoring pass was asked for)."""
        cosine = _cosine(features)
        chosen = []
        for first in range(0, len(batch), self.size):
            found = self.selector.select(self.group(batch, features, cosine, step, slice(first, first + self.size)))
            chosen.append(Selection(found.rows + first, found.weights, found.ranked_by))
        together = None if any(found.ranked_by is None for found in chosen) else torch.cat([found.ranked_by for found in chosen])
        weights = {name: torch.cat([found.weights[name] for found in chosen]) for name in chosen[0].weights}
        return Selection(torch.cat([found.rows for found in chosen]), weights, together), cosine

    def group(self, batch: Batch, features: dict[str, Tensor] | None, cosine: Tensor | None, step: int, at: slice) -> Candidates:
        """The rows `at` of this rank's batch, as a selector sees them."""
        needs = self.selector.needs(step)
        return Candidates(
            slot=batch.slot[at],
            cosine=cosine[at] if cosine is not None else None,
            keep=self.keep(step),
            loss=_group_loss(features, batch.valid, at, self.comm) if "loss" in needs else None,
            sample=batch.sample[at],
            valid=batch.valid[at],
            step=step,
            image=features["image"][at] if features and "image" in features else None,
            text=features["text"][at] if features and "text" in features else None,
            weight=None if batch.weight is None else batch.weight[at],
        )


class GlobalSelector(GroupSelector):
    """The candidates of all ranks form one group of `size` rows, of which `keep` are trained: the choice of one process with one group.

    What `selector.needs` of every candidate and its row of the score table are gathered in one collective (18 bytes a row, 22 with the
    loss, and 4 D for each of image and text where a selector reads them); then every rank makes the same choice on the same rows, with
    the same medians and lots, and keeps what it learnt of its own. That is all for any selector whose state is its score table; choosing
    costs each rank what it costs one process.

    The ranks' shares of the choice are not equal, their shapes must be: each rank trains as many rows as the one with the largest share,
    filled up with rejected rows that are not valid (no loss, no negatives, but a forward and backward; a tower with BatchNorm sees them).
    Where ranks differ by chance alone, at rate 0.5, 2 % of the trained rows are padding on 2 ranks of 640 candidates, 4 % on 8 of 1,280,
    16 % on 64 of 160 and 30 % on 256 of 40; `padded_share` counts them. The largest share has to be asked of the device: one wait a step,
    which `scope: group` does not have.
    """

    def __init__(self, selector: Selector, size: int, keep: int | Callable[[float], int], comm: Comm) -> None:
        super().__init__(selector, size, keep)
        self.comm = comm

    def select(self, batch: Batch, features: dict[str, Tensor] | None, step: int) -> tuple[Selection, Tensor | None]:
        """As GroupSelector's, with `padding` and `scale` where the ranks' shares differ. Collective."""
        if self.comm.size == 1:
            return super().select(batch, features, step)
        rows, first = len(batch), self.comm.rank * len(batch)
        cosine = _cosine(features)
        mine = self.group(batch, features, cosine, step, slice(0, rows))
        columns = {"sample": mine.sample, "valid": mine.valid} | {name: getattr(mine, name) for name in self.selector.needs(step)}
        columns |= {} if mine.weight is None else {"weight": mine.weight}
        table, own = self.selector.scores, self.selector.scores.state_dict()
        whole = gather_columns(columns | {f"table {name}": column[batch.slot] for name, column in own.items()}, self.comm)
        slot = _slots(whole["sample"])
        everyones = type(table)(len(slot)).to(slot.device)
        for name, column in everyones.state_dict().items():
            column[slot] = whole[f"table {name}"]
        self.selector.scores = everyones
        try:
            chosen = self.selector.select(
                Candidates(slot=slot, keep=self.keep(step), step=step, **{"cosine": None} | {n: whole[n] for n in columns})
            )
        finally:
            self.selector.scores = table
        here = slot[first : first + rows]
        for name, column in own.items():
            column[batch.slot] = everyones.state_dict()[name][here]
        ranked = None if chosen.ranked_by is None else chosen.ranked_by[first : first + rows]
        if self.selector.trains_all(step):
            weights = {name: value[first : first + rows] for name, value in chosen.weights.items()}
            return Selection(torch.arange(rows, device=slot.device), weights, ranked), cosine
        return self._deal(chosen, rows, first, ranked), cosine

    def _deal(self, chosen: Selection, rows: int, first: int, ranked: Tensor | None) -> Selection:
        """This rank's share of the choice, filled up to the largest share. Waits for the device."""
        taken = torch.zeros(rows * self.comm.size, dtype=torch.uint8, device=chosen.rows.device).index_fill_(0, chosen.rows, 1)
        largest = int(taken.view(self.comm.size, rows).sum(1).max())
        here = taken[first : first + rows]
        kept = here.argsort(descending=True, stable=True)[:largest].sort().values
        padding = here[kept] == 0
        place = torch.searchsorted(chosen.rows, kept + first).clamp_max_(len(chosen.rows) - 1)
        weights = {name: value[place].masked_fill(padding, 0) for name, value in chosen.weights.items()}
        return Selection(kept, weights, ranked, padding, largest * self.comm.size / len(chosen.rows))


def gather_columns(columns: dict[str, Tensor], comm: Comm) -> dict[str, Tensor]:
    """Columns [b, ...] of every rank -> [size * b, ...], in rank order, as one collective over their bytes."""
    flat = {name: value.detach().contiguous().view(len(value), -1).view(torch.uint8) for name, value in columns.items()}
    parts = comm.gather(torch.cat(list(flat.values()), 1)).split([part.shape[1] for part in flat.values()], 1)
    return {name: part.contiguous().view(value.dtype).view(-1, *value.shape[1:]) for (name, value), part in zip(columns.items(), parts)}


def _slots(sample: Tensor) -> Tensor:
    """A row of a table of all candidates for each of them, int64 [n]; a sample that stands there twice has one row."""
    ordered, place = sample.sort()
    number = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)
    return torch.empty_like(number).index_copy_(0, place, number)


def _cosine(features: dict[str, Tensor] | None) -> Tensor | None:
    """Given where it is not of this step's features alone."""
    if not features or "cosine" in features:
        return features["cosine"] if features else None
    return kernels.cosine(features["image"], features["text"])


def _group_loss(features: dict[str, Tensor], valid: Tensor, at: slice, comm: Comm) -> Tensor:
    """Per-sample contrastive loss float32 [g] with the group's own negatives: with others it would depend on the world size."""
    weights = valid[at].float()
    return kernels.clip_loss(features["image"][at], features["text"][at], features["scale"], weights=weights, comm=comm).per_sample
