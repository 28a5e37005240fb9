"""RHO-LOSS (arXiv 2206.07137): the pairs whose loss is largest above what a model that never saw them can reach."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field

from pipeline.config import ConfigError
from pipeline.data.sources import Sources
from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig

INDEX = b"index"  # key of the file's metadata: the digest of the samples that it is for


class Config(SelectorConfig):
    """The table is made by `python -m tools.irreducible_loss RUN TABLE`."""

    table: str | None = Field(None, description="Parquet file with sample (int64, from 0 on) and loss (float): the irreducible loss")

    def check(self, sources: Sources) -> str | None:
        """See SelectorConfig.check. A table that another program made may lack the digest of the samples; their number is compared."""
        loss, index = read_table(self.table)
        if len(loss) != sources.num_samples or index not in (None, sources.digest):
            raise ConfigError(
                f"selector.table: {self.table}: is of other samples: {len(loss)} of index {(index or 'unknown')[:12]}, and data.sources hold "
                f"{sources.num_samples} of index {sources.digest[:12]}. Make it again with python -m tools.irreducible_loss RUN TABLE"
            )
        return hashlib.sha256(loss.tobytes()).hexdigest()

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "RhoLoss":
        """See SelectorConfig.build. Raises ConfigError where there is no table, or it is none."""
        return RhoLoss(self, num_samples, warmup_steps, seed)


class RhoLoss(Selector):
    """Ranks by l_i(theta) - l_i(reference): what is noisy or hopeless is so for the reference too, what is learned has a small first term.

    Both losses are contrastive; the reference's negatives come from random groups, the learner's from its selection group, so the table
    is best made with groups of that size. Memory: 4 bytes for each sample of the whole set on every rank, on the device.
    """

    def __init__(self, config: Config, num_samples: int, warmup_steps: int, seed: int) -> None:
        super().__init__(config, num_samples, warmup_steps, seed)
        self.irreducible = torch.from_numpy(read_table(config.table)[0])

    def needs(self, step: int) -> frozenset[str]:
        """The loss once warm-up is over."""
        return frozenset() if self.in_warmup(step) else frozenset({"loss"})

    def select(self, group: Candidates) -> Selection:
        """`keep` rows by excess loss. Raises ValueError when `group.loss` is None, IndexError for a sample that the table lacks."""
        if self.in_warmup(group.step):
            return self.warmup(group)
        loss = self.given(group, "loss").float()
        self.irreducible = self.irreducible.to(loss.device)
        return self.ranked(group, loss - self.irreducible[group.slot if group.sample is None else group.sample])


def read_table(path: str | None) -> tuple[np.ndarray, str | None]:
    """Losses float32 [N] by sample id, and the digest of the samples' index, where the file says it. Raises ConfigError."""
    how = "Make one with python -m tools.irreducible_loss RUN TABLE"
    if path is None or not Path(path).is_file():
        raise ConfigError(f"selector.table: {path or 'none given'}: rho_loss needs a table of irreducible losses. {how}")
    try:
        table = pq.read_table(path, columns=["sample", "loss"])
        sample, loss = table["sample"].to_numpy(), table["loss"].to_numpy().astype(np.float32)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"selector.table: {path}: is no such table ({error}). {how}") from None
    order = np.argsort(sample, kind="stable")
    if not len(sample) or not np.array_equal(sample[order], np.arange(len(sample))) or not np.isfinite(loss).all():
        raise ConfigError(f"selector.table: {path}: expected each sample id from 0 on once, with a finite loss. {how}")
    return loss[order], (table.schema.metadata or {}).get(INDEX, b"").decode() or None
