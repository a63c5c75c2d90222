"""When the controller must not follow: the stages from driving to standing, decided from a list of faults.

Pure: knows no message, no clock of its own and no vehicle. Faults are sentences; the first is given as the reason.
"""

from collections.abc import Sequence
from enum import Enum

import numpy as np

from mose_ros.core.types import Trajectory

STANDING_MPS = 0.15


class Stage(Enum):
    """What the controller does."""

    WAITING = 'waiting'  # for the first trajectory, with the brake held
    NORMAL = 'normal'
    COMFORTABLE_STOP = 'comfortable stop'
    EMERGENCY_STOP = 'emergency stop'
    STOPPED = 'stopped'  # by a fault, standing


class Supervisor:
    """Follows the faults over time; a fault brakes at once, normal driving returns only after a while without any."""

    def __init__(self, *, hard_after_s: float, recover_after_s: float):
        self._hard_after_s, self._recover_after_s = hard_after_s, recover_after_s
        self.reset()

    def reset(self) -> None:
        """Begin anew, waiting."""
        self.stage, self.reason = Stage.WAITING, 'waiting for the first trajectory'
        self._fault_since = 0.0
        self._healthy_since: float | None = None

    @property
    def is_emergency(self) -> bool:
        """Say whether a fault holds or is being braked for."""
        return self.stage not in (Stage.WAITING, Stage.NORMAL)

    def update(
        self, now: float, faults: Sequence[str], speed: float, is_planned: bool = True
    ) -> Stage:
        """Return the stage at `now`, seconds of any steady clock; `is_planned`: there has been a trajectory."""
        if self.stage is Stage.WAITING and not is_planned:
            self.reason = faults[0] if faults else 'waiting for the first trajectory'
            return self.stage
        if faults:
            if not self.is_emergency:
                self._fault_since = now
            self._healthy_since = None
            self.reason = faults[0]
            is_hard = now - self._fault_since >= self._hard_after_s
            self.stage = Stage.EMERGENCY_STOP if is_hard else Stage.COMFORTABLE_STOP
            if abs(speed) < STANDING_MPS:
                self.stage = Stage.STOPPED
            return self.stage
        if self._healthy_since is None:
            self._healthy_since = now
        is_steady = now - self._healthy_since >= self._recover_after_s
        if self.stage is Stage.WAITING or is_steady:
            self.stage, self.reason = Stage.NORMAL, 'following the trajectory'
        return self.stage


def check_trajectory(trajectory: Trajectory, speed: float, max_speed: float) -> None:
    """Raise ValueError for a trajectory that no car could drive: a jump at its start, or faster than `max_speed`."""
    speeds = trajectory.speeds()
    if speeds.max() > max_speed:
        raise ValueError(
            f'the trajectory asks for {speeds.max():.1f} m/s, more than {max_speed:.1f}'
        )
    reach = (abs(speed) + 10.0 * trajectory.dt) * trajectory.dt + 1.0
    start = float(np.hypot(*trajectory.xy[0]))
    if start > reach:
        raise ValueError(f'the trajectory begins {start:.1f} m away from the car')
