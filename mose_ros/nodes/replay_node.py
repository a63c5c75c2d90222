"""The node that plays a recording as the front camera: a video or a folder of pictures, through the same topics as a car's.

There is no odometry in a video, so a constant speed straight ahead is published with it, and a straight route.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as RosPath
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Float32, Header, String

from mose_ros.core import rig, vision
from mose_ros.core.types import Command, EgoState
from mose_ros.nodes import conversions, images
from mose_ros.nodes.lifecycle import (
    LATCHED,
    OK,
    SENSOR,
    ManagedNode,
    NodeParameters,
    run_node,
)
from mose_ros.nodes.parameters import parameter
from mose_ros.nodes.simulator_node import BRIDGE, DT

PICTURES = ('.jpg', '.jpeg', '.png')
ROUTE_M = 5000.0


@dataclass(frozen=True, kw_only=True)
class ReplayParameters(NodeParameters):
    """Parameters of the replay."""

    frames: str = parameter('', 'a video, or a folder of pictures that are played at 10 Hz')
    speed: float = parameter(10.0, 'm/s that odometry tells', minimum=0.0, maximum=60.0)
    role_name: str = parameter('ego_vehicle', 'role of the vehicle in topic and frame names')
    max_width: int = parameter(640, 'wider pictures are reduced', minimum=32, maximum=4096)
    wait_for: tuple[str, ...] = parameter(
        ('view_router', 'driver', 'controller'), 'autostart only when these nodes are active'
    )


class ReplayNode(ManagedNode):
    """Publishes a recorded picture ten times a second."""

    def __init__(self, **options):
        super().__init__('replay', ReplayParameters, **options)
        self._timer, self._heard, self._awake = None, [], set()

    def configure(self) -> None:
        p, publish = self.parameters, self.create_lifecycle_publisher
        check_frames(p.frames)
        self._pictures = read_frames(p.frames, DT)
        prefix, front = f'/carla/{p.role_name}', rig.CAMERAS[0]
        self._image = publish(Image, f'{prefix}/{front}/image', BRIDGE)
        self._info = publish(CameraInfo, f'{prefix}/{front}/camera_info', BRIDGE)
        self._odometry = publish(Odometry, f'{prefix}/odometry', BRIDGE)
        self._speedometer = publish(Float32, f'{prefix}/speedometer', BRIDGE)
        self._route = publish(RosPath, f'{prefix}/waypoints', LATCHED)
        self._command = publish(String, 'command', BRIDGE)
        # where the runner looks for the end, whoever plays the world
        self._outcome = publish(DiagnosticStatus, 'simulator/outcome', LATCHED)
        for name in p.wait_for:
            beat = self._waiter(name)
            topic = f'{name}/heartbeat'
            self._heard.append(self.create_subscription(Header, topic, beat, SENSOR))

    def activate(self) -> None:
        self._count = 0
        self._timer = self.create_timer(DT, self._tick)

    def deactivate(self) -> None:
        if self._timer:
            self.destroy_timer(self._timer)
            self._timer = None

    def cleanup(self) -> None:
        for subscription in self._heard:
            self.destroy_subscription(subscription)
        self._heard = []

    def may_activate(self) -> bool:
        wanted = self.parameters.wait_for
        is_seen = not wanted or self._image.get_subscription_count() > 0
        return set(wanted) <= self._awake and is_seen

    def _waiter(self, name: str):
        def beat(msg: Header):
            if msg.frame_id == 'active':
                self._awake.add(name)

        return beat

    def _tick(self) -> None:
        if not self.is_active:
            return
        p = self.parameters
        picture = next(self._pictures, None)
        if picture is None:
            self.deactivate()
            self.report('replay', OK, 'the recording has ended')
            self._publish_outcome(done=True)
            return
        if picture.shape[1] > p.max_width:
            height = round(picture.shape[0] * p.max_width / picture.shape[1])
            picture = vision.resize(picture, p.max_width, height)
        stamp = conversions.to_stamp(time.time())
        if self._count == 0:
            straight = np.stack([np.arange(0.0, ROUTE_M, 10.0), np.zeros(int(ROUTE_M / 10))], 1)
            self._route.publish(conversions.polyline_to_msg(straight, stamp, 'map'))
            self._publish_outcome(done=False)
        ego = EgoState(x=self._count * DT * p.speed, y=0.0, yaw=0.0, speed=p.speed)
        self._odometry.publish(conversions.ego_to_msg(ego, stamp, 'map', p.role_name))
        self._speedometer.publish(Float32(data=p.speed))
        self._command.publish(String(data=Command.FOLLOW.value))
        front = rig.RIG[0]
        frame, (height, width) = f'{p.role_name}/{front.name}', picture.shape[:2]
        self._image.publish(images.image_to_msg(picture, stamp, frame))
        self._info.publish(images.camera_info_to_msg(front, width, height, stamp, frame))
        self._count += 1

    def _publish_outcome(self, done: bool) -> None:
        status = 'Completed' if done else 'running'
        values = {
            'family': 'replay',
            'seed': 0,
            'done': done,
            'status': status,
            'seconds': round(self._count * DT, 2),
            'route_completion': float(done),
            'infractions': '',
        }
        msg = DiagnosticStatus(level=OK, name='outcome', message=status)
        msg.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        self._outcome.publish(msg)


def check_frames(path: str) -> None:
    """Raise ValueError unless there is something to play."""
    source = Path(path)
    if source.is_dir():
        if not any(one.suffix.lower() in PICTURES for one in source.iterdir()):
            raise ValueError(f'{source} holds no {", ".join(PICTURES)} pictures')
    elif not source.is_file():
        raise ValueError(f'{source} does not exist; give a video or a folder of pictures')
    elif not cv2.VideoCapture(str(source)).isOpened():
        raise ValueError(f'{source} can not be read as a video')


def read_frames(path: str, period: float) -> Iterator[np.ndarray]:
    """Yield RGB pictures `period` seconds of the recording apart; those of a folder one by one."""
    source = Path(path)
    if source.is_dir():
        for one in sorted(source.iterdir()):
            picture = cv2.imread(str(one)) if one.suffix.lower() in PICTURES else None
            if picture is not None:
                yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        return
    video = cv2.VideoCapture(str(source))
    rate = video.get(cv2.CAP_PROP_FPS) or 25.0
    index, due = 0, 0.0
    while video.grab():
        if index / rate >= due - 1e-6:
            is_there, picture = video.retrieve()
            if not is_there:
                return
            yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
            due += period
        index += 1
    video.release()


def main() -> None:
    """Run this node until it is told to end."""
    run_node(ReplayNode)


if __name__ == '__main__':
    main()
