"""Run by test_scope on every rank: every selector with scope global on given features, so that only the choice can differ.

python -m tests.ranks.choices DATA OUT: rank 0 writes, by selector, the samples chosen at each step, and the score table by sample id.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import load, names_in
from pipeline.data.lanes import RankLanes, layout
from pipeline.data.sources import Sources
from pipeline.distributed.comm import Comm, connect
from pipeline.run import RunConfig
from pipeline.selection.groups import GlobalSelector
from pipeline.types import EVERY, Batch
from tests.runs import DEBUG
from tests.selector_cases import needed

BATCH, RATE, VISITS = 64, 0.25, 4


def choose(name: str, data: Path, comm: Comm) -> dict:
    """What one selector does in all visits; equal on every rank."""
    sources = Sources.open(load(RunConfig, DEBUG, [f"data.sources.0.url={data}"]).data)
    plan = layout(sources.shapes, BATCH, 8, 4, 2, 0)
    lanes = RankLanes(plan, comm.rank, comm.size)
    config = importlib.import_module(f"pipeline.selection.{name}").Config(rate=RATE, warmup_visits=1, scope="global", **needed(name))
    selector = GlobalSelector(config.build(lanes.num_samples, plan.steps_for(1), seed=3), BATCH, int(RATE * BATCH), comm)
    make = torch.Generator().manual_seed(1)
    steps = plan.steps_for(VISITS)
    given = torch.nn.functional.normalize(
        torch.randn(steps, 2, sources.num_samples, 16, generator=make), dim=3
    )  # of all samples at all steps
    broken = torch.rand(sources.num_samples, generator=make) < 0.1
    kept, padded = [], 0
    for step in range(steps):
        rows = lanes.rows(step)
        batch = Batch(*map(torch.from_numpy, (rows.sample, rows.slot, rows.visit)), ~broken[torch.from_numpy(rows.sample)], {})
        batch.weight = 1.0 + batch.sample % 3
        image, text = given[step][:, batch.sample]
        found, _ = selector.select(batch, {"image": image, "text": text, "scale": torch.tensor([14.0])}, step)
        padding = torch.zeros(len(found.rows), dtype=torch.bool) if found.padding is None else found.padding
        taken = batch.take(found.rows, {"image": image, "text": text}, found.padding)
        assert torch.equal(taken.valid, batch.valid[found.rows] & ~padding)
        left, here = taken.unselected, int((~padding).sum())
        assert int(left["valid"].sum()) == int(batch.valid.sum()) - int(taken.valid.sum())  # what is not trained is left, and nothing twice
        assert all(weight.shape == found.rows.shape for weight in found.weights.values())
        assert name != "info_batch" or torch.equal(found.weights[EVERY], batch.weight)  # those of this rank's rows
        ids = torch.full((BATCH,), -1).index_copy_(0, torch.arange(here), batch.sample[found.rows[~padding]])
        everyones = comm.gather(ids)
        kept.append(sorted(everyones[everyones >= 0].tolist()))
        shapes = comm.gather(torch.tensor([len(found.rows)])).tolist()
        assert len(set(shapes)) == 1 and round(sum(shapes) / found.scale) == len(kept[-1])
        padded += sum(shapes) - len(kept[-1])
    table = torch.zeros(sources.num_samples, 2)
    own = selector.selector.scores
    table[torch.from_numpy(lanes.ids)] = torch.stack([own.score, own.visits.float()], 1)
    return {"kept": kept, "table": comm.sum(table).tolist(), "padded": padded}


if __name__ == "__main__":
    alone = len(sys.argv) > 3
    if not alone:
        dist.init_process_group("gloo")
    try:
        comm = connect(torch.device("cpu"))
        seen = {name: choose(name, Path(sys.argv[1]), comm) for name in names_in("pipeline.selection")}
        if comm.rank == 0:
            Path(sys.argv[2]).write_text(json.dumps(seen), encoding="utf-8")
    finally:
        if not alone:
            dist.destroy_process_group()
