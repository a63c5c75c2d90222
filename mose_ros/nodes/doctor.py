"""What is wrong, and what helps: looks at the machine, then listens to the graph for a few seconds and changes nothing.

    python -m mose_ros.nodes.doctor                                   # or: ros2 run mose_ros doctor
    python -m mose_ros.nodes.doctor --platform vehicle --params-file mine.yaml  # before our nodes run: cameras and machine

Exit status: 0 nothing is broken, 1 something is, 2 the arguments are wrong. The rules are in `diagnosis` and `machine`.
"""

import argparse
import dataclasses
import json
import struct
import sys
import time
from collections import defaultdict

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from nav_msgs.msg import Odometry
from rcl_interfaces.msg import ParameterType
from rcl_interfaces.srv import GetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from mose_ros.core.bundle import Manifest
from mose_ros.nodes import diagnosis, images, machine
from mose_ros.nodes.diagnosis import Endpoint, Finding, Heard
from mose_ros.nodes.files import NODES, parameters_of, shared
from mose_ros.nodes.view_router_node import ViewRouterParameters

PLATFORMS = ('sim', 'carla_bridge', 'carla_native', 'leaderboard', 'vehicle', 'bag')
ANYBODY = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)  # hears every publisher
SILENT = ('/parameter_events', '/rosout')
PICTURES = {'sensor_msgs/msg/Image': Image, 'sensor_msgs/msg/CompressedImage': CompressedImage}
ODOMETRY, ROUTE = 'nav_msgs/msg/Odometry', 'nav_msgs/msg/Path'
HEARD = (*PICTURES, ODOMETRY)
ASKED = ('bundle', 'transport', 'cameras', 'camera_topic', 'camera_topics')
DISCOVERY_S = 1.5
SIGNS = {'ok': 'ok     ', 'warning': 'WARNING', 'error': 'ERROR  '}


class Doctor(Node):
    """Listens and asks; `findings` tells what that shows."""

    def __init__(self, namespace: str, expected: ViewRouterParameters, rate: float, **options):
        super().__init__('doctor', start_parameter_services=False, **options)
        self._namespace, self._rate = f'/{namespace.strip("/")}', rate
        self._settings, self._simulated = dataclasses.asdict(expected), {}
        self._heard: dict[str, Heard] = defaultdict(Heard)
        self._first: dict[str, Image | CompressedImage] = {}
        self._states: dict[str, str] = {}
        self._complaints: dict[str, DiagnosticStatus] = {}
        self._now, self._ticks = 0.0, set()

    # ---- listening ----

    def ask(self) -> None:
        """Read the parameters of the nodes that run."""
        for name in self._present():
            client = self.create_client(GetParameters, f'{self._namespace}/{name}/get_parameters')
            if not client.wait_for_service(1.0):
                continue
            wanted = ('use_sim_time', *(ASKED if name == NODES[0] else ()))
            # one by one: an answer ends at the first parameter that has no value
            answers = {
                one: client.call_async(GetParameters.Request(names=[one])) for one in wanted
            }
            for one, answer in answers.items():
                self.executor.spin_until_future_complete(answer, timeout_sec=2.0)
                values = answer.result().values if answer.done() else ()
                value = _value(values[0]) if values else None
                if one == 'use_sim_time':
                    self._simulated[name] = bool(value)
                elif value is not None:
                    self._settings[one] = value

    def listen(self, seconds: float) -> None:
        """Hear all that our nodes hear, without taking messages apart."""
        kinds = {topic: kind for topic, kind in self._inputs().items() if kind in PICTURES}
        for topic, kind in kinds.items():
            self.create_subscription(
                PICTURES[kind], topic, self._listener(topic, PICTURES[kind]), ANYBODY, raw=True
            )
        for topic, kind in self._inputs().items():
            if kind == ODOMETRY:
                hear = self._listener(topic)
                self.create_subscription(Odometry, topic, hear, ANYBODY, raw=True)
        for name in self._present():
            topic = f'{self._namespace}/{name}/heartbeat'
            self.create_subscription(Header, topic, self._beat(name), ANYBODY)
        self.create_subscription(DiagnosticArray, '/diagnostics', self._on_diagnostics, ANYBODY)
        self.create_subscription(Clock, '/clock', self._on_clock, ANYBODY)
        spin(self, seconds)

    def _listener(self, topic: str, kind: type | None = None):
        heard = self._heard[topic]

        def hear(raw: bytes):
            # four bytes say how the rest is written; then the header's stamp
            order = '<' if raw[1] & 1 else '>'
            sec, nanosec = struct.unpack_from(f'{order}iI', raw, 4)
            heard.arrived.append(self._now if any(self._simulated.values()) else time.time())
            heard.stamps.append(sec + nanosec * 1e-9)
            heard.size = max(heard.size, len(raw))
            if kind is not None and topic not in self._first:
                self._first[topic] = deserialize_message(raw, kind)

        return hear

    def _beat(self, name: str):
        def hear(msg: Header):
            self._states[name] = msg.frame_id

        return hear

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        self._complaints.update({status.name: status for status in msg.status})

    def _on_clock(self, msg: Clock) -> None:
        self._now = msg.clock.sec + msg.clock.nanosec * 1e-9
        self._ticks.add(self._now)

    # ---- the graph ----

    def _present(self) -> list[str]:
        names = self.get_node_names_and_namespaces()
        return [name for name in NODES if (name, self._namespace) in names]

    def _inputs(self) -> dict[str, str]:
        """Return topic and type of the cameras and of the odometry: as the view router hears them, or would."""
        heard = {topic: kind for topic, kind in self._asked().items() if kind in HEARD}
        if heard:
            return heard
        kind = list(PICTURES)[self._settings['transport'] != 'raw']
        return {self._absolute(topic): kind for topic in self._cameras().values()}

    def _asked(self) -> dict[str, str]:
        """Return what the view router hears: topic and type."""
        if NODES[0] not in self._present():
            return {}
        pairs = self.get_subscriber_names_and_types_by_node(NODES[0], self._namespace)
        return {topic: kinds[0] for topic, kinds in pairs}

    def _cameras(self) -> dict[str, str]:
        """Return the topic of each camera as the parameters have it."""
        names, topics = self._settings['cameras'], self._settings['camera_topics']
        if not topics:
            topics = [self._settings['camera_topic'].format(camera=name) for name in names]
        return dict(zip(names, topics, strict=False))

    def _absolute(self, topic: str) -> str:
        return topic if topic.startswith('/') else f'{self._namespace}/{topic}'

    def _offered_on(self, topic: str) -> list[Endpoint]:
        return [_endpoint(one) for one in self.get_publishers_info_by_topic(topic)]

    def _asked_on(self, topic: str) -> list[Endpoint]:
        found = [_endpoint(one) for one in self.get_subscriptions_info_by_topic(topic)]
        own = self.get_fully_qualified_name()
        return [one for one in found if one.node != own]

    # ---- judging ----

    def moment_bytes(self) -> int:
        """Return what all cameras publish at once."""
        cameras = [heard.size for topic, heard in self._heard.items() if topic in self._first]
        return sum(cameras)

    @property
    def bundle(self) -> str:
        """Return the folder of the bundle that is used, or would be."""
        return self._settings['bundle'] or str(shared('models/mose-tiny'))

    def findings(self, seconds: float) -> list[Finding]:
        """Return what the graph shows."""
        return [
            *self._judge_nodes(),
            *self._judge_topics(),
            *self._judge_inputs(seconds),
            *self._judge_pictures(),
            *diagnosis.judge_clock(
                self._simulated, self._offered_on('/clock'), len(self._ticks) > 1
            ),
            *self._judge_complaints(),
        ]

    def _judge_nodes(self) -> list[Finding]:
        names, present = self.get_node_names_and_namespaces(), self._present()
        found, what = [], 'nodes'
        for name, space in sorted({one for one in names if names.count(one) > 1}):
            says = f'{names.count((name, space))} nodes are called {space.rstrip("/")}/{name}'
            remedy = (
                'end the older one (a launch that was left running?), or use another namespace'
            )
            found.append(Finding(level='error', what=what, says=says, remedy=remedy))
        if not present:
            says = f'none of ours runs under {self._namespace}; cameras and machine were looked at'
            remedy = 'ros2 launch mose_ros drive.launch.py, or give the right --namespace'
            return [*found, Finding(level='warning', what=what, says=says, remedy=remedy)]
        for name in NODES:
            state = self._states.get(name, 'silent') if name in present else 'not there'
            if state == 'active':
                continue
            remedy = {
                'not there': 'start it: ros2 launch mose_ros drive.launch.py',
                'silent': 'it hangs or is stopped: see its log, then start it again',
                'unconfigured': 'see its complaint below and its log, then configure it again',
                'inactive': f'ros2 lifecycle set {self._namespace}/{name} activate',
            }.get(state, 'see its log')
            level = 'warning' if state == 'inactive' else 'error'
            found.append(Finding(level=level, what=name, says=f'is {state}', remedy=remedy))
        if not found:
            found.append(Finding(level='ok', what=what, says=f'{", ".join(present)} are active'))
        return found

    def _judge_topics(self) -> list[Finding]:
        found, count = [], 0
        for topic, _ in self.get_topic_names_and_types():
            if topic in SILENT:
                continue
            offered, asked = self._offered_on(topic), self._asked_on(topic)
            count += bool(offered and asked)
            found += diagnosis.judge_topic(topic, offered, asked)
        if not found:
            found.append(Finding(level='ok', what='QoS', says=f'both ends meet on {count} topics'))
        for topic in ('trajectory', 'views'):
            offered = self._offered_on(self._absolute(topic))
            if len(offered) > 1:
                says = f'{", ".join(one.node for one in offered)} all publish it'
                remedy = 'two graphs in one domain: end one, or set another ROS_DOMAIN_ID'
                found.append(Finding(level='error', what=topic, says=says, remedy=remedy))
        return found

    def _judge_inputs(self, seconds: float) -> list[Finding]:
        found, simulated = [], any(self._simulated.values())
        router = f'{self._namespace}/{NODES[0]}'
        anchor = self._cameras().get(self._settings['cameras'][0], '')
        for topic, kind in sorted(self._inputs().items()):
            needed = kind == ODOMETRY or topic == self._absolute(anchor)
            missing = diagnosis.judge_inputs(router, topic, self._offered_on(topic), needed)
            found += missing
            if not missing:
                heard, rate = self._heard[topic], 0.0 if kind == ODOMETRY else self._rate
                found += diagnosis.judge_stream(
                    topic, heard, seconds, rate, is_simulated=simulated
                )
        for topic, kind in self._asked().items():
            if kind == ROUTE:
                found += diagnosis.judge_inputs(router, topic, self._offered_on(topic))
        return found

    def _judge_pictures(self) -> list[Finding]:
        try:
            manifest = Manifest.load(self.bundle, verify=False)
        except (ValueError, OSError):
            return []  # told of the bundle itself
        view, found = (manifest.view_width, manifest.view_height), []
        known = tuple(self._settings['cameras'])
        if set(known) - set(manifest.cameras):
            says = f'{", ".join(sorted(set(known) - set(manifest.cameras)))} are not in the bundle'
            remedy = f'name the cameras as the bundle does: {", ".join(manifest.cameras)}'
            found.append(Finding(level='warning', what='cameras', says=says, remedy=remedy))
        for topic, msg in self._first.items():
            is_raw = isinstance(msg, Image)
            try:
                read = images.image_from_msg if is_raw else images.image_from_compressed
                height, width = read(msg).shape[:2]
            except ValueError as error:
                remedy = f'set the camera driver right; encodings: {", ".join(images.ENCODINGS)}'
                found.append(Finding(level='error', what=topic, says=str(error), remedy=remedy))
                continue
            encoding = msg.encoding if is_raw else images.ENCODINGS[0]
            found += diagnosis.judge_pictures(
                topic, (width, height), encoding, view, images.ENCODINGS
            )
        return found

    def _judge_complaints(self) -> list[Finding]:
        levels = {DiagnosticStatus.WARN: 'warning', DiagnosticStatus.ERROR: 'error'}
        remedy = 'the node says this itself: see docs/vehicle.md and its log'
        own = self._namespace.lstrip('/')
        return [
            Finding(level=levels[status.level], what=name, says=status.message, remedy=remedy)
            for name, status in sorted(self._complaints.items())
            if status.level in levels and name.startswith(own)
        ]


def spin(node: Node, seconds: float) -> None:
    """Serve the node's callbacks for a while."""
    end = time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0:
        node.executor.spin_once(timeout_sec=rest)


def _endpoint(info) -> Endpoint:
    qos = info.qos_profile
    is_reliable = qos.reliability == ReliabilityPolicy.RELIABLE
    is_latched = qos.durability == DurabilityPolicy.TRANSIENT_LOCAL
    is_manual = qos.liveliness == LivelinessPolicy.MANUAL_BY_TOPIC
    return Endpoint(
        node=f'{info.node_namespace.rstrip("/")}/{info.node_name}',
        kind=info.topic_type,
        reliability='reliable' if is_reliable else 'best_effort',
        durability='transient_local' if is_latched else 'volatile',
        deadline_s=_limit(qos.deadline),
        liveliness='manual_by_topic' if is_manual else 'automatic',
        lease_s=_limit(qos.liveliness_lease_duration),
        depth=qos.depth,
    )


def _limit(duration) -> float:
    seconds = duration.nanoseconds * 1e-9
    return seconds if 0 < seconds < diagnosis.FOREVER_S else float('inf')


def _value(value):
    kinds = {
        ParameterType.PARAMETER_BOOL: 'bool_value',
        ParameterType.PARAMETER_INTEGER: 'integer_value',
        ParameterType.PARAMETER_DOUBLE: 'double_value',
        ParameterType.PARAMETER_STRING: 'string_value',
        ParameterType.PARAMETER_STRING_ARRAY: 'string_array_value',
    }
    name = kinds.get(value.type)
    found = getattr(value, name) if name else None
    return tuple(found) if name == 'string_array_value' else found


def expectation(
    platform: str | None, params_file: str | None, namespace: str
) -> ViewRouterParameters:
    """Return what the launch file would tell the view router, for when it does not run; ValueError for a wrong file."""
    files = [params_file] if params_file else []
    if platform:
        files.insert(0, shared(f'config/{"drive" if platform == "sim" else platform}.yaml'))
    known = {field.name for field in dataclasses.fields(ViewRouterParameters)}
    given = parameters_of(files, NODES[0], namespace)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in known}
    return ViewRouterParameters(**values)


def main(arguments: list[str] | None = None) -> int:
    """Examine, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog='doctor', description='Say what is wrong and what helps.'
    )
    add = parser.add_argument
    add('--namespace', default='mose', help='of our nodes (mose)')
    add('--seconds', type=float, default=4.0, help='how long to listen (4)')
    add('--rate', type=float, default=10.0, help='Hz that cameras should have (10)')
    add('--platform', choices=PLATFORMS, help='whose parameters hold where our nodes do not run')
    add('--params-file', metavar='YAML', help='parameters on top of them, as for the launch file')
    add('--json', action='store_true', help='print the findings as JSON')
    options, _ = parser.parse_known_args(arguments)  # ros2 run may append --ros-args
    try:
        expected = expectation(options.platform, options.params_file, options.namespace)
        if not 0 < options.seconds <= 600:
            raise ValueError(f'--seconds {options.seconds} is not in 0..600')
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    rclpy.init(args=[])
    try:
        doctor = Doctor(options.namespace, expected, options.rate)
        executor = SingleThreadedExecutor()
        executor.add_node(doctor)
        spin(doctor, DISCOVERY_S)
        doctor.ask()
        doctor.listen(options.seconds)
        found = doctor.findings(options.seconds)
        folders = {'logs': '~/.ros/log', 'engines': '~/.cache'}
        found = [
            *machine.examine(moment=doctor.moment_bytes(), folders=folders),
            machine.check_bundle(doctor.bundle),
            *found,
        ]
        executor.shutdown(timeout_sec=1.0)
        doctor.destroy_node()
    finally:
        rclpy.try_shutdown()
    show(found, options.json)
    return int(any(one.level == 'error' for one in found))


def show(found: list[Finding], as_json: bool) -> None:
    """Print findings: the worst last, where the eye is when all has scrolled by."""
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
        return
    for one in sorted(found, key=lambda finding: diagnosis.LEVELS.index(finding.level)):
        print(f'{SIGNS[one.level]} {one.what}: {one.says}')
        if one.remedy:
            print(f'        -> {one.remedy}')
    counts = [sum(one.level == level for one in found) for level in diagnosis.LEVELS]
    print('{} ok, {} warnings, {} errors'.format(*counts))


if __name__ == '__main__':
    sys.exit(main())
