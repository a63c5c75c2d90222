"""Every fault of the table in docs/reliability.md: how it is brought about in the running graph, and how it ends."""

import math
import os
import resource
import shutil
import signal
import time

import numpy as np

from mose_ros.core.rig import CAMERAS
from mose_ros.nodes import images
from nodes.bench import NODES, Fault
from nodes.vehicle import RADIUS, circle, late, same, shifted

FRONT, SIDES = CAMERAS[0], CAMERAS[1:]


def _kill(name):
    def inject(bench):
        os.kill(bench.processes.pid(name), signal.SIGKILL)

        def heal():
            bench.processes.restart(name)

        return heal

    return inject


def _halt(names):
    def inject(bench):
        pids = [bench.processes.pid(name) for name in names]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return lambda: [os.kill(pid, signal.SIGCONT) for pid in pids]

    return inject


def _camera(names, make_change):
    def inject(bench):
        for name in names:
            bench.car.change[name] = make_change()
        return lambda: [bench.car.change.pop(name) for name in names]

    return inject


def _odometry(make_change):
    def inject(bench):
        before, bench.car.change_odometry = bench.car.change_odometry, make_change()
        return lambda: setattr(bench.car, 'change_odometry', before)

    return inject


def _route(points):
    def inject(bench):
        bench.car.publish_route(points)
        return bench.car.publish_route

    return inject


def _clock(seconds):
    def inject(bench):
        bench.car.offset += seconds
        return lambda: setattr(bench.car, 'offset', bench.car.offset - seconds)

    return inject


def _pause(bench):
    """Let a simulator stand still with its clock."""
    bench.car.is_paused, began = True, time.monotonic()
    bench.car.pauses.append((began, math.inf))

    def heal():
        ended = time.monotonic()
        bench.car.offset -= ended - began
        bench.car.pauses[-1] = began, ended
        bench.car.is_paused = False

    return heal


def _flood(bench):
    bench.processes.start('flood', 'nodes.flood', [], bench.flooding)
    return lambda: os.kill(bench.processes.pid('flood'), signal.SIGKILL)


def _full_disk(bench):
    """Refuse every write of the nodes to a file: what they log and record finds no room."""
    pids = [bench.processes.pid(name) for name in NODES]
    before = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids]
    for pid, (_, hard) in zip(pids, before, strict=True):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    bench.car.change[SIDES[0]] = lambda msg: []  # something to log

    def heal():
        bench.car.change.pop(SIDES[0])
        for pid, limits in zip(pids, before, strict=True):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    return heal


def _swap_bundle(bench):
    kept = bench.bundle.with_name('kept')
    shutil.copytree(bench.bundle, kept, dirs_exist_ok=True)

    def put(source):
        for path in source.iterdir():
            shutil.copy(path, bench.bundle / f'{path.name}.new')
            os.replace(bench.bundle / f'{path.name}.new', bench.bundle / path.name)

    put(bench.mad)
    return lambda: put(kept)


def _pixels(change):
    """Return a change of a camera's messages by its pixels."""

    def make():
        def one(msg):
            made = change(np.frombuffer(msg.data, np.uint8).reshape(msg.height, msg.width, 3))
            return [images.image_to_msg(made, msg.header.stamp, msg.header.frame_id)]

        return one

    return make


def _field(**changes):
    def make():
        def one(msg):
            for name, value in changes.items():
                setattr(msg, name, value(msg) if callable(value) else value)
            return [msg]

        return one

    return make


def _stamped(seconds):
    def make():
        def one(msg):
            msg.header.stamp = shifted(msg.header.stamp, seconds)
            return [msg]

        return one

    return make


def _odd_odometry(change):
    def make():
        def one(msg):
            change(msg)
            return msg

        return one

    return make


def _frozen_odometry(is_new_stamp):
    def make():
        change = same(is_new_stamp)
        return lambda msg: change(msg)[0]

    return make


def _jumping():
    count = [0]

    def one(msg):
        count[0] += 1
        msg.pose.pose.position.x += 20.0 * (count[0] % 2)
        return msg

    return one


def _nan(msg):
    msg.pose.pose.position.x = math.nan


def _dead_speed(msg):
    msg.twist.twist.linear.x = 0.0


def _shift(seconds):
    def change(msg):
        msg.header.stamp = shifted(msg.header.stamp, seconds)

    return change


_noise = np.random.default_rng(0)
CAMERA_FAULTS = {
    'lost': lambda: lambda msg: [],
    'frozen, same stamp': lambda: same(False),
    'frozen, new stamps': lambda: same(True),
    'delayed by 500 ms': lambda: late(5),
    'black': _pixels(np.zeros_like),
    'noise': _pixels(lambda picture: _noise.integers(0, 256, picture.shape, np.uint8)),
    'half resolution': _pixels(lambda picture: picture[::2, ::2]),
    'wrong encoding': _field(encoding='yuv422'),
    'truncated': _field(data=lambda msg: msg.data[:1000]),
    'stamps from the future': _stamped(1.0),
    'stamps from the past': _stamped(-5.0),
}


def all_faults() -> list[Fault]:
    """Return every fault, in the order of the table."""
    found = [Fault(name=f'kill -9 {name}', inject=_kill(name)) for name in NODES]
    found.append(Fault(name='driver stopped for 2 s', inject=_halt(['driver']), hold_s=2.0))
    for kind, change in CAMERA_FAULTS.items():
        serves = kind == 'half resolution'  # the same view, only coarser
        found.append(
            Fault(
                name=f'front camera: {kind}',
                inject=_camera([FRONT], change),
                stops=not serves,
                degrades=serves,
            )
        )
        found += [
            Fault(
                name=f'other camera: {kind}',
                inject=_camera([camera], change),
                stops=False,
                degrades=True,
                which=camera,
            )
            for camera in SIDES
        ]
    odometry = {
        'lost': lambda: lambda msg: None,
        'not finite': _odd_odometry(_nan),
        'frozen, same stamp': _frozen_odometry(False),
        'frozen, new stamps': _frozen_odometry(True),
        'jumping by 20 m': _jumping,
        'speed of 0, though it moves': _odd_odometry(_dead_speed),
        'stamps from the future': _odd_odometry(_shift(5.0)),
        'stamps from the past': _odd_odometry(_shift(-5.0)),
    }
    found += [Fault(name=f'odometry: {k}', inject=_odometry(v)) for k, v in odometry.items()]
    road = np.stack(circle(np.arange(0.0, 2 * math.pi * RADIUS, 5.0)), 1)
    found += [
        Fault(name='route: empty', inject=_route(road[:0]), stops=False, degrades=True),
        Fault(name='route: reversed', inject=_route(road[::-1])),
        Fault(name='route: 100 km away', inject=_route(road + 1e5)),
        # on two cores the flood takes most of what the nodes need: to stop for that is right
        Fault(name='flood of 1 kHz', inject=_flood, stops=False, may_stop=True, hold_s=5.0),
        Fault(name='200 ms without CPU', inject=_halt(NODES), stops=False, hold_s=0.2),
        Fault(name='disk full', inject=_full_disk, stops=False, degrades=True),
        Fault(name='bundle swapped', inject=_swap_bundle, stops=False, hold_s=1.0),
        Fault(name="sensors' clock 10 s ahead", inject=_clock(10.0)),
        Fault(name="sensors' clock 10 s back", inject=_clock(-10.0)),
    ]
    simulated = {'stops': False, 'is_simulated': True}
    jump = {**simulated, 'may_stop': True, 'hold_s': 1.5}  # for a moment all is old, or unknown
    found += [
        Fault(name='/clock jumps by +10 s', inject=_clock(10.0), **jump),
        Fault(name='/clock jumps by -10 s', inject=_clock(-10.0), **jump),
        Fault(name='simulator paused for 3 s', inject=_pause, **simulated, hold_s=3.0),
    ]
    return found
