"""The tables of docs/interfaces.md, made from what the nodes declare and open, so that the page can't say anything else.

    python -m mose_ros.nodes.interfaces docs/interfaces.md        # fills the tables in anew

A table stands between `<!-- kind:name -->` and `<!-- end -->`.
"""

import argparse
import ast
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

import rclpy
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

from mose_ros.core.files import write_text
from mose_ros.core.rig import CAMERAS
from mose_ros.nodes.bag_node import BagParameters
from mose_ros.nodes.carla_state_node import CarlaStateNode, CarlaStateParameters
from mose_ros.nodes.controller_node import ControllerNode
from mose_ros.nodes.controller_parameters import ControllerParameters
from mose_ros.nodes.driver_node import DriverNode, DriverParameters
from mose_ros.nodes.files import shared
from mose_ros.nodes.lifecycle import ManagedNode, NodeParameters
from mose_ros.nodes.replay_node import ReplayParameters
from mose_ros.nodes.simulator_node import SimulatorParameters
from mose_ros.nodes.view_router_node import ViewRouterNode, ViewRouterParameters

NAMESPACE = '/mose'
PARAMETERS = {
    'view_router': ViewRouterParameters,
    'driver': DriverParameters,
    'controller': ControllerParameters,
    'carla_state': CarlaStateParameters,
    'simulator': SimulatorParameters,
    'bag': BagParameters,
    'replay': ReplayParameters,
}
NODES = {  # whose topics can be had without a simulator or a bag
    'view_router': ViewRouterNode,
    'driver': DriverNode,
    'controller': ControllerNode,
    'carla_state': CarlaStateNode,
}
ROS_OWN = ('/rosout', '/parameter_events')
MARKED = re.compile(r'(<!-- (\w+):(\w+) -->\n).*?(<!-- end -->)', re.DOTALL)


def parameters(kind: type[NodeParameters]) -> str:
    """Return the table of a node's parameters, those that every node has left out."""
    shared = {field.name for field in dataclasses.fields(NodeParameters)}
    common = kind is NodeParameters
    rows = []
    for field in dataclasses.fields(kind):
        if common or field.name not in shared:
            rules = field.metadata
            cells = (f'`{field.name}`', _default(field.default), _range(rules), rules['live'])
            rows.append((*cells[:3], 'yes' if cells[3] else '', rules['description']))
    return _table(('parameter', 'default', 'range', 'live', 'meaning'), rows)


def topics(node: ManagedNode) -> str:
    """Return the table of the topics that a configured node hears and says."""
    heard = {_topic(one.topic_name, one) for one in node.subscriptions}
    said = {_topic(one.topic_name, one) for one in node.publishers}
    rows = [('in', *one) for one in sorted(heard) if one[0]]
    rows += [('out', *one) for one in sorted(said) if one[0]]
    return _table(('', 'topic', 'type', 'QoS'), rows)


def services(node: ManagedNode) -> str:
    """Return the table of a node's services, beside those that every ROS node has."""
    rows = [
        (f'`{_name(one.srv_name)}`', f'`{_type(one.srv_type)}`')
        for one in node.services
        if one.srv_type.__module__.startswith('std_srvs')
    ]
    return _table(('service', 'type'), sorted(rows))


def arguments(declared: Mapping[str, tuple]) -> str:
    """Return the table of the launch file's arguments."""
    rows = [
        (f'`{name}`', f'`{default}`' if default else '', _choices(choices), text)
        for name, (default, choices, text) in declared.items()
    ]
    return _table(('argument', 'default', 'choices', 'meaning'), rows)


def launch_arguments(path: str | Path) -> Mapping[str, tuple]:
    """Read the declared arguments out of the launch file, without the packages that it imports."""
    tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    constants = [one for one in tree.body if isinstance(one, ast.Assign)]
    space: dict = {}
    exec(compile(ast.Module(constants, []), str(path), 'exec'), space)  # our own file
    return space['ARGUMENTS']


def filled(text: str, nodes: Mapping[str, ManagedNode], launch_file: str | Path) -> str:
    """Return the page with its tables made anew; KeyError for a table of nobody."""
    make = {
        'parameters': lambda name: parameters({**PARAMETERS, 'all': NodeParameters}[name]),
        'topics': lambda name: topics(nodes[name]),
        'services': lambda name: services(nodes[name]),
        'arguments': lambda name: arguments(launch_arguments(launch_file)),
    }

    def replace(found: re.Match) -> str:
        return f'{found[1]}{make[found[2]](found[3])}\n{found[4]}'

    return MARKED.sub(replace, text)


def configured(bundle: str, **options) -> dict[str, ManagedNode]:
    """Return the nodes of `NODES`, configured so that they open all they can; the caller closes and destroys them."""
    made = {}
    for name, kind in NODES.items():
        given = [Parameter('autostart', value=False)]
        if name in ('view_router', 'driver'):
            given.append(Parameter('bundle', value=bundle))
        if name == 'carla_state':  # as for the Leaderboard
            given += [Parameter('plan', value='path'), Parameter('announce', value=True)]
        node = kind(parameter_overrides=given, namespace=NAMESPACE, **options)
        node.trigger_configure()
        made[name] = node
    return made


def _default(value) -> str:
    if isinstance(value, tuple):
        return f'`[{", ".join(map(str, value))}]`'
    return f'`{str(value).lower() if isinstance(value, bool) else value}`' if value != '' else ''


def _range(rules: Mapping) -> str:
    low, high = rules['minimum'], rules['maximum']
    if rules['choices']:
        return _choices(rules['choices'])
    if low is None and high is None:
        return ''
    if high is None:
        return f'>= {low:g}'
    return f'<= {high:g}' if low is None else f'{low:g} .. {high:g}'


def _choices(choices) -> str:
    return ', '.join(f'`{one}`' for one in choices or [] if one)


def _topic(name: str, endpoint) -> tuple[str, str, str]:
    """Return name, type and QoS of a topic; the name is empty where it is ROS's own."""
    if name in ROS_OWN or name.endswith('/transition_event'):
        return ('', '', '')
    qos = endpoint.qos_profile
    reliable = qos.reliability == ReliabilityPolicy.RELIABLE
    latched = qos.durability == DurabilityPolicy.TRANSIENT_LOCAL
    said = f'{"reliable" if reliable else "best effort"}, {qos.depth}'
    return (
        f'`{_name(name)}`',
        f'`{_type(endpoint.msg_type)}`',
        said + (', transient local' if latched else ''),
    )


def _name(name: str) -> str:
    """Return a name relative to the namespace, with one place in it for all cameras."""
    parts = name.removeprefix(f'{NAMESPACE}/').split('/')
    return '/'.join('<camera>' if part in CAMERAS else part for part in parts)


def _type(kind: type) -> str:
    return f'{kind.__module__.split(".")[0]}/{kind.__name__}'


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ('---',) * len(head), *rows]
    return '\n'.join(f'| {" | ".join(map(_cell, line))} |' for line in lines)


def _cell(text: str) -> str:
    """Return text that Markdown shows as it is: `<platform>` is a tag to it but in code."""
    return text if text.startswith('`') else text.replace('<', '&lt;').replace('|', '&#124;')


def main() -> None:
    """Fill the tables of a page in anew."""
    parser = argparse.ArgumentParser(prog='interfaces', description=__doc__.partition('\n')[0])
    parser.add_argument('page', type=Path, help='docs/interfaces.md')
    parser.add_argument('--bundle', default=str(shared('models/mose-tiny')), help='any bundle')
    parser.add_argument('--launch-file', default='launch/drive.launch.py')
    options = parser.parse_args()
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    rclpy.init(args=['--ros-args', '--log-level', 'warn'])
    nodes = configured(options.bundle)
    try:
        text = filled(options.page.read_text(encoding='utf-8'), nodes, options.launch_file)
    finally:
        for node in nodes.values():
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    write_text(options.page, text)


if __name__ == '__main__':
    main()
