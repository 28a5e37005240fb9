"""Scores and choices: the one place of cosine, differential, history update and top-k. No loop over samples, no wait for the device."""

from functools import lru_cache
from importlib import import_module
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from pipeline.hashing import hash_ids
from pipeline.kernels import score_numpy

__all__ = ["Scored", "cosine", "score", "top_k", "update_history"]


class Scored(NamedTuple):
    """What `score` found out about one group of g rows."""

    rows: Tensor | None  # int64 [keep], ascending; None when `keep` was None
    differential: Tensor  # float32 [g], history minus current score; the group's median where there was no history
    current: Tensor  # float32 [g], max(100 cos, 0)
    history: Tensor  # float32 [g], the history before this visit; means nothing where there was none
    known: Tensor  # bool [g], whether there was one


def cosine(image: Tensor, text: Tensor) -> Tensor:
    """Row-wise cosine of two feature matrices, float32 [B] in [-1, 1] whatever their dtype and norms; a row of zeros has cosine 0.

    `image` and `text` are [B, D]. Autocast does not reach into it. Raises ValueError when the shapes differ.
    """
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(f"cosine: expected image and text of one shape [B, D], found {tuple(image.shape)} and {tuple(text.shape)}")
    if image.device.type == "cuda" and not (torch.is_grad_enabled() and (image.requires_grad or text.requires_grad)):
        return import_module("pipeline.kernels.gpu").cosine(image, text)
    image, text = image.float(), text.float()
    dot = (image * text).sum(1)
    for rows in (image, text):  # one after the other: the product of two small norms could be 0
        dot = dot / torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return dot.clamp(-1, 1)


def score(
    cosine: Tensor,
    *,
    slot: Tensor,
    history: Tensor,
    visits: Tensor,
    keep: int | None = None,
    sample: Tensor | None = None,
    valid: Tensor | None = None,
    momentum: float | None = None,
    freeze: int | None = None,
    mean: bool = False,
    seed: int = 0,
) -> Scored:
    """One visit of one selection group: differential, choice, then the history update in place (DISSect, arXiv 2507.12998).

    With s_i = max(100 cos_i, 0) and h_i the history: d_i = h_i - s_i, the `keep` rows with the largest d are chosen, and only then
    h_i is updated, for every valid row, chosen or not. A row without history takes the median of the group's known differentials
    (of the lower two, when even): it is neither first nor last. When nothing is known all rows tie.

    `cosine` float [g], `slot` int64 [g] into the table `history` float32 [N] (100 cos scale) and `visits` uint8 [N] (0: no history);
    both tables change in place. `valid` bool [g]: rows that are False, or whose cosine is NaN, are neither written nor counted and
    are chosen last. Ties are broken by a hash of (`seed`, `sample` or else `slot`, visits), never by position.
    `momentum`, `freeze` and `mean` are `update_history`'s. Raises ValueError for shapes that do not fit, IndexError for slots outside.
    """
    if cosine.dim() != 1 or slot.shape != cosine.shape:
        raise ValueError(f"score: expected cosine [g] and slot [g], found {tuple(cosine.shape)} and {tuple(slot.shape)}")
    check_keep(keep, slot.shape[0])
    given = (cosine.detach().float(), slot, history, visits, keep, slot if sample is None else sample, valid)
    rule = {"momentum": momentum, "freeze": freeze, "mean": mean}
    with record_function("kernels.score"):
        if slot.device.type == "cuda":
            named = {"slot": slot, "history": history, "visits": visits, "keep": keep, "sample": sample, "valid": valid}
            return import_module("pipeline.kernels.gpu").score(cosine, **named, **rule, seed=seed)
        return _score_numpy(*given, seed, rule) if slot.device.type == "cpu" else _score_torch(*given, seed, rule)


def _score_torch(
    cosine: Tensor,
    slot: Tensor,
    history: Tensor,
    visits: Tensor,
    keep: int | None,
    sample: Tensor,
    valid: Tensor | None,
    seed: int,
    rule: dict,
) -> Scored:
    """For every device. Nothing is asked of it: no branch on a value, no choice by mask."""
    current = (100 * cosine).clamp_min(0)
    countable = current == current  # NaN is no score
    if valid is not None:
        countable &= valid
    before, count = history.index_select(0, slot), visits.index_select(0, slot)
    known = count > 0
    differential = _neutral_where_unknown(before - current, known, countable)
    rows = None
    if keep is not None:
        # sample and visits in one word: half the hashing
        rows = top_k_torch(differential, keep, hash_ids(seed, sample * 256 + count), countable)
    _record_torch(history, visits, slot, current, countable, before, count, **rule)
    return Scored(rows, differential, current, before, known)


def _score_numpy(
    cosine: Tensor,
    slot: Tensor,
    history: Tensor,
    visits: Tensor,
    keep: int | None,
    sample: Tensor,
    valid: Tensor | None,
    seed: int,
    rule: dict,
) -> Scored:
    table, counter, slots = history.numpy(), visits.numpy(), slot.numpy()
    check_slots(slots, table)
    before, count = table[slots], counter[slots]
    change, current, countable, known = score_numpy.differential(cosine.numpy(), None if valid is None else valid.numpy(), before, count)
    rows = None
    if keep is not None:
        rows = torch.from_numpy(score_numpy.top_k(change, keep, score_numpy.tie(seed, sample.numpy(), count), countable))
    if score_numpy.has_duplicates(slots, table, before):
        gathered = (torch.from_numpy(value) for value in (current, countable, before, count))
        _record_torch(history, visits, slot, *gathered, **rule)
    else:
        score_numpy.record(table, counter, slots, current, countable, before, count, **rule)
    return Scored(rows, *(torch.from_numpy(value) for value in (change, current, before, known)))


def _neutral_where_unknown(differential: Tensor, known: Tensor, countable: Tensor) -> Tensor:
    # nanmedian and not median of a choice of rows: how many are known must not be asked of the device
    middle = torch.where(known & countable, differential, torch.nan).nanmedian(0).values.nan_to_num(0.0)
    return torch.where(known, differential, middle)


def update_history(
    history: Tensor,
    visits: Tensor,
    slot: Tensor,
    current: Tensor,
    *,
    valid: Tensor | None = None,
    momentum: float | None = None,
    freeze: int | None = None,
    mean: bool = False,
) -> None:
    """Writes the scores of one visit into the table, in place: `history` float32 [N], `visits` uint8 [N], `slot` int64 [g], `current` [g].

    The new history is `current`; with `momentum` m it is m h + (1 - m) current, and `current` at the first visit; with `mean` it is
    the running mean over the visits. A sample whose visits have reached `freeze` keeps its history; its visits still count, up to 255.
    Rows with `valid` (bool [g]) False change nothing.

    A sample may stand in a group twice (the end of one visit and the start of the next). Its visits rise by the number of its valid
    rows, but its history is updated once, with the score of its last valid row (its first, when that one reaches `freeze`). The
    result does not depend on the order in which a device writes. Raises IndexError for a slot outside the table (on a GPU torch's
    own assertion).
    """
    countable = torch.ones_like(slot, dtype=torch.bool) if valid is None else valid
    before, count = history.index_select(0, slot), visits.index_select(0, slot)
    _record_torch(history, visits, slot, current, countable, before, count, momentum, freeze, mean)


def _record_torch(
    history: Tensor,
    visits: Tensor,
    slot: Tensor,
    current: Tensor,
    valid: Tensor,
    before: Tensor,
    count: Tensor,
    momentum: float | None,
    freeze: int | None,
    mean: bool,
) -> None:
    """`update_history` for a caller that has read the table already: `before` and `count` are its rows at `slot`."""
    count = count.float()
    # The table itself is the scratch paper on which the rows of one sample agree: first on which of them counts (the largest turn),
    # then on how many they are. Sorting the slots would cost three times as much, a scratch buffer 4 bytes for every sample.
    rising, falling = _turns(slot.shape[0], slot.device)
    turn, choice = rising, current
    if freeze is not None:
        turn, choice = torch.where(count == freeze - 1, falling, rising), torch.cat((current, current.flip(0)))
    winner = history.index_fill_(0, slot, 0).scatter_reduce_(0, slot, turn * valid, "amax").index_select(0, slot)
    new = choice.index_select(0, winner.long())
    visited = history.index_copy_(0, slot, count).scatter_add_(0, slot, valid.float()).index_select(0, slot)
    if mean:
        new = before + (new - before) / (count + 1)
    elif momentum is not None:
        new = torch.where(count > 0, momentum * before + (1 - momentum) * new, new)
    written = visited > count
    if freeze is not None:
        written &= count < freeze
    # rows of one sample write one value
    history.index_copy_(0, slot, torch.where(written, new, before))
    visits.index_copy_(0, slot, visited.clamp_max_(255).to(torch.uint8))


@lru_cache(maxsize=16)
def _turns(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers that pick the last row of a sample by being larger, and the first: places in (scores, scores backwards)."""
    rising = torch.arange(rows, dtype=torch.float32, device=device)
    return rising, rising.flip(0) + rows


def top_k(value: Tensor, keep: int, tie: Tensor, valid: Tensor | None = None) -> Tensor:
    """The rows with the `keep` largest values, int64 [keep], ascending.

    `value` float [g] is compared as float32; equal values are ordered by `tie` (int64 [g] in [0, 2**63), a hash: its upper 28 bits
    count); rows equal in both, such as one sample that stands in the group twice, are as good as each other. NaN comes after every
    number and rows with `valid` False (bool [g]) after that: they are chosen only when there are too few others. Raises ValueError
    when `keep` is not in 1..g.
    """
    check_keep(keep, value.shape[0])
    value = value.detach().float()
    if value.device.type != "cpu":
        return top_k_torch(value, keep, tie, valid)
    return torch.from_numpy(score_numpy.top_k(value.numpy(), keep, tie.numpy(), None if valid is None else valid.numpy()))


def top_k_torch(value: Tensor, keep: int, tie: Tensor, valid: Tensor | None) -> Tensor:
    """`top_k` of checked arguments, for every device."""
    # A float32 leaves the low 29 bits of a double free for the tie: one number orders by both. The tiny summand keeps zeros of either
    # sign from becoming denormals, and powers of two beyond float32 stand for what is infinite, no number, or not valid.
    key = value.double().add_(2.0**-200).nan_to_num_(-(2.0**300), 2.0**200, -(2.0**200))
    if valid is not None:
        key.masked_fill_(~valid, -(2.0**400))
    key = key.view(torch.int64).bitwise_or_(tie >> 35).view(torch.float64)
    return key.topk(keep, sorted=False).indices.sort().values


def check_keep(keep: int | None, rows: int) -> None:
    """Raises ValueError unless `keep` of `rows` rows can be kept."""
    if keep is not None and not 1 <= keep <= rows:
        raise ValueError(f"top_k: cannot keep {keep} of {rows} rows; expected 1 to {rows}")


def check_slots(slots: np.ndarray, table: np.ndarray) -> None:
    """Raises IndexError for a slot outside of the table."""
    if slots.size and (slots.min() < 0 or slots.max() >= table.size):  # numpy would count negative ones from the end
        raise IndexError(f"slots {slots.min()} to {slots.max()}: the rows of the score table are numbered from 0 to {table.size - 1}")
