"""What the runner of `make drive` hears of the graph, and the figures it makes of that. It only listens."""

import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Bool, Float32, Header, String
from trajectory_msgs.msg import MultiDOFJointTrajectory

from mose_ros.core import rig
from mose_ros.core.safety import State
from mose_ros.core.types import Trajectory
from mose_ros.nodes import conversions, images
from mose_ros.nodes.lifecycle import ERROR, LATCHED

DEADLINE_MS = 100.0
KEPT_MOMENTS = 30


@dataclass(kw_only=True)
class Moment:
    """One frame of the anchor camera and what became of it."""

    time: float
    pictures: dict[str, Image] = field(default_factory=dict)
    trajectory: Trajectory | None = None
    latency_ms: float | None = None
    views: tuple[str, ...] = ()
    skills: str = ''


class Monitor(Node):
    """Listens to everything that a drive reports. Its fields are written by the executor's thread alone."""

    def __init__(self, role: str = 'ego_vehicle', with_pictures: bool = False):
        super().__init__('monitor', namespace='/mose', start_parameter_services=False)
        self.lock = threading.Lock()
        self.moments: OrderedDict[int, Moment] = OrderedDict()  # by stamp in ns
        self.frames: list[int] = []  # stamps of the anchor's frames
        self.latencies_ms: dict[int, float] = {}  # stamp -> from stamp to publication
        self.views: Counter = Counter()
        self.views_now: tuple[str, ...] = ()
        self.skills = self.sentence = self.partial = ''
        self.reasoning_count = 0
        self.speed = 0.0
        self.is_emergency = False
        self.safety = ''  # the controller's state and its reason
        self.outcome: dict[str, str] = {}
        self.states: dict[str, DiagnosticStatus] = {}
        self._hear(role, with_pictures)
        # the simulator waits for it, so that no frame is missed in the figures
        self._heartbeat = self.create_publisher(Header, '~/heartbeat', 10)
        self.create_timer(0.2, lambda: self._heartbeat.publish(Header(frame_id='active')))

    def _hear(self, role: str, with_pictures: bool) -> None:
        hear, carla = self.create_subscription, f'/carla/{role}'
        anchor = rig.CAMERAS[0]
        hear(CameraInfo, f'{carla}/{anchor}/camera_info', self._on_frame, 10)
        hear(MultiDOFJointTrajectory, 'trajectory', self._on_trajectory, 10)
        hear(Image, 'views', self._on_views, 2)
        hear(String, 'skills', self._on_skills, 10)
        hear(String, 'reasoning', self._on_reasoning, 10)
        hear(String, 'reasoning_partial', self._on_partial, 10)
        hear(Float32, f'{carla}/speedometer', self._on_speed, 10)
        hear(Bool, 'emergency', self._on_emergency, LATCHED)
        hear(String, 'safety_state', self._on_safety, LATCHED)
        hear(DiagnosticStatus, 'simulator/outcome', self._on_outcome, LATCHED)
        hear(DiagnosticArray, '/diagnostics', self._on_diagnostics, 20)
        if with_pictures:
            for name in rig.CAMERAS:
                topic = f'{carla}/{name}/image'
                hear(Image, topic, self._picture_listener(name), QoSProfile(depth=2))

    def _moment(self, header) -> Moment:
        key = _nanoseconds(header.stamp)
        with self.lock:
            if key not in self.moments:
                self.moments[key] = Moment(time=conversions.seconds(header.stamp))
            while len(self.moments) > KEPT_MOMENTS:
                self.moments.popitem(last=False)
            return self.moments[key]

    def _on_frame(self, msg: CameraInfo) -> None:
        self.frames.append(_nanoseconds(msg.header.stamp))

    def _on_trajectory(self, msg: MultiDOFJointTrajectory, info) -> None:
        stamp = _nanoseconds(msg.header.stamp)
        # the time at which the driver handed it to DDS, not the time at which it was heard here
        published = info['source_timestamp'] or time.time_ns()
        self.latencies_ms[stamp] = (published - stamp) * 1e-6
        moment = self._moment(msg.header)
        moment.latency_ms = self.latencies_ms[stamp]
        moment.skills = self.skills
        moment.trajectory = conversions.trajectory_from_msg(msg)

    def _on_views(self, msg: Image) -> None:
        self.views_now = tuple(msg.header.frame_id.split(','))
        self.views.update(self.views_now)
        self._moment(msg.header).views = self.views_now

    def _on_skills(self, msg: String) -> None:
        self.skills = msg.data
        with self.lock:
            if self.moments:
                next(reversed(self.moments.values())).skills = msg.data

    def _on_reasoning(self, msg: String) -> None:
        self.sentence, self.partial = msg.data, msg.data
        self.reasoning_count += 1

    def _on_partial(self, msg: String) -> None:
        self.partial = msg.data

    def _on_speed(self, msg: Float32) -> None:
        self.speed = msg.data

    def _on_emergency(self, msg: Bool) -> None:
        self.is_emergency = msg.data

    def _on_safety(self, msg: String) -> None:
        self.safety = msg.data

    def _on_outcome(self, msg: DiagnosticStatus) -> None:
        self.outcome = {pair.key: pair.value for pair in msg.values}

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            self.states[status.name] = status

    def _picture_listener(self, name: str):
        def hear(msg: Image):
            self._moment(msg.header).pictures[name] = msg

        return hear

    # ---- figures ----

    @property
    def is_degraded(self) -> bool:
        """Return whether the car drives on with something missing."""
        return self.safety.startswith(State.DEGRADED.value)

    @property
    def complaints(self) -> list[str]:
        """Return what is in error now."""
        return [
            f'{status.name}: {status.message}'
            for status in list(self.states.values())
            if status.level == ERROR
        ]

    @property
    def failed_to_start(self) -> str:
        """Return why a node could not be configured, or nothing."""
        for status in list(self.states.values()):
            if status.name.endswith(': lifecycle') and status.level == ERROR:
                return f'{status.name.split(":")[0]}: {status.message}'
        return ''

    @property
    def newest_latency_ms(self) -> float | None:
        """Return the latency of the newest plan."""
        return next(reversed(self.latencies_ms.values()), None)

    def figures(self) -> dict:
        """Return what the JSON of a drive says about plans; frames before the first plan are starting up."""
        plans = sorted(self.latencies_ms)
        latencies = np.array([self.latencies_ms[stamp] for stamp in plans])
        frames = [stamp for stamp in self.frames if plans and plans[0] <= stamp <= plans[-1]]
        missed = [stamp for stamp in frames if self.latencies_ms.get(stamp, np.inf) > DEADLINE_MS]
        span = (plans[-1] - plans[0]) * 1e-9 if len(plans) > 1 else 0.0
        return {
            'plans': len(plans),
            'plan_rate_hz': round((len(plans) - 1) / span, 3) if span else 0.0,
            'plan_latency_ms': {
                f'p{percent}': round(float(np.percentile(latencies, percent)), 2)
                if plans
                else None
                for percent in (50, 95, 99)
            },
            'deadline_ms': DEADLINE_MS,
            'deadline_misses': len(missed),
            'missed': [  # seconds after the first plan; no latency where no plan came
                [round((stamp - plans[0]) * 1e-9, 2), self.latencies_ms.get(stamp)]
                for stamp in missed[:100]
            ],
            'frames': len(frames),
            'frames_before_first_plan': sum(not plans or s < plans[0] for s in self.frames),
            'on_time_share': round(1 - len(missed) / len(frames), 4) if frames else None,
            'reasoning_count': self.reasoning_count,
            'views': {name: round(n / max(1, len(plans)), 4) for name, n in self.views.items()},
        }


def picture(msg: Image) -> np.ndarray | None:
    """Return a picture for the film, or None when it is damaged."""
    try:
        return images.image_from_msg(msg)
    except ValueError:
        return None


def _nanoseconds(stamp) -> int:
    return stamp.sec * 1_000_000_000 + stamp.nanosec
