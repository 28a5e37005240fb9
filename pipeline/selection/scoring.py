"""The scoring pass and its options: which candidates are embedded before the choice, how cheaply, and what stands in for the others.

Selection at rate r costs 3 r + c forwards a sample, where c is the scoring pass (cost.py counts it on the first batch): the options lower c.
"""

import json
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from pipeline import kernels
from pipeline.config import ConfigError, Strict
from pipeline.data.lanes import RankLanes
from pipeline.hashing import hash_ids
from pipeline.selection.base import Selector
from pipeline.selection.groups import GroupSelector
from pipeline.selection.warmup import Watch
from pipeline.towers._views import KEPT
from pipeline.types import Batch, Selection


class ScoringConfig(Strict):
    """Ways to a cheaper scoring pass; with the defaults every candidate is embedded at every visit as it would be trained."""

    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="autocast of the scoring pass alone; null: engine.precision"
    )
    image_size: int | None = Field(
        None, ge=1, description="pixels: images are scored at this size, position embeddings interpolated; null: the trained size"
    )
    patches: float = Field(1.0, gt=0, le=1, description="share of an image's patches that is scored; the same ones at every visit")
    every: int = Field(
        1,
        ge=1,
        le=254,
        description="after warm-up a sample is scored every n-th visit; in between its last score stands in for the new one",
    )
    reuse: bool = Field(
        False,
        description="trained rows take their score from the training forward (dropout included): a warm-up on all data needs no scoring pass",
    )
    ahead: bool = Field(
        False,
        description="a batch is scored during the step before its own, with the weights before that step's update: on a GPU beside training, "
        "on a CPU nothing is gained",
    )
    micro_batch: int | None = Field(None, ge=1, description="rows of a rank that are scored at once; null: all")

    @model_validator(mode="after")
    def _comparable(self) -> "ScoringConfig":
        if self.reuse and (self.image_size or self.patches < 1):
            raise ValueError(
                "reuse: scores of whole images in training cannot be compared with scores of image_size or patches; use one of them"
            )
        return self


class Choice(NamedTuple):
    """What is trained at a step, and what is known of the candidates."""

    selection: Selection
    cosine: Tensor | None = None  # float32 [b], NaN where a last score stands in; None: nothing was scored
    features: dict[str, Tensor] | None = None  # of all b rows, for what wants the embeddings of rejected rows
    scored: int = 0  # rows of this rank that were embedded at this step, with `ahead` those of the next one
    late: bool = False  # the table is still to be told, from the training forward


class Scoring:
    """Chooses a rank's rows. Its state is `last`, float32 [N]: the cosine that stands in where a sample is not scored at every visit, or that
    was found `ahead` of its step; and `ready`, the step of which all that it scores lies there already.

    Which lanes are scored at a step is arithmetic: after warm-up lane l in its visit v is scored when n divides v + l, so about one
    n-th of every batch is, whatever the number of ranks, and nothing has to be asked of the device.
    """

    def __init__(
        self,
        config: ScoringConfig,
        engine: Any,
        groups: GroupSelector,
        lanes: RankLanes,
        seed: int,
        negatives: bool,
        watch: Watch | None = None,
    ) -> None:
        """`negatives`: whether an objective wants the embeddings of rejected rows; `watch` wants scores in warm-up. Raises ConfigError for what cannot be had."""
        self.watch = watch
        self.config, self.engine, self.groups, self.lanes, self.seed, self.negatives = config, engine, groups, lanes, seed, negatives
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        self.last = torch.full((lanes.num_samples,), torch.nan, device=engine.device) if config.every > 1 or config.ahead else None
        self.ready = -1
        self._check(groups.selector)
        self.first_scores = self._first_scores(groups.selector)

    def _check(self, selector: Any) -> None:
        """Raises ConfigError for options that the towers or the selector do not have."""
        config, needs = self.config, selector.needs(selector.warmup_steps)
        for option, found, without in (("every", config.every, 1), ("ahead", config.ahead, False)):
            if found != without and not needs <= {"cosine"}:
                raise ConfigError(
                    f"scoring.{option}: {found}, but {selector.config.name} needs {', '.join(sorted(needs))} of every candidate as it chooses, "
                    f"and only a cosine can be remembered; set scoring.{option}={json.dumps(without)}"
                )
        if config.ahead:
            self._check_ahead()
        if config.image_size is None and config.patches == 1:
            return
        sizes = {name: tower.patch_size for name, tower in self.engine.raw.towers.items()}
        if None in sizes.values() or len(set(sizes.values())) != 1:
            raise ConfigError(
                f"scoring.image_size and scoring.patches need towers that embed parts and sizes of images, with patches of one size; here: {sizes}. "
                "Set scoring.image_size=null and scoring.patches=1.0, or use an open_clip model whose image tower is a ViT"
            )
        (patch,) = set(sizes.values())
        if config.image_size and config.image_size % patch:
            raise ConfigError(f"scoring.image_size: {config.image_size} is no multiple of the towers' patches of {patch} px")

    def _check_ahead(self) -> None:
        """Raises ConfigError where a forward beside training cannot be, or would see what training is writing."""
        why = None
        if self.negatives:
            why = "an objective has rejected rows for negatives, and only their cosines would be remembered; use negatives: selected"
        elif self.engine.stage == 3:
            why = "engine.zero.stage 3 gathers each module's weights as it is reached, for one forward at a time; use stage 2"
        elif any(isinstance(m, _NormBase) and m.track_running_stats for m in self.engine.raw.towers.modules()):
            why = "a tower has BatchNorm, whose running averages training writes while they would be read; use a tower with LayerNorm"
        if why:
            raise ConfigError(f"scoring.ahead: {why}, or set scoring.ahead=false")

    def choose(self, batch: Batch, step: int) -> Choice:
        """The rows to train. Collective in ZeRO stage 3, with the same number of rows embedded on every rank."""
        wanted = self.negatives and not self.groups.selector.trains_all(step)
        if self.late(step):
            return Choice(Selection(torch.arange(len(batch), device=batch.slot.device)), late=True)
        if not self.needs(step) and not wanted:
            return Choice(self.groups.select(batch, None, step)[0])
        rows, padding = self._rows_at(step)
        if rows is not None:
            return self._in_part(batch, rows, padding, step, wanted)
        if step == self.ready:
            return Choice(*self.groups.select(batch, {"cosine": self.last[batch.slot]}, step))
        features = self.embed(batch)
        selection, cosine = self.groups.select(batch, features, step)
        self._remember(batch.slot, cosine, batch.valid)
        return Choice(selection, cosine, features if wanted else None, len(batch))

    def ahead(self, choice: Choice, batch: Batch | None, step: int) -> Choice:
        """Where the options say so: what `step`, the next one, scores of its `batch` (None: there is none) is embedded now, on a GPU beside
        the training that is queued after it. The choice of the step before, which counts these rows.

        What the end of that step may still change is which rows `step` asks for: fewer after an automatic warm-up, none where a selector
        has judged so. `choose` follows that; a row that was scored and is not asked for has a last score that is new.
        """
        if not self.config.ahead or batch is None or self.late(step) or self.needs(step) != {"cosine"}:
            return choice
        with self.engine.beside():
            embedded, _ = self._score(batch, *self._rows_at(step))
        self.ready = step
        return choice._replace(scored=choice.scored + embedded)

    def late(self, step: int) -> bool:
        """Whether the scores of a step come from its training forward, so that it has no scoring pass."""
        return self.config.reuse and self.groups.selector.trains_all(step) and self.needs(step) == {"cosine"}

    def needs(self, step: int) -> frozenset[str]:
        """What has to be known of the candidates at a step, whoever asks."""
        needs = self.groups.selector.needs(step) | (self.watch.needs(step) if self.watch else frozenset())
        return needs | {"cosine"} if step in self.first_scores else needs

    def _first_scores(self, selector: Selector) -> range:
        """The steps at which everything is scored since warm-up scored nothing that could stand in: from where the first lane has
        finished warm-up to where the last has finished the visit after it. Empty where there is no need."""
        visits, plan = selector.config.warmup_visits, self.lanes.layout
        scored = selector.needs(0) or visits == "auto" or (self.config.reuse and selector.trains_all(0))
        asked = self.config.every > 1 and selector.warmup_steps and selector.needs(selector.warmup_steps)
        if scored or not asked:
            return range(0)
        return range(int((plan.size * visits // plan.per_lane).min()), plan.steps_for(visits + 1))

    def _rows_at(self, step: int) -> tuple[Tensor | None, int]:
        """What is scored where there is a scoring pass: all rows in warm-up, and as long as it left nothing that could stand in."""
        rows, padding = (None, 0) if self.groups.selector.in_warmup(step) or step in self.first_scores else self.rows(step)
        return None if rows is None else torch.from_numpy(rows).to(self.engine.device, non_blocking=True), padding

    def rows(self, step: int) -> tuple[np.ndarray | None, int]:
        """The rows of this rank that are scored at `step` after warm-up, int64 (None: all), and how many more other ranks have at most."""
        plan, every = self.lanes.layout, self.config.every
        if every == 1:
            return None, 0
        visit = step * plan.per_lane // plan.size  # of each lane's first row
        scored = (visit == 0) | ((visit + np.arange(plan.lanes)) % every == 0)
        mine = np.flatnonzero(scored[self.lanes.lanes])
        most = int(scored.reshape(-1, len(self.lanes.lanes)).sum(1).max())
        if len(mine) == len(self.lanes.lanes):
            return None, 0
        rows = (mine[:, None] * plan.per_lane + np.arange(plan.per_lane)).ravel()
        return rows, (most - len(mine)) * plan.per_lane

    def _in_part(self, batch: Batch, rows: Tensor, padding: int, step: int, wanted: bool) -> Choice:
        """Embeds some rows; the others have their last score, which is recorded nowhere: the table counts visits that were scored."""
        scored, found = (0, {}) if step == self.ready else self._score(batch, rows, padding)
        embedded = None
        if wanted and found:
            embedded = {name: _spread(found[name][: len(rows)], rows, len(batch)) for name in ("image", "text")}
            embedded["embedded"] = torch.zeros_like(batch.valid).index_fill_(0, rows, True)
        known = self.last[batch.slot]
        stale = torch.ones_like(batch.slot).index_fill_(0, rows, 0).argsort(descending=True, stable=True)[: len(batch) - len(rows)]
        slots, table = batch.slot[stale], self.groups.selector.state_dict()
        before = {name: value[slots] for name, value in table.items()}
        selection, _ = self.groups.select(batch, {"cosine": known}, step)
        for name, value in before.items():
            table[name].index_copy_(0, slots, value)
        seen = torch.full_like(known, torch.nan).index_copy(0, rows, known[rows])
        return Choice(selection, seen, embedded, scored)

    def _score(self, batch: Batch, rows: Tensor | None, padding: int) -> tuple[int, dict[str, Tensor]]:
        """Embeds rows of a batch (None: all) and `padding` more, and remembers their cosines; a sample that stands there twice has one.
        How many rows that were, and their features."""
        if rows is not None:
            filled = torch.cat([rows, rows.new_zeros(padding)])
            batch = batch.map(lambda value: value[filled])
        if not len(batch):
            return 0, {}
        found, own = self.embed(batch), slice(0, len(batch) - padding)
        self._remember(batch.slot[own], kernels.cosine(found["image"], found["text"])[own], batch.valid[own])
        return len(batch), found

    def learn(self, batch: Batch, choice: Choice, trained: Tensor | None, step: int) -> Choice:
        """After the training step: its cosines [k] are scores too, where `reuse` says so. The choice, with what is now known of it."""
        if not self.config.reuse:
            return choice
        if trained is None:
            raise ConfigError("scoring.reuse: the towers give no image and text of one width to compare; set scoring.reuse=false")
        rows = choice.selection.rows
        if choice.late:
            selection, cosine = self.groups.select(batch, {"cosine": trained}, step)
            choice = choice._replace(selection=replace(selection, rows=rows), cosine=cosine)
        self._remember(batch.slot[rows], trained, batch.valid[rows])
        return choice

    def _remember(self, slot: Tensor, cosine: Tensor | None, valid: Tensor) -> None:
        if self.last is not None and cosine is not None:
            self.last.index_copy_(0, slot, torch.where(valid, cosine, self.last[slot]))

    def embed(self, batch: Batch, as_trained: bool = False) -> dict[str, Tensor]:
        """The features of the scoring pass for all rows of a batch; `as_trained`: of whole images, in training's precision."""
        batch, dtype = (batch, None) if as_trained else (self.view(batch), self.dtype)
        rows = self.config.micro_batch or len(batch)
        if rows >= len(batch):
            return self.engine.features(batch, dtype)
        pieces = [slice(first, first + rows) for first in range(0, len(batch), rows)]
        parts = [self.engine.features(batch.map(lambda value, at=at: value[at]), dtype) for at in pieces]
        return {name: torch.cat([part[name] for part in parts]) if value.ndim >= 2 else value for name, value in parts[0].items()}

    def view(self, batch: Batch) -> Batch:
        """The batch as the scoring pass sees it: smaller images, the patches to keep. A sample's patches are the same at every visit,
        for what is compared is its score with its history."""
        config, fields = self.config, dict(batch.fields)
        image = fields.get("image")
        if image is None or (config.image_size is None and config.patches == 1):
            return batch
        if config.image_size:
            small = F.interpolate(image.float(), (config.image_size,) * 2, mode="bilinear", antialias=True, align_corners=False)
            image = fields["image"] = small if image.is_floating_point() else small.round_().to(image.dtype)
        if config.patches < 1:
            count = (image.shape[-1] // next(iter(self.engine.raw.towers.values())).patch_size) ** 2
            lot = hash_ids(self.seed, -4, batch.sample[:, None], torch.arange(count, device=image.device))
            fields[KEPT] = lot.topk(max(1, int(config.patches * count)), dim=1).indices.sort(dim=1).values
        return replace(batch, fields=fields)

    def state_dict(self) -> dict[str, Tensor]:
        """The selector's table, and the scores that stand in: one row a sample."""
        return self.groups.selector.state_dict() | ({} if self.last is None else {"last": self.last})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` gave, of this rank's lanes. Raises ValueError when the length is another one."""
        table = dict(state)
        if self.last is not None:
            self.last.copy_(table.pop("last"))
        self.groups.selector.load_state_dict(table)


def _spread(found: Tensor, rows: Tensor, count: int) -> Tensor:
    """[m, D] as rows `rows` of zeros [count, D]."""
    return found.new_zeros(count, *found.shape[1:]).index_copy_(0, rows, found)
