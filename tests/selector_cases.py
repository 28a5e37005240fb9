"""What the selectors of the folder need before they can be built; shared by the contract test and the one over ranks."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLES = 20_000  # ids that a table of the tests covers


@cache
def needed(name: str) -> dict[str, str]:
    """Settings without which a selector cannot be built."""
    if name != "rho_loss":
        return {}
    path = Path(mkdtemp()) / "table.parquet"
    loss = np.random.default_rng(0).random(SAMPLES, np.float32)
    pq.write_table(pa.table({"sample": np.arange(len(loss)), "loss": loss}), path)
    return {"table": str(path)}
