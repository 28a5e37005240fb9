"""What a run asks of a cluster, from its configuration alone: lanes, batch arithmetic, memory, and a forecast with its assumptions."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ConfigError, to_yaml
from pipeline.data.errors import DataError
from pipeline.data.index import Index
from pipeline.data.lanes import Layout, RankLanes, SourceShape, layout
from pipeline.distributed.views import View
from pipeline.run import RunConfig
from pipeline.selection.rate import RateSchedule
from pipeline.selection.scoring import ScoringConfig
from pipeline.task import check_wiring
from pipeline.towers._views import KEPT
from pipeline.towers.base import TowerData
from pipeline.weights import tower_of
from slurm.cluster import ClusterConfig

SHARD = 10_000  # samples of a shard, where there is no index to ask
UTILISATION = 0.35  # of a device's peak that a step reaches; what ViT training with autocast and overlapped communication gets
TABLE_BYTES, LANE_BYTES = 5, 24  # of one sample: its score and visits on the device; its id and order on the host
BUILT_AT_MOST = 4_000_000  # samples of a rank up to which its lanes are really built and measured


def shapes(config: RunConfig, samples: int | None) -> list[SourceShape]:
    """The sources' sizes: from their indices, or `samples` dealt to them by weight. Raises ConfigError."""
    if samples is None:
        try:
            starts = [Index.open(source.url).shard_start for source in config.data.sources]
        except (DataError, OSError) as error:
            raise ConfigError(f"{error}\nWithout the data, say how many samples there are: --samples 10_000_000") from None
    else:
        weights = np.array([source.weight or 1.0 for source in config.data.sources])
        counts = np.maximum(1, samples * weights / weights.sum()).astype(np.int64)
        starts = [np.append(np.arange(0, count, SHARD, dtype=np.int64), count) for count in counts]
    return [SourceShape(start, source.weight or float(start[-1])) for start, source in zip(starts, config.data.sources)]


def plan(config: RunConfig, world: int, samples: int | None) -> Layout:
    """The lanes of the run. Raises ConfigError where this world size or batch cannot be dealt."""
    data = config.data
    found = layout(shapes(config, samples), data.pool, data.lanes, data.groups, data.window, config.seed)
    found.check_world(world)
    if config.limits:
        config.limits.check(found)
    for visits in (0, math.inf):
        found.keep(config.selector.rate_at(visits))
    return found


def check(config: RunConfig, world: int, before: Mapping[Path, RunConfig] | None = None) -> None:
    """Everything about a run that can be known before it starts and without its data. `before`: folder -> configuration of the runs that it
    will find trained, to start from or to learn from. Raises ConfigError."""
    with _as_if_trained(config, before or {}) as seen:
        check_wiring(seen.towers, seen.objectives, seen.teachers, seen.data)
        for to, origin in seen.init_from.towers.items() if seen.init_from else ():
            tower_of(View(seen.init_from.run).folder, origin.split(".")[0], f"init_from.towers.{to}")
    with torch.device("meta"):
        for objective in config.objectives.values():
            objective.build()
    plan(config, world, config.data.pool * 1000)


@contextmanager
def _as_if_trained(config: RunConfig, before: Mapping[Path, RunConfig]) -> Iterator[RunConfig]:
    """The configuration, with a folder that tells the same in the place of each run that is not there yet."""
    with TemporaryDirectory() as made_up:

        def found(part: Any) -> Any:
            run = getattr(part, "run", None)
            first = before.get(Path(run).absolute()) if run else None
            if first is None:
                members = {name: found(member) for name, member in getattr(part, "members", {}).items()}
                return part.model_copy(update={"members": members}) if members else part
            folder = Path(made_up + first.out)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "resolved.yaml").write_text(to_yaml(first), encoding="utf-8")
            return part.model_copy(update={"run": str(folder)})

        try:
            yield config.model_copy(
                update={
                    "init_from": found(config.init_from),
                    "teachers": {name: found(teacher) for name, teacher in config.teachers.items()},
                }
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace(made_up, "")) from None


class Model(NamedTuple):
    """What the towers cost."""

    parameters: int  # that are trained
    flops: float  # of one sample's forward
    scoring: float  # of one candidate's, as `scoring` sees it: smaller images, some patches
    training: float  # of one trained row's forward, and of its backward through what is not frozen
    frozen: int = 0  # parameters that no optimizer has


def measure(config: RunConfig) -> Model:
    """Builds the towers of tensors that have a shape and no memory, and counts. A tokenizer that is not trained yet counts as configured,
    or, for a debug tower, as a small one. Raises ConfigError for an unknown model."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    parameters, frozen, counts = 0, 0, []
    with TemporaryDirectory() as made_up:
        for tower in config.towers.values():
            tower = tower.untrained()
            if getattr(getattr(tower, "tokenizer", None), "kind", None) == "bpe":
                tower = tower.model_copy(update={"tokenizer": type(tower.tokenizer)()})
            tower.prepare(TowerData(Path(made_up), lambda: ["a caption", "another one"]))
            shapes_only = FakeTensorMode(allow_non_fake_inputs=True)
            with _as_if_it_had_memory(), shapes_only:
                model = tower.build(Path(made_up))  # in train mode: eval's fused attention is not seen by the counter
            parameters += sum(p.numel() for p in model.parameters() if p.requires_grad)
            frozen += sum(p.numel() for p in model.parameters() if not p.requires_grad)
            # evaluation may look at a sample in several views; a tower that trains from a cache alone is counted without it
            decoders = tower.decoders(Path(made_up), train=True) or tower.decoders(Path(made_up), train=False)
            fields = {name: decoder.collate([None]) for name, decoder in decoders.items()}
            scored = scored_fields(config.scoring, fields, model.patch_size)
            for looked_at, backward in ((fields, False), (scored, False), (fields, True)):
                with torch.set_grad_enabled(backward), shapes_only, FlopCounterMode(display=False) as counter:
                    out = model({name: shapes_only.from_tensor(value) for name, value in looked_at.items()})
                    if backward and (trained := [value.sum() for value in out.values() if value.requires_grad]):
                        sum(trained).backward()
                counts.append(counter.get_total_flops())
    flops, scoring, training = (float(sum(counts[kind::3])) for kind in range(3))
    return Model(parameters, flops, scoring, training, frozen)


def scored_fields(config: ScoringConfig, fields: dict[str, Tensor], patch: int | None) -> dict[str, Tensor]:
    """The shapes that Scoring.view gives one sample, of any content."""
    if "image" not in fields or patch is None:
        return fields
    size = config.image_size or fields["image"].shape[-1]
    found = fields | {"image": fields["image"].new_zeros(1, 3, size, size)}
    return found | ({KEPT: torch.arange(max(1, int(config.patches * (size // patch) ** 2)))[None]} if config.patches < 1 else {})


@contextmanager
def _as_if_it_had_memory() -> Iterator[None]:
    """Without Module.to, which cannot move what has no memory; open_clip calls it even for the device a model is on. A number that is read
    from a tensor is 0: timm has the rates of its drop path, which change no count, from one."""
    from torch._subclasses.fake_tensor import FakeTensor

    moved = torch.nn.Module.to
    torch.nn.Module.to = lambda module, *args, **kwargs: module
    FakeTensor.item = lambda value: 0.0 if value.constant is None else value.constant.item()
    try:
        yield
    finally:
        torch.nn.Module.to = moved
        del FakeTensor.item


def zero_bytes(parameters: int, world: int, frozen: int = 0) -> dict[int, dict[str, float]]:
    """Stage -> bytes of a rank for weights (trained and `frozen`), gradients and Adam's two moments, all float32 (bf16 is autocast)."""
    whole, part, weights = 4.0 * parameters, 4.0 * parameters / world, 4.0 * (parameters + frozen)
    return {
        0: {"weights": weights, "gradients": whole, "adam": 2 * whole},
        1: {"weights": weights, "gradients": whole, "adam": 2 * part},
        2: {"weights": weights, "gradients": part, "adam": 2 * part},
        3: {"weights": weights / world, "gradients": part, "adam": 2 * part},
    }


def table_bytes(found: Layout, world: int) -> tuple[int, int]:
    """(device, host) bytes of the rank with the most samples: score table, and lane order."""
    most = int(found.size.reshape(world, -1).sum(axis=1).max())
    return TABLE_BYTES * most, LANE_BYTES * most


def built_bytes(found: Layout, world: int) -> int | None:
    """Bytes of the arrays of rank 0's lanes, really built; None where a rank has too many samples for that to be quick."""
    if found.num_samples // world > BUILT_AT_MOST:
        return None
    lanes = RankLanes(found, 0, world)
    lanes.rows(0)
    return sum(value.nbytes for value in vars(lanes).values() if isinstance(value, np.ndarray)) + sum(
        piece.nbytes for piece in lanes._pieces
    )


def gb(count: float) -> str:
    """Bytes in the unit that reads best."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def lines(config: RunConfig, cluster: ClusterConfig, samples: int | None) -> Iterator[str]:
    """The page of one run."""
    world = cluster.world
    found = plan(config, world, samples)
    steps, batch = config.num_steps(found.num_samples), found.batch
    rate, in_the_end = config.selector.rate_at(math.inf), " in the end" if isinstance(config.selector.rate, RateSchedule) else ""
    keep = found.keep(rate) * found.groups
    warmup = config.selector.last_warmup_step(found.steps_for, steps)
    yield f"ranks        {world} = {cluster.nodes} nodes x {cluster.tasks_per_node}"
    yield f"samples      {found.num_samples:,} ({'given' if samples else 'by the index'}) in {len(found.sources)} source(s)"
    smallest, largest = int(found.size.min()), int(found.size.max())
    yield f"lanes        {found.lanes}, {found.lanes // world} a rank, {smallest:,} to {largest:,} samples each, {found.per_lane} of each in a batch"
    yield f"batch        {batch:,} candidates, {batch // world} a rank; {found.groups} groups of {batch // found.groups}, {found.groups // world} a rank"
    yield f"trained      {keep:,} of them, {keep // world} a rank ({config.selector.name}, rate {rate}{in_the_end})"
    yield f"steps        {steps:,}, of which {warmup:,} gather history; each sample is offered {steps * batch / found.num_samples:.1f} times"
    device, host = table_bytes(found, world)
    built = built_bytes(found, world)
    yield f"score table  {gb(device)} of device memory a rank ({TABLE_BYTES} bytes a sample)"
    yield f"lane order   {gb(host)} of host memory a rank ({LANE_BYTES} bytes a sample)" + (
        f"; built: {gb(built)}" if built is not None else ""
    )
    if skip := config.limits:
        of = "half of it on the device" if config.data.skip else "of host memory"
        yield f"skip         {2 * device // TABLE_BYTES / 1e6:.2f} MB a rank, {of}; at most {skip.share:.0%} of a lane's samples at a visit"
    model = measure(config)
    held = f" and {model.frozen / 1e6:.1f} M frozen ones" if model.frozen else ""
    yield f"model        {model.parameters / 1e6:.1f} M parameters{held}, {model.flops / 1e9:.2f} GFLOP for a forward of one sample"
    yield "memory       of a rank for weights, gradients and Adam in float32; activations, autocast copies and buffers come on top"
    for stage, parts in zero_bytes(model.parameters, world, model.frozen).items():
        yield f"  ZeRO {stage}     {gb(sum(parts.values())):>10}  ({', '.join(f'{name} {gb(value)}' for name, value in parts.items())})"
    yield f"checkpoint   {gb(12 * model.parameters + 4 * model.frozen + TABLE_BYTES * found.num_samples)} for weights, Adam and the score table, before compression"
    yield from forecast(config, model, cluster, batch, trained_rows(config, found, steps - warmup), (warmup, steps))


def trained_rows(config: RunConfig, found: Layout, steps: int) -> float:
    """Rows trained of a batch, on average over the `steps` after warm-up, of which at most some thousand are looked at: selector.rate may be a schedule."""
    looked = range(0, max(1, steps), max(1, steps // 1000))
    return found.groups * sum(found.keep(config.selector.rate_at(step * found.batch / found.num_samples)) for step in looked) / len(looked)


def forecast(config: RunConfig, model: Model, cluster: ClusterConfig, batch: int, keep: float, steps: tuple[int, int]) -> Iterator[str]:
    """Candidates a second after warm-up, and how long the run takes with it. `keep`: rows of a batch that are trained then, on average;
    `steps`: where warm-up ends, and all of them."""
    if cluster.peak_tflops is None:
        yield "speed        no forecast: the cluster file gives no peak_tflops"
        return
    (warm, rows), (later, kept) = (step_cost(config, model, batch, keep, warmup) for warmup in (True, False))
    rate = cluster.world * cluster.peak_tflops * 1e12 * UTILISATION
    # engine.micro_batch embeds every row a second time
    each = [model.training + model.flops * ((config.engine.micro_batch or math.inf) < many / cluster.world) for many in (rows, kept)]
    seconds = (later * batch * model.flops + kept * each[1]) / rate
    first = (warm * batch * model.flops + rows * each[0]) / rate
    total = steps[0] * first + (steps[1] - steps[0]) * seconds
    yield f"speed        {batch / seconds:,.0f} candidates/s, {kept / seconds:,.0f} trained/s, {seconds * 1000:.0f} ms a step" + (
        f" ({first * 1000:.0f} ms in warm-up); {total / 3600:.1f} h in all" if steps[0] else f"; {total / 3600:.1f} h in all"
    )
    yield f"  assuming   {cluster.peak_tflops:g} TFLOP/s a device at {UTILISATION:.0%}; {later:.2f} forwards to score a candidate"
    yield f"             ({f'{warm:.2f} in warm-up, ' if steps[0] else ''}by scoring.* in FLOP, its precision aside), {each[1] / model.flops:.2f} to train a row"
    if config.selector.scope == "global":
        yield "             (the rows that selector.scope global pads the ranks' shares with are not counted: 4 % on 8 ranks of 1,280, 16 % on 64 of 160)"
    yield "             (no frozen teacher); gathering and gradients hidden behind it; loaders that keep up with"
    yield f"             {batch / seconds / cluster.nodes:,.0f} images/s on each node"
    yield f"starts       {math.ceil(total / max(1, cluster.minutes * 60 - cluster.signal_delay))} of {cluster.minutes} minutes"


def step_cost(config: RunConfig, model: Model, batch: int, keep: float, warmup: bool) -> tuple[float, float]:
    """Forwards that the scoring pass costs a candidate, and how many rows are trained, at a step of warm-up or after it."""
    selector = config.selector.build(1, warmup_steps=1)
    step = 0 if warmup else 1
    every_row, needs = selector.trains_all(step), selector.needs(step)
    if warmup and config.selector.warmup_visits == "auto":
        needs |= {"cosine"}
    rejected = any(objective.rejected() for objective in config.objectives.values()) and not every_row
    free = not (needs or rejected) or (config.scoring.reuse and every_row and needs == {"cosine"})
    share = 0.0 if free else model.scoring / model.flops / (1 if warmup else config.scoring.every)
    return share, batch if every_row else keep


def describe(top: Path, runs: dict[Path, Any], cluster: ClusterConfig, samples: int | None, dependency: str | None) -> None:
    """Prints the submission of a run or sweep, and the page of its first run."""
    from submitit.slurm.slurm import _make_sbatch_string

    submissions = top / "launch"
    parameters = cluster.slurm(top.name, submissions, dependency)
    command = f"python -P -u -m submitit.core._submit {submissions}"
    array = {"map_count": len(runs)} if len(runs) > 1 else {}
    print(f"== {top}: {len(runs)} run(s), would be submitted as\n")
    print(_make_sbatch_string(command=command, folder=submissions, **parameters, **array))
    for run in list(runs)[1:]:
        print(f"   and {run}")
    print("\n".join(lines(next(iter(runs.values())), cluster, samples)), end="\n\n")
