"""One rank's candidates, cut into selection groups: the selector sees a group at a time and never knows how many there are."""

import torch
from torch import Tensor

from pipeline import kernels
from pipeline.selection.base import Selector
from pipeline.types import Batch, Candidates, Selection


class GroupSelector:
    """`size` consecutive rows form a group, of which `keep` are trained. Equal for every world size that divides the groups."""

    def __init__(self, selector: Selector, size: int, keep: int) -> None:
        self.selector, self.size, self.keep = selector, size, keep

    def select(self, batch: Batch, features: dict[str, Tensor] | None, step: int) -> tuple[Selection, Tensor | None]:
        """The rows of the batch to train, ascending, and the cosine float32 [b] they were judged by (None: no scoring pass was asked for)."""
        needs = self.selector.needs(step)
        features = features or {}
        cosine = features.get("cosine")  # given where it is not of this step's features alone
        if cosine is None and features:
            cosine = kernels.cosine(features["image"], features["text"])
        rows, ranked = [], []
        for first in range(0, len(batch), self.size):
            at = slice(first, first + self.size)
            group = Candidates(
                slot=batch.slot[at],
                cosine=cosine[at] if cosine is not None else None,
                keep=self.keep,
                loss=_group_loss(features, batch.valid, at) if "loss" in needs else None,
                sample=batch.sample[at],
                valid=batch.valid[at],
                step=step,
                image=features["image"][at] if "image" in features else None,
                text=features["text"][at] if "text" in features else None,
            )
            chosen = self.selector.select(group)
            rows.append(chosen.rows + first)
            ranked.append(chosen.ranked_by)
        together = None if any(value is None for value in ranked) else torch.cat(ranked)
        return Selection(torch.cat(rows), ranked_by=together), cosine


def _group_loss(features: dict[str, Tensor], valid: Tensor, at: slice) -> Tensor:
    """Per-sample contrastive loss float32 [g] with the group's own negatives: with others it would depend on the world size."""
    weights = valid[at].float()
    return kernels.clip_loss(features["image"][at], features["text"][at], features["scale"], weights=weights).per_sample
