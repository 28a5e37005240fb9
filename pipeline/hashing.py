"""Random choices without a generator: a hash of (seed, ids) that is the same in Python, numpy and torch, on any device."""

from functools import reduce
from typing import Any

import numpy as np
import torch

__all__ = ["hash_ids"]

# splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014; constants of its mix13 variant)
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 0xFFFF_FFFF_FFFF_FFFF
_POSITIVE = 0x7FFF_FFFF_FFFF_FFFF
_STEPS, _FACTORS, _SHIFTS = np.uint64(_STEP), (np.uint64(_FIRST), np.uint64(_SECOND)), (np.uint64(30), np.uint64(27), np.uint64(31))


def hash_ids(seed: int, *parts: Any) -> Any:
    """Hashes integers to integers in [0, 2**63), a bijection of 64 bits per part with the top bit cut off.

    `seed` is any Python int (taken modulo 2**64). Each part is an int, a numpy integer array or a torch integer tensor; parts
    broadcast together and their order matters. The result is an int when every part is one, a torch int64 tensor (on the tensors'
    device) when any part is a tensor, else a numpy int64 array; the three agree bit for bit, and so do all devices. Raises TypeError
    for what is no integer.
    """
    parts = tuple(_checked(part) for part in parts)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if not tensors:
        return _fold(seed, parts)
    device = tensors[0].device
    if device.type == "cpu":  # numpy works on the same memory and costs a third of torch per small operation
        return torch.from_numpy(np.asarray(_fold(seed, tuple(p.numpy() if isinstance(p, torch.Tensor) else p for p in parts))))
    wide = (p.to(torch.int64) if isinstance(p, torch.Tensor) else torch.as_tensor(_signed(p), device=device) for p in parts)
    return reduce(lambda state, part: _mix_torch(part ^ state), wide, _signed(_mix_int(seed))) & _POSITIVE


def _fold(seed: int, parts: tuple) -> Any:
    """Over ints and arrays: the ints at the front are folded as ints, and everything after the first array is an array."""
    state: Any = _mix_int(seed)
    for part in parts:
        if isinstance(part, int) and isinstance(state, int):
            state = _mix_int(state ^ (part & _MASK))
            continue
        words = np.uint64(part & _MASK) if isinstance(part, int) else part.astype(np.int64, copy=False).view(np.uint64)
        state = _mix_numpy(np.bitwise_xor(words, np.uint64(state) if isinstance(state, int) else state))
    if isinstance(state, int):
        return state & _POSITIVE
    return (state & np.uint64(_POSITIVE)).view(np.int64)


def _mix_int(word: int) -> int:
    word = (word + _STEP) & _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def _mix_numpy(word: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # 0-d results are numpy scalars, which warn where arrays wrap in silence
        word = word + _STEPS  # a copy; the rest works in place
        word ^= word >> _SHIFTS[0]
        word *= _FACTORS[0]
        word ^= word >> _SHIFTS[1]
        word *= _FACTORS[1]
        word ^= word >> _SHIFTS[2]
        return word


def _mix_torch(word: torch.Tensor) -> torch.Tensor:
    # torch has no unsigned 64-bit arithmetic: products wrap alike, and a right shift needs the copies of the sign bit masked off
    word = word + _signed(_STEP)
    word = (word ^ ((word >> 30) & (_MASK >> 30))) * _signed(_FIRST)
    word = (word ^ ((word >> 27) & (_MASK >> 27))) * _signed(_SECOND)
    return word ^ ((word >> 31) & (_MASK >> 31))


def _signed(word: Any) -> Any:
    """A Python int as the int64 of the same 64 bits; arrays as they are."""
    if not isinstance(word, int):
        return word.astype(np.int64, copy=False) if isinstance(word, np.ndarray) else word
    word &= _MASK
    return word - (1 << 64) if word > _POSITIVE else word


def _checked(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        integer = not part.is_floating_point() and not part.is_complex()
    elif isinstance(part, np.ndarray):
        integer = np.issubdtype(part.dtype, np.integer) or part.dtype == bool
    elif isinstance(part, int | np.integer):
        return int(part)
    else:
        integer = False
    if not integer:
        found = f"{type(part).__name__} of {part.dtype}" if hasattr(part, "dtype") else repr(part)
        raise TypeError(f"hash_ids: every part must be an int or an integer array or tensor, found {found}")
    return part
