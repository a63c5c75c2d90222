"""Drive for an hour over changing scenarios and see whether anything grows; then start and stop a hundred times and see what is left.

    make soak                                              # 60 minutes and 100 starts: about 80 minutes
    python -m mose_ros.nodes.soak --minutes 5 --starts 10 --json soak.json

The three nodes live through all episodes, only the simulator is started anew. Memory, threads, file descriptors of each node and
the latency of plans are fitted by a line over time; something grows where the 95 % interval of its slope lies above 0 and the
slope above what is allowed. Exit status: 0 nothing grows and nothing is left, 1 otherwise.
"""

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mose_ros.core.files import write_json
from mose_ros.core.process import resident_bytes
from mose_ros.core.types import FAMILIES
from mose_ros.nodes.drive import ROLE, Failed, start_nodes, start_world, take_domain
from mose_ros.nodes.files import NODES, shared
from mose_ros.nodes.processes import Processes

ALLOWED = {'memory_mb': 10.0, 'threads': 0.5, 'descriptors': 0.5, 'latency_ms': 5.0}  # an hour
WARM_UP = 0.2  # of the time, in which everything is loaded once and nothing is judged
BLOCKS = 12  # samples follow one another, so that means of blocks are fitted
START_LIMIT_S = 90.0
PROCESS, SEGMENT, QUEUE = 'process ', '/dev/shm/fastdds_', '/dev/shm/fastdds_port'
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's, 1 to 10 degrees


def main(arguments: list[str] | None = None) -> int:
    """Soak, print what was found, and return the exit status."""
    options = _parse(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        result = {'drive': drive_on(options, stop)} if options.minutes else {}
        if options.starts and not stop.is_set():
            result['starts'] = start_and_stop(options, stop)
    except (Failed, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    bad = [*result.get('drive', {}).get('grows', ()), *result.get('starts', {}).get('left', ())]
    if options.json:
        write_json(options.json, result)
    print(f'soak: {"; ".join(bad) if bad else "nothing grows, nothing is left"}', flush=True)
    return int(bool(bad))


def _parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='make soak SOAK_ARGS=...', description=main.__doc__)
    add = parser.add_argument
    add('--minutes', type=float, default=60.0, help='of driving; 0: none (60)')
    add('--episode', type=float, default=60.0, metavar='S', help='longest episode (60)')
    add('--starts', type=int, default=100, help='of the whole graph; 0: none (100)')
    add('--bundle', default=str(shared('models/mose-tiny')), help='folder of the exported network')
    add('--seed', type=int, default=1000, help='of the first episode (1000)')
    add('--renderer', default='auto', choices=('auto', 'egl', 'tiny'), help='who draws (auto)')
    add('--json', metavar='FILE', help='write the figures')
    options = parser.parse_args(arguments)
    numbers = (options.minutes, options.episode, options.starts)
    if not all(math.isfinite(one) and one >= 0 for one in numbers) or not options.episode:
        parser.error('--minutes, --episode and --starts are numbers that are not negative')
    options.params_file = options.frames = options.domain = None
    return options


# ---- an hour of driving ----


def drive_on(options: argparse.Namespace, stop: threading.Event) -> dict:
    """Drive episode after episode; Failed names the node that ended."""
    lock, samples, episodes = take_domain(None), [], []
    with tempfile.TemporaryDirectory(prefix='mose_ros_soak_') as name:
        folder, processes = Path(name), Processes(name)
        try:
            start_nodes(options, processes, folder)
            with _Listener() as monitor:
                rest = 60.0 * options.minutes  # of driving; starts of the simulator don't count
                while rest > 0 and not stop.is_set():
                    options.family = FAMILIES[len(episodes) % len(FAMILIES)]
                    seconds = min(rest, options.episode)
                    outcome = _episode(options, processes, folder, monitor, seconds, stop, samples)
                    rest -= outcome['seconds']
                    episodes.append(outcome | {'seconds': round(outcome['seconds'], 1)})
                    print(
                        f'soak: {len(episodes):3d} {options.family:16} {outcome["status"]:10} '
                        f'{outcome["plans"]} plans, {samples[-1]["driver"]["memory_mb"]:.0f} MB',
                        flush=True,
                    )
                    options.seed += 1
        finally:
            processes.close()
            lock.close()
    slopes = fit(samples)
    grows = [
        f'{name} {what} by {slope["per_hour"]:.2f} an hour'
        for name, found in slopes.items()
        for what, slope in found.items()
        if slope['ci95'][0] > 0 and slope['per_hour'] > ALLOWED[what]
    ]
    return {
        'minutes': round(sum(one['seconds'] for one in episodes) / 60, 2),
        'episodes': episodes,
        'plans': sum(one['plans'] for one in episodes),
        'slopes': slopes,
        'grows': grows,
    }


class _Listener:
    """A monitor in a thread, as a context."""

    def __enter__(self):
        import rclpy  # its import takes a while, in which the nodes start already
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.signals import SignalHandlerOptions

        from mose_ros.nodes.monitor import Monitor

        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        self._monitor, self._executor = Monitor(ROLE), SingleThreadedExecutor()
        self._executor.add_node(self._monitor)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        return self._monitor

    def _spin(self):
        while not self._done.is_set():
            self._executor.spin_once(timeout_sec=0.2)

    def __exit__(self, *_):
        import rclpy

        self._done.set()
        self._thread.join(2.0)
        self._executor.shutdown(timeout_sec=1.0)
        self._monitor.destroy_node()
        rclpy.try_shutdown()


def _episode(options, processes, folder, monitor, seconds, stop, samples) -> dict:
    """Drive one episode with a simulator of its own, sampling twice a second."""
    monitor.outcome, known = {}, len(monitor.latencies_ms)
    start_world(options, processes, folder)
    limit = time.monotonic() + START_LIMIT_S
    while len(monitor.latencies_ms) == known and not stop.is_set():
        _raise_if_ended(processes)
        if time.monotonic() > limit:
            raise Failed(f'no plan within {START_LIMIT_S:.0f} s: {"; ".join(monitor.complaints)}')
        time.sleep(0.05)
    begun = time.monotonic()
    while monitor.outcome.get('done') != 'True' and not stop.is_set():
        _raise_if_ended(processes)
        samples.append(_sample(processes.pids(), monitor, samples))
        if time.monotonic() - begun > seconds:
            break
        time.sleep(0.5)
    driven = time.monotonic() - begun
    processes.end('simulator')
    outcome = monitor.outcome
    return {
        'family': options.family,
        'seed': options.seed,
        'seconds': driven,
        'status': outcome.get('status', '') if outcome.get('done') == 'True' else 'broken off',
        'plans': len(monitor.latencies_ms) - known,
        'infractions': [one for one in outcome.get('infractions', '').split('\n') if one],
    }


def _raise_if_ended(processes: Processes) -> None:
    for name, code in processes.ended().items():
        raise Failed(f'{name} ended with {code}:\n{processes.tail(name)}')


def _sample(pids: dict[str, int], monitor, samples: list) -> dict:
    seen = samples[-1]['plans_seen'] if samples else 0
    latencies = list(monitor.latencies_ms.values())
    new = latencies[seen:]
    sample = {'seconds': time.monotonic(), 'plans_seen': len(latencies)}
    sample['latency_ms'] = statistics.median(new) if new else None
    for name in NODES:
        folder = Path(f'/proc/{pids[name]}')
        sample[name] = {
            'memory_mb': resident_bytes(pids[name]) / 2**20,
            'threads': len(os.listdir(folder / 'task')),
            'descriptors': len(os.listdir(folder / 'fd')),
        }
    return sample


def fit(samples: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """Return the slope of each figure of each node, and of the graph's latency, after the warm-up."""
    if not samples:
        return {}
    begin, end = samples[0]['seconds'], samples[-1]['seconds']
    kept = [one for one in samples if one['seconds'] >= begin + WARM_UP * (end - begin)]
    hours = np.array([one['seconds'] - begin for one in kept]) / 3600
    found = {
        name: {
            what: slope(hours, np.array([one[name][what] for one in kept], float))
            for what in ('memory_mb', 'threads', 'descriptors')
        }
        for name in NODES
    }
    late = [(hour, one['latency_ms']) for hour, one in zip(hours, kept, strict=True)]
    late = np.array([pair for pair in late if pair[1] is not None], float).reshape(-1, 2)
    found['graph'] = {'latency_ms': slope(late[:, 0], late[:, 1])}
    return found


def slope(hours: np.ndarray, values: np.ndarray) -> dict:
    """Fit a line through the means of up to 12 blocks; return slope an hour, its 95 % interval, and first and last block."""
    blocks = min(BLOCKS, len(values) // 2)
    if blocks < 3:
        return {'per_hour': 0.0, 'ci95': [-math.inf, math.inf], 'first': None, 'last': None}
    x = np.array([part.mean() for part in np.array_split(hours, blocks)])
    y = np.array([part.mean() for part in np.array_split(values, blocks)])
    off = x - x.mean()
    per_hour = float(off @ y / (off @ off))
    residual = y - y.mean() - per_hour * off
    spread = math.sqrt(float(residual @ residual) / (blocks - 2) / float(off @ off))
    half = T_975[blocks - 3] * spread
    return {
        'per_hour': round(per_hour, 4),
        'ci95': [round(per_hour - half, 4), round(per_hour + half, 4)],
        'first': round(float(y[0]), 2),
        'last': round(float(y[-1]), 2),
    }


# ---- a hundred starts ----


def start_and_stop(options: argparse.Namespace, stop: threading.Event) -> dict:
    """Run `make drive` again and again, interrupt it while it drives, and look for what it leaves behind.

    A process or a segment of shared memory must never be left. What else the first start leaves is `kept` (Fast DDS's queues of a
    domain, which the next start uses again) and no later start may add to it.
    """
    left, kept, took = [], [], []
    lock = take_domain(None)
    with tempfile.TemporaryDirectory(prefix='mose_ros_soak_') as name:
        try:
            for index in range(options.starts):
                if stop.is_set():
                    break
                begun = time.monotonic()
                found = _one_start(options, Path(name), lock.number)
                took.append(round(time.monotonic() - begun, 2))
                kept = kept or [one for one in found if _may_stay(one)]
                left += [f'start {index + 1} left {one}' for one in found if one not in kept]
            nodes = _nodes_in(lock.number)
            left += [f'node {one} is still there' for one in nodes]
        finally:
            lock.close()
    print(f'soak: {len(took)} starts, {statistics.median(took):.1f} s each', flush=True)
    return {
        'starts': len(took),
        'seconds_p50': statistics.median(took),
        'left': left,
        'kept': kept,
    }


def _may_stay(what: str) -> bool:
    return what.startswith(QUEUE) or not what.startswith((PROCESS, SEGMENT))


def _one_start(options, folder: Path, domain: int) -> list[str]:
    """Start, interrupt once it drives, and return what is left of processes, shared memory and files."""
    words = ['--family', 'normal', '--seed', '3', '--bundle', options.bundle]
    command = [sys.executable, '-m', 'mose_ros.nodes.drive', *words]
    command += ['--renderer', options.renderer, '--domain', str(domain)]
    environment = {**os.environ, 'TMPDIR': str(folder)}  # all that it writes is there
    environment.pop('ROS_DOMAIN_ID', None)
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said, pids, shared = [], set(), set()
    watchdog = threading.Timer(START_LIMIT_S, running.kill)
    watchdog.start()
    for line in running.stdout:
        said.append(line)
        if ' m/s ' in line:
            pids |= _children(running.pid)
            shared |= {path for pid in pids | {running.pid} for path in _shared_memory(pid)}
            running.send_signal(signal.SIGINT)
            break
    said += running.stdout.readlines()
    code = running.wait()
    watchdog.cancel()
    if code or len(pids) < len(NODES) + 1:
        raise Failed(f'drive ended with {code}, {len(pids)} nodes:\n{"".join(said[-12:])}')
    left = [f'{PROCESS}{pid}' for pid in pids if Path(f'/proc/{pid}').exists()]
    used = {path for pid in _everybody() for path in _shared_memory(pid)}
    left += [path for path in sorted(shared - used) if Path(path).exists()]
    files = [path for path in folder.rglob('*') if path.is_file()]
    return left + [
        f'{path} ({path.stat().st_size} bytes)' for path in files if path.stat().st_size
    ]


def _children(pid: int) -> set[int]:
    found = set()
    for task in Path(f'/proc/{pid}/task').iterdir():
        found |= {int(one) for one in (task / 'children').read_text().split()}
    return found


def _everybody() -> list[int]:
    return [int(path.name) for path in Path('/proc').iterdir() if path.name.isdecimal()]


def _shared_memory(pid: int) -> set[str]:
    """Return the files of Fast DDS's shared memory that a process has before it; none for a process that is gone or another's."""
    try:
        lines = Path(f'/proc/{pid}/maps').read_text().splitlines()
    except OSError:
        return set()
    paths = {line.split(None, 5)[5] for line in lines if f' {SEGMENT}' in line}
    return {path for path in paths if not path.endswith('(deleted)')}


def _nodes_in(domain: int) -> list[str]:
    import rclpy

    context = rclpy.Context()
    rclpy.init(args=[], context=context, domain_id=domain)
    node = rclpy.create_node('soak', context=context)
    time.sleep(2.0)  # for whoever is there to be discovered
    names = [name for name in node.get_node_names() if name != 'soak']
    node.destroy_node()
    rclpy.try_shutdown(context=context)
    return names


if __name__ == '__main__':
    sys.exit(main())
