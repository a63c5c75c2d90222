"""Where the vehicle is and where it shall go: the odometry, route and command that view router and driver both hear."""

import threading

import numpy as np
from nav_msgs.msg import Odometry, Path
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import String

from mose_ros.core.navigation import EgoHistory, RouteFollower, check_guidance
from mose_ros.core.types import Command, EgoState, Guidance
from mose_ros.nodes import conversions
from mose_ros.nodes.lifecycle import LATCHED, NEWEST, OK, ManagedNode

ODOMETRY = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)


class NotReady(ValueError):
    """Something is missing to answer; the message says what."""


class Bearings:
    """Hears `odometry`, `route` and `command` for a node; answers for the moment of an image."""

    def __init__(self, node: ManagedNode, tolerance_s: float):
        self._node = node
        self._tolerance_s = tolerance_s
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._route: RouteFollower | None = None
        self.clear()
        hear = node.create_subscription
        odometry = node.guarded('odometry', self._on_odometry)
        route = node.guarded('route', self._on_route)
        self._subscriptions = [
            hear(Odometry, 'odometry', odometry, ODOMETRY),
            # a latched route that is replayed from a bag comes volatile, so both are heard
            hear(Path, 'route', route, LATCHED),
            hear(Path, 'route', route, NEWEST),
            hear(String, 'command', node.guarded('command', self._on_command), NEWEST),
        ]

    def clear(self) -> None:
        """Forget motion and command; for when time goes backwards. The route stays, the place on it is sought anew."""
        with self._lock:
            self._history = EgoHistory()
            self._command: Command | None = None  # nobody says: the route's turns do
            if self._route is not None:
                self._route.progress = None

    def close(self) -> None:
        """Stop hearing."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)

    def wait(self, time: float, timeout_s: float) -> None:
        """Wait until the odometry of that moment is there, at most so long."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._is_there(time), timeout_s)

    def at(self, time: float) -> tuple[EgoState, Guidance]:
        """Return state and guidance at that moment; NotReady says what is missing."""
        with self._lock:
            ego = self._history.at(time, self._tolerance_s)
            newest, route, command = self._history.newest, self._route, self._command
            if newest is None:
                raise NotReady(f'no odometry yet on {self._resolved("odometry")}')
            if ego is None:
                raise NotReady(f'the odometry is {time - newest[0]:.2f} s away from the image')
            if route is None:
                raise NotReady(f'no route yet on {self._resolved("route")}')
            guidance = route.guidance(ego, command)
            try:
                check_guidance(guidance, route.distance)
            except ValueError as error:
                raise NotReady(str(error)) from None
            return ego, guidance

    def _resolved(self, topic: str) -> str:
        return self._node.resolve_topic_name(topic)

    def _is_there(self, time: float) -> bool:
        newest = self._history.newest
        return newest is not None and newest[0] >= time - 1e-3

    def _on_odometry(self, msg: Odometry) -> None:
        ego = conversions.ego_from_msg(msg)
        with self._arrived:
            self._history.add(conversions.seconds(msg.header.stamp), ego)
            self._arrived.notify_all()
        self._node.report('odometry', OK, 'arrives')

    def _on_route(self, msg: Path) -> None:
        points = conversions.polyline_from_msg(msg)
        with self._lock:
            if self._route is not None and np.array_equal(self._route_seen, points):
                return  # published again: keep the place on it
            self._route, self._route_seen = RouteFollower(points), points
            self._command = None  # was for the way before
        self._node.report('route', OK, f'{len(points)} points')

    def _on_command(self, msg: String) -> None:
        self._command = conversions.command_from_msg(msg)
        self._node.report('command', OK, 'arrives')
