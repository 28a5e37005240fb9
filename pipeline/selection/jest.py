"""JEST (arXiv 2406.17711): the rows that are worth most together, by what a reference model has learned of them and this one has not."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import ConfigError
from pipeline.data.errors import DataError
from pipeline.data.sources import Sources
from pipeline.hashing import hash_ids
from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig
from pipeline.teachers import cached
from pipeline.teachers.cached import CachedRows, parts, read_facts


class Config(SelectorConfig):
    """The reference's embeddings of the whole set are made by `python -m tools.cache_teacher RUN FOLDER`."""

    reference: str | None = Field(
        None, description="folder that tools.cache_teacher wrote, with image and text, for the data.sources of this run"
    )
    chunks: int = Field(16, ge=1, description="blocks in which a group's rows are drawn; more is closer to one row at a time, and slower")
    loss: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="CLIP's loss, or SigLIP's pairwise one as in the paper's experiments"
    )
    scale: float = Field(10.0, gt=0, description="of the cosines of both models in these losses, so that they can be subtracted")
    bias: float = Field(-10.0, description="added to scaled cosines; loss sigmoid")

    def check(self, sources: Sources) -> str | None:
        """See SelectorConfig.check."""
        try:
            return cached.Config(path=self.reference).open(sources).digest if self.reference else None  # build() says that there is none
        except DataError as error:
            raise ConfigError(f"selector.reference: {error}") from None

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "Jest":
        """See SelectorConfig.build. Raises ConfigError where there is no reference, or it has no image and text."""
        return Jest(self, num_samples, warmup_steps, seed)


class Jest(Selector):
    """Draws `keep` rows in blocks, each given those that are drawn already.

    With C the rows drawn so far (for the first block and `softmax` the whole group, for a loss needs something to be told from),
    l(i | C) the loss of row i in a batch of C and i, under the learner and under the reference r, the next block is drawn with

        log p_i = l(i | C) - l_r(i | C) + constant,

    the learnability: large where the learner is bad and the reference is good. With `softmax` l is the symmetric InfoNCE of row i with
    the negatives C; with `sigmoid` it is softplus(-z_ii) + sum over j in C of softplus(z_ij) + softplus(z_ji), z = scale x cosine + bias. A
    draw is the largest log p_i + g_i, g_i from Gumbel's distribution by a hash of (seed, sample, step, block).

    Deviations from the paper: groups of this project's size instead of one super-batch, both models at one fixed scale, and the blocks
    are top-k of perturbed values, which draws without replacement inside a block too. Costs a product of the group's rows for each
    model and `chunks` passes over both; the reference's rows are read from a memory-mapped file, and that waits for the device once a group.
    Rows that the reference has seen nothing of are drawn last, as those that are not finite.
    """

    def __init__(self, config: Config, num_samples: int, warmup_steps: int, seed: int) -> None:
        super().__init__(config, num_samples, warmup_steps, seed)
        how = "Make one with python -m tools.cache_teacher RUN FOLDER"
        if config.reference is None:
            raise ConfigError(f"selector.reference: none given: jest needs the embeddings of a reference model. {how}")
        facts = read_facts(Path(config.reference))
        if missing := {"image", "text"} - set(facts["features"]):
            raise ConfigError(f"selector.reference: {config.reference}: has no {' and no '.join(sorted(missing))} of the samples. {how}")
        self.reference = CachedRows(parts(Path(config.reference)), facts)

    def needs(self, step: int) -> frozenset[str]:
        """Both embeddings once warm-up is over."""
        return frozenset() if self.in_warmup(step) else frozenset({"image", "text"})

    def select(self, group: Candidates) -> Selection:
        """`keep` rows; recorded as their rank is the learnability that the last block saw. Raises ValueError when an embedding is None."""
        if self.in_warmup(group.step):
            return self.warmup(group)
        image, text = self.given(group, "image").float(), self.given(group, "text").float()
        known = self.reference((group.slot if group.sample is None else group.sample).cpu().numpy())
        learner = self._logits(image, text)
        reference = self._logits(*(F.normalize(known[name].to(image.device).float(), dim=1) for name in ("image", "text")))
        usable = image.isfinite().all(1) & text.isfinite().all(1) & known["present"].to(image.device)
        usable = usable if group.valid is None else usable & group.valid
        chosen, others, blocks, drawn = torch.zeros_like(usable), usable, min(self.config.chunks, group.keep), []
        if self.config.loss == "sigmoid":
            others = chosen
        for block in range(blocks):
            gain = self._loss(learner, others) - self._loss(reference, others)
            lot = hash_ids(self.seed, group.slot if group.sample is None else group.sample, group.step, block) >> 39
            gumbel = -((lot.float() + 0.5) * 2.0**-24).log().neg().log()
            value = (gain + gumbel).masked_fill(~usable, -1e30).masked_fill(chosen, -torch.inf)
            count = group.keep * (block + 1) // blocks - group.keep * block // blocks
            drawn.append(value.topk(count).indices)
            others = chosen = chosen.index_fill(0, drawn[-1], True)
        return Selection(torch.cat(drawn).sort().values, ranked_by=gain.masked_fill(~usable, torch.nan))

    def _logits(self, image: Tensor, text: Tensor) -> Tensor:
        bias = self.config.bias if self.config.loss == "sigmoid" else 0.0
        return self.config.scale * image @ text.T + bias

    def _loss(self, logits: Tensor, others: Tensor) -> Tensor:
        """float32 [g]: each row's loss in a batch of `others`, bool [g], and itself."""
        own = torch.eye(len(others), dtype=torch.bool, device=others.device)
        sides = (logits, logits.T)
        if self.config.loss == "softmax":
            return sum(side.masked_fill(~(own | others), -torch.inf).logsumexp(1) for side in sides) / 2 - logits.diagonal()
        return F.softplus(-logits.diagonal()) + sum(F.softplus(side.masked_fill(own | ~others, -torch.inf)).sum(1) for side in sides)
