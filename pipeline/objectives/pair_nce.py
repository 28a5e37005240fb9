"""InfoNCE over pairs of related items (NoteLLM-2, Zhang et al., KDD 2025, arXiv 2405.16789): each item against all others of all ranks."""

import torch
from pydantic import Field
from torch import Tensor

from pipeline.distributed.comm import Comm
from pipeline.kernels.checks import checked, choose
from pipeline.kernels.similarity import Pairs, similarity
from pipeline.objectives._rows import feature
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.types import Batch, Selection

VIEWS = {"multimodal": ("item", "related"), "visual": ("visual", "related_visual")}


class Config(ObjectiveConfig):
    """(alpha x the loss of the multimodal view + that of the visual view) / (alpha + 1), the paper's alpha 9 of 1, 3, 9 and 19.

    The visual view needs a tower with prompt: micl. `impl` picks the kernel: reference, blocked, triton, or auto.
    """

    alpha: float | None = Field(9.0, ge=0, description="null: the multimodal view alone")
    impl: str = "auto"

    def views(self) -> dict[str, float]:
        """The share of each view in the loss."""
        if self.alpha is None:
            return {"multimodal": 1.0}
        return {"multimodal": self.alpha / (self.alpha + 1), "visual": 1 / (self.alpha + 1)}

    def reads(self) -> tuple[str, ...]:
        return (*(name for view in self.views() for name in VIEWS[view]), "scale")

    def build(self) -> "PairNce":
        return PairNce(self)


class PairNce(Objective):
    """Gradients reach the rows of all ranks, so that they are those of one device; the published code's gather cuts them off, which
    after averaging leaves 1/R of that. An item whose row is zeros, for it has neither image nor text, takes its pair out of that view."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.views, self.impl = config.views(), config.impl

    def forward(self, features: dict[str, Tensor], batch: Batch, selection: Selection, comm: Comm) -> Tensor:
        given = selection.weight("pair_nce", batch.valid)
        losses = {}
        for view in self.views:
            item, related = (feature("pair_nce", features, batch, name, given) for name in VIEWS[view])
            there = (item.detach() != 0).any(1) & (related.detach() != 0).any(1)
            scale = feature("pair_nce", features, batch, "scale")
            losses[view] = pair_nce(item, related, scale, given * there, comm, self.impl)
        self.telemetry = {view: loss.detach() for view, loss in losses.items()}
        return sum(self.views[view] * loss for view, loss in losses.items())


def pair_nce(item: Tensor, related: Tensor, scale: Tensor, weights: Tensor, comm: Comm, impl: str = "auto") -> Tensor:
    """This rank's share x size of -(1 / 2B) sum_i w_i log softmax_{j != i}(s <e_i, e_j>)_{partner of i} over the 2B items of B pairs, [].

    `item`, `related` unit rows [b, D], `scale` [1], `weights` [b] >= 0: a pair of weight 0 is no row, no negative, and may hold anything.
    The log-sum without the item itself is the kernels' own (they leave the diagonal out), so the 2B x 2B matrix is stored for small
    problems only. Collective. Raises ValueError.
    """
    rows = torch.cat([item, related])
    everybody, weight = comm.gather(rows), comm.gather(weights.repeat(2))
    problem = checked(rows, rows, scale, (everybody, everybody), comm.rank * len(rows), weight, None, "pair_nce")
    with torch.autocast(rows.device.type, enabled=False):
        exact = problem.scale.dtype
        x, y, used = problem.image, problem.all_image, problem.used
        mine = used[problem.offset : problem.offset + len(rows)]
        partner = (x.to(exact) * x.roll(len(item), 0).to(exact)).sum(1) * problem.scale
        if (chosen := choose(impl, problem, "pair_nce")) == "reference":
            logits = problem.scale * (x.to(exact) @ y.to(exact).T)
            own = torch.arange(len(y), device=y.device) == problem.offset + torch.arange(len(x), device=x.device)[:, None]
            # a finite floor and not -inf: a row without any column would have a gradient of NaN
            total = logits.masked_fill(own | ~used, torch.finfo(exact).min / 2).logsumexp(1)
        else:
            total = similarity(Pairs(x, y, problem.scale, None, mine, used, problem.offset, "rows"), chosen).row.to(exact)
        return ((total - partner).masked_fill(~mine, 0) * problem.weight).sum() / len(rows)
