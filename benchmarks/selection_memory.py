"""A cell of benchmarks/selection.py without loader, record and checkpoints: all samples decoded once and kept in memory.

The same configuration, initial weights, order of samples, selector, selection groups, objective, optimizer and evaluation as
`python -m pipeline train`, one process, float32: what is left out changes no number that is compared, and a run of small towers takes
seconds instead of a minute, most of which went into decoding the same images at every visit.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config import ConfigError
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import RankLanes, Rows, layout
from pipeline.data.sources import Sources
from pipeline.data.walk import Walk
from pipeline.distributed.comm import LocalComm
from pipeline.evaluation.evaluate import HeldOut, judge_selection, measure
from pipeline.evaluation.selection_quality import LOG_SCHEMA
from pipeline.run import RunConfig, build_task, compete, make_decoders
from pipeline.selection.groups import GroupSelector
from pipeline.selection.scoring import Scoring
from pipeline.selection.warmup import Watch, visits_of
from pipeline.towers.base import TowerData
from pipeline.types import Batch, Selection, StepOutput


class Run:
    """One cell. Raises ConfigError for what this loop does not have."""

    stage, beside = 0, staticmethod(nullcontext)  # of Engine, as Scoring sees it

    def __init__(self, config: RunConfig) -> None:
        if config.engine.precision != "fp32" or config.teachers or config.init_from or config.scoring.precision == "fp16":
            raise ConfigError("memory: true: needs engine.precision fp32, scoring.precision fp32 or bf16, no teachers or init_from")
        self.config, self.folder, self.comm = config, Path(config.out), LocalComm()
        torch.set_num_threads(config.engine.threads or 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sources = Sources.open(config.data)
        config.selector.check(self.sources)
        plan = layout(self.sources.shapes, config.data.pool, config.data.lanes, config.data.groups, config.data.window, config.seed)
        self.steps, self.lanes = config.num_steps(self.sources.num_samples), RankLanes(plan, 0, 1)
        for tower in config.towers.values():
            tower.prepare(TowerData(self.folder, self.sources.captions))
        self.decoders = make_decoders(config, self.folder, train=True)
        self._same_at_every_visit()
        torch.manual_seed(config.seed)
        self.task = self.raw = build_task(config, self.folder, self.comm)
        self.device = torch.device("cpu")
        self.optimizer = config.optimizer.build(self.task)
        selector = config.selector.build(plan.num_samples, config.selector.last_warmup_step(plan.steps_for, self.steps), config.seed)
        self.groups = GroupSelector(selector, *compete(config, plan))
        rule = config.data.skip.rule(self.lanes, self.device) if config.data.skip else selector.rule(self.steps)
        self.walk = Walk(self.lanes, rule, self.device) if rule else None
        self.watch = Watch(selector, self.comm, plan.steps_for, self.folder)
        rejected = any(objective.rejected() for objective in config.objectives.values())
        self.scoring = Scoring(config.scoring, self, self.groups, self.lanes, config.seed, rejected, self.watch)
        began = time.process_time()
        self.samples = self._decode()
        self.loading = (time.process_time() - began) / self.sources.num_samples  # CPU seconds of a sample, read and decoded once
        self.scored = self.trained = 0
        self.log: list[pa.Table] = []

    def _same_at_every_visit(self) -> None:
        """Raises ConfigError where a visit would see something else of a sample than another one does: all are decoded once."""
        plain = make_decoders(self.config, self.folder, train=False)
        varied = [name for name, decoder in self.decoders.items() if decoder.settings() != plain[name].settings()]
        if varied:
            raise ConfigError(
                f"memory: true: decodes once, but {', '.join(varied)} is augmented; set augmentation to null, or memory to false"
            )
        count = self.sources.num_samples
        if (captions := sum(1 for _ in self.sources.captions(count))) > count:
            raise ConfigError(
                f"memory: true: decodes once, but the {count} samples have {captions} captions, of which each visit draws one"
            )

    def _decode(self) -> Batch:
        every = np.arange(self.sources.num_samples)
        return Fetch(self.sources, self.decoders, self.config.seed)._batch(Rows(every, every, np.zeros_like(every)))

    def train(self) -> float:
        """All steps; gives the CPU seconds that scoring, choosing and training took."""
        began, selector = time.process_time(), self.groups.selector
        if self.walk:
            self.walk.begin(0)
        coming = self._batch(0)
        for step in range(self.steps):
            if self.walk:
                self.walk.advance(step)
            batch, coming = coming, self._batch(step + 1) if step + 1 < self.steps else None
            choice = self.scoring.choose(batch, step)
            choice = self.scoring.ahead(choice, coming, step + 1)
            chosen = choice.selection
            trained = batch.take(chosen.rows, choice.features)
            out = self.step(trained, chosen, step)
            selector.learn(trained, out.per_sample)
            choice = self.scoring.learn(batch, choice, out.cosine, step)
            self.watch.step(choice.cosine, batch, step + 1)
            if self.walk and not selector.in_warmup(step):
                self.walk.rule.note(batch, chosen)
            self.scored += choice.scored
            self.trained += len(chosen.rows)
            self._note(step, batch, chosen, choice.cosine)
        return time.process_time() - began

    def _batch(self, step: int) -> Batch:
        """The candidates of a step, the next one of the walk where there is one."""
        rows = self.walk.next() if self.walk else self.lanes.rows(step)
        batch = self.samples.take(torch.from_numpy(rows.sample))
        batch.slot, batch.visit = torch.from_numpy(rows.slot), torch.from_numpy(rows.visit)
        batch.weight = None if rows.weight is None else torch.from_numpy(rows.weight)
        return batch

    @torch.no_grad()
    def features(self, batch: Batch, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The scoring pass, with autocast to `dtype`, and what evaluation embeds with."""
        self.task.eval()
        try:
            with torch.autocast("cpu", dtype or torch.float32, enabled=dtype not in (None, torch.float32)):
                return self.task(batch, "features")
        finally:
            self.task.train()

    def step(self, batch: Batch, chosen: Selection, step: int) -> StepOutput:
        """Forward, backward, clip, update, bounds: Engine.step for one process."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.rate_at(step, self.steps)
        out = self.task(batch, "train", chosen)
        out.loss.backward()
        if self.config.engine.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.task.parameters(), self.config.engine.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step()
        with torch.no_grad():
            for parameter, low, high in self.task.bounds():
                parameter.clamp_(low, high)
        return out

    def _note(self, step: int, batch: Batch, chosen: Selection, cosine: torch.Tensor | None) -> None:
        kept = np.zeros(len(batch), bool)
        kept[chosen.rows.numpy()] = True
        nothing = np.full(len(batch), np.nan, np.float32)
        score = nothing if cosine is None else np.maximum(100 * cosine.numpy(), 0)
        ranked = nothing if chosen.ranked_by is None else chosen.ranked_by.float().numpy()
        columns = [np.full(len(batch), step, np.int32), batch.visit.numpy().astype(np.int16), batch.sample.numpy(), score, ranked, kept]
        self.log.append(pa.table([pa.array(column) for column in columns], schema=LOG_SCHEMA))

    def result(self) -> dict[str, Any]:
        """What result.json holds of a real run, as far as the grid reads it, and `loading_seconds`, the CPU seconds that reading and
        decoding all that was offered would have taken. The log is written where a real run has it."""
        (self.folder / "selection").mkdir(exist_ok=True)
        pq.write_table(
            pa.concat_tables(self.log), self.folder / "selection" / f"step-{self.steps:08d}-rank0000.parquet", compression="zstd"
        )
        config = self.config.evaluation.model_copy(update={"probe": False})
        held = HeldOut.open(config, self.config.data, lambda: set(self.sources.captions()))
        found, _ = measure(held, config, self.decoders, self.features, torch.device("cpu"))
        warmup = visits_of(self.folder, self.config.selector.warmup_visits)
        quality = judge_selection(self.folder, self.sources, [source.url for source in self.config.data.sources], warmup)
        samples = {"scored": self.scored, "trained": self.trained}
        return found | {"selection": quality, "samples": samples, "loading_seconds": self.loading * self.steps * self.lanes.layout.batch}


def run(config: RunConfig) -> tuple[dict[str, Any], float]:
    """(result, CPU seconds of training) of one run."""
    one = Run(config)
    seconds = one.train()
    return one.result(), seconds
