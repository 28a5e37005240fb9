"""Which tile a launch takes: one table, by architecture, kind of number and sizes. No timing at run time: the ranks of a run would disagree.

The entries were chosen by what ahead-of-time compilation says of them (`python -m tools.compile_kernels`: registers, no spills, shared
memory) and by arithmetic: 128 x 128 with 128 registers runs twice on a multiprocessor, one's exponentials under the other's products; from
D = 768 on the products outweigh them, and 128 x 256 fetches a quarter less from the L2. None has been timed on a GPU yet: a tuning script
passes `config=` to `sums` and `gradients`, and this table is edited by what it finds.
"""

from typing import NamedTuple

import torch

__all__ = ["TABLE", "Config", "Entry", "Tile", "architecture", "choose"]


class Tile(NamedTuple):
    """One compiled shape: a program computes `rows` x `cols` logits, `depth` features at a time."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


class Config(NamedTuple):
    """All that may be tuned. The chunk is what is written of P at a time: it bounds the workspace of backward and should fit the L2."""

    sums: Tile
    write: Tile
    sigmoid: Tile  # both for SigLIP, whose two sums need more registers
    careful: Tile
    chunk: tuple[int, int]  # rows and columns of P
    partials: int = 2**27  # bytes of partial sums of one strip of rows


class Entry(NamedTuple):
    """Holds from so many rows (and columns) and so many features on."""

    rows: int
    width: int
    config: Config


def _same(tile: Tile, careful: Tile, chunk: tuple[int, int]) -> Config:
    return Config(tile, tile, tile, careful, chunk)


_SMALL, _MIDDLE, _WIDE = Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 4)
_AMPERE = Tile(128, 128, 32, 8, 4)  # under 99 KB of shared memory: sm_86 and sm_89 run it too
_FLOAT, _AMPERE_FLOAT = Tile(64, 64, 32, 8, 3), Tile(64, 64, 16, 8, 3)
_HALF_CHUNK, _FLOAT_CHUNK = (4096, 4096), (2048, 4096)  # 32 MB of P

# (architecture, kind of number): the last entry that holds is taken
TABLE: dict[tuple[int, str], tuple[Entry, ...]] = {
    (90, "half"): (
        Entry(0, 0, _same(_SMALL, _SMALL, _HALF_CHUNK)),
        Entry(2048, 0, _same(_MIDDLE, _SMALL, _HALF_CHUNK)),
        Entry(16384, 768, Config(_WIDE, _WIDE, _MIDDLE, _SMALL, _HALF_CHUNK)),
    ),
    (90, "float"): (Entry(0, 0, _same(_FLOAT, _FLOAT, _FLOAT_CHUNK)),),
    (80, "half"): (
        Entry(0, 0, _same(_SMALL, _SMALL, _HALF_CHUNK)),
        Entry(2048, 0, _same(_AMPERE, _SMALL, _HALF_CHUNK)),
    ),
    (80, "float"): (Entry(0, 0, _same(_AMPERE_FLOAT, _AMPERE_FLOAT, _FLOAT_CHUNK)),),
}


def architecture(device: torch.device) -> int:
    """90 for Hopper and newer, else 80; what is interpreted on a CPU takes Hopper's entries."""
    return 90 if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0) else 80


def choose(device: torch.device, dtype: torch.dtype, rows: int, cols: int, width: int) -> Config:
    """The entry for [rows, width] against [cols, width] of one `dtype`."""
    entries = TABLE[architecture(device), "float" if dtype == torch.float32 else "half"]
    return [entry.config for entry in entries if entry.rows <= min(rows, cols) and entry.width <= width][-1]
