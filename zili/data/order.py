"""The order in which data is read: shuffles and mixtures in which any position can be computed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from zili.errors import DataError

DOCUMENTS, WINDOWS, MIXTURE = range(3)  # what a shuffle is for: each has a stream of its own
_SMALLEST_BLOCK = 256
_SMALLEST_WEIGHT = 1e-6


def permutation(count: int, seed: int, *purpose: int) -> NDArray[np.int64]:
    """A shuffle of `0 .. count-1` that depends on nothing but the arguments.

    numpy promises that a bit generator's raw stream never changes, and of `Generator.permutation` that it may (NEP 19).
    So the shuffle is the order of raw random numbers, and a run can resume under a newer numpy.
    """
    keys = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=purpose)).random_raw(count)
    return np.argsort(keys, kind="stable")


class Mixture:
    """Which source the global sample `n` comes from, and which of that source's samples it is.

    Samples come in blocks, shuffled within. The first b blocks hold the largest-remainder share of each source. So its
    count is within one sample of its weight at the end of every block, however long the run. The share is a closed
    form: any sample is found without walking there.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(Fraction(weight) for weight in weights)
        self.shares = [Fraction(weight) / total for weight in weights]
        """The weights, exactly, of sum one."""
        smallest = min(self.shares)
        if smallest < _SMALLEST_WEIGHT:
            raise DataError(f"mixture weight {float(smallest):.1e} of the whole; {_SMALLEST_WEIGHT} is the least.")
        # Largest remainders can shrink by one as the total grows; two expected samples a block keep each
        # source's count from ever falling between blocks.
        self.block = max(_SMALLEST_BLOCK, ceil(2 / smallest))
        self._seed = seed
        self._cached = lru_cache(maxsize=4)(self._build)

    def counts(self, blocks: int) -> NDArray[np.int64]:
        """Samples of each source `[sources]` in the first `blocks` blocks."""
        quotas = [share * blocks * self.block for share in self.shares]
        counts = [int(quota) for quota in quotas]
        left = blocks * self.block - sum(counts)
        by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
        for index in by_remainder[:left]:
            counts[index] += 1
        return np.array(counts, dtype=np.int64)

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For global samples `[N]`: their sources `[N]`, and which of the source's samples they are `[N]`."""
        source, position = np.empty_like(samples), np.empty_like(samples)
        blocks, inside = np.divmod(samples, self.block)
        for block in np.unique(blocks):
            here = blocks == block
            sources, positions = self._cached(int(block))
            source[here], position[here] = sources[inside[here]], positions[inside[here]]
        return source, position

    def _build(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        before, after = self.counts(block), self.counts(block + 1)
        sources = np.repeat(np.arange(len(before)), after - before)
        sources = sources[permutation(self.block, self._seed, MIXTURE, block)]
        positions = np.empty_like(sources)
        for index, first in enumerate(before):
            mine = np.flatnonzero(sources == index)
            positions[mine] = first + np.arange(len(mine))
        return sources, positions
