"""What the selectors of the folder need before they can be built; shared by the contract test and the one over ranks."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.teachers.cached import FORMAT, write_part

SAMPLES = 20_000  # ids that a table of the tests covers


@cache
def reference(width: int) -> Path:
    """Random unit rows of all samples, as tools.cache_teacher writes them."""
    folder, rows = Path(mkdtemp()), np.random.default_rng(1).standard_normal((2, SAMPLES, width)).astype(np.float16)
    facts = {"format": FORMAT, "index": "none", "samples": SAMPLES, "dtype": "float16", "constants": {}}
    write_part(
        folder, 0, dict(zip(("image", "text"), rows)), np.ones(SAMPLES, bool), facts | {"features": {"image": [width], "text": [width]}}
    )
    return folder


@cache
def needed(name: str) -> dict[str, str]:
    """Settings without which a selector cannot be built."""
    if name == "jest":
        return {"reference": str(reference(8))}
    if name != "rho_loss":
        return {}
    path = Path(mkdtemp()) / "table.parquet"
    loss = np.random.default_rng(0).random(SAMPLES, np.float32)
    pq.write_table(pa.table({"sample": np.arange(len(loss)), "loss": loss}), path)
    return {"table": str(path)}
