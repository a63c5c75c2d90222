"""How many pictures of six large cameras arrive, by transport and QoS: two processes, real DDS, nothing else.

    python -m mose_ros.nodes.delivery                            # Fast DDS as it comes, beside the profiles of config/
    python -m mose_ros.nodes.delivery --transports my.xml --size 2880x1860 --json out.json

Publisher and hearer are processes of their own in a ROS domain of their own. Every picture is a bgra8 Image as CARLA's bridge
sends it, all cameras at once; delivered is what arrived of what was published. Exit status 1: less than `--least` arrived.
"""

import argparse
import array
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mose_ros.core.files import write_json
from mose_ros.nodes.drive import Failed
from mose_ros.nodes.files import shared
from mose_ros.nodes.machine import PROFILES
from mose_ros.nodes.processes import DomainLock, Processes

SHIPPED, DEFAULT = 'shm', 'default'  # names of transports; anything else is a profile's path
ROLES = ('publish', 'hear')
RELIABILITIES = ('best_effort', 'reliable')
DEPTH = 10  # of both: a bridge's, and enough for a hearer to be late without losing what has come
TOPIC = '/camera_{}'
MEETING_S, SILENCE_S = 30.0, 4.0
CHANNELS = 4


def main(arguments: list[str] | None = None) -> int:
    """Measure each transport with each QoS; return the exit status."""
    options = _parse(arguments)
    if options.role:
        {'publish': _publish, 'hear': _hear}[options.role](options)
        return 0
    try:
        rows = [
            measure(options, transport, reliability)
            for transport in options.transports.split(',')
            for reliability in RELIABILITIES
        ]
    except (Failed, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    if options.json:
        settings = {name: getattr(options, name) for name in ('size', 'cameras', 'rate')}
        machine = {'cpus': os.cpu_count(), 'machine': platform.platform()}
        write_json(options.json, {**settings, **machine, 'rows': rows})
    shares = [row['delivered'] for row in rows if row['transport'] != DEFAULT]
    return int(any(share < options.least for share in shares))


def _parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='delivery', description=main.__doc__)
    add = parser.add_argument
    add('--transports', default=f'{DEFAULT},{SHIPPED}', help='default, shm, or files of profiles')
    add('--size', default='1600x900', help='of each picture (1600x900)')
    add('--cameras', type=int, default=6, help='that publish at once (6)')
    add('--rate', type=float, default=10.0, help='Hz (10)')
    add('--seconds', type=float, default=8.0, help='of each measurement (8)')
    add('--least', type=float, default=0.99, help='share that must arrive, but for default (0.99)')
    add('--json', metavar='FILE', help='write the figures')
    add('--role', choices=ROLES, help=argparse.SUPPRESS)
    add('--reliability', choices=RELIABILITIES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = re.fullmatch(r'(\d{1,4})x(\d{1,4})', options.size)
    if not size or '0' in size.groups():
        parser.error(f'--size {options.size} is no WIDTHxHEIGHT')
    options.width, options.height = map(int, size.groups())
    if not (options.cameras > 0 and options.rate > 0 and options.seconds > 0):
        parser.error('--cameras, --rate and --seconds are positive')
    options.count = max(1, round(options.rate * options.seconds))
    return options


# ---- the runner ----


def measure(options: argparse.Namespace, transport: str, reliability: str) -> dict:
    """Run both processes once and return what arrived; Failed says which of them ended early."""
    files = dict(zip(ROLES, _profiles(transport), strict=True))
    lock = DomainLock()
    environment = {
        'ROS_DOMAIN_ID': str(lock.number),
        'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
    }
    with tempfile.TemporaryDirectory(prefix='mose_ros_delivery_') as folder:
        processes, out = Processes(folder), Path(folder) / 'heard.json'
        words = ['--size', options.size, '--cameras', str(options.cameras)]
        words += ['--rate', str(options.rate), '--seconds', str(options.seconds)]
        words += ['--reliability', reliability]
        try:
            for role in reversed(ROLES):
                own = ['--json', str(out)] if role == 'hear' else []
                command = [*words, '--role', role, *own]
                profile = dict.fromkeys(PROFILES, files[role])
                processes.start(
                    role, 'mose_ros.nodes.delivery', command, {**environment, **profile}
                )
            deadline = time.monotonic() + 2 * MEETING_S + 3 * options.seconds
            while not out.exists():
                codes = processes.ended()
                if codes.get('publish') or 'hear' in codes or time.monotonic() > deadline:
                    if out.exists():
                        break
                    said = '\n'.join(map(processes.tail, ROLES))
                    raise Failed(f'{transport}, {reliability}: no figures; {codes}\n{said}')
                time.sleep(0.05)
            row = json.loads(out.read_text())
        finally:
            processes.close()
            lock.close()
    row = {'transport': Path(transport).name, 'reliability': reliability, **row}
    print(
        f'{row["transport"]:>16} {reliability:>12}: {row["arrived"]} of {row["published"]} '
        f'({100 * row["delivered"]:.1f} %), latency p50 {row["latency_ms"]["p50"]} '
        f'p95 {row["latency_ms"]["p95"]} ms',
        flush=True,
    )
    return row


def _profiles(transport: str) -> tuple[str, str]:
    """Return the profiles of publisher and hearer."""
    if transport == DEFAULT:
        return '', ''
    if transport == SHIPPED:
        return str(shared('config/fastdds_cameras.xml')), str(shared('config/fastdds_shm.xml'))
    path = Path(transport)
    if not path.is_file():
        raise ValueError(f'{transport} is neither {DEFAULT}, {SHIPPED} nor a profile')
    return str(path.resolve()), str(path.resolve())


# ---- its two processes ----


def _publish(options: argparse.Namespace) -> None:
    node, executor, qos = _open('publisher', options)
    from sensor_msgs.msg import Image

    publishers = [
        node.create_publisher(Image, TOPIC.format(index), qos) for index in range(options.cameras)
    ]
    pixels = np.random.default_rng(0).integers(
        0, 256, options.width * options.height * CHANNELS, np.uint8
    )
    msg = Image(height=options.height, width=options.width, encoding='bgra8')
    msg.step, data = options.width * CHANNELS, array.array('B')
    data.frombytes(memoryview(pixels))
    msg.data = data
    _wait(lambda: all(one.get_subscription_count() for one in publishers), executor)
    due = time.monotonic() + 0.5  # for the hearer's side of the meeting
    for index in range(options.count):
        time.sleep(max(0.0, due - time.monotonic()))
        due = max(due + 1.0 / options.rate, time.monotonic())
        for publisher in publishers:
            msg.header.frame_id, now = str(index), time.time_ns()
            msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(now, 1_000_000_000)
            publisher.publish(msg)
    _wait(lambda: not any(one.get_subscription_count() for one in publishers), executor)


def _hear(options: argparse.Namespace) -> None:
    node, executor, qos = _open('hearer', options)
    from sensor_msgs.msg import Image

    ages: dict[tuple[int, str], float] = {}
    newest = [time.monotonic() + MEETING_S]

    def listener(camera: int):
        def hear(msg: Image):
            now = time.time_ns()
            stamp = msg.header.stamp
            ages[camera, msg.header.frame_id] = (
                now - stamp.sec * 1_000_000_000 - stamp.nanosec
            ) * 1e-6
            newest[0] = time.monotonic()

        return hear

    for index in range(options.cameras):
        node.create_subscription(Image, TOPIC.format(index), listener(index), qos)
    published = options.count * options.cameras
    while len(ages) < published and time.monotonic() - newest[0] < SILENCE_S:
        executor.spin_once(timeout_sec=0.1)
    values = list(ages.values())
    latency = (
        {f'p{p}': round(float(np.percentile(values, p)), 1) for p in (50, 95)} if values else {}
    )
    row = {
        'published': published,
        'arrived': len(ages),
        'delivered': round(len(ages) / published, 4),
        'latency_ms': latency or {'p50': None, 'p95': None},
    }
    write_json(options.json, row)


def _open(name: str, options: argparse.Namespace):
    import rclpy  # by the two processes only: it starts a Python process anew
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    rclpy.init(args=[])
    node, executor = rclpy.create_node(name), SingleThreadedExecutor()
    executor.add_node(node)
    kind = getattr(ReliabilityPolicy, options.reliability.upper())
    return node, executor, QoSProfile(depth=DEPTH, reliability=kind)


def _wait(is_done, executor) -> None:
    deadline = time.monotonic() + MEETING_S
    while not is_done() and time.monotonic() < deadline:
        executor.spin_once(timeout_sec=0.05)


if __name__ == '__main__':
    sys.exit(main())
