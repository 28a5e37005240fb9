"""Seeded caption noise: some samples get the caption of another one that is called differently."""

from collections.abc import Sequence

import numpy as np


def swapped(names: Sequence[str], rate: float, seed: int) -> np.ndarray:
    """int64 [N]: whose caption each sample gets; round(rate * N) samples get one of another name, the rest keep their own.

    The captions of the chosen samples are permuted among them, so every caption stays as frequent as it was, and two samples of one
    name get independent wrong captions (a shift by name would be a rule that a model can learn). Raises ValueError where that many
    different names do not exist.
    """
    rng = np.random.default_rng([seed, 0x6E6F697365])
    count, kinds = len(names), np.unique(np.asarray(names, dtype=object), return_inverse=True)[1]
    chosen = rng.permutation(count)[: round(rate * count)]
    given = np.arange(count)
    if not len(chosen):
        return given
    most = np.bincount(kinds[chosen]).max()
    if 2 * most > len(chosen):
        raise ValueError(
            f"--noise {rate}: of {len(chosen)} samples to be swapped {most} have one name, so not all can get another; take another rate"
        )
    source = rng.permutation(chosen)
    while len(clash := np.flatnonzero(kinds[chosen] == kinds[source])):
        for at in clash:  # each clash changes places with a sample drawn at random; a swap that makes a new clash is not done
            other = rng.integers(len(chosen))
            if kinds[chosen[at]] != kinds[source[other]] and kinds[chosen[other]] != kinds[source[at]]:
                source[at], source[other] = source[other], source[at]
    given[chosen] = source
    return given
