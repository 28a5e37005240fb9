"""Who reads what, in which order: pure functions of (seed, step).

The shards of a source are permuted once by the seed and laid end to end; lane l is one of L equal slices of that line. A lane is an
endless stream of visits, each in its own seeded order. A global batch takes the same number of consecutive samples of every lane, in
lane order, and rank r of R reads lanes [r L / R, (r + 1) L / R). So the order does not depend on the number of ranks or workers,
resume is arithmetic, and a sample's score history can live with the rank that reads its lane.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.config import ConfigError
from pipeline.hashing import hash_ids

MAX_DEFAULT_LANES = 1024
MIN_GROUP_ROWS = 8


class SourceShape(NamedTuple):
    """What lanes need to know of a source."""

    shard_start: np.ndarray  # int64 [S + 1], first sample of each shard; the last entry is the number of samples
    weight: float  # relative share of the candidates

    @property
    def num_samples(self) -> int:
        return int(self.shard_start[-1])


class Rows(NamedTuple):
    """The candidate rows of one rank at one step."""

    sample: np.ndarray  # int64 [b], global sample id (sources one after the other)
    slot: np.ndarray  # int64 [b], row in the rank's score table
    visit: np.ndarray  # int64 [b]
    skipped: int = 0  # samples that the lanes passed over on their way to these (pipeline/data/walk.py)
    weight: np.ndarray | None = None  # float32 [b], how many samples of its visit a row stands for; None: each for itself


@dataclass(frozen=True)
class Layout:
    """The lanes of a whole run; equal on every rank."""

    sources: tuple[SourceShape, ...]
    batch: int  # N_b
    lanes: int  # L
    groups: int  # G
    window: int
    seed: int
    source: np.ndarray  # int64 [L], the source of each lane
    first: np.ndarray  # int64 [L], where the lane begins on its source's line
    size: np.ndarray  # int64 [L]

    @property
    def per_lane(self) -> int:
        """Samples that one batch takes of one lane."""
        return self.batch // self.lanes

    @property
    def num_samples(self) -> int:
        return int(self.size.sum())

    def steps_for(self, visits: float) -> int:
        """Steps after which every lane has finished that many visits."""
        return int(np.ceil(self.size * visits / self.per_lane).max()) if visits else 0

    def keep(self, rate: float) -> int:
        """Rows trained of one selection group: floor(rate N_b / G + 1e-9). Raises ConfigError when that is none."""
        keep = math.floor(rate * self.batch / self.groups + 1e-9)
        if keep < 1:
            raise ConfigError(
                f"selector.rate: {rate} of a selection group of {self.batch // self.groups} rows keeps no row; raise the rate or lower data.groups"
            )
        return keep

    def mix(self) -> list[float]:
        """The share of candidates that each source really gives (weights are realised in units of one lane)."""
        return [float((self.source == s).mean()) for s in range(len(self.sources))]

    def check_world(self, world_size: int) -> None:
        """Raises ConfigError, with the world sizes that work, unless R divides both L and G."""
        if self.lanes % world_size or self.groups % world_size:
            common = math.gcd(self.lanes, self.groups)
            possible = [r for r in range(1, common + 1) if common % r == 0]
            raise ConfigError(
                f"data.lanes {self.lanes} and data.groups {self.groups} cannot be dealt to {world_size} ranks; "
                f"world sizes that work here: {', '.join(map(str, possible))}. Start one of these, or change data.lanes or data.groups"
            )


def layout(sources: list[SourceShape], batch: int, lanes: int | None, groups: int, window: int, seed: int) -> Layout:
    """Deals the samples to lanes. Raises ConfigError for every impossible combination, with the numbers and a way out."""
    largest = batch & -batch  # the largest power of two that divides the batch
    lanes = lanes or min(largest, MAX_DEFAULT_LANES)
    if batch % lanes:
        raise ConfigError(
            f"data.batch {batch} is not a multiple of data.lanes {lanes}; every lane gives the same number of samples to a batch"
        )
    if batch % groups:
        raise ConfigError(f"data.batch {batch} is not a multiple of data.groups {groups}; selection groups are equally large")
    if batch // groups < MIN_GROUP_ROWS:
        raise ConfigError(
            f"data.groups: {groups} groups of a batch of {batch} have {batch // groups} rows each, at least {MIN_GROUP_ROWS} are needed; lower data.groups"
        )
    source = _deal_lanes(sources, lanes)
    first, size = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
    for s, shape in enumerate(sources):
        mine = np.flatnonzero(source == s)
        if len(mine) > shape.num_samples:
            raise ConfigError(
                f"data.lanes: {len(mine)} lanes for the {shape.num_samples} samples of data.sources.{s}; lower data.lanes to {shape.num_samples} or less"
            )
        edges = np.arange(len(mine) + 1, dtype=np.int64) * shape.num_samples // len(mine)
        first[mine], size[mine] = edges[:-1], np.diff(edges)
    smallest = int(size.min())
    if smallest < batch // lanes:
        s = int(source[size.argmin()])
        raise ConfigError(
            f"data.batch {batch} takes {batch // lanes} samples of a lane that holds {smallest} (data.sources.{s}: {sources[s].num_samples} samples in "
            f"{int((source == s).sum())} lanes), so a sample would come twice in one batch; lower data.batch or that source's weight"
        )
    return Layout(tuple(sources), batch, lanes, groups, window, seed, source, first, size)


def _deal_lanes(sources: list[SourceShape], lanes: int) -> np.ndarray:
    """The source of each lane: weights to whole lanes by largest remainder, spread evenly so that every selection group is mixed."""
    if len(sources) > lanes:
        raise ConfigError(
            f"data.sources: {len(sources)} sources need at least as many lanes, data.lanes is {lanes}; raise data.lanes or data.batch"
        )
    weights = np.array([shape.weight for shape in sources], np.float64)
    exact = weights / weights.sum() * lanes
    count = np.maximum(1, np.floor(exact)).astype(np.int64)
    while count.sum() > lanes:  # the minimum of one lane each was more than there are
        count[np.argmax(count)] -= 1
    for s in np.argsort(-(exact - count), kind="stable")[: lanes - count.sum()]:
        count[s] += 1
    position = np.concatenate([(np.arange(c) + 0.5) / c for c in count])
    owner = np.repeat(np.arange(len(sources)), count)
    return owner[np.argsort(position, kind="stable")]


class RankLanes:
    """The lanes that one rank reads; `rows(step)` is its part of the global batch.

    Memory is 24 bytes per sample of the rank's lanes: the ids, and the order of two visits (a batch spans two at most).
    """

    def __init__(self, layout: Layout, rank: int, world_size: int) -> None:
        layout.check_world(world_size)
        self.layout = layout
        per_rank = layout.lanes // world_size
        self.lanes = np.arange(rank * per_rank, (rank + 1) * per_rank)
        self.size = layout.size[self.lanes]
        self.start = np.concatenate([[0], np.cumsum(self.size)])  # the lanes' rows in the score table
        lines = [_Line(shape, base, s, layout.seed) for s, (shape, base) in enumerate(zip(layout.sources, _bases(layout.sources)))]
        self.ids = np.empty(self.num_samples, np.int64)
        self._pieces = []  # per lane: where the parts of its shards begin
        for i, lane in enumerate(self.lanes):
            ids, pieces = lines[layout.source[lane]].slice(int(layout.first[lane]), int(layout.size[lane]))
            self.ids[self.start[i] : self.start[i + 1]] = ids
            self._pieces.append(pieces)
        self._order = np.zeros((2, self.num_samples), np.int64)
        self._loaded = np.full((2, len(self.lanes)), -1)

    @property
    def num_samples(self) -> int:
        return int(self.start[-1])

    def open_pieces(self) -> int:
        """Shards that these lanes read at a time: a window each."""
        return sum(min(self.layout.window, len(pieces)) for pieces in self._pieces)

    def rows(self, step: int) -> Rows:
        """The candidates of this rank at `step`; b = N_b / R of each array. Any step, in any order, at the same cost within a visit."""
        count = self.layout.per_lane
        position = step * count + np.arange(count)[None, :]
        visit, offset = np.divmod(position, self.size[:, None])
        for parity in (0, 1):
            wanted = np.where(visit[:, 0] % 2 == parity, visit[:, 0], visit[:, -1])
            stale = (wanted % 2 == parity) & (self._loaded[parity] != wanted)
            for i in np.flatnonzero(stale):
                self._order[parity, self.start[i] : self.start[i + 1]] = self.visit_order(i, int(wanted[i]))
                self._loaded[parity, i] = wanted[i]
        place = self._order[visit % 2, self.start[:-1, None] + offset]
        slot = (self.start[:-1, None] + place).ravel()
        return Rows(self.ids[slot], slot, visit.ravel())

    def visit_order(self, i: int, visit: int) -> np.ndarray:
        """The places int64 of lane i in the order of one visit: the lane's shards permuted, then its samples shuffled inside windows of `window` shards."""
        lane, starts, size = int(self.lanes[i]), self._pieces[i], int(self.size[i])
        rank_of_piece = np.empty(len(starts), np.int64)
        rank_of_piece[np.argsort(hash_ids(self.layout.seed, lane, visit, -1, np.arange(len(starts))), kind="stable")] = np.arange(
            len(starts)
        )
        lengths = np.diff(np.append(starts, size))
        window = np.repeat(rank_of_piece // self.layout.window, lengths)
        return np.lexsort((hash_ids(self.layout.seed, lane, visit, np.arange(size)), window))


def _bases(sources: tuple[SourceShape, ...]) -> list[int]:
    """The global id of each source's first sample."""
    return [sum(shape.num_samples for shape in sources[:s]) for s in range(len(sources))]


class _Line:
    """A source's shards, permuted by the seed and laid end to end."""

    def __init__(self, shape: SourceShape, base: int, number: int, seed: int) -> None:
        order = np.argsort(hash_ids(seed, -2, number, np.arange(len(shape.shard_start) - 1)), kind="stable")
        self.shard_first = shape.shard_start[:-1][order] + base
        self.edges = np.concatenate([[0], np.cumsum(np.diff(shape.shard_start)[order])])

    def slice(self, first: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The sample ids of positions [first, first + size), and where in them each shard's part begins."""
        low, high = np.searchsorted(self.edges, [first, first + size - 1], side="right") - 1
        begin = np.maximum(self.edges[low : high + 1], first)
        end = np.minimum(self.edges[low + 1 : high + 2], first + size)
        shift = self.shard_first[low : high + 1] - self.edges[low : high + 1]
        filled = end > begin  # a shard without samples leaves no piece
        begin, end, shift = begin[filled], end[filled], shift[filled]
        ids = np.arange(first, first + size) + np.repeat(shift, end - begin)
        return ids, begin - first
