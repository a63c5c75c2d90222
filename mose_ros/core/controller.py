"""The last line before the actuators: follows the plan that is believed, and brings the car to rest when driving is not safe.

Joins what `safety` believes and decides, where `pursuit` says the car is, and how `control` moves it. Used by whoever holds the
wheel: the controller node, and the agent that drives in lock-step. Knows no message and reads no clock: stamps are compared
with stamps, and `now` is the steady time at which things come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mose_ros.core import safety
from mose_ros.core.control import TrajectoryTracker, VehicleModel
from mose_ros.core.pursuit import Pursuit
from mose_ros.core.safety import Fault, SafetyMachine, Severity, State, TrajectoryLimits
from mose_ros.core.types import EgoState, Trajectory, VehicleCommand

PUSHED_MPS = (
    2.5  # a car that was pushed to this speed has moved, so odometry that has not by a bit is dead
)
UNMOVED = 'the odometry has not moved at all though the car is driven: mend it, or free the car and call ~/reset'
MAX_PERIOD_S = 0.2  # of a command that counts as a push


@dataclass(frozen=True, kw_only=True)
class Caution:
    """What is believed and for how long, and how the car comes to rest."""

    limits: TrajectoryLimits = field(default_factory=TrajectoryLimits)
    plan_max_age_s: float = 0.35  # an older plan is not accepted
    odometry_timeout_s: float = 0.22
    early_s: float = 0.05  # a stamp may be so far ahead of the clock
    grace_s: float = 0.1  # is driven on, degraded, after an input is noticed to be missing
    comfortable_deceleration: float = 2.5  # m/s^2 of the first answer to a fault
    hard_deceleration: float = 8.0  # m/s^2, what the vehicle can
    hard_after_s: float = 1.0  # a fault that lasts so long is braked for hard
    recover_after_s: float = 0.3  # without fault, the car rolls: braking ends
    restart_after_s: float = 1.0  # without fault, the car stands: it drives off
    relapse_s: float = 15.0  # another stop in this time doubles both
    degraded_speed: float = 6.0  # m/s beyond which a degraded car gains no speed
    max_odometry_jump: float = 1.0  # m between a pose and where speed and heading led


class Controller:
    """Takes odometry and plans, and answers with a command whenever it is asked for one.

    caution: may be replaced while driving, but for the four times of the state machine and the jump, which are read once.
    """

    def __init__(self, vehicle: VehicleModel, period_s: float, caution: Caution, now: float = 0.0):
        self.caution = caution
        self._vehicle = vehicle
        self._tracker = TrajectoryTracker(vehicle, period_s)
        self._machine = SafetyMachine(
            hard_after_s=caution.hard_after_s,
            recover_after_s=caution.recover_after_s,
            restart_after_s=caution.restart_after_s,
            relapse_s=caution.relapse_s,
        )
        self._pursuit = Pursuit(max_jump_m=caution.max_odometry_jump)
        self.reset(now)

    def reset(self, now: float) -> None:
        """Forget all that was heard: at rest, waiting for a first plan."""
        self._machine.reset()
        self._tracker.reset()
        self._pursuit.clear(now)
        self._deceleration = 0.0  # m/s^2 of the last command
        self._place: tuple[float, float, float] | None = None  # of the last odometry
        self._pushed, self._commanded = (
            0.0,
            now,
        )  # m/s that throttle should have given at that place
        self._broken: dict[str, str] = {}  # input -> what is wrong with its newest message
        self.left_way = ''  # why the last braking was not along the plan

    @property
    def state(self) -> State:
        """Return what is done now."""
        return self._machine.state

    @property
    def reason(self) -> str:
        """Return why, in a sentence."""
        return self._machine.reason

    @property
    def is_emergency(self) -> bool:
        """Say whether a fault is braked for, or held at rest."""
        return self._machine.is_emergency

    @property
    def has_driven(self) -> bool:
        """Say whether a plan was ever followed."""
        return self._machine.has_driven

    @property
    def speed(self) -> float:
        """Return the car's speed in m/s, reckoned from the commands where nobody measures it."""
        return self._pursuit.speed

    def plan_age(self, now: float) -> float | None:
        """Return the time from the pictures of the plan to now; None where no plan may be followed."""
        return self._pursuit.plan_age(now) if self._pursuit.serves else None

    # ---- what comes ----

    def hear_odometry(self, stamp: float, ego: EgoState, age: float, now: float) -> float:
        """Take an odometry that was `age` seconds old when it came; return by how much its time went back.

        ValueError for one that is not believed. It is a fault until a good one comes.
        """
        try:
            safety.check_age('odometry', age, self.caution.plan_max_age_s, self.caution.early_s)
            back = self._pursuit.hear_odometry(stamp, ego, age, now)
        except ValueError as error:
            self.refuse_odometry(str(error))
            raise
        self._broken.pop('odometry', None)
        place = ego.x, ego.y, ego.yaw
        if place != self._place:
            self._place, self._pushed = place, 0.0
        if back:
            self._tracker.reset()
        return back

    def hear_plan(self, trajectory: Trajectory, age: float, now: float) -> None:
        """Take a plan that was `age` seconds old when it came; ValueError for one that is not believed: a fault, as above."""
        c = self.caution
        try:
            safety.check_age('plan', age, c.plan_max_age_s, c.early_s)
            self._pursuit.hear_plan(trajectory, age, now, c.limits, c.plan_max_age_s)
        except ValueError as error:
            self.refuse_plan(str(error))
            raise
        self._broken.pop('plan', None)

    def refuse_odometry(self, reason: str) -> None:
        """Take note of an odometry that could not even be read."""
        self._pursuit.lose_odometry()
        self._broken['odometry'] = reason

    def refuse_plan(self, reason: str) -> None:
        """Take note of a plan that could not even be read."""
        self._broken['plan'] = reason

    def go_back(self, now: float) -> None:
        """Count from here what came later than now; simulated time goes back."""
        self._pursuit.go_back(now)

    # ---- what is wrong ----

    def faults(self, now: float) -> list[Fault]:
        """Return what is wrong with odometry and plan."""
        c, found = self.caution, []
        if 'odometry' in self._broken:
            found.append(Fault(severity=Severity.STOP, reason=self._broken['odometry']))
        if self._pushed > PUSHED_MPS:
            found.append(Fault(severity=Severity.STOP, reason=UNMOVED))
        silent = self._pursuit.silence(now)
        found.append(safety.silence('odometry', silent, c.odometry_timeout_s, c.grace_s))
        refusal, age = self._broken.get('plan'), self.plan_age(now)
        if age is not None:
            late = safety.silence('trajectory', age, c.plan_max_age_s, c.grace_s)
            if late is not None and refusal:
                late = replace(late, reason=f'{late.reason} ({refusal})')
            found.append(late)
        if refusal:
            found.append(Fault(severity=Severity.DEGRADE, reason=f'refused: {refusal}'))
        return [fault for fault in found if fault is not None]

    # ---- what is done ----

    def command(self, now: float, others: Sequence[Fault] = ()) -> VehicleCommand:
        """Return the command of this moment; `others`: faults that the caller knows of beside those of `faults`."""
        pursuit, self.left_way = self._pursuit, ''
        self.go_back(now)
        faults = [*others, *self.faults(now)]
        timeout_s = self.caution.odometry_timeout_s
        pursuit.move_on(now, timeout_s, self._deceleration, self._tracker.roll)
        state = self._machine.update(now, faults, pursuit.speed, pursuit.serves)
        command = None
        if state in safety.DRIVING:
            try:
                command = self._follow(state, now)
            except ValueError as error:
                faults.append(Fault(severity=Severity.STOP, reason=str(error)))
                state = self._machine.update(now, faults, pursuit.speed, pursuit.serves)
        if command is None:
            command = self._brake(state)
        self._deceleration = command.brake * self._vehicle.brake_gain
        passed, self._commanded = max(0.0, now - self._commanded), now
        self._pushed += command.throttle * self._vehicle.throttle_gain * min(passed, MAX_PERIOD_S)
        return command

    def leave(self) -> VehicleCommand:
        """Return the command to leave behind when nobody will command any more: full brake, on the way as far as it is known."""
        return replace(self._brake(State.EMERGENCY_STOP), throttle=0.0, brake=1.0)

    def _follow(self, state: State, now: float) -> VehicleCommand:
        """Track the plan, shifted by its age, from where the car is now."""
        pursuit = self._pursuit
        age = max(0.0, pursuit.plan_age(now))
        command = self._tracker.command(pursuit.trajectory, pursuit.speed, age, pursuit.pose)
        if state is State.DEGRADED and pursuit.speed > self.caution.degraded_speed:
            return replace(command, throttle=0.0)
        return command

    def _brake(self, state: State) -> VehicleCommand:
        """Brake along the last way that was believed; straight on where there is none."""
        c, pursuit = self.caution, self._pursuit
        # at rest by what was commanded is not at rest: on a wet road, downhill, the car may still roll
        is_hard = state is State.EMERGENCY_STOP or (state is State.STOPPED and pursuit.is_blind)
        wanted = c.hard_deceleration if is_hard else c.comfortable_deceleration
        # who does not know whether the car stands doesn't loosen the brake to hold it
        speed = max(pursuit.speed, safety.STANDING_MPS) if pursuit.is_blind else pursuit.speed
        if pursuit.trajectory is not None and pursuit.pose is not None:
            try:
                return self._tracker.brake(pursuit.trajectory, speed, wanted, pursuit.pose)
            except ValueError as error:
                self.left_way = str(error)
        return self._tracker.stop(speed, wanted)
