"""Whether one setting is better than another, or luckier: resampling of records, and of seeds where there are some.

Paired bootstrap resampling (Koehn 2004, https://aclanthology.org/W04-3250) draws records with replacement, the same for
both sides, and looks at how the difference of the scores varies.  Where a side has several seeds, they are drawn as
well, for each side alone, as the Multi-Bootstrap of unpaired seeds does (Sellam et al. 2022,
https://arxiv.org/abs/2106.16163): averaging over seeds would say how sure the difference of these very trainings is,
not that of others.  n seeds are drawn n - 1 at a time, which makes the variance of their mean unbiased (Rao & Wu 1988,
https://doi.org/10.1080/01621459.1988.10478591); drawing n makes it (n - 1)/n of that: half, for two.  What no
resampling can know is the tail of a distribution of which two or three values were seen, so that an interval from few
seeds is still too narrow.

Approximate randomisation (Riezler & Maxwell 2005, https://aclanthology.org/W05-0908) swaps the two sides' answers to
each record with probability 1/2 and counts how often the difference comes out at least as large.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# counts [S N] of N records in S resamples -> S values of each score
Scores = Callable[[np.ndarray], dict[str, np.ndarray]]


class Difference(NamedTuple):
    """How much more the second side scores than the first."""

    value: float
    low: float  # of the 95 % interval
    high: float
    p: float  # two-sided, of no difference
    samples: int
    randomised: float | None = None  # p by approximate randomisation; None where a side has several seeds


def paired(
    first: Sequence[Scores], second: Sequence[Scores], size: int, samples: int, seed: int = 0
) -> dict[str, Difference]:
    """The difference in every score that all runs have; a side is a function for each seed, all over `size` records.

    The interval has the 2.5 and 97.5 % quantiles of the resamples' differences; p is the share of them that are as far
    from their mean as the difference is from 0.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(size, np.full(size, 1 / size), size=samples)
    counts = np.concatenate([np.ones((1, size), counts.dtype), counts])  # the records themselves come first
    sides = [[run(counts) for run in side] for side in (first, second)]
    weights = [seeds(rng, samples, len(side)) for side in sides]
    names = [name for name in sides[0][0] if all(name in run for side in sides for run in side)]
    found = {}
    for name in names:
        one, two = (
            np.einsum("sr,rs->s", weight, np.stack([run[name] for run in side]))
            for weight, side in zip(weights, sides, strict=True)
        )
        value, drawn = two[0] - one[0], (two - one)[1:]
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
        found[name] = Difference(value, low, high, share(drawn - drawn.mean(), value), len(drawn))
    return found


def seeds(rng: np.random.Generator, samples: int, n: int) -> np.ndarray:
    """Weights [samples + 1, n] of a side's seeds: all alike in the first row, then n - 1 of them drawn for each."""
    drawn = rng.multinomial(n - 1, np.full(n, 1 / n), size=samples) / (n - 1) if n > 1 else np.ones((samples, 1))
    return np.concatenate([np.full((1, n), 1 / n), drawn])


def randomised(both: Scores, size: int, samples: int, seed: int = 0) -> dict[str, float]:
    """p of every score by approximate randomisation; `both` scores the first side's records, then the second's."""
    rng = np.random.default_rng(seed)
    kept = rng.integers(2, size=(samples, size))
    kept = np.concatenate([np.ones((1, size), kept.dtype), kept])
    one, two = both(np.concatenate([kept, 1 - kept], axis=1)), both(np.concatenate([1 - kept, kept], axis=1))
    return {name: share((two[name] - one[name])[1:], (two[name] - one[name])[0]) for name in one}


def share(values: np.ndarray, observed: float) -> float:
    """How many of the values, and of the observed one itself, are at least as far from 0, up to rounding."""
    return float((1 + np.sum(np.abs(values) >= abs(observed) * (1 - 1e-9))) / (1 + len(values)))
