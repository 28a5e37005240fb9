"""Whether an item finds its related one: recall at k over a pool that holds no query, whole and with one modality taken away."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.decode import captions
from pipeline.data.errors import BadSample
from pipeline.data.fetch import Fetch
from pipeline.data.lanes import Rows
from pipeline.data.loader import batches
from pipeline.data.sources import SourceConfig, Sources
from pipeline.evaluation.retrieval import retrieval
from pipeline.task import MAIN

KS = (1, 10, 100)
ONLY = {"image_only": "image", "text_only": "text"}  # figure: what of each item is shown


def relates(towers: dict[str, Any]) -> bool:
    """Whether the student gives vectors of two related items."""
    return {"item", "related"} <= set(towers[MAIN].gives())


@torch.inference_mode()
def measure_items(run: Any, url: str, *, batch: int = 256, workers: int = 2) -> dict[str, Any]:
    """Of the pairs of these shards: `pairs`, and `items`, `image_only`, `text_only` and `short_text` with the recalls r1, r10, r100 of the
    partner among all second items, as evaluation/retrieval gives them. `run`: a pipeline.run.TrainedRun.

    image_only and text_only take the other modality from queries and pool; short_text are the queries whose text is one word or none.
    Raises ConfigError, DataError.
    """
    config, tower = run.config.towers[MAIN], run.task.towers[MAIN]
    sources = Sources.open(run.config.data.model_copy(update={"sources": [SourceConfig(url=url)]}))
    fetch = Fetch(sources, config.decoders(run.folder, train=False), seed=None)
    every = np.arange(sources.num_samples)
    requests = [Rows(part, part, np.zeros_like(part)) for part in np.split(every, range(batch, len(every), batch))]
    parts: dict[str, list[Tensor]] = {}
    kept = []
    for rows in batches(fetch, requests, workers):
        rows = rows.to(run.device)
        kept.append(rows.sample[rows.valid].cpu())
        for figure, field in ({"items": ""} | ONLY).items():
            shown = {name: value for name, value in rows.fields.items() if field in name}
            with torch.autocast(run.device.type, run.config.engine.dtype, enabled=run.config.engine.precision != "fp32"):
                out = tower(shown)
            for side in ("item", "related"):
                parts.setdefault(f"{figure} {side}", []).append(out[side][rows.valid].float().cpu())
    found = {name: torch.cat(values) for name, values in parts.items()}
    short = torch.tensor([_words(sources, int(sample)) <= 1 for sample in torch.cat(kept)])
    result: dict[str, Any] = {"pairs": len(short)}
    for figure in ("items", *ONLY):
        result[figure] = recalls(found[f"{figure} item"], found[f"{figure} related"], torch.ones_like(short))
    return result | {"short_text": recalls(found["items item"], found["items related"], short)}


def recalls(queries: Tensor, pool: Tensor, which: Tensor) -> dict[str, Any] | None:
    """Recalls of row i of `pool` [n, D] by row i of `queries` [n, D], for the queries `which` (bool [n]); None where nothing is asked.

    Rows of zeros, of items that lack what is shown, ask and answer nothing.
    """
    rows = torch.nonzero(which & (queries != 0).any(1) & (pool != 0).any(1)).flatten()
    if not len(rows):
        return None
    return retrieval(queries[rows], pool, [[row] for row in rows.tolist()], ks=KS)["image_to_text"]


def _words(sources: Sources, sample: int) -> int:
    try:
        return len(captions(sources.members(sample).get("txt", b""))[0].split())
    except BadSample:
        return 0
