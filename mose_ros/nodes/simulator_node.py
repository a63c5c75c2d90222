"""The node that stands in for CARLA: the embedded world in real time, on the topics of carla-ros-bridge.

MetaDrive and the renderer belong to the main thread, so here the main thread is the world's and the executor has one of its own.
A frame's stamp is the wall clock at the end of its physics step, before its pictures are drawn: the moment the shutter opens.
Odometry, pictures and /clock of a frame carry the same stamp.
"""

import contextlib
import os
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from nav_msgs.msg import Odometry, Path
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import Float32, Header, String

from mose_ros.core import rig
from mose_ros.core.infractions import faults
from mose_ros.core.types import FAMILIES, Scene, VehicleCommand
from mose_ros.nodes import conversions, images
from mose_ros.nodes.lifecycle import (
    LATCHED,
    OK,
    SENSOR,
    WARN,
    ManagedNode,
    NodeParameters,
    run_node,
)
from mose_ros.nodes.parameters import parameter
from mose_ros.nodes.vehicle_command import command_from_joint_state

if TYPE_CHECKING:  # MetaDrive takes seconds to import; the node does it once it is needed
    from mose_ros.sim.judge import Outcome

DT = 0.1  # s of one step of the world
ANSWER_LIMIT_S = 3.0
BRIDGE = QoSProfile(depth=10)  # what carla-ros-bridge publishes with
STANDING = VehicleCommand(steer=0.0, throttle=0.0, brake=0.1)
BRAKING = VehicleCommand(steer=0.0, throttle=0.0, brake=0.2)


@dataclass(frozen=True, kw_only=True)
class SimulatorParameters(NodeParameters):
    """Parameters of the simulator."""

    family: str = parameter('normal', 'scenario family', choices=FAMILIES)
    seed: int = parameter(1, 'same seed, same episode', minimum=0, maximum=2**31 - 1)
    renderer: str = parameter('auto', 'who draws', choices=('auto', 'egl', 'tiny'))
    role_name: str = parameter('ego_vehicle', 'role of the vehicle in topic and frame names')
    image_width: int = parameter(256, 'pixels', minimum=32, maximum=1920)
    image_height: int = parameter(144, 'pixels', minimum=32, maximum=1200)
    command_timeout_s: float = parameter(
        0.5, 'the vehicle brakes by itself after so long without command', minimum=0.1
    )
    wait_for: tuple[str, ...] = parameter(
        ('view_router', 'driver', 'controller'), 'autostart only when these nodes are active'
    )


class SimulatorNode(ManagedNode):
    """Publishes what the ego vehicle's sensors see and drives it as commanded."""

    def __init__(self, **options):
        super().__init__('simulator', SimulatorParameters, **options)
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()  # for the main thread
        self._world = None
        self._heard, self._awake = [], set()
        self._published: list = []

    # ---- lifecycle, in the executor's thread ----

    def configure(self) -> None:
        p = self.parameters
        self._command, self._commanded = STANDING, None
        self._is_answered, self._asked = False, set()
        prefix = f'/carla/{p.role_name}'
        publish = self.create_lifecycle_publisher
        self._clock_topic = publish(Clock, '/clock', BRIDGE)
        self._odometry = publish(Odometry, f'{prefix}/odometry', BRIDGE)
        self._speedometer = publish(Float32, f'{prefix}/speedometer', BRIDGE)
        self._route = publish(Path, f'{prefix}/waypoints', LATCHED)
        self._order = publish(String, 'command', BRIDGE)
        self._outcome = publish(DiagnosticStatus, '~/outcome', LATCHED)
        self._cameras = {
            name: (
                publish(Image, f'{prefix}/{name}/image', BRIDGE),
                publish(CameraInfo, f'{prefix}/{name}/camera_info', BRIDGE),
            )
            for name in rig.CAMERAS
        }
        hear = self.create_subscription
        on_command = self.guarded('command', self._on_command)
        self._heard = [hear(JointState, 'vehicle_command', on_command, QoSProfile(depth=1))]
        for name in p.wait_for:
            self._heard.append(hear(Header, f'{name}/heartbeat', self._waiter(name), SENSOR))
        self._in_main(self._load)

    def activate(self) -> None:
        self._in_main(self._begin)

    def deactivate(self) -> None:
        self._is_running = False

    def cleanup(self) -> None:
        self._is_running = False
        for subscription in self._heard:
            self.destroy_subscription(subscription)
        self._heard = []
        if self._world is not None:
            self._in_main(self._unload)

    def may_activate(self) -> bool:
        missing = set(self.parameters.wait_for) - self._awake
        if missing:
            self.report('start', OK, f'waits for {", ".join(sorted(missing))}')
        anchor, _ = self._cameras[rig.CAMERAS[0]]
        is_seen = not self.parameters.wait_for or anchor.get_subscription_count() > 0
        return not missing and is_seen

    def _waiter(self, name: str):
        def beat(msg: Header):
            if msg.frame_id == 'active':
                self._awake.add(name)

        return beat

    def _in_main(self, task) -> None:
        """Run a task in the main thread and wait for it; its exception is raised here."""
        if threading.current_thread() is threading.main_thread():
            task()
            return
        done: Future = Future()
        self._tasks.put((task, done))
        done.result()

    # ---- hearing ----

    def _on_command(self, msg: JointState) -> None:
        self._command = command_from_joint_state(msg)
        self._commanded = time.monotonic()
        stamp = msg.header.stamp
        self._is_answered = self._is_answered or (stamp.sec, stamp.nanosec) in self._asked
        self.report('command', OK, 'arrives')

    # ---- the world, in the main thread ----

    def spin_world(self, should_stop: threading.Event) -> None:
        """Be the main thread: do what the executor's thread asks for, and step the world when its time has come."""
        self._is_running, self._due = False, 0.0
        while not should_stop.is_set():
            wait = max(0.0, self._due - time.monotonic()) if self._is_running else 0.05
            try:
                task, done = self._tasks.get(timeout=wait) if wait else self._tasks.get_nowait()
            except queue.Empty:
                if self._is_running and time.monotonic() >= self._due:
                    self._tick()
                continue
            try:
                done.set_result(task())
            except Exception as error:
                done.set_exception(error)
        self._is_running = False

    def _load(self) -> None:
        p = self.parameters
        with _quiet():
            from mose_ros.sim.world import World

            size = (p.image_width, p.image_height)
            self._world = World(renderer=p.renderer, camera_size=size)
            self._world.reset(p.family, p.seed)
            self._world.images()  # the first picture compiles and uploads; not in the first frame's time
        self.get_logger().info(f'episode {p.family} {p.seed}, {size[0]}x{size[1]}')

    def _unload(self) -> None:
        self._world.close()
        self._world = None

    def _begin(self) -> None:
        self._frames = self._late = 0
        self._asked: set[tuple[int, int]] = set()  # stamps of the frames before the first answer
        self._is_answered, self._is_running = False, True
        self._due = (
            time.monotonic() + 0.05
        )  # after the transition: lifecycle publishers are still mute

    def _tick(self) -> None:
        """Make, stamp and publish one frame."""
        started = time.perf_counter()
        # the episode stands still until somebody has answered a frame, so that it begins as in lock-step
        if self._is_answered or self._frames * DT > ANSWER_LIMIT_S:
            scene = self._world.step(self._newest_command())
        else:
            scene = self._world.scene
        if self._frames == 0:
            self._publish_route()
        self._frames += 1
        now = time.time()
        stamp = conversions.to_stamp(now)
        if not self._is_answered:
            self._asked.add((stamp.sec, stamp.nanosec))
        stepped = time.perf_counter()
        self._publish_state(scene, stamp)
        pictures = self._world.images()
        drawn = time.perf_counter()
        self._publish_pictures(pictures, stamp)
        done = time.perf_counter()
        self.debug(
            processing_time_ms=1e3 * (done - started),
            stages={
                'step': 1e3 * (stepped - started),
                'render': 1e3 * (drawn - stepped),
                'publish': 1e3 * (done - drawn),
            },
        )
        outcome = self._world.outcome
        if outcome.done or self._frames % 5 == 1:
            self._publish_outcome(outcome)
        if outcome.done:
            self.get_logger().info(f'the episode ends after {scene.time:.1f} s: {outcome.status}')
            self._is_running = False
        self._pace()

    def _pace(self) -> None:
        """Set the time of the next frame; one that is late slips, since the world can't take a longer step."""
        self._due += DT
        behind = time.monotonic() - self._due
        if behind > 0.5 * DT:
            self._late += 1
            self.report('pace', WARN, 'slower than real time', late=self._late)
            self._due = time.monotonic()

    def _newest_command(self) -> VehicleCommand:
        if self._commanded is None:
            return STANDING
        if time.monotonic() - self._commanded > self.parameters.command_timeout_s:
            self.report('command', WARN, 'none comes: the vehicle brakes by itself')
            return BRAKING
        return self._command

    def _publish_route(self) -> None:
        xy = np.asarray(self._world.route)
        self._route.publish(
            conversions.polyline_to_msg(xy, conversions.to_stamp(time.time()), 'map')
        )

    def _publish_state(self, scene: Scene, stamp) -> None:
        self._clock_topic.publish(Clock(clock=stamp))
        role = self.parameters.role_name
        self._odometry.publish(conversions.ego_to_msg(scene.ego, stamp, 'map', role))
        self._speedometer.publish(Float32(data=float(scene.ego.speed)))
        self._order.publish(String(data=scene.guidance.command.value))

    def _publish_pictures(self, pictures, stamp) -> None:
        role = self.parameters.role_name
        # the anchor last: whoever acts on it finds the others of the moment already there
        for name in reversed(rig.CAMERAS):
            to_image, to_info = self._cameras[name]
            frame = f'{role}/{name}'
            to_image.publish(images.image_to_msg(pictures[name], stamp, frame))
            height, width = pictures[name].shape[:2]
            camera = rig.camera(name)
            to_info.publish(images.camera_info_to_msg(camera, width, height, stamp, frame))

    def _publish_outcome(self, outcome) -> None:
        p = self.parameters
        self._outcome.publish(outcome_to_msg(outcome, p.family, p.seed, self._late))


def outcome_to_msg(
    outcome: 'Outcome', family: str, seed: int, late_frames: int
) -> DiagnosticStatus:
    """Return how the episode stands; slowness, which costs nothing, is not told as an infraction."""
    events = [
        f'{name}: {event}'
        for name, found in faults(outcome.infractions).items()
        for event in found
    ]
    values = {
        'family': family,
        'seed': seed,
        'done': outcome.done,
        'status': outcome.status,
        'seconds': round(outcome.seconds, 2),
        'route_completion': round(outcome.route_completion, 4),
        'driving_score': round(outcome.score, 2),
        'success': outcome.success,
        'late_frames': late_frames,
        'infractions': '\n'.join(events),
    }
    msg = DiagnosticStatus(level=OK, name='outcome', message=outcome.status)
    msg.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    return msg


@contextlib.contextmanager
def _quiet():
    """Keep MetaDrive's greetings off the terminal; what goes wrong is raised, not printed."""
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def main() -> None:
    """Run this node until it is told to end."""
    run_node(SimulatorNode, main_thread=SimulatorNode.spin_world)


if __name__ == '__main__':
    main()
