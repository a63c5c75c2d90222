"""What load the graph holds: cameras x size x rate, raised until the first plan misses its deadline.

    python -m mose_ros.nodes.load                                              # 1, 2 and 6 cameras, small and large
    python -m mose_ros.nodes.load --cameras 6 --sizes 1600x900 --rates 10 --seconds 60 --json out.json

One process publishes bgra8 pictures of all cameras at once, as CARLA's bridge does, with odometry and a straight route; view_router,
driver and controller are processes of their own, with the shipped bundle and transport. A frame is on time when its trajectory is
published within 100 ms of the stamp of its pictures, which they get before the first of them is published.
"""

import argparse
import array
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import rclpy
import yaml
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as RosPath
from rclpy.executors import SingleThreadedExecutor
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import String

from mose_ros.core.files import write_json
from mose_ros.core.provenance import commit, machine, versions
from mose_ros.core.rig import CAMERAS, RIG
from mose_ros.core.types import Command, EgoState
from mose_ros.nodes import conversions, images
from mose_ros.nodes.drive import ROLE, Failed, start_nodes, take_domain
from mose_ros.nodes.files import NODES, shared
from mose_ros.nodes.lifecycle import LATCHED
from mose_ros.nodes.machine import PROFILES
from mose_ros.nodes.monitor import DEADLINE_MS, Monitor
from mose_ros.nodes.processes import Processes
from mose_ros.nodes.simulator_node import BRIDGE

START_LIMIT_S, WARM_UP_S, REST_S = 90.0, 2.0, 0.5
PICTURES = 8  # different ones, so that none is the same again
SPEED = 8.0  # m/s that the odometry tells
CHANNELS = 4
KEPT_RATE = 0.98  # of the rate, that the publishing process must reach itself


def main(arguments: list[str] | None = None) -> int:
    """Raise the rate for each number of cameras and size until a deadline is missed; return the exit status."""
    options = _parse(arguments)
    if options.role:
        _publish(options)
        return 0
    rows = []
    lock = take_domain(None)
    try:
        for cameras in options.cameras:
            for size in options.sizes:
                rows += raised(options, cameras, size)
    except (Failed, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    finally:
        lock.close()
    if options.json:
        made = {'seconds': options.seconds, 'machine': machine(), 'versions': versions()}
        write_json(options.json, {**made, 'commit': commit(), 'rows': rows})
    return 0


def _parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='load', description=main.__doc__)
    add = parser.add_argument
    add('--cameras', type=_numbers, default='1,2,6', help='how many at once (1,2,6)')
    add('--sizes', type=_sizes, default='640x360,1600x900', help='of each picture')
    add('--rates', type=_numbers, default='5,10,15,20,30', help='Hz, from low to high')
    add('--seconds', type=float, default=20.0, help='of each measurement (20)')
    add('--bundle', default=str(shared('models/mose-tiny')), help='folder of the exported network')
    add('--json', metavar='FILE', help='write the figures')
    add('--role', choices=['publish'], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if max(options.cameras) > len(CAMERAS) or not options.seconds > 0:
        parser.error(f'there are {len(CAMERAS)} cameras, and --seconds is positive')
    return options


def _numbers(text: str) -> list[int]:
    values = [int(one) for one in text.split(',')]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f'{text}: each is 1 at least')
    return values


def _sizes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r'(\d{2,4})x(\d{2,4})', one) for one in text.split(',')]
    if not all(found):
        raise argparse.ArgumentTypeError(f'{text}: give sizes as 640x360,1600x900')
    return [(int(one[1]), int(one[2])) for one in found]


# ---- the runner ----


def raised(options: argparse.Namespace, cameras: int, size: tuple[int, int]) -> list[dict]:
    """Measure one rate after the other, up to the first that is not held."""
    rows = []
    for rate in options.rates:
        rows.append(measure(options, cameras, size, rate))
        print(_told(rows[-1]), flush=True)
        if not rows[-1]['held']:
            break
    return rows


def measure(options: argparse.Namespace, cameras: int, size: tuple[int, int], rate: int) -> dict:
    """Run the graph under one load and return what became of its frames; Failed where it does not come alive."""
    folder = Path(tempfile.mkdtemp(prefix='mose_ros_load_'))
    processes = Processes(folder)
    try:
        _start(options, processes, folder, cameras, size, rate)
        latencies = _listen(options.seconds, processes)
    finally:
        processes.close()
        shutil.rmtree(folder, ignore_errors=True)
    missed = int((latencies > DEADLINE_MS).sum())
    reached = len(latencies) / options.seconds
    planned = latencies[np.isfinite(latencies)]
    return {
        'cameras': cameras,
        'size': f'{size[0]}x{size[1]}',
        'rate_hz': rate,
        'reached_hz': round(reached, 2),
        'mb_s': round(cameras * size[0] * size[1] * CHANNELS * rate / 1e6, 1),
        'frames': len(latencies),
        'missed': missed,
        'unplanned': int(np.isinf(latencies).sum()),
        'latency_ms': {
            f'p{p}': round(float(np.percentile(planned, p)), 1) if len(planned) else None
            for p in (50, 99)
        },
        'held': missed == 0 and reached >= KEPT_RATE * rate,
    }


def _start(options, processes, folder, cameras, size, rate) -> None:
    file = folder / 'cameras.yaml'
    there = {'cameras': list(CAMERAS[:cameras])}
    file.write_text(yaml.safe_dump({'/**/view_router': {'ros__parameters': there}}))
    large = dict.fromkeys(PROFILES, str(shared('config/fastdds_shm.xml')))
    wanted = argparse.Namespace(bundle=options.bundle, params_file=file)
    start_nodes(wanted, processes, folder, large)
    words = ['--role', 'publish', '--cameras', str(cameras), '--rates', str(rate)]
    words += ['--sizes', f'{size[0]}x{size[1]}']
    sender = dict.fromkeys(PROFILES, str(shared('config/fastdds_cameras.xml')))
    processes.start('cameras', 'mose_ros.nodes.load', words, sender)


def _listen(seconds: float, processes: Processes) -> np.ndarray:
    """Return of each frame in so many seconds the ms to its trajectory, infinite where none came."""
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    monitor, executor, done = Monitor(ROLE), SingleThreadedExecutor(), threading.Event()
    executor.add_node(monitor)

    def spin():
        while not done.is_set():
            executor.spin_once(timeout_sec=0.2)

    thread = threading.Thread(target=spin, name='monitor', daemon=True)
    thread.start()
    try:
        _wait(monitor, processes)
        time.sleep(WARM_UP_S)
        begin = time.time_ns()
        time.sleep(seconds)
        end = time.time_ns()
        time.sleep(REST_S)  # for the plans of the last frames
    finally:
        done.set()
        thread.join()
        executor.shutdown(timeout_sec=1.0)
        monitor.destroy_node()
        rclpy.try_shutdown()
    frames = [stamp for stamp in monitor.frames if begin <= stamp < end]
    return np.array([monitor.latencies_ms.get(stamp, np.inf) for stamp in frames])


def _wait(monitor, processes) -> None:
    """Wait for the first plan."""
    deadline = time.monotonic() + START_LIMIT_S
    while not monitor.latencies_ms:
        ended = processes.ended()
        if ended or monitor.failed_to_start or time.monotonic() > deadline:
            said = '\n'.join(map(processes.tail, [*NODES, 'cameras']))
            why = monitor.failed_to_start or ended or f'no plan within {START_LIMIT_S:.0f} s'
            raise Failed(f'{why}\n{said}')
        time.sleep(0.05)


def _told(row: dict) -> str:
    latency = row['latency_ms']
    return (
        f'{row["cameras"]} x {row["size"]} at {row["rate_hz"]} Hz ({row["mb_s"]:.0f} MB/s): '
        f'{row["missed"]} of {row["frames"]} frames missed, p50 {latency["p50"]}, p99 {latency["p99"]} ms, '
        f'{"held" if row["held"] else "NOT held"}'
    )


# ---- the process of the cameras ----


def _publish(options: argparse.Namespace) -> None:
    rclpy.init(args=[])
    [cameras], [(width, height)], [rate] = options.cameras, options.sizes, options.rates
    node = rclpy.create_node('cameras', namespace='/mose')
    prefix, publish = f'/carla/{ROLE}', node.create_publisher
    senders = [publish(Image, f'{prefix}/{name}/image', BRIDGE) for name in CAMERAS[:cameras]]
    info = publish(CameraInfo, f'{prefix}/{CAMERAS[0]}/camera_info', BRIDGE)
    odometry = publish(Odometry, f'{prefix}/odometry', BRIDGE)
    command = publish(String, 'command', BRIDGE)
    route = publish(RosPath, f'{prefix}/waypoints', LATCHED)
    straight = np.stack([np.arange(0.0, 10000.0, 20.0), np.zeros(500)], 1)
    route.publish(conversions.polyline_to_msg(straight, conversions.to_stamp(time.time()), 'map'))
    msg = Image(height=height, width=width, encoding='bgra8', step=width * CHANNELS)
    pictures = [_picture(width, height, index) for index in range(PICTURES)]
    begun, count = time.monotonic(), 0
    while rclpy.ok():
        due = begun + count / rate
        time.sleep(max(0.0, due - time.monotonic()))
        stamp = conversions.to_stamp(time.time())
        driven = (time.monotonic() - begun) * SPEED
        ego = EgoState(x=driven, y=0.0, yaw=0.0, speed=SPEED)
        odometry.publish(conversions.ego_to_msg(ego, stamp, 'map', ROLE))
        command.publish(String(data=Command.FOLLOW.value))
        frame = f'{ROLE}/{CAMERAS[0]}'
        info.publish(images.camera_info_to_msg(RIG[0], width, height, stamp, frame))
        msg.data = pictures[count % PICTURES]
        for name, sender in zip(CAMERAS, senders, strict=False):
            msg.header.stamp, msg.header.frame_id = stamp, f'{ROLE}/{name}'
            sender.publish(msg)
        count = max(count + 1, int((time.monotonic() - begun) * rate))  # what is late is left out


def _picture(width: int, height: int, index: int) -> array.array:
    """Return a smooth picture that moves on with the index: what is flat, noisy or the same again is masked as broken."""
    rows, columns = np.mgrid[0:height, 0:width]
    wave = np.sin(4.0 * np.pi * columns / width + index) * np.cos(2.0 * np.pi * rows / height)
    pixels = np.repeat((128.0 + 90.0 * wave).astype(np.uint8)[..., None], CHANNELS, 2)
    data = array.array('B')
    data.frombytes(memoryview(pixels.reshape(-1)))
    return data


if __name__ == '__main__':
    sys.exit(main())
