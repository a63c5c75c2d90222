"""Taking turns: programs that are compared plan on the same observations, one after the other, and their pairs are judged.

So what else the machine does falls on all of them alike. Knows nothing of what a program is.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float

PAUSE = 0.004  # s between turns, in which threads that spin for more work lie down


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One answer: how long it took, and what it was."""

    ms: float
    timings: Mapping[str, float] = field(default_factory=dict)  # ms of its stages, if it has any
    xy: Float[np.ndarray, 'H 2'] | None = None  # the trajectory
    views: Sequence[str] = ()


class Contestant(Protocol):
    """Whatever takes turns."""

    def plan(self, index: int) -> Turn:
        """Answer the observation of this number."""


def take_turns(
    contestants: Mapping[str, Contestant], rounds: int, warmup: int, pause: float = PAUSE
) -> dict[str, list[Turn]]:
    """Let all plan on observation after observation; return their turns behind the warm-up, in the order of rounds.

    Their order is drawn anew for each round, the same in each run, so that nobody always follows the same one, which may
    leave the caches, or the cores, as they suit one of the two.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f'need plans >= 1 and warmup >= 0, got {rounds} and {warmup}')
    names, random = list(contestants), np.random.default_rng(0)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        for place in random.permutation(len(names)):
            name = names[place]
            time.sleep(pause)
            turn = contestants[name].plan(index)
            if index >= warmup:
                turns[name].append(turn)
    return turns


def row(values: Sequence[float]) -> dict[str, float]:
    """Return the percentiles of milliseconds that reports have."""
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {'p50_ms': p50, 'p90_ms': p90, 'p99_ms': p99}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return theirs / ours: the median of the pairs, and between what the middle 80 % of the pairs lie.

    ratio_fastest: of the fastest twentieth of each side, which nobody disturbed.
    """
    if len(ours) != len(theirs):
        raise ValueError(f'pairs of {len(ours)} and {len(theirs)} turns cannot be made')
    pairs = np.asarray(theirs) / np.asarray(ours)
    low, middle, high = np.percentile(pairs, (10, 50, 90)).tolist()
    fastest = float(np.percentile(theirs, 5) / np.percentile(ours, 5))
    return {'ratio': middle, 'ratio_p10': low, 'ratio_p90': high, 'ratio_fastest': fastest}


def versus(
    ours: Sequence[Turn], theirs: Sequence[Turn], stages: Sequence[str] = ()
) -> dict[str, object]:
    """Return the row of a comparison: the ratio, both sides' percentiles, and over these stages the same where both have them."""
    found: dict[str, object] = {
        **ratio([one.ms for one in ours], [one.ms for one in theirs]),
        'ours': row([one.ms for one in ours]),
        'theirs': row([one.ms for one in theirs]),
        'pairs': len(ours),
    }
    if stages and all(set(stages) <= one.timings.keys() for one in [*ours, *theirs]):
        sums = [[sum(one.timings[s] for s in stages) for one in side] for side in (ours, theirs)]
        own = {**ratio(*sums), 'ours': row(sums[0]), 'theirs': row(sums[1])}
        found['_'.join(stages)] = own
    return found


def apart(ours: Sequence[Turn], theirs: Sequence[Turn]) -> dict[str, float]:
    """Return how far two programs' answers to the same observations are apart."""
    gaps = [np.hypot(*(a.xy - b.xy).T) for a, b in zip(ours, theirs, strict=True)]
    same = [tuple(a.views) == tuple(b.views) for a, b in zip(ours, theirs, strict=True)]
    return {
        'trajectory_max_m': float(max(gap.max() for gap in gaps)),
        'trajectory_mean_m': float(np.mean([gap.mean() for gap in gaps])),
        'views_equal_share': float(np.mean(same)),
    }
