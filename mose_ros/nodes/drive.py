"""The runner behind `make drive`: starts simulator and nodes, shows what they say, and ends them all.

    python -m mose_ros.nodes.drive --family merging --seed 3 --duration 30 --json out.json --video out.mp4

Nothing here drives. The nodes are processes of their own in a ROS domain of their own that stays on this machine.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mose_ros.core.bundle import MANIFEST, Manifest, sha256
from mose_ros.core.files import write_json
from mose_ros.core.provenance import commit, machine, versions
from mose_ros.core.types import FAMILIES
from mose_ros.nodes.files import NODES, check_params_file, shared
from mose_ros.nodes.processes import DomainLock, Processes

NAMESPACE, ROLE = '/mose', 'ego_vehicle'
START_LIMIT_S = 60.0
REVIVALS = 3  # of one node in a drive; more is not a mishap


class Failed(Exception):
    """A drive that could not begin or had to be broken off; the message says why."""


def main(arguments: list[str] | None = None) -> None:
    """Drive, and exit with 0 unless something failed."""
    options = _parse(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        manifest = _check(options)
        _drive(options, manifest, stop)
    except (Failed, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(1 if isinstance(error, Failed) else 2)


def _parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='make drive DRIVE_ARGS=...', description='Watch the car drive and say what it thinks.'
    )
    add = parser.add_argument
    add('--family', default='normal', help=f'scenario: {", ".join(FAMILIES)} (normal)')
    add('--seed', default='1', help='same seed, same episode (1)')
    add('--duration', type=float, default=0.0, metavar='S', help='end after so many seconds')
    add('--bundle', default=str(shared('models/mose-tiny')), help='folder of the exported network')
    add('--json', metavar='FILE', help='write the figures of the drive')
    add('--video', metavar='FILE.mp4', help='film the drive')
    add(
        '--frames',
        metavar='PATH',
        help='a video or a folder of pictures in place of the simulator',
    )
    add('--renderer', default='auto', choices=('auto', 'egl', 'tiny'), help='who draws (auto)')
    add('--params-file', metavar='YAML', help='ROS parameters that override config/drive.yaml')
    add('--domain', type=int, metavar='N', help='ROS domain (a free one)')
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> Manifest:
    """Refuse at once, with one clear line, what could not work; return the bundle's manifest."""
    if options.family not in FAMILIES:
        raise ValueError(f'unknown family {options.family!r}; choose one of {", ".join(FAMILIES)}')
    if not (options.seed.isdecimal() and int(options.seed) < 2**31):
        raise ValueError(f'seed {options.seed!r} is not an integer in 0..2147483647')
    if not (np.isfinite(options.duration) and options.duration >= 0):
        raise ValueError(f'duration {options.duration} is not a number of seconds')
    for path in filter(None, [options.json, options.video]):
        if not Path(path).resolve().parent.is_dir():
            raise ValueError(f'the folder of {path} does not exist')
    if options.video and Path(options.video).suffix.lower() != '.mp4':
        raise ValueError(f'--video takes an .mp4 file, not {options.video!r}')
    if options.params_file:
        check_params_file(options.params_file)
    if options.frames:
        source = Path(options.frames)
        if not source.exists():
            raise ValueError(f'--frames {source} does not exist; give a video or a folder')
    return Manifest.load(options.bundle)


# ---- the drive ----


def _drive(options, manifest: Manifest, stop: threading.Event) -> None:
    lock = take_domain(options.domain)
    folder = Path(tempfile.mkdtemp(prefix='mose_ros_drive_'))
    processes = Processes(folder)
    keep_logs = False
    started = time.monotonic()
    try:
        start_world(options, processes, folder)
        start_nodes(options, processes, folder)
        _watch(options, manifest, processes, stop, started)
    except Failed as error:
        keep_logs = True
        raise Failed(f'{error}\nlogs: {folder}') from None
    finally:
        processes.close()
        lock.close()
        if not keep_logs:
            shutil.rmtree(folder, ignore_errors=True)


def take_domain(domain: int | None) -> DomainLock:
    """Take a ROS domain and let this process and its children stay in it, and on this machine unless the user says otherwise."""
    if domain is None and os.environ.get('ROS_DOMAIN_ID'):
        domain = int(os.environ['ROS_DOMAIN_ID'])
    lock = DomainLock(domain)
    os.environ['ROS_DOMAIN_ID'] = str(lock.number)
    is_local = os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST') == 'LOCALHOST'
    profile = shared(f'config/fastdds_{"local" if is_local else "shm"}.xml')
    os.environ.setdefault('FASTDDS_DEFAULT_PROFILES_FILE', str(profile))
    return lock


def start_world(options, processes: Processes, folder: Path) -> None:
    """Start the simulator, or what plays `--frames` in its place; it waits for the others by itself."""
    own = ['-p', f'wait_for:=[{", ".join((*NODES, "monitor"))}]']
    if options.frames:
        name, own = 'replay', [*own, '-p', f'frames:={Path(options.frames).resolve()}']
    else:
        name, own = 'simulator', [*own, '-p', f'family:={options.family}']
        own += ['-p', f'seed:={options.seed}', '-p', f'renderer:={options.renderer}']
    words, environment = _ros_arguments(options, folder)
    processes.start(name, f'mose_ros.nodes.{name}_node', [*words, *own], environment)


def start_nodes(
    options, processes: Processes, folder: Path, extra: Mapping[str, str] | None = None
) -> None:
    """Start the nodes that drive, all at once; `extra`: more of their environment."""
    words, environment = _ros_arguments(options, folder)
    environment |= extra or {}
    bundle = ['-p', f'bundle:={Path(options.bundle).resolve()}']
    for name in NODES:
        own = bundle if name != 'controller' else []
        processes.start(name, f'mose_ros.nodes.{name}_node', [*words, *own], environment)


def _ros_arguments(options, folder: Path) -> tuple[list[str], dict[str, str]]:
    words = ['--ros-args', '-r', f'__ns:={NAMESPACE}']
    words += ['--params-file', str(shared('config/drive.yaml'))]
    if options.params_file:
        words += ['--params-file', str(Path(options.params_file).resolve())]
    for topic, source in {'odometry': 'odometry', 'route': 'waypoints'}.items():
        words += ['-r', f'{topic}:=/carla/{ROLE}/{source}']
    environment = {'ROS_LOG_DIR': str(folder / 'ros'), 'RCUTILS_COLORIZED_OUTPUT': '0'}
    return words, environment | {'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}


def _watch(options, manifest, processes, stop, started) -> None:
    """Listen until the end, say a line a second, and write what was asked for."""
    import rclpy  # after the nodes were started: its import takes a while
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.signals import SignalHandlerOptions

    from mose_ros.nodes.monitor import Monitor

    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    try:
        monitor = Monitor(ROLE, with_pictures=bool(options.video))
        executor = SingleThreadedExecutor()
        executor.add_node(monitor)
        done = threading.Event()

        def spin():
            while not done.is_set():
                executor.spin_once(timeout_sec=0.2)

        thread = threading.Thread(target=spin, name='monitor', daemon=True)
        thread.start()
        show = _Show(options, manifest, monitor, processes, started)
        try:
            show.run(stop)
        finally:
            done.set()
            thread.join(2.0)
            show.close()
            executor.shutdown(timeout_sec=1.0)
            monitor.destroy_node()
        if options.json:
            write_json(options.json, show.result)
        show.summary()
    finally:
        rclpy.try_shutdown()


class _Show:
    """The lines, the film and the figures of one drive."""

    def __init__(self, options, manifest, monitor, processes, started):
        self._options, self._manifest = options, manifest
        self._monitor, self._processes = monitor, processes
        self._started = started
        self._memory: list[dict[str, float]] = []
        self._revived: Counter = Counter()
        self.result: dict = {}
        episode = f'{options.family}  seed {options.seed}'
        self._title = Path(options.frames).name if options.frames else episode
        self._film = None
        if options.video:
            from mose_ros.nodes.film_crew import FilmCrew

            self._film = FilmCrew(options.video, monitor, self._title)

    def run(self, stop: threading.Event) -> None:
        """Wait for the first plan, then until something ends the drive."""
        print(
            f'mose_ros: {self._title}, bundle {self._manifest.name}, domain {_domain()}',
            flush=True,
        )
        status = self._wait_for_first_plan(stop)
        begun = time.monotonic()
        cpu = self._processes.cpu_seconds()
        due = begun
        while not status:
            if time.monotonic() >= due:
                self._say_line(begun)
                self._memory.append(self._processes.resident_mb())
                due += 1.0
            stop.wait(0.05)
            status = self._ended(stop, begun)
        wall = max(time.monotonic() - begun, 1e-3)
        spent = self._processes.cpu_seconds()
        share = {name: round((spent[name] - cpu.get(name, 0)) / wall, 3) for name in spent}
        self._memory.append(self._processes.resident_mb())
        self.result = self._figures(status, wall, begun, share)

    def _wait_for_first_plan(self, stop) -> str:
        deadline = time.monotonic() + START_LIMIT_S
        while not self._monitor.latencies_ms:
            if stop.wait(0.05):
                return 'interrupted'
            self._raise_if_broken()
            if time.monotonic() > deadline:
                complaints = '; '.join(self._monitor.complaints) or 'no node complains'
                raise Failed(f'no plan within {START_LIMIT_S:.0f} s: {complaints}')
        took = time.monotonic() - self._started
        print(f'mose_ros: driving after {took:.1f} s', flush=True)
        return ''

    def _raise_if_broken(self) -> None:
        for name, code in self._processes.ended().items():
            raise Failed(f'{name} ended with {code}:\n{self._processes.tail(name)}')
        if self._monitor.failed_to_start:
            raise Failed(self._monitor.failed_to_start)

    def _revive(self) -> None:
        """Start a node again whose process has ended, as a vehicle's launch does; the controller stands until it plans."""
        for name, code in self._processes.ended().items():
            if name in NODES and self._revived[name] < REVIVALS:
                self._revived[name] += 1
                print(f'mose_ros: {name} ended with {code} and is started again', flush=True)
                self._processes.restart(name)

    def _ended(self, stop, begun) -> str:
        self._revive()
        self._raise_if_broken()
        outcome = self._monitor.outcome
        if outcome.get('done') == 'True':
            return outcome['status']
        if stop.is_set():
            return 'interrupted'
        duration = self._options.duration
        return 'duration' if duration and time.monotonic() - begun >= duration else ''

    def _say_line(self, begun: float) -> None:
        monitor = self._monitor
        latency = monitor.newest_latency_ms
        parts = [
            f'{time.monotonic() - begun:6.1f} s',
            f'{monitor.speed:5.1f} m/s',
            f'{latency:4.0f} ms' if latency is not None else '   - ms',
            '+'.join(monitor.views_now) or '-',
            monitor.skills or '-',
        ]
        if monitor.is_emergency or monitor.is_degraded:
            parts.append(monitor.safety[:120])
        line = '  '.join(parts)
        text = monitor.sentence
        if sys.stdout.isatty():
            room = shutil.get_terminal_size().columns - len(line) - 5
            text = text if len(text) <= room else text[: max(0, room - 3)] + '...'
        print(f'{line}  "{text}"', flush=True)

    def _figures(self, status: str, wall: float, begun: float, cpu: dict) -> dict:
        outcome, manifest = self._monitor.outcome, self._manifest
        totals = [sum(sizes.values()) for sizes in self._memory]
        return {
            'family': outcome.get('family', self._options.family),
            'seed': int(outcome.get('seed', self._options.seed)),
            'status': status,
            'seconds': round(wall, 2),
            'startup_seconds': round(begun - self._started, 2),
            **self._monitor.figures(),
            'route_completion': float(outcome.get('route_completion', 0.0)),
            'driving_score': float(outcome.get('driving_score', 0.0)),
            'infractions': [one for one in outcome.get('infractions', '').split('\n') if one],
            'late_frames': int(outcome.get('late_frames', 0)),
            'memory_mb': {
                'p50': round(float(np.median(totals)), 1),
                'max': round(max(totals), 1),
                'processes': {name: round(size, 1) for name, size in self._memory[-1].items()},
            },
            'cpu': cpu,
            'complaints': self._monitor.complaints,
            'revived': dict(self._revived),
            'bundle': {
                'name': manifest.name,
                'commit': manifest.commit,
                'manifest_sha256': sha256(Path(self._options.bundle) / MANIFEST),
            },
            'versions': versions(),
            'commit': commit(),
            'machine': machine(),
        }

    def summary(self) -> None:
        """Say how it went."""
        found = self.result
        if not found:
            return
        latency = found['plan_latency_ms']
        print(
            f'mose_ros: {found["status"]} after {found["seconds"]:.1f} s; route '
            f'{100 * found["route_completion"]:.0f} %; {found["plans"]} plans at '
            f'{found["plan_rate_hz"]:.1f} Hz, latency p50 {latency["p50"]} p99 {latency["p99"]} ms, '
            f'{found["deadline_misses"]} of {found["frames"]} frames late; '
            f'{found["reasoning_count"]} texts; {found["memory_mb"]["max"]:.0f} MB',
            flush=True,
        )
        for infraction in found['infractions']:
            print(f'mose_ros: infraction: {infraction}', flush=True)

    def close(self) -> None:
        """Finish the film."""
        if self._film is not None:
            self._film.close()


def _domain() -> str:
    return os.environ['ROS_DOMAIN_ID']


if __name__ == '__main__':
    main()
