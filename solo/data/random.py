"""Counter-based random numbers: every number is a pure function of the words that name it.

A sample's numbers depend on (seed, epoch, index, view) and on nothing else: not on the batch, worker, rank or engine
that draws them, so resuming, changing the number of workers or splitting a batch over ranks changes no image.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDER = 0x6F72646572  # keeps the order of an epoch independent of the numbers its samples draw


def mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64 words of any shape."""
    z = words + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key(*words: int | np.ndarray) -> np.ndarray:
    """One uint64 key per row from integers and integer arrays that broadcast together."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = mix(state ^ np.asarray(word, dtype=np.int64).astype(np.uint64))
    return state


class Draws:
    """The random numbers of one view of n samples; each call returns the next ones.

    Args:
        seed: of the run.
        epoch: from 0.
        index: [n] positions of the samples in their dataset.
        view: number of the view in the batch.
    """

    def __init__(self, seed: int, epoch: int, index: np.ndarray, view: int) -> None:
        self._key = key(seed, epoch, view, np.asarray(index))
        self._drawn = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """[n] float64, uniform on [low, high)."""
        self._drawn += 1
        words = mix(self._key + np.array([self._drawn], dtype=np.uint64) * _GOLDEN)
        return low + (high - low) * _unit(words)

    def skip(self, count: int) -> None:
        """Leave out the next ``count`` numbers, as if they had been drawn."""
        self._drawn += count

    def permutation(self, k: int) -> np.ndarray:
        """[n, k] int64, each row a uniformly random order of 0..k-1."""
        return np.argsort(np.stack([self.uniform() for _ in range(k)], axis=1), axis=1, kind="stable")


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which epoch ``epoch`` visits n samples: [n] int64, a permutation."""
    return np.argsort(key(_ORDER, seed, epoch, np.arange(n)), kind="stable")


def integers(high: int, *words: int | np.ndarray) -> np.ndarray:
    """int64 on 0..high-1, one per row of ``key(*words)``."""
    return (_unit(key(*words)) * high).astype(np.int64)


def _unit(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
