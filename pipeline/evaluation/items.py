"""Whether an item finds its related one: recall at k over a pool that holds no query, whole and with one modality taken away."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.data.decode import captions
from pipeline.data.errors import BadSample
from pipeline.data.sources import SourceConfig, Sources
from pipeline.evaluation.retrieval import retrieval
from pipeline.evaluation.student import forwards

KS = (1, 10, 100)
ONLY = {"image_only": "image", "text_only": "text"}  # figure: what of each item is shown


@torch.inference_mode()
def measure(run: Any, url: str, *, batch: int = 256, workers: int = 2) -> dict[str, Any]:
    """Of the pairs of these shards: `pairs`, and under `related` for `whole`, `image_only`, `text_only` and `short_text` the recalls r1, r10,
    r100 of the partner among all second items, as evaluation/retrieval gives them. `run`: a pipeline.run.TrainedRun.

    image_only and text_only take the other modality from queries and pool; short_text are the queries whose `txt` is one word or none.
    Raises ConfigError, DataError.
    """
    parts: dict[str, list[Tensor]] = {}
    kept = []
    for rows, whole in forwards(run, [url], batch=batch, workers=workers):
        kept.append(rows.sample[rows.valid].cpu())
        for figure, field in ({"whole": ""} | ONLY).items():
            shown = {name: value for name, value in rows.fields.items() if field in name}
            out = run.encode(replace(rows, fields=shown)) if field else whole
            for side in ("item", "related"):
                parts.setdefault(f"{figure} {side}", []).append(out[side][rows.valid].float().cpu())
    found = {name: torch.cat(values) for name, values in parts.items()}
    sources = Sources.open(run.config.data.model_copy(update={"sources": [SourceConfig(url=url)]}))
    short = torch.tensor([_words(sources, int(sample)) <= 1 for sample in torch.cat(kept)])
    related = {name: recalls(found[f"{name} item"], found[f"{name} related"], torch.ones_like(short)) for name in ("whole", *ONLY)}
    return {"pairs": len(short), "related": related | {"short_text": recalls(found["whole item"], found["whole related"], short)}}


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
