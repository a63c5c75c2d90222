"""The node that acts, and the last line: follows the trajectory, watches everyone, brings the car to rest when they fail.

It hears and speaks; what is believed, when the car stops and how it moves is decided in `core.controller`. Inputs age by the node's clock and heartbeats by the wall's: a simulator that pauses is not a dead node.
"""

import re
import time

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Odometry
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Bool, Header, String
from trajectory_msgs.msg import MultiDOFJointTrajectory

from mose_ros.core import safety
from mose_ros.core.controller import Caution, Controller
from mose_ros.core.safety import Fault, Severity, State
from mose_ros.core.types import VehicleCommand
from mose_ros.nodes import conversions
from mose_ros.nodes.bearings import ODOMETRY
from mose_ros.nodes.controller_parameters import ControllerParameters
from mose_ros.nodes.lifecycle import (
    ERROR,
    LATCHED,
    NEWEST,
    OK,
    SENSOR,
    WARN,
    ManagedNode,
    run_node,
)
from mose_ros.nodes.vehicle_command import open_backend

TICK_S = 0.05
# a plan may be ahead of the clock: other computers' clocks; and /clock may come after it
EARLY_S, EARLY_SIMULATED_S = 0.05, 0.11
ANSWER_AFTER_S = 0.2  # of the wall's time: then a tick is answered without a plan
SAME_TICK_S = 1e-3
LEVELS = {State.NORMAL: OK, State.DEGRADED: WARN}
SEVERITIES = {
    OK: Severity.NONE,
    WARN: Severity.DEGRADE,
}  # of a camera by its diagnostic; else STOP


class ControllerNode(ManagedNode):
    """Answers each trajectory with a command, and keeps answering when none comes."""

    def __init__(self, **options):
        super().__init__('controller', ControllerParameters, **options)
        self._heard = []

    def configure(self) -> None:
        p = self.parameters
        self._backend = open_backend(
            p.control_backend, p.role_name, p.vehicle(), p.wheel_angle, p.command_topic
        )
        self.get_logger().info(f'commands: {self._backend.name} on {self._backend.topic}')
        self._is_simulated = self.get_parameter('use_sim_time').value
        self._controller = Controller(p.vehicle(), p.period_s, self._caution(p))
        depth, publish = QoSProfile(depth=2), self.create_lifecycle_publisher
        self._commands = publish(self._backend.kind, self._backend.topic, depth)
        self._emergency = publish(Bool, 'emergency', LATCHED)
        self._safety_state = publish(String, 'safety_state', LATCHED)
        self._asked = self._answered = None  # stamps: the newest tick's, and of the last answer
        self._asked_at = 0.0
        self._is_stop_asked = False
        self._start_anew()
        hear = self.create_subscription
        self._heard = [
            hear(MultiDOFJointTrajectory, 'trajectory', self._on_trajectory, depth),
            hear(Odometry, 'odometry', self._on_odometry, ODOMETRY),
            # latched by a switch, volatile from `ros2 topic pub`: both are heard
            hear(Bool, 'emergency_stop', self._on_emergency_stop, LATCHED),
            hear(Bool, 'emergency_stop', self._on_emergency_stop, NEWEST),
            hear(DiagnosticArray, '/diagnostics', self._on_diagnostics, QoSProfile(depth=20)),
        ]
        for name in p.watch:
            self._heard.append(hear(Header, f'{name}/heartbeat', self._watcher(name), SENSOR))
        if p.answer_ticks:
            # reliable: a tick that is not heard is a tick that is never answered
            self._heard.append(hear(Clock, '/clock', self._on_clock, QoSProfile(depth=10)))
        self._timer = self.create_timer(TICK_S, self._tick, clock=self.steady)

    def _start_anew(self) -> None:
        self._controller.reset(self._data_time())
        self._stamp = Time()  # of the plan
        self._cameras: dict[str, tuple[Severity, str]] = {}
        self._acted, self._said = self._data_time(), ''
        self._beats = dict.fromkeys(self.parameters.watch, time.monotonic())

    def _caution(self, parameters: ControllerParameters) -> Caution:
        return parameters.caution(EARLY_SIMULATED_S if self._is_simulated else EARLY_S)

    def take_over(self, wanted: ControllerParameters) -> None:
        if self.state in ('inactive', 'active'):
            self._controller.caution = self._caution(wanted)

    def activate(self) -> None:
        self._start_anew()

    def deactivate(self) -> None:
        """Leave a full brake behind: a vehicle that hears no more goes on with what it heard last."""
        if self._heard:
            self._command(self._controller.leave(), conversions.to_stamp(self.now()), 0.0)

    def reset(self) -> None:
        self._start_anew()

    def cleanup(self) -> None:
        if self._heard:
            self.destroy_timer(self._timer)
        for subscription in self._heard:
            self.destroy_subscription(subscription)
        self._heard = []

    @property
    def is_active(self) -> bool:
        """Say whether commands are wanted: disabled, it brakes, since silence would let the car roll on."""
        return self.state == 'active'

    # ---- hearing ----

    def _data_time(self) -> float:
        """Return the time by which inputs age: a simulated second may last long, and the vehicle drives in it."""
        return self.now() if self._is_simulated else time.monotonic()

    def _watcher(self, name: str):
        def beat(msg: Header):
            if msg.frame_id == 'active':
                self._beats[name] = time.monotonic()
            if self._asked is None and msg.stamp != Time():
                # begun in the middle of a tick, whose /clock is gone: its time is known from who has heard it
                self._asked, self._asked_at = msg.stamp, time.monotonic()

        return beat

    def _on_emergency_stop(self, msg: Bool) -> None:
        self._is_stop_asked = msg.data

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        """Learn from the watched nodes which cameras they do not see."""
        for status in msg.status:
            node, _, what = status.name.partition(': ')
            if what.startswith('camera ') and self._is_watched(node):
                camera = what.removeprefix('camera ')
                severity = SEVERITIES.get(status.level, Severity.STOP)
                self._cameras[camera] = (severity, status.message)

    def _is_watched(self, node: str) -> bool:
        namespace, _, name = f'/{node}'.rpartition('/')
        return name in self.parameters.watch and (namespace or '/') == self.get_namespace()

    def _on_odometry(self, msg: Odometry) -> None:
        try:
            ego = conversions.ego_from_msg(msg)
            stamp = conversions.seconds(msg.header.stamp)
        except ValueError as error:
            self._controller.refuse_odometry(str(error))
            return
        try:
            now = self._data_time()
            back = self._controller.hear_odometry(stamp, ego, self.now() - stamp, now)
        except ValueError:
            return  # the controller tells of it until a good one comes
        if back:
            self.report('time', WARN, f'went back by {back:.3f} s: all is forgotten')

    def _on_trajectory(self, msg: MultiDOFJointTrajectory) -> None:
        if not self.is_active:
            return
        try:
            trajectory = conversions.trajectory_from_msg(msg)
        except ValueError as error:
            self._controller.refuse_plan(str(error))
            return
        try:
            age = self.now() - trajectory.time
            self._controller.hear_plan(trajectory, age, self._data_time())
        except ValueError:
            return  # as above
        self._stamp = msg.header.stamp
        self._act()

    def _on_clock(self, msg: Clock) -> None:
        self._asked, self._asked_at = msg.clock, time.monotonic()

    # ---- what is wrong ----

    def _faults(self) -> list[Fault]:
        """Return what is wrong beside the odometry and the plans themselves."""
        p, found = self.parameters, []
        if self._is_stop_asked:
            reason = 'an emergency stop is asked for'
            found.append(Fault(severity=Severity.EMERGENCY, reason=reason))
        if not self.is_enabled:
            found.append(Fault(severity=Severity.STOP, reason='disabled by set_enabled'))
        for name, beat in self._beats.items():
            silent = time.monotonic() - beat
            what = f'heartbeat of {name}'
            found.append(safety.silence(what, silent, p.heartbeat_timeout_s, p.grace_s))
            if found[-1] is not None:
                self._cameras.clear()  # nobody tells of them now
        found += safety.camera_faults(self._cameras)
        return [fault for fault in found if fault is not None]

    # ---- acting ----

    def _tick(self) -> None:
        if not self.is_active:
            return
        now = self._data_time()
        self._go_back(now)
        is_due = now - self._acted > 1.1 * self.parameters.period_s
        is_asked = self._is_unanswered and time.monotonic() - self._asked_at > ANSWER_AFTER_S
        is_well = self._controller.state is State.NORMAL and not self._controller.faults(now)
        if is_due or is_asked or not is_well or self._faults():
            self._act()

    @property
    def _is_unanswered(self) -> bool:
        """Say whether there is a tick without an answer."""
        if self._asked is None or self._answered is None:
            return self._asked is not None
        asked, answered = map(conversions.seconds, (self._asked, self._answered))
        return abs(asked - answered) >= SAME_TICK_S

    def _go_back(self, now: float) -> None:
        self._acted = min(self._acted, now)  # simulated time goes back
        self._controller.go_back(now)

    def _act(self) -> None:
        now, started, controller = self._data_time(), time.perf_counter(), self._controller
        self._go_back(now)
        command = controller.command(now, self._faults())
        self._acted = now
        if controller.left_way:
            self.log('way', f'left, braking straight on: {controller.left_way}')
        is_driving = controller.state in safety.DRIVING
        stamp = self._stamp if is_driving else conversions.to_stamp(self.now())
        self._command(command, stamp, controller.speed)
        self._emergency.publish(Bool(data=controller.is_emergency))
        self._tell()
        self.debug(processing_time_ms=1e3 * (time.perf_counter() - started))
        age = controller.plan_age(now)
        if age is not None:
            self.debug(input_age_ms=1e3 * age)

    def _command(self, command: VehicleCommand, stamp: Time, speed: float) -> None:
        """Publish a command at a speed; with `answer_ticks` once for each tick, with the stamp of the tick."""
        if self.parameters.answer_ticks:
            if not self._is_unanswered:
                return
            stamp = self._answered = self._asked
        self._commands.publish(self._backend.to_msg(command, speed, stamp))

    def _tell(self) -> None:
        """Say the state and its reason once each time that they change; numbers in the reason are no change."""
        state, reason = self._controller.state, self._controller.reason
        text = f'{state.value}: {reason}'
        skeleton = re.sub(r'\d[\d.]*', '#', text)
        if skeleton == self._said:
            return
        self._said = skeleton
        self._logged.pop('control', None)  # each change is worth its line
        is_waiting = state is State.STOPPED and not self._controller.has_driven
        self.report('control', WARN if is_waiting else LEVELS.get(state, ERROR), text)
        self._safety_state.publish(String(data=text))


def main() -> None:
    """Run this node until it is told to end."""
    run_node(ControllerNode)


if __name__ == '__main__':
    main()
