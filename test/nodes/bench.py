"""The running graph that faults are injected into, and what becomes of each: when it was noticed, how the car came to rest.

The three nodes are processes of their own over real DDS; the car is `vehicle.Vehicle` in this one.
"""

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rclpy
from rclpy.executors import SingleThreadedExecutor

from engine.bundles import make_bundle
from mose_ros.core.control import METADRIVE
from mose_ros.nodes.processes import Processes
from nodes.vehicle import Vehicle

NODES = ('view_router', 'driver', 'controller')
CRUISE = 8.0
SLACK_S = 0.15  # grace_s, and a tick of the controller
NORMAL, DEGRADED, STANDS = 'NORMAL', 'DEGRADED', 0.05


# ---- the running graph ----


class Bench:
    """The three nodes, and the car that they drive."""

    def __init__(self, folder: Path, is_simulated: bool = False, patience: float = 1.0, **changes):
        """`patience`: how many times longer everything may take; `changes`: parameters of the controller."""
        self.patience = patience
        for name in ('trajectory_max_age_s', 'heartbeat_timeout_s', 'odometry_timeout_s'):
            if patience > 1:  # for function, not for speed
                changes[name] = 1.5
        # driving by older pictures is unsafe; and so long after a fault that asks for a stop nothing drives any more
        self.stale_s = changes.get('trajectory_max_age_s', 0.35) + SLACK_S
        self.blind_s = 2.0 * self.stale_s
        self.bundle = make_bundle(folder / 'bundle', cruise=CRUISE)
        self.mad = make_bundle(folder / 'mad', velocity_gain=float('nan'))
        self.processes = Processes(folder)
        self._context = rclpy.Context()
        rclpy.init(context=self._context)
        self.car = Vehicle(self._context, is_simulated)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.car)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        environment = {'ROS_LOG_DIR': str(folder / 'ros'), 'OMP_NUM_THREADS': '1'}
        own = {
            'view_router': {
                'camera_topic': 'camera/{camera}',
                'camera_timeout_s': 1.4 if patience > 1 else 0.25,
            },
            'driver': {'reasoning_period_s': 5.0},
            'controller': changes,
        }
        for name in NODES[:2]:
            own[name] |= {'bundle': self.bundle, 'max_age_s': 1.4 if patience > 1 else 0.3}
        for name in NODES:
            arguments = ['--ros-args', '-r', '__ns:=/mose', '-p', f'use_sim_time:={is_simulated}']
            for key, value in own[name].items():
                arguments += ['-p', f'{key}:={value}']
            self.processes.start(name, f'mose_ros.nodes.{name}_node', arguments, environment)
        self.flooding = {'PYTHONPATH': os.pathsep.join(['.', 'test'])}

    def _spin(self) -> None:
        while not self._stop.is_set():
            self._executor.spin_once(timeout_sec=0.05)

    def close(self) -> None:
        """End everything."""
        self.processes.close()
        self._stop.set()
        self._thread.join(2.0)
        self._executor.shutdown(timeout_sec=1.0)
        self.car.destroy_node()
        rclpy.try_shutdown(context=self._context)

    def wait(self, wanted: Callable[[], object], limit_s: float) -> bool:
        """Wait until something is so; say whether it became so."""
        deadline = time.monotonic() + limit_s * self.patience
        while time.monotonic() < deadline:
            if wanted():
                return True
            time.sleep(0.005)
        return bool(wanted())

    def hold(self, each: Callable[[], object], seconds: float) -> None:
        """Let a fault last, not a moment longer on a slow machine."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            each()
            time.sleep(0.005)

    def state(self) -> str:
        """Return the newest state and its reason."""
        return self.car.states[-1][1] if self.car.states else ''

    def drives(self, since: float) -> bool:
        """Say whether the car is driven as usual, by a command that left since then."""
        with self.car.lock:
            newest = [one for one in self.car.heard[-20:] if one.left > since]
        throttle = any(one.command and one.command.throttle > 0 for one in newest)
        return throttle and self.state().startswith(NORMAL)

    def ready(self, speed: float = 5.0) -> None:
        """Wait until the car drives at that speed; AssertionError tells why it does not."""

        def steady():
            with self.car.lock:
                last = self.car.states[-1][0] if self.car.states else math.inf
            is_calm = time.monotonic() - last > 0.3
            return is_calm and self.car.speed >= speed and self.drives(time.monotonic() - 0.5)

        if not self.wait(steady, 15.0):
            logs = '\n'.join(self.processes.tail(name) for name in NODES)
            raise AssertionError(f'the car does not drive: {self.state()!r}\n{logs}')


# ---- faults, and what becomes of them ----


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault: how it is brought about, and what must come of it."""

    name: str  # of its row in the table
    inject: Callable[['Bench'], Callable[[], None]]  # returns what ends it
    stops: bool = True  # the car must come to rest
    may_stop: bool = False  # it may for a moment, though it need not
    degrades: bool = False  # where it does not: something must be told of it
    hold_s: float = 0.7  # how long it lasts where the car does not come to rest
    which: str = ''  # camera, in a row of several
    is_simulated: bool = False  # needs a graph in simulated time


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One fault, once."""

    detected_s: float | None  # None: nobody said anything
    states: tuple[str, ...]  # the controller's, in order
    reason: str
    unsafe: tuple[str, ...]
    speed: float  # m/s when it began
    stop_m: float | None
    beside_m: float  # from the middle of the road, at most
    recovered_s: float | None


def measure(bench: Bench, fault: Fault) -> Sample:
    """Inject a fault into a graph that drives, end it, and wait until the car drives again."""
    bench.ready()
    car = bench.car
    with car.lock:
        now = time.monotonic()
        known = {said for when, said in car.complaints if when > now - 1.5}  # each is repeated
        before, speed, driven = len(car.heard), car.speed, car.driven
    began = time.monotonic()
    heal = fault.inject(bench)
    stop_m, beside = None, 0.0

    def goes_on():
        nonlocal beside
        beside = max(beside, car.beside)
        return False

    if fault.stops:
        lasted = fault.hold_s if 'for' in fault.name else 0.0
        is_over = bench.wait(lambda: goes_on() or car.speed < STANDS, 12.0)
        stop_m = car.driven - driven if is_over else None
        bench.wait(lambda: bench.state().startswith('STOPPED'), 0.3)
        bench.hold(goes_on, began + lasted - time.monotonic())
    else:
        bench.hold(goes_on, fault.hold_s)
        if fault.degrades:
            bench.wait(lambda: goes_on() or car.noticed(began, known), 1.0)
    healed = time.monotonic()
    heal()
    recovered = None
    if bench.wait(lambda: bench.drives(healed), 30.0):
        recovered = time.monotonic() - healed
    with car.lock:
        heard, states = car.heard[before:], [one for one in car.states if one[0] > began]
        timeouts = [when for when in car.timeouts if when > began]
    changes = [one for one in states if not one[1].startswith(NORMAL)]
    news = car.noticed(began, known)
    noticed = [one[0] for one in (*changes, *news)] + timeouts
    told = [one for one in states if one[0] <= healed]
    reason = (changes or news or [(0.0, '')])[0][1]
    return Sample(
        detected_s=min(noticed) - began if noticed else None,
        states=tuple(dict.fromkeys(text.partition(':')[0] for _, text in told)),
        reason=reason,
        unsafe=tuple(_unsafe(bench, fault, heard, began, healed)),
        speed=speed,
        stop_m=stop_m,
        beside_m=beside,
        recovered_s=recovered,
    )


def _unsafe(bench, fault, heard, began, healed):
    """Yield what is wrong with each command that should not have left."""
    for one in heard:
        if one.command is None:
            yield 'not finite, or out of range'
        elif one.command.throttle > 0:
            if one.age is None:
                yield 'drives by no picture of ours'
            elif one.age > bench.stale_s:
                yield f'drives by pictures that are {one.age:.2f} s old'
            elif fault.stops and began + bench.blind_s < one.left < healed:
                yield f'drives on {one.left - began:.2f} s after the fault'


def complaint(fault: Fault, sample: Sample) -> str:
    """Return what a fault should not have come to, or nothing."""
    wrong = list(sample.unsafe)
    if fault.stops and sample.stop_m is None:
        wrong.append('the car did not come to rest')
    if not (fault.stops or fault.may_stop) and any(
        state not in (NORMAL, DEGRADED) for state in sample.states
    ):
        wrong.append(f'the car need not stop: {sample.states}')
    if (fault.stops or fault.degrades) and sample.detected_s is None:
        wrong.append('nobody noticed')
    if sample.recovered_s is None:
        wrong.append('the car did not drive again')
    return '; '.join(wrong)


def least_m(speed: float) -> float:
    """Return the way that the tyres need to stop."""
    return speed**2 / (2.0 * METADRIVE.max_deceleration)
