"""How long the bundles of a table take for a plan: all on the same recorded moments, in turns in one process.

What a closed loop measures depends on what ran beside it, which is another cell of the table for one row and none for the next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from mose_ros.core.types import Observation
from mose_ros.data import storage
from mose_ros.engine.policy import Policy
from mose_ros.engine.turns import Turn, row, take_turns
from mose_ros.training.moments import recorded_moments, spread

PLANS, WARMUP = 200, 10  # of each bundle
CLIPS = 25  # of two moments each
THREADS = 2  # of ONNX Runtime, as in the closed loop
AGAIN = 1e6  # s, by which moments are later when they come again


@dataclass(frozen=True, kw_only=True)
class PlanTimes:
    """What was measured, and how."""

    p50_ms: Mapping[str, float]  # by the bundles' names
    plans: int
    moments: int
    threads: int

    def __str__(self) -> str:
        return (
            f'plan_ms: median of {self.plans} plans on {self.moments} recorded moments, the same for all, each bundle with its own '
            f'views; all in turns in one process with {self.threads} threads, after the last cell was made'
        )


@dataclass(frozen=True)
class _Seat:
    """A bundle that takes its turns."""

    policy: Policy
    moments: Sequence[Observation]

    def plan(self, index: int) -> Turn:
        rounds, place = divmod(index, len(self.moments))
        moment = self.moments[place]
        moment = replace(
            moment, time=moment.time + AGAIN * rounds
        )  # time that goes back clears a policy
        started = perf_counter()
        self.policy.plan(moment)
        return Turn(ms=1e3 * (perf_counter() - started))


def measure(
    bundles: Mapping[str, Path], data: str | Path, plans: int = PLANS, warmup: int = WARMUP
) -> PlanTimes:
    """Time bundles of the same cameras on clips of the data; ValueError where these show no moment with all of the cameras."""
    policies = {name: Policy.load(folder, threads=THREADS) for name, folder in bundles.items()}
    known = next(iter(policies.values())).manifest
    [folders] = spread(storage.place(data), [CLIPS])
    moments = recorded_moments(folders, known.cameras, known.frame_gap)
    if not moments:
        raise ValueError(
            f'{data} has no clip with the cameras {", ".join(known.cameras)}; name other clips by --data'
        )
    seats = {name: _Seat(policy, moments) for name, policy in policies.items()}
    turns = take_turns(seats, plans, warmup)
    p50 = {name: round(row([one.ms for one in took])['p50_ms'], 2) for name, took in turns.items()}
    return PlanTimes(p50_ms=p50, plans=plans, moments=len(moments), threads=THREADS)
