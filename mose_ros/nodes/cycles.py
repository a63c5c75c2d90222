"""Take the nodes through their lives again and again, and see whether anything is left behind: memory, threads, file descriptors.

    python -m mose_ros.nodes.cycles --count 500 --json cycles.json

One cycle is configure, activate, deactivate and cleanup of view_router, driver and controller, by the transitions that a
lifecycle manager asks for. What grows is judged over the second half, when all that is loaded once has been loaded. The exit
code is 1 where something grows.
"""

import argparse
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import rclpy
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from mose_ros.core.files import write_json
from mose_ros.core.process import resident_bytes
from mose_ros.nodes.controller_node import ControllerNode
from mose_ros.nodes.driver_node import DriverNode
from mose_ros.nodes.files import shared
from mose_ros.nodes.lifecycle import ManagedNode
from mose_ros.nodes.processes import DomainLock
from mose_ros.nodes.view_router_node import ViewRouterNode

STEPS = ('configure', 'activate', 'deactivate', 'cleanup')
# A cycle, over the second half; more is a leak. rclpy and Fast DDS themselves keep 0.56 KB of each endpoint that was opened and
# closed (a loop of nothing else: 5.6 KB for 10 of them, rclpy 9.1.2), and a cycle opens 33.
GROWTH_KB = 30.0


def resources() -> dict[str, float]:
    """Return what this process holds: resident memory in MB, threads, file descriptors."""
    gc.collect()
    return {
        'memory_mb': resident_bytes() / 2**20,
        'threads': threading.active_count(),
        'tasks': len(os.listdir('/proc/self/task')),
        'descriptors': len(os.listdir('/proc/self/fd')),
    }


def entities(node: ManagedNode) -> dict[str, int]:
    """Return how many of each kind a node has open."""
    return {
        kind: len(list(getattr(node, kind)))
        for kind in ('publishers', 'subscriptions', 'timers', 'services')
    }


def cycle(nodes: list[ManagedNode]) -> None:
    """Take each node once through its life; RuntimeError names the step that failed."""
    for step in STEPS:
        for node in nodes:
            if getattr(node, f'trigger_{step}')() != TransitionCallbackReturn.SUCCESS:
                raise RuntimeError(f'{node.get_name()}: {step} failed')


def run(
    nodes: list[ManagedNode], count: int, tell: Callable[[str], None] = lambda line: None
) -> dict:
    """Cycle so often and return what was held before, while active, after each cycle, and what grew."""
    before, opened = resources(), [entities(node) for node in nodes]
    after, seconds = [], []
    for index in range(count):
        started = time.perf_counter()
        cycle(nodes)
        seconds.append(time.perf_counter() - started)
        after.append(resources())
        if entities_now(nodes) != opened:
            raise RuntimeError(f'cycle {index + 1}: {entities_now(nodes)} are open, not {opened}')
        if index % 25 == 24 or index == count - 1:
            held = after[-1]
            tell(
                f'{index + 1:5d} cycles  {held["memory_mb"]:7.1f} MB  {held["tasks"]} threads  '
                f'{held["descriptors"]} descriptors  {1e3 * np.median(seconds[-25:]):.0f} ms each'
            )
    half = after[len(after) // 2 :]
    slope = float(np.polyfit(range(len(half)), [one['memory_mb'] for one in half], 1)[0]) * 1024
    return {
        'cycles': count,
        'before': before,
        'after_first': after[0],
        'after_last': after[-1],
        'memory_kb_per_cycle': round(slope, 2) if len(half) > 2 else 0.0,
        'threads_grown': after[-1]['tasks'] - after[0]['tasks'],
        'descriptors_grown': after[-1]['descriptors'] - after[0]['descriptors'],
        'cycle_s': {
            'p50': round(float(np.median(seconds)), 4),
            'max': round(max(seconds), 4),
        },
    }


def entities_now(nodes: list[ManagedNode]) -> list[dict[str, int]]:
    """Return what all nodes have open."""
    return [entities(node) for node in nodes]


def freed(nodes: list[ManagedNode]) -> dict[str, float]:
    """Return the memory in MB of one life: unconfigured, active, and cleaned up."""
    found = {'unconfigured': resources()['memory_mb']}
    for step in STEPS:
        for node in nodes:
            getattr(node, f'trigger_{step}')()
        if step in ('activate', 'cleanup'):
            found[{'activate': 'active', 'cleanup': 'cleaned_up'}[step]] = resources()['memory_mb']
    return found


def make_nodes(bundle: str, **options) -> list[ManagedNode]:
    """Return the vehicle's nodes, unconfigured."""

    def given(**values):
        return [Parameter(name, value=value) for name, value in values.items()]

    network = given(autostart=False, bundle=bundle)
    options = {'namespace': '/mose', **options}
    return [
        ViewRouterNode(parameter_overrides=network, **options),
        DriverNode(parameter_overrides=network, **options),
        ControllerNode(parameter_overrides=given(autostart=False), **options),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Cycle, say what was held, and exit with 1 where something grows."""
    parser = argparse.ArgumentParser(prog='cycles', description=__doc__.partition('\n')[0])
    parser.add_argument('--count', type=int, default=500, help='cycles (500)')
    parser.add_argument(
        '--bundle', default=str(shared('models/mose-tiny')), help='folder of the bundle'
    )
    parser.add_argument('--json', metavar='FILE', help='write the figures')
    options = parser.parse_args(arguments)
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    lock = DomainLock()
    os.environ['ROS_DOMAIN_ID'] = str(lock.number)
    rclpy.init(args=['--ros-args', '--log-level', 'warn'])
    nodes = make_nodes(options.bundle)
    try:
        memory = freed(nodes)
        result = {**run(nodes, options.count, print), 'first_life_mb': memory}
    except RuntimeError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    finally:
        for node in nodes:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
        lock.close()
    if options.json:
        write_json(options.json, result)
    print(json.dumps(result))
    grown = result['threads_grown'] > 0 or result['descriptors_grown'] > 0
    sys.exit(1 if grown or result['memory_kb_per_cycle'] > GROWTH_KB else 0)


if __name__ == '__main__':
    main()
