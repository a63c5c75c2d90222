"""What the last line before the actuators decides: which plans and which odometry are believed, and when the car must stop.

Pure: no message, no clock of its own, no vehicle; whoever calls brings `now`, in seconds of any steady clock. Everything that
is wrong is a `Fault` with a severity and a sentence; `SafetyMachine` turns the faults of each moment into a state.

    NORMAL            follows the plan
    DEGRADED          follows the plan, gains no speed beyond a limit: something is late or missing, but nothing that driving needs
    COMFORTABLE_STOP  brakes gently along the last valid path
    EMERGENCY_STOP    brakes as hard as the vehicle may: the fault lasts, or there is no path
    STOPPED           stands, brake held; also before the first plan
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import EgoState, Trajectory

STANDING_MPS = 0.15
ROLLING_MPS = 0.5  # faster than that the car no longer stands, whatever was thought
MAX_PATIENCE = 8  # times the usual time, at most

# ---- faults and the state machine ----


class Severity(IntEnum):
    """How bad a fault is; the worst of a moment decides."""

    NONE = 0
    DEGRADE = 1
    STOP = 2
    EMERGENCY = 3


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that is wrong now."""

    severity: Severity
    reason: str  # a sentence for people; the same as long as the fault is the same


class State(Enum):
    """What the controller does; the module's docstring tells each."""

    NORMAL = 'NORMAL'
    DEGRADED = 'DEGRADED'
    COMFORTABLE_STOP = 'COMFORTABLE_STOP'
    EMERGENCY_STOP = 'EMERGENCY_STOP'
    STOPPED = 'STOPPED'


DRIVING = (State.NORMAL, State.DEGRADED)


class SafetyMachine:
    """Follows the faults over time: gets worse at once, better only after a while without faults.

    A stop is left directly for NORMAL or DEGRADED: after `recover_after_s` without a fault that asks for one while the car
    still rolls, after `restart_after_s` once it stands. Each stop within `relapse_s` of the end of another doubles that time, so
    that a loose contact doesn't make the car creep.
    """

    def __init__(
        self,
        *,
        hard_after_s: float,
        recover_after_s: float,
        restart_after_s: float,
        relapse_s: float,
    ):
        self._hard_after_s, self._relapse_s = hard_after_s, relapse_s
        self._recover_after_s, self._restart_after_s = recover_after_s, restart_after_s
        self.reset()

    def reset(self) -> None:
        """Begin anew: at rest, waiting for a first plan."""
        self.state, self.reason = State.STOPPED, 'waiting for the first plan'
        self.has_driven = False
        self._now = -math.inf
        self._last = dict.fromkeys((Severity.DEGRADE, Severity.STOP), -math.inf)
        self._stopping_since = self._recovered_at = -math.inf
        self._patience = 1

    @property
    def is_emergency(self) -> bool:
        """Say whether a fault is braked for, or held at rest."""
        return self.has_driven and self.state not in DRIVING

    def update(self, now: float, faults: Sequence[Fault], speed: float, is_planned: bool) -> State:
        """Return the state at `now`; `is_planned`: there is a plan that may be followed."""
        self._shift(now)
        worst = max(faults, key=lambda fault: fault.severity, default=None)
        severity = worst.severity if worst else Severity.NONE
        if not self.has_driven:
            return self._wait(worst, severity, is_planned)
        if not is_planned and severity < Severity.STOP:
            worst = Fault(severity=Severity.STOP, reason='there is no plan to follow')
            severity = worst.severity
        for level in self._last:
            if severity >= level:
                self._last[level] = now
        if severity >= Severity.STOP:
            self._stop(now, severity, speed)
            self.reason = worst.reason
        elif self.state not in DRIVING:
            self._try_to_leave(now, speed, worst)
        if self.state in DRIVING:
            self._drive(now, worst)
        return self.state

    def _wait(self, worst, severity, is_planned) -> State:
        if is_planned and severity < Severity.STOP:
            self.has_driven = True
            self.state = State.DEGRADED if worst else State.NORMAL
            self._last[Severity.DEGRADE] = self._now if worst else -math.inf
        self.reason = worst.reason if worst else 'waiting for the first plan'
        if self.state is State.NORMAL:
            self.reason = 'following the plan'
        return self.state

    def _stop(self, now, severity, speed) -> None:
        if self.state in DRIVING:
            is_relapse = now - self._recovered_at < self._relapse_s
            self._patience = min(2 * self._patience, MAX_PATIENCE) if is_relapse else 1
            self._stopping_since = now
        lasts = now - self._stopping_since >= self._hard_after_s
        if severity is Severity.EMERGENCY or lasts or self.state is State.EMERGENCY_STOP:
            wanted = State.EMERGENCY_STOP
        else:
            wanted = State.COMFORTABLE_STOP
        limit = ROLLING_MPS if self.state is State.STOPPED else STANDING_MPS
        self.state = State.STOPPED if abs(speed) < limit else wanted

    def _try_to_leave(self, now, speed, worst) -> None:
        """Go on braking until nothing has asked for it for long enough."""
        if self.state is not State.STOPPED and abs(speed) < STANDING_MPS:
            self.state = State.STOPPED
        is_standing = self.state is State.STOPPED
        usual = self._restart_after_s if is_standing else self._recover_after_s
        if now - self._last[Severity.STOP] >= usual * self._patience:
            self._recovered_at = now
            self.state = State.DEGRADED if worst else State.NORMAL

    def _drive(self, now, worst) -> None:
        if worst:
            self.state, self.reason = State.DEGRADED, worst.reason
        elif now - self._last[Severity.DEGRADE] >= self._recover_after_s:
            self.state, self.reason = State.NORMAL, 'following the plan'

    def _shift(self, now: float) -> None:
        """Keep what has lasted when the caller's clock goes back."""
        back = max(0.0, self._now - now) if math.isfinite(self._now) else 0.0
        if back:
            self._last = {level: when - back for level, when in self._last.items()}
            self._stopping_since -= back
            self._recovered_at -= back
        self._now = now


def silence(what: str, silent_s: float, limit_s: float, grace_s: float) -> Fault | None:
    """Return the fault of an input that has been silent for `silent_s`: degraded at the limit, a stop after `grace_s` more."""
    if silent_s <= limit_s:
        return None
    severity = Severity.DEGRADE if silent_s <= limit_s + grace_s else Severity.STOP
    return Fault(severity=severity, reason=f'no {what} for {limit_s:.2f} s')


# ---- which plans are believed ----


@dataclass(frozen=True, kw_only=True)
class TrajectoryLimits:
    """What a plan may ask for; beyond that it is not a plan but a fault.

    The defaults lie well above what good plans show by `motion_of`: 4254 of the expert had at most 0.31 m, 0.38 1/m, 2.9, 1.8 and
    6.3 m/s^2, 12 m/s^3 (emergency braking among them); 342 of the shipped bundle stayed below that.
    """

    speed: float = 30.0  # m/s
    start_offset: float = 1.0  # m between the first point and where car and `deceleration` lead
    curvature: float = 0.5  # 1/m, where the plan is faster than CURVATURE_FROM_MPS
    lateral_acceleration: float = 6.0  # m/s^2
    acceleration: float = 5.0  # m/s^2
    deceleration: float = 10.0  # m/s^2
    jerk: float = 40.0  # m/s^3


CURVATURE_FROM_MPS = 2.0  # slower, the noise of the points says more than their way
WINDOW_S = 1.2  # of the fits


@dataclass(frozen=True, kw_only=True)
class Motion:
    """How a plan moves at moments along it."""

    acceleration: Float[np.ndarray, 'K']  # m/s^2 along the way
    lateral_acceleration: Float[np.ndarray, 'K']  # m/s^2, positive to the left
    curvature: Float[np.ndarray, 'K']  # 1/m, 0 where the plan is slower than CURVATURE_FROM_MPS
    jerk: Float[np.ndarray, 'K']  # m/s^3


def motion_of(trajectory: Trajectory) -> Motion:
    """Return the derivatives of a plan at the middles of its windows of WINDOW_S.

    Points of a network scatter by centimetres, which second differences turn into several m/s^2; so each window is fitted
    by a cubic in least squares (Savitzky and Golay, 1964). Absurdly far points give what no limit lets through.
    """
    with np.errstate(over='ignore', invalid='ignore'):
        return _motion_of(trajectory)


def _motion_of(trajectory: Trajectory) -> Motion:
    points = np.vstack([np.zeros((1, 2)), trajectory.xy])
    size = min(len(points), max(5, 2 * round(0.5 * WINDOW_S / trajectory.dt) + 1))
    times = (np.arange(size) - 0.5 * (size - 1)) * trajectory.dt
    powers = np.vander(times, min(4, size), increasing=True)
    windows = np.lib.stride_tricks.sliding_window_view(points, size, axis=0)
    fits = np.zeros((len(windows), 2, 4))
    fits[..., : powers.shape[1]] = windows @ np.linalg.pinv(powers).T
    velocity, acceleration, jerk = fits[..., 1], 2 * fits[..., 2], 6 * fits[..., 3]
    speed = np.hypot(*velocity.T)
    heading = velocity / np.maximum(speed, 1.0)[:, None]  # fades out where there is none
    along = np.einsum('ki,ki->k', heading, acceleration)
    across = heading[:, 0] * acceleration[:, 1] - heading[:, 1] * acceleration[:, 0]
    turns = np.where(speed > CURVATURE_FROM_MPS, across / np.maximum(speed, 1.0) ** 2, 0.0)
    return Motion(
        acceleration=along,
        lateral_acceleration=across,
        curvature=turns,
        jerk=np.hypot(*jerk.T),
    )


def check_trajectory(trajectory: Trajectory, speed: float, limits: TrajectoryLimits) -> None:
    """Raise ValueError, with the number, for a plan that no car could or should drive; `speed`: the car's at its start."""
    if not (math.isfinite(trajectory.time) and math.isfinite(speed)):
        raise ValueError(f'the plan begins at {trajectory.time} s, at {speed} m/s')
    if not (math.isfinite(trajectory.dt) and trajectory.dt > 0):
        raise ValueError(f'the times of the plan do not grow: steps of {trajectory.dt} s')
    if not np.isfinite(trajectory.xy).all():
        raise ValueError('the plan is not finite')
    start = float(np.hypot(*(trajectory.xy[0] - (speed * trajectory.dt, 0.0))))
    if not start <= limits.start_offset + 0.5 * limits.deceleration * trajectory.dt**2:
        raise ValueError(f'the plan begins {start:.1f} m away from the car')
    motion = motion_of(trajectory)
    found = (
        ('speed', trajectory.speeds().max(), limits.speed, 'm/s'),
        ('curvature', np.abs(motion.curvature).max(), limits.curvature, '1/m'),
        (
            'lateral acceleration',
            np.abs(motion.lateral_acceleration).max(),
            limits.lateral_acceleration,
            'm/s^2',
        ),
        ('acceleration', motion.acceleration.max(), limits.acceleration, 'm/s^2'),
        ('deceleration', -motion.acceleration.min(), limits.deceleration, 'm/s^2'),
        ('jerk', motion.jerk.max(), limits.jerk, 'm/s^3'),
    )
    for name, value, limit, unit in found:
        if not value <= limit:
            raise ValueError(f'the plan asks for a {name} of {value:.2f} {unit}, over {limit:g}')


def check_age(what: str, age: float, max_age_s: float, early_s: float) -> None:
    """Raise ValueError for what comes too late, or from further ahead of the clock than clocks differ."""
    if not math.isfinite(age) or age > max_age_s:
        raise ValueError(f'the {what} is {age:.2f} s old, more than {max_age_s:.2f}')
    if age < -early_s:
        raise ValueError(f'the {what} is {-age:.2f} s ahead of the clock')


# ---- which odometry is believed ----


class OdometryCheck:
    """Holds each odometry against those of the last second; feed it all of them, in the order of their coming."""

    GAP_S = 1.0  # after a longer gap nothing is compared: time was set, or the source began anew
    WINDOW_S = 1.0  # over which poses and speeds must agree,
    SHARE = 0.25  # to this share of the way, or to `max_jump_m`

    def __init__(
        self,
        *,
        max_jump_m: float,
        max_acceleration: float = 30.0,
        max_yaw_rate: float = 3.0,
        frozen_after_s: float = 0.12,
    ):
        """`max_jump_m`: how far a pose may lie from where speed and heading lead; m/s^2, rad/s and s for the others."""
        self._max_jump_m, self._max_acceleration = max_jump_m, max_acceleration
        self._max_yaw_rate, self._frozen_after_s = max_yaw_rate, frozen_after_s
        self.clear()

    def clear(self) -> None:
        """Forget what was before."""
        self._before: tuple[float, EgoState] | None = None
        self._moved_at = -math.inf
        self._way: deque[tuple[float, EgoState, float]] = deque()  # stamp, state, m by its speeds

    def check(self, stamp: float, ego: EgoState) -> None:
        """Raise ValueError for a stamp that comes twice, a pose that stands while the car moves, a jump, and a wrong speed.

        What jumped to is what the next one is held against, so that a single jump is a single complaint.
        """
        before, self._before = self._before, (stamp, ego)
        way, self._way = self._way, deque()  # begins anew after whatever is refused here
        if before is None or not 0.0 <= stamp - before[0] <= self.GAP_S:
            self._moved_at = stamp
            return
        dt, last = stamp - before[0], before[1]
        if dt == 0.0:
            raise ValueError('the same stamp twice: the odometry is frozen')
        self._check_movement(stamp, last, ego)
        self._check_jump(dt, last, ego)
        self._way = way
        self._check_speed(stamp, dt, last, ego)

    def _check_movement(self, stamp, last, ego) -> None:
        stands = (ego.x, ego.y, ego.yaw) == (last.x, last.y, last.yaw)
        if not stands or abs(ego.speed) < ROLLING_MPS:
            self._moved_at = stamp
        elif stamp - self._moved_at > self._frozen_after_s:
            raise ValueError(f'the pose stands still at {ego.speed:.1f} m/s: odometry is frozen')

    def _check_jump(self, dt, last, ego) -> None:
        turned = math.remainder(ego.yaw - last.yaw, 2 * math.pi)
        heading = last.yaw + 0.5 * turned
        way = 0.5 * (last.speed + ego.speed) * dt
        off = math.hypot(
            ego.x - last.x - way * math.cos(heading), ego.y - last.y - way * math.sin(heading)
        )
        if off > self._max_jump_m:
            raise ValueError(f'the odometry jumps by {off:.1f} m')
        if abs(ego.speed - last.speed) > 1.0 + self._max_acceleration * dt:
            raise ValueError(f'the speed jumps from {last.speed:.1f} to {ego.speed:.1f} m/s')
        if abs(turned) > 0.3 + self._max_yaw_rate * dt:
            raise ValueError(f'the heading jumps by {turned:.1f} rad')

    def _check_speed(self, stamp, dt, last, ego) -> None:
        """Compare how far the car came with what its speeds say: between two samples a dead speed shows as nothing."""
        way = self._way
        if not way:
            way.append((stamp - dt, last, 0.0))
        way.append((stamp, ego, way[-1][2] + 0.5 * abs(last.speed + ego.speed) * dt))
        while way[0][0] < stamp - self.WINDOW_S - 1e-9:
            way.popleft()
        since, first, start = way[0]
        driven, came = way[-1][2] - start, math.hypot(ego.x - first.x, ego.y - first.y)
        if abs(came - driven) > max(self._max_jump_m, self.SHARE * driven):
            raise ValueError(
                f'the pose moved {came:.1f} m in {stamp - since:.1f} s and the speed says {driven:.1f} m: one of them is wrong'
            )


# ---- what others say ----


def camera_faults(health: Mapping[str, tuple[Severity, str]]) -> list[Fault]:
    """Return a fault for each camera that is not well: camera -> how bad that is, and what is said of it."""
    return [
        Fault(severity=severity, reason=f'camera {name}: {said}')
        for name, (severity, said) in sorted(health.items())
        if severity > Severity.NONE
    ]
