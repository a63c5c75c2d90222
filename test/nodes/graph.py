"""A graph of real nodes over real DDS in this process, and a vehicle that shows them what a test wants."""

import threading
import time
from collections import defaultdict

import numpy as np
from nav_msgs.msg import Odometry, Path
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image
from std_msgs.msg import String

from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import EgoState
from mose_ros.nodes import conversions, images
from mose_ros.nodes.lifecycle import LATCHED

NAMESPACE = '/mose'


def overrides(**values) -> list[Parameter]:
    """Return parameters as a launch file would give them."""
    return [Parameter(name, value=value) for name, value in values.items()]


class Graph:
    """Nodes, each with an executor thread of its own, as they would be in processes of their own."""

    def __init__(self, context):
        self.context = context
        self._running = {}

    def start(self, kind, **parameters):
        """Make a node and spin it."""
        options = {'context': self.context, 'namespace': NAMESPACE}
        node = kind(
            **options, **({'parameter_overrides': overrides(**parameters)} if parameters else {})
        )
        return self.spin(node)

    def spin(self, node):
        """Spin a node in a thread."""
        executor = SingleThreadedExecutor(context=self.context)
        executor.add_node(node)
        stop = threading.Event()

        def spin():
            while not stop.is_set():
                executor.spin_once(timeout_sec=0.05)

        thread = threading.Thread(target=spin, daemon=True)
        thread.start()
        self._running[node] = (executor, thread, stop)
        return node

    def kill(self, node) -> None:
        """End a node without a word to the others."""
        executor, thread, stop = self._running.pop(node)
        stop.set()
        thread.join(2.0)
        if hasattr(node, 'close'):
            node.close()
        executor.shutdown(timeout_sec=1.0)
        node.destroy_node()

    def close(self) -> None:
        """End all."""
        for node in list(self._running):
            self.kill(node)


class Car(Node):
    """Publishes pictures, odometry, route and command ten times a second; fields say what is wrong with them."""

    def __init__(self, context):
        super().__init__('car', context=context, namespace=NAMESPACE)
        self.cameras = set(CAMERAS)
        self.brightness = dict.fromkeys(CAMERAS, 90)
        self.speed, self.x = 2.0, 0.0  # slower than the test bundle's plans
        self.has_odometry, self.offset = True, 0.0
        self.change = lambda name, msg: msg  # of a picture's message
        self.stamps = []
        self._images = {n: self.create_publisher(Image, f'camera/{n}', 10) for n in CAMERAS}
        self._odometry = self.create_publisher(Odometry, 'odometry', 10)
        self._route = self.create_publisher(Path, 'route', LATCHED)
        self._command = self.create_publisher(String, 'command', 10)
        straight = np.stack([np.arange(0.0, 500.0, 5.0), np.zeros(100)], 1)
        self._route.publish(
            conversions.polyline_to_msg(straight, conversions.to_stamp(0.0), 'map')
        )
        self.create_timer(0.1, self._tick)

    def _tick(self) -> None:
        now = time.time() + self.offset
        stamp = conversions.to_stamp(now)
        if np.isfinite(self.speed):
            self.x += 0.1 * self.speed
        ego = EgoState(x=self.x, y=0.0, yaw=0.0, speed=self.speed)
        if self.has_odometry:
            self._odometry.publish(conversions.ego_to_msg(ego, stamp, 'map', 'ego_vehicle'))
        self._command.publish(String(data='follow'))
        for name in reversed(CAMERAS):
            if name in self.cameras:
                picture = np.full((72, 128, 3), self.brightness[name], np.uint8)
                msg = images.image_to_msg(picture, stamp, name)
                self._images[name].publish(self.change(name, msg))
        self.stamps.append((stamp.sec, stamp.nanosec))


class Ear(Node):
    """Keeps what is said on topics, with the time at which it was heard."""

    def __init__(self, context, **topics):
        super().__init__('ear', context=context, namespace=NAMESPACE)
        self.heard = defaultdict(list)
        for topic, kind in topics.items():
            name = f'/{topic}' if topic == 'diagnostics' else topic
            self.create_subscription(kind, name, self._listener(topic), 50)

    def _listener(self, topic):
        return lambda msg: self.heard[topic].append((time.monotonic(), msg))

    def newest(self, topic):
        """Return the newest message."""
        return self.heard[topic][-1][1]

    def wait(self, topic, wanted=lambda msg: True, since=0.0, timeout=5.0):
        """Return time and message of the first that is wanted and was heard after `since`; AssertionError if none comes."""
        deadline = time.monotonic() + timeout
        seen = 0
        while time.monotonic() < deadline:
            for heard, msg in self.heard[topic][seen:]:
                seen += 1
                if heard > since and wanted(msg):
                    return heard, msg
            time.sleep(0.01)
        raise AssertionError(f'nothing wanted on {topic} within {timeout} s; {seen} messages came')

    def states(self, level=None):
        """Return the newest diagnostic of each name, as name -> message."""
        found = {}
        for _, array in list(self.heard['diagnostics']):
            found.update({status.name: status for status in array.status})
        return {n: s.message for n, s in found.items() if level is None or s.level == level}
