"""Actions: what goes into and comes out of the action expert, as plain numbers.

An action is the trajectory's points, normalised to [-1, 1] by percentiles of the training data (DriveMoE 1.1), one
pair for each step and axis: the first points are near and sure, the last far and wide.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import COMMANDS, EgoState, Guidance, Trajectory

PROPRIO = (
    'speed',
    'acceleration',
    'yaw_rate',
    'since_stop',
    'near_x',
    'near_y',
    'far_x',
    'far_y',
    *(f'command_{command.value}' for command in COMMANDS),
)
CROWDING = 1.5  # of the flow's steps towards the action; 1: all are equal
SINCE_STOP_MAX_M = 20.0  # further back no stop matters


def proprio(ego: EgoState, guidance: Guidance) -> Float[np.ndarray, 'P']:
    """Return what the vehicle knows without looking, in the order of PROPRIO, SI units; ValueError if not finite."""
    values = [ego.speed, ego.acceleration, ego.yaw_rate, min(ego.since_stop, SINCE_STOP_MAX_M)]
    values += [*guidance.near, *guidance.far]
    values += [float(guidance.command is command) for command in COMMANDS]
    array = np.asarray(values, np.float32)
    if not np.isfinite(array).all():
        bad = [name for name, value in zip(PROPRIO, array, strict=True) if not np.isfinite(value)]
        raise ValueError(f'not finite: {", ".join(bad)}')
    return array


@dataclass(frozen=True)
class Normalizer:
    """Map [low, high] to [-1, 1] and back, element by element; not clipped."""

    low: Float[np.ndarray, '...']
    high: Float[np.ndarray, '...']

    def __post_init__(self):
        if self.low.shape != self.high.shape or not (self.high > self.low).all():
            raise ValueError(
                f'need low < high of equal shape, got {self.low.shape} and {self.high.shape}'
            )

    @classmethod
    def fit(
        cls, samples: Float[np.ndarray, 'B ...'], percent: float = 1.0, margin: float = 1e-2
    ) -> 'Normalizer':
        """Take the percentiles `percent` and 100 - `percent` of samples; at least `margin` apart on each side."""
        low, high = np.percentile(samples, [percent, 100 - percent], axis=0)
        middle = (low + high) / 2
        return cls(
            np.minimum(low, middle - margin).astype(np.float32),
            np.maximum(high, middle + margin).astype(np.float32),
        )

    def encode(self, values: Float[np.ndarray, '...']) -> Float[np.ndarray, '...']:
        """Return 2 (v - low) / (high - low) - 1."""
        return (2 * (values - self.low) / (self.high - self.low) - 1).astype(np.float32)

    def decode(self, codes: Float[np.ndarray, '...']) -> Float[np.ndarray, '...']:
        """Undo `encode`."""
        return ((codes + 1) / 2 * (self.high - self.low) + self.low).astype(np.float32)


def flow(velocity: Callable, noise, num_steps: int):
    """Integrate dx/dt = velocity(x, t) from t = 0 (noise) to t = 1 (action), asking for the velocity once a step.

    Adams-Bashforth of order 2, the first step one of Euler's: a step that also knows the velocity before costs no more than
    one that doesn't. Steps get shorter towards the action, where the velocity turns most. DriveMoE (1.4) takes ten equal
    steps of Euler; what is won is in docs/performance.md. Uses nothing but + and *, so that numpy arrays and torch tensors
    take the same path.
    """
    times = [1 - (1 - step / num_steps) ** CROWDING for step in range(num_steps + 1)]
    x, before, last = noise, None, 0.0
    for start, end in pairwise(times):
        now, step = velocity(x, start), end - start
        if before is None:
            x = x + now * step
        else:
            lean = step / last / 2
            x = x + now * (step * (1 + lean)) + before * (-step * lean)
        before, last = now, step
    return x


def to_trajectory(
    action: Float[np.ndarray, 'T 2'],
    normalizer: Normalizer,
    time: float,
    dt: float,
    limit: float = 1.5,
) -> Trajectory:
    """Denormalise an action, clipped to +-limit (beyond what training showed nothing is known); ValueError if not finite."""
    if not np.isfinite(action).all():
        raise ValueError('the action expert answered with numbers that are not finite')
    return Trajectory(
        time=time, dt=dt, xy=normalizer.decode(np.clip(action, -limit, limit)).astype(np.float64)
    )
