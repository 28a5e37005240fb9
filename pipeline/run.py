"""RunConfig, the root of a configuration, and build(), the only place where parts are put together."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config import ConfigError, Strict, component, digest, dump, load, to_yaml, unknown
from pipeline.data.decode import Decoder
from pipeline.data.fetch import Fetch
from pipeline.data.fields import join
from pipeline.data.lanes import Layout, layout
from pipeline.data.loader import DataModule
from pipeline.data.sources import DataConfig, Sources, cache_folder
from pipeline.data.walk import Limits
from pipeline.distributed import checkpoint
from pipeline.distributed.checkpoint import CheckpointConfig
from pipeline.distributed.comm import Comm, LocalComm
from pipeline.distributed.engine import Engine, EngineConfig
from pipeline.distributed.home import Home, folder_of, open_home, together
from pipeline.distributed.launch import commit, describe_device, start
from pipeline.distributed.optimizer import OptimizerConfig
from pipeline.distributed.saver import Saver
from pipeline.distributed.stop import Stop, StopConfig
from pipeline.distributed.views import View
from pipeline.distributed.watchdog import Watchdog, WatchdogConfig
from pipeline.evaluation.evaluate import EvaluationConfig
from pipeline.evaluation.watched import watcher
from pipeline.objectives.base import ObjectiveConfig
from pipeline.record.metrics import Record, RecordConfig
from pipeline.selection.base import SelectorConfig
from pipeline.selection.groups import GlobalSelector, GroupSelector
from pipeline.selection.scoring import Scoring, ScoringConfig
from pipeline.selection.warmup import Watch
from pipeline.task import Task, check_wiring, feature_names
from pipeline.teachers.base import TeacherConfig, Teachers
from pipeline.towers.base import TowerConfig, TowerData
from pipeline.trainer import Trainer
from pipeline.types import Batch
from pipeline.weights import InitFrom, begin, weights_file

TowerField = component("pipeline.towers", TowerConfig)
ObjectiveField = component("pipeline.objectives", ObjectiveConfig)
SelectorField = component("pipeline.selection", SelectorConfig)
TeacherField = component("pipeline.teachers", TeacherConfig)

# may differ between the runs of one folder: they change neither the samples, nor the choices, nor the weights
FREE = (
    "out",
    "data.sources",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.cache_gb",
    "data.max_bad_fraction",
    "checkpoint",
    "record",
    "evaluation",
    "stop",
    "watchdog",
    "engine.zero",
    "engine.micro_batch",
    "scoring.micro_batch",
    "engine.compile",
)


class RunConfig(Strict):
    """One training run. Both stages are this, with other towers, objectives and data."""

    out: str = Field(description="the run folder: a path that all ranks see, or the URL of a folder in an object store")
    seed: int = 0
    steps: int | None = Field(None, ge=1, description="optimizer steps; or give visits")
    visits: float | None = Field(None, gt=0, description="how often each sample is offered, on average; or give steps")
    data: DataConfig
    towers: dict[str, TowerField]
    objectives: dict[str, ObjectiveField]
    selector: SelectorField
    scoring: ScoringConfig = ScoringConfig()
    teachers: dict[str, TeacherField] = Field(default_factory=dict, description="frozen; their features are read as <teacher>.<feature>")
    init_from: InitFrom | None = Field(None, description="initial weights of towers, from another run")
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    record: RecordConfig = RecordConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    stop: StopConfig = StopConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="after")
    def _one_length(self) -> "RunConfig":
        if (self.steps is None) == (self.visits is None):
            raise ValueError("give either steps or visits")
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> "RunConfig":
        self.selector.fits(self.objectives)
        if self.data.skip:
            self.data.skip.beside(self.selector.name, self.selector.passes_over() is not None)
        if self.limits:
            self.limits.fits(self.data.workers, self.data.prefetch, self.scoring.every)
        return self

    @model_validator(mode="after")
    def _known_towers(self) -> "RunConfig":
        for name in self.init_from.towers if self.init_from else ():
            if name.split(".")[0] not in self.towers:
                raise ValueError(f"init_from.towers: {unknown('tower', name.split('.')[0], self.towers)}")
        return self

    @property
    def limits(self) -> Limits | None:
        """Of what is passed over before it is read, by data.skip or by the selector; None: everything is read."""
        return self.data.skip.limits if self.data.skip else self.selector.passes_over()

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or max(1, int(self.visits * num_samples / self.data.pool))

    def binding(self) -> dict[str, Any]:
        """The part of the configuration that a checkpoint must agree with."""
        values = dump(self)
        for path in FREE:
            *parents, last = path.split(".")
            place = values
            for part in parents:
                place = place[part]
            place.pop(last)
        del values["teachers"]  # the digests of what they are decide; a folder may move
        values["data"]["weights"] = [source.weight for source in self.data.sources]  # shards may move, their shares decide the order
        return values


def build(config: RunConfig) -> tuple[Trainer, Home]:
    """The trainer of a configuration, at the step its folder has reached, and that folder, which the caller closes.

    Collective. Raises ConfigError, DataError, CheckpointError.
    """
    check_wiring(config.towers, config.objectives, config.teachers, config.data)
    cache = cache_folder(config.data)
    accelerator, comm = start(config.engine, folder_of(config.out, cache), config.record.trackers)
    home = open_home(config.out, cache, comm, config.checkpoint.upload_timeout)
    try:
        return _wire(config, accelerator, home), home
    except BaseException:
        home.close(well=False)
        raise


def _wire(config: RunConfig, accelerator: Any, home: Home) -> Trainer:
    folder, comm = home.folder, home.comm
    sources = together(comm, lambda: Sources.open(config.data))
    plan = layout(sources.shapes, config.data.pool, config.data.lanes, config.data.groups, config.data.window, config.seed)
    plan.check_world(comm.size)
    teachers = together(comm, lambda: Teachers.open(config.teachers, sources))
    facts = {"config": config.binding(), "index": sources.digest, "lanes": plan.lanes, "groups": plan.groups, "teachers": teachers.digests}
    facts["reference"] = together(comm, lambda: config.selector.check(sources))
    checkpoint.agree(folder, facts)  # before anything in the folder is touched
    steps = config.num_steps(sources.num_samples)
    warmup = config.selector.last_warmup_step(plan.steps_for, steps)
    size, keep = compete(config, plan)
    decoders = prepare(config, home, sources)
    torch.manual_seed(config.seed)  # initial weights; every later draw has a seed of its own
    task = build_task(config, folder, comm)
    if not checkpoint.committed(folder):
        together(comm, lambda: begin(task.towers, config.init_from, config.towers, teachers.all))
    engine = Engine(config.engine, config.optimizer, accelerator, comm, task, steps, config.seed)
    needed = {teacher for tower in config.towers.values() for teacher in tower.follows()}
    fetch = Fetch(sources, decoders, config.seed, teachers.rows, needed)
    data = DataModule(config.data, plan, comm.rank, comm.size, fetch, steps, engine.device)
    sources.check_cache(config.data, data.lanes, comm.local_size)
    selector = config.selector.build(data.lanes.num_samples, warmup, config.seed)
    selector.scores.to(engine.device)
    data.follow(selector.rule(steps))
    record = Record(config.record, folder, comm, accelerator, sources.num_samples, steps, config.seed)
    groups = GlobalSelector(selector, size, keep, comm) if config.selector.scope == "global" else GroupSelector(selector, size, keep)
    saver = Saver(config.checkpoint, folder, comm, home.taken, home.uploads)
    stop = Stop(config.stop, comm, home.superseded, lambda: saver.failed() or data.trouble is not None)
    facts |= {"world_size": comm.size, "commit": commit(folder)}
    watchdog = Watchdog(config.watchdog, comm, folder)
    teachers.to(engine.device, config.engine.dtype, engine.autocast, config.engine.micro_batch)
    rejected = any(objective.rejected() for objective in config.objectives.values())
    scoring = Scoring(config.scoring, engine, groups, data.lanes, config.seed, rejected, Watch(selector, comm, plan.steps_for, folder))
    trainer = Trainer(folder, steps, data, groups, scoring, engine, record, stop, saver, facts, watchdog, teachers)
    if config.evaluation.every and config.evaluation.data:
        plain = make_decoders(config, folder, train=False)
        trainer.evaluate = together(comm, lambda: watcher(config.towers)(config, folder, engine, record, sources, plain))
        trainer.evaluate_every = config.evaluation.every
    if comm.rank == 0:
        describe(folder, config, sources, plan, engine, steps, warmup)
        accelerator.init_trackers("training", config={"config": to_yaml(config)})
    home.fetch(data.lanes)
    trainer.resume()
    return trainer


def compete(config: RunConfig, plan: Layout) -> tuple[int, Callable[[float], int]]:
    """How many rows compete, those of a selection group or of the whole batch (selector.scope), and for how many places: a function of the
    steps since warm-up. Raises ConfigError."""
    plan, rate_at = replace(plan, groups=1) if config.selector.scope == "global" else plan, config.selector.rate_at
    for visits in (0, math.inf):  # both ends of it are possible
        plan.keep(rate_at(visits))
    return plan.batch // plan.groups, lambda steps: plan.keep(rate_at(steps * plan.batch / plan.num_samples))


def prepare(config: RunConfig, home: Home, sources: Sources) -> dict[str, Decoder]:
    """The decoders of towers and teachers. Rank 0 does first what is done once (a tokenizer); resume finds it done, for these towers and samples."""
    folder, comm = home.folder, home.comm
    done, this = folder / "prepared", digest([dump(config)["towers"], dump(config)["init_from"], sources.digest])

    def once() -> None:
        if comm.rank or (done.is_file() and done.read_text(encoding="utf-8") == this):
            return
        for tower in config.towers.values():
            tower.prepare(TowerData(folder, sources.captions))
        if config.init_from:
            config.init_from.prepare(config.towers, folder)
        done.write_text(this, encoding="utf-8")

    together(comm, once)
    home.share()
    return make_decoders(config, folder, train=True)


def make_decoders(config: RunConfig, folder: Path, train: bool) -> dict[str, Decoder]:
    """Field name -> decoder, over all towers, and all teachers while training. Raises ConfigError where two readers of one disagree."""
    towers = {f"towers.{name}": tower.decoders(folder, train) for name, tower in config.towers.items()}
    return join(towers, {f"teachers.{name}": teacher.decoders() for name, teacher in config.teachers.items()} if train else None)


def build_task(config: RunConfig, folder: Path, comm: Comm) -> Task:
    """Towers and objectives with fresh weights, on the CPU."""
    towers = {name: tower.build(folder) for name, tower in config.towers.items()}
    objectives = {name: (objective.weight, objective.build()) for name, objective in config.objectives.items()}
    trained = {feature for objective in config.objectives.values() for feature in objective.trains()}
    follows = {name: tower.follows() for name, tower in config.towers.items()}
    return Task(towers, objectives, comm, set(feature_names(config.towers)) - trained, follows)


class TrainedRun:
    """A finished or interrupted run, opened to be used: its configuration, its student's weights, its preprocessing."""

    def __init__(self, run: str | Path, which: str = "newest") -> None:
        """`run`: its folder, or the URL of that. `which`: newest, best, or a step. Raises ConfigError, CheckpointError, DataError."""
        self.view = View(run)
        folder = self.view.folder
        if not (folder / "resolved.yaml").is_file():
            raise ConfigError(f"{run}: is no run folder, it has no resolved.yaml; give the `out` of a run that was trained")
        self.folder, self.config = folder, load(RunConfig, folder / "resolved.yaml")
        self.view.weights(which)
        weights = weights_file(folder, which, "--checkpoint")
        self.task = build_task(self.config, folder, LocalComm())
        self.task.load_state_dict(load_file(weights))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.task.to(self.device).eval()
        self.decoders = make_decoders(self.config, folder, train=False)

    @torch.inference_mode()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Features of a batch, in eval mode and the precision the run was trained in."""
        with torch.autocast(self.device.type, self.config.engine.dtype, enabled=self.config.engine.precision != "fp32"):
            return self.task(batch, "features")


def describe(folder: Path, config: RunConfig, sources: Sources, plan: Layout, engine: Engine, steps: int, warmup: int) -> None:
    """Writes resolved.yaml and facts.json before the first step, and prints what is about to happen."""
    checkpoint.write_durably(folder / "resolved.yaml", to_yaml(config))  # a run that is started again may be killed here
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.raw.parameters())
    facts = {
        "device": describe_device(engine.device),
        "world_size": engine.comm.size,
        "parameters": parameters,
        "samples": sources.num_samples,
        "steps": steps,
        "warmup_steps": warmup,
        "lanes": plan.lanes,
        "groups": plan.groups,
        "mix": plan.mix(),
        "torch": torch.__version__,
        "commit": commit(folder),
    }
    checkpoint.write_durably(folder / "facts.json", json.dumps(facts, indent=1))
    size, keep = compete(config, plan)
    print(
        f"{folder}: {sources.num_samples} samples, {parameters / 1e6:.1f} M parameters on {facts['device']} x {engine.comm.size}; {steps} steps of "
        f"{plan.batch} candidates in {plan.batch // size} groups; {config.selector.name} keeps "
        f"{' to '.join(str(kept) for kept in dict.fromkeys((keep(0), keep(math.inf))))} of {size} after step "
        + (f"{warmup} at the latest, when the spread of the scores has peaked" if config.selector.warmup_visits == "auto" else f"{warmup}"),
        flush=True,
    )
