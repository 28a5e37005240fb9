"""Whether an item finds its related one: recall at k over a pool that holds no query, whole and with one modality taken away."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.data.fetch import Fetch
from pipeline.data.sources import SourceConfig, Sources
from pipeline.evaluation.retrieval import retrieval
from pipeline.evaluation.student import forwards
from pipeline.towers._prompt import words

KS = (1, 10, 100)
ONLY = {"image_only": "image", "text_only": "text"}  # figure: what of each item is shown


@torch.inference_mode()
def measure(run: Any, url: str, *, batch: int = 256, workers: int = 2) -> dict[str, Any]:
    """Of the pairs of these shards: `pairs`, and under `related` for `whole`, `image_only`, `text_only` and `short_text` the recalls r1, r10,
    r100 of the partner among all second items, as evaluation/retrieval gives them. `run`: a pipeline.run.TrainedRun.

    image_only and text_only take the other modality from queries and pool; short_text are the queries whose text, as the
    tower reads it, is one word or none; None for recalls that nothing asks, such as short_text of shards without texts.
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
    texts = Fetch(sources, {"text": run.decoders["text"]}, seed=None)
    counts = torch.tensor([_words(texts, int(sample)) for sample in torch.cat(kept)])
    short = (counts <= 1) & counts.any()
    related = {name: recalls(found[f"{name} item"], found[f"{name} related"], torch.ones_like(short)) for name in ("whole", *ONLY)}
    return {"pairs": len(short), "related": related | {"short_text": recalls(found["whole item"], found["whole related"], short)}}


def recalls(queries: Tensor, pool: Tensor, which: Tensor) -> dict[str, Any] | None:
    """Recalls of row i of `pool` [n, D] by row i of `queries` [n, D], for the queries `which` (bool [n]); None where nothing is asked.

    Rows of zeros, of items that lack what is shown, ask nothing and are not in the pool: their cosine is 0 with every query.
    """
    there = (pool != 0).any(1)
    rows = torch.nonzero(which & (queries != 0).any(1) & there).flatten()
    if not len(rows):
        return None
    place = there.cumsum(0) - 1
    return retrieval(queries[rows], pool[there], [[at] for at in place[rows].tolist()], ks=KS)["image_to_text"]


def _words(texts: Fetch, sample: int) -> int:
    """Of a sample's text by the tower's own reading; 0 without one."""
    members = texts.sources.members(sample)
    member = next((name for name in texts.members["text"] if name in members), None)
    return 0 if member is None else words(texts.decoders["text"](members[member], member.rsplit(".", 1)[-1], None))
