"""The node that acts, and the last line: follows the trajectory, watches everyone, brings the car to rest when they fail."""

import time
from dataclasses import dataclass, replace

from builtin_interfaces.msg import Time
from nav_msgs.msg import Odometry
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Bool, Header
from trajectory_msgs.msg import MultiDOFJointTrajectory

from mose_ros.core.control import METADRIVE, TrajectoryTracker
from mose_ros.core.navigation import EgoHistory, to_ego
from mose_ros.core.types import Trajectory, VehicleCommand
from mose_ros.nodes import conversions
from mose_ros.nodes.bearings import ODOMETRY
from mose_ros.nodes.lifecycle import (
    ERROR,
    LATCHED,
    OK,
    SENSOR,
    WARN,
    ManagedNode,
    NodeParameters,
    run_node,
)
from mose_ros.nodes.parameters import parameter
from mose_ros.nodes.supervisor import STANDING_MPS, Stage, Supervisor, check_trajectory
from mose_ros.nodes.vehicle_command import BACKENDS, open_backend

TICK_S = 0.05
INPUTS = ('odometry', 'trajectory')
EARLY_S, EARLY_SIMULATED_S = (
    0.05,
    0.11,
)  # a plan may be ahead of the clock; /clock may come after it
ANSWER_AFTER_S = (
    0.2  # of the wall's time without a plan for a tick: the answer is given without one
)


@dataclass(frozen=True, kw_only=True)
class ControllerParameters(NodeParameters):
    """Parameters of the controller; lengths and gains are the vehicle's."""

    control_backend: str = parameter('sim', 'whom the commands are for', choices=BACKENDS)
    role_name: str = parameter('ego_vehicle', 'role of the vehicle in CARLA')
    period_s: float = parameter(
        0.1, 'a command at least this often; plans come this often', minimum=0.05, maximum=1.0
    )
    trajectory_max_age_s: float = parameter(
        0.35, 'an older trajectory is not followed', minimum=0.05, maximum=2.0, live=True
    )
    odometry_timeout_s: float = parameter(
        0.3, 'longer without odometry is a fault', minimum=0.05, maximum=2.0, live=True
    )
    heartbeat_timeout_s: float = parameter(
        0.35, 'longer without heartbeat of a watched node is a fault', minimum=0.15, maximum=5.0
    )
    watch: tuple[str, ...] = parameter(('view_router', 'driver'), 'nodes that must be alive')
    comfortable_deceleration: float = parameter(
        2.0, 'm/s^2 of the first answer to a fault', minimum=0.5, maximum=5.0, live=True
    )
    hard_deceleration: float = parameter(
        6.0, 'm/s^2 once the fault lasts', minimum=1.0, maximum=9.0, live=True
    )
    hard_after_s: float = parameter(
        1.0, 'a fault that lasts so long is braked for hard', minimum=0.0, maximum=10.0
    )
    recover_after_s: float = parameter(
        0.2, 'so long without fault ends the braking', minimum=0.0, maximum=10.0
    )
    max_speed: float = parameter(
        30.0, 'm/s; a faster trajectory is a fault', minimum=1.0, maximum=60.0, live=True
    )
    wheelbase: float = parameter(METADRIVE.wheelbase, 'm', minimum=0.5, maximum=10.0)
    rear_axle: float = parameter(
        METADRIVE.rear_axle, 'm from the rear axle to the centre of the body', minimum=0.0
    )
    max_steer: float = parameter(
        METADRIVE.max_steer, 'rad of the front wheels at steer 1', minimum=0.05, maximum=1.5
    )
    throttle_gain: float = parameter(
        METADRIVE.throttle_gain, 'm/s^2 at throttle 1', minimum=0.1, maximum=20.0
    )
    brake_gain: float = parameter(
        METADRIVE.brake_gain, 'm/s^2 at brake 1', minimum=1.0, maximum=100.0
    )
    wheel_angle: float = parameter(
        0.0, 'rad that ackermann and twist ask for at steer 1; 0: max_steer', minimum=0.0
    )
    answer_ticks: bool = parameter(
        False, 'one command for each /clock, with its stamp: for a simulator that waits for it'
    )
    hold_brake: float = parameter(
        METADRIVE.hold_brake, 'brake that keeps the car at rest', minimum=0.0, maximum=1.0
    )


class ControllerNode(ManagedNode):
    """Answers each trajectory with a command, and keeps answering when none comes."""

    def __init__(self, **options):
        super().__init__('controller', ControllerParameters, **options)
        self._heard = []

    def configure(self) -> None:
        p = self.parameters
        self._model = replace(
            METADRIVE,
            wheelbase=p.wheelbase,
            rear_axle=p.rear_axle,
            max_steer=p.max_steer,
            throttle_gain=p.throttle_gain,
            brake_gain=p.brake_gain,
            hold_brake=p.hold_brake,
        )
        self._tracker = TrajectoryTracker(self._model, p.period_s)
        self._backend = open_backend(p.control_backend, p.role_name, self._model, p.wheel_angle)
        self.get_logger().info(f'commands: {self._backend.name} on {self._backend.topic}')
        self._is_simulated = self.get_parameter('use_sim_time').value
        self._supervisor = Supervisor(
            hard_after_s=p.hard_after_s, recover_after_s=p.recover_after_s
        )
        self._history = EgoHistory()
        depth = QoSProfile(depth=2)
        self._commands = self.create_lifecycle_publisher(
            self._backend.kind, self._backend.topic, depth
        )
        self._emergency = self.create_lifecycle_publisher(Bool, 'emergency', LATCHED)
        self._trajectory: Trajectory | None = None
        self._stamp = None
        self._times: dict[str, float] = {}  # steady clock, when each input was last good
        self._broken: dict[str, str] = {}  # input -> what is wrong with its newest message
        self._speed, self._acted = 0.0, 0.0
        hear = self.create_subscription
        on_trajectory = self._guard('trajectory', self._on_trajectory)
        on_odometry = self._guard('odometry', self._on_odometry)
        self._heard = [
            hear(MultiDOFJointTrajectory, 'trajectory', on_trajectory, depth),
            hear(Odometry, 'odometry', on_odometry, ODOMETRY),
        ]
        for name in p.watch:
            beat = self._watcher(name)
            self._heard.append(hear(Header, f'{name}/heartbeat', beat, SENSOR))
        self._asked = self._answered = None  # stamps: the newest tick's, and of the last answer
        self._asked_at = 0.0
        if p.answer_ticks:
            # reliable: a tick that is not heard is a tick that is never answered
            self._heard.append(hear(Clock, '/clock', self._on_clock, QoSProfile(depth=10)))
        self._timer = self.create_timer(TICK_S, self._tick, clock=self.steady)

    def activate(self) -> None:
        self._supervisor.reset()
        self._tracker.reset()
        self._trajectory = None
        self._times = dict.fromkeys(self.parameters.watch, time.monotonic())
        self._times.update(dict.fromkeys(INPUTS, self._data_time()))

    def cleanup(self) -> None:
        if self._heard:
            self.destroy_timer(self._timer)
        for subscription in self._heard:
            self.destroy_subscription(subscription)
        self._heard = []

    # ---- hearing ----

    def _guard(self, what: str, callback):
        """Wrap a callback: a bad message is a fault until a good one comes."""

        def call(msg):
            try:
                callback(msg)
            except ValueError as error:
                self._broken[what] = str(error)
                return
            self._broken.pop(what, None)
            self._times[what] = self._data_time()

        return call

    def _data_time(self) -> float:
        """Return the time by which inputs age: a simulated second may last long, and the vehicle drives in it."""
        return self.now() if self._is_simulated else time.monotonic()

    def _watcher(self, name: str):
        def beat(msg: Header):
            if msg.frame_id == 'active':
                self._times[name] = time.monotonic()

        return beat

    def _on_odometry(self, msg: Odometry) -> None:
        ego = conversions.ego_from_msg(msg)
        stamp = conversions.seconds(msg.header.stamp)
        newest = self._history.newest
        if newest is not None and stamp < newest[0]:
            self.report('time', WARN, f'went back by {newest[0] - stamp:.3f} s: all is forgotten')
            self._trajectory = None
            self._tracker.reset()
            self._times.update(dict.fromkeys(INPUTS, self._data_time()))
        if newest is not None and stamp == newest[0]:
            raise ValueError('the same stamp twice: the odometry is frozen')
        self._history.add(stamp, ego)
        self._speed = ego.speed

    def _on_trajectory(self, msg: MultiDOFJointTrajectory) -> None:
        if not self.is_active:
            return
        trajectory = conversions.trajectory_from_msg(msg)
        if self._trajectory is not None and trajectory.time <= self._trajectory.time:
            raise ValueError(
                f'the trajectory is not newer than the last ({trajectory.time:.3f} s)'
            )
        age = self.now() - trajectory.time
        early = EARLY_SIMULATED_S if self._is_simulated else EARLY_S
        if not -early <= age <= self.parameters.trajectory_max_age_s:
            raise ValueError(f'the trajectory is {age:.2f} s old')
        check_trajectory(trajectory, self._speed, self.parameters.max_speed)
        self._trajectory, self._stamp = trajectory, msg.header.stamp
        self._times['trajectory'] = self._data_time()
        self._broken.pop('trajectory', None)
        self._act()

    def _on_clock(self, msg: Clock) -> None:
        self._asked, self._asked_at = msg.clock, time.monotonic()

    # ---- acting ----

    def _tick(self) -> None:
        if not self.is_active:
            return
        now = self._data_time()
        is_due = now - self._acted > 1.1 * self.parameters.period_s
        is_unanswered = self._asked is not None and self._asked != self._answered
        is_asked = is_unanswered and time.monotonic() - self._asked_at > ANSWER_AFTER_S
        if is_due or is_asked or self._supervisor.stage is not Stage.NORMAL or self._faults(now):
            self._act()

    def _faults(self, now: float) -> list[str]:
        p = self.parameters
        limits = {
            'odometry': p.odometry_timeout_s,
            **dict.fromkeys(p.watch, p.heartbeat_timeout_s),
            'trajectory': p.trajectory_max_age_s,
        }
        faults = []
        for name, limit in limits.items():
            if name in INPUTS and self._times[name] > now:  # time went back: count from here
                self._times[name] = now
            silent = (now if name in INPUTS else time.monotonic()) - self._times[name]
            what = name if name in INPUTS else f'heartbeat of {name}'
            if name == 'odometry' and name in self._broken:
                faults.append(self._broken[name])
            elif silent > limit:
                detail = f' ({self._broken[name]})' if name in self._broken else ''
                faults.append(f'no {what} for {limit:.2f} s{detail}')
        return faults

    def _act(self) -> None:
        now, p = self._data_time(), self.parameters
        started = time.perf_counter()
        faults = self._faults(now)
        if 'odometry' in self._broken or not self._history.newest:
            # blind to its own motion: assume that the brake works
            lost = max(0.0, now - max(self._acted, self._times['odometry']))
            self._speed = max(0.0, abs(self._speed) - lost * p.comfortable_deceleration)
        is_planned = self._trajectory is not None
        if not is_planned and self._supervisor.stage is not Stage.WAITING:
            faults.append('no trajectory since time went back')
        stage = self._supervisor.update(now, faults, self._speed, is_planned)
        if stage is Stage.NORMAL:
            try:
                command = self._follow()
            except ValueError as error:
                stage = self._supervisor.update(now, [str(error)], self._speed)
        if stage is not Stage.NORMAL:
            command = self._brake(stage)
        self._acted = now
        stamp = self._stamp if stage is Stage.NORMAL else conversions.to_stamp(self.now())
        self._command(command, stamp)
        self._emergency.publish(Bool(data=self._supervisor.is_emergency))
        level = {Stage.NORMAL: OK, Stage.WAITING: WARN}.get(stage, ERROR)
        self.report('control', level, f'{stage.value}: {self._supervisor.reason}')
        self.debug(processing_time_ms=1e3 * (time.perf_counter() - started))
        if is_planned:
            self.debug(input_age_ms=1e3 * (self.now() - self._trajectory.time))

    def _command(self, command: VehicleCommand, stamp: Time) -> None:
        """Publish a command; with `answer_ticks` once for each tick, with the stamp of the tick."""
        if self.parameters.answer_ticks:
            if self._asked is None or self._asked == self._answered:
                return
            stamp = self._answered = self._asked
        self._commands.publish(self._backend.to_msg(command, self._speed, stamp))

    def _follow(self) -> VehicleCommand:
        """Track the trajectory from where odometry says that the car is now."""
        stamp, ego = self._history.newest
        trajectory = self._trajectory
        age = max(0.0, stamp - trajectory.time)
        then = self._history.at(trajectory.time, 0.06)
        pose = None
        if then is not None:
            x, y = to_ego((ego.x, ego.y), then.x, then.y, then.yaw)
            pose = (float(x), float(y), ego.yaw - then.yaw)
        return self._tracker.command(trajectory, ego.speed, age, pose)

    def _brake(self, stage: Stage) -> VehicleCommand:
        """Brake, along the last trajectory as long as it and the odometry serve."""
        p = self.parameters
        is_hard = stage is Stage.EMERGENCY_STOP
        deceleration = p.hard_deceleration if is_hard else p.comfortable_deceleration
        if self._trajectory is not None and 'odometry' not in self._broken:
            try:
                steer = self._follow().steer
            except ValueError:
                pass  # the trajectory has run out: straight on
            else:
                brake = min(1.0, deceleration / self._model.brake_gain)
                if abs(self._speed) < STANDING_MPS:
                    brake = self._model.hold_brake
                return VehicleCommand(steer=steer, throttle=0.0, brake=brake)
        return self._tracker.stop(self._speed, deceleration)


def main() -> None:
    """Run this node until it is told to end."""
    run_node(ControllerNode)


if __name__ == '__main__':
    main()
