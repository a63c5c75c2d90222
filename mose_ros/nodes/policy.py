"""The SROS2 policy of our graph, with no more than each node needs: made from what the nodes really declare.

    python -m mose_ros.nodes.policy --params-file config/vehicle.yaml > config/sros2/vehicle.xml
    python -m mose_ros.nodes.policy --params-file config/carla_bridge.yaml --remap odometry:=/carla/ego_vehicle/odometry \\
        --remap route:=/carla/ego_vehicle/waypoints > carla_bridge.xml

Enclaves are those of the launch file, `<enclave>/<node>`, and three for the others: `sensors` gives what we hear, `actuators` hears
the commands, `operator` sees everything and may call our services. docs/vehicle.md tells how keys are made of it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

import rclpy
from rclpy.parameter import Parameter

from mose_ros.core.control import METADRIVE
from mose_ros.nodes.controller_node import ControllerNode
from mose_ros.nodes.driver_node import DriverNode
from mose_ros.nodes.files import shared
from mose_ros.nodes.lifecycle import ManagedNode
from mose_ros.nodes.vehicle_command import open_backend
from mose_ros.nodes.view_router_node import ViewRouterNode

NODES = {'view_router': ViewRouterNode, 'driver': DriverNode, 'controller': ControllerNode}
EVERYONE = ('/rosout', '/parameter_events')  # rclpy publishes them for every node


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Full names of what a node must be allowed."""

    publish: set[str] = field(default_factory=set)
    subscribe: set[str] = field(default_factory=set)
    reply: set[str] = field(default_factory=set)
    request: set[str] = field(default_factory=set)


def needs_of(node: ManagedNode) -> Needs:
    """Return what a configured node has opened; debug topics are opened when first used, so by their folder.

    The node is asked, not the graph, which learns of a node later, and mixes it up with another of its name.
    """
    name = node.get_fully_qualified_name()
    below_rclpy = {'/rosout', f'{name}/transition_event'}
    return Needs(
        publish={one.topic_name for one in node.publishers} | below_rclpy | {f'{name}/debug/*'},
        subscribe={one.topic_name for one in node.subscriptions},
        reply={node.resolve_service_name(one.srv_name) for one in node.services},
        request={node.resolve_service_name(one.srv_name) for one in node.clients},
    )


def declared(
    arguments: Sequence[str], bundle: str, namespace: str
) -> tuple[dict[str, Needs], str]:
    """Configure our nodes, one after the other, with these ROS arguments; return their needs and the commands' topic.

    ValueError where one cannot be configured.
    """
    context, found = rclpy.Context(), {}
    rclpy.init(args=['--ros-args', *arguments], context=context)
    try:
        for name, kind in NODES.items():
            own = {'autostart': False} | ({} if name == 'controller' else {'bundle': bundle})
            overrides = [Parameter(key, value=value) for key, value in own.items()]
            node = kind(context=context, namespace=namespace, parameter_overrides=overrides)
            try:
                node.configure()
                found[name] = needs_of(node)
                if name == 'controller':
                    p = node.parameters
                    backend = open_backend(
                        p.control_backend, p.role_name, METADRIVE, topic=p.command_topic
                    )
                    commands = node.resolve_topic_name(backend.topic)
            finally:
                node.close()
                node.destroy_node()
    finally:
        rclpy.try_shutdown(context=context)
    return found, commands


def with_others(needs: dict[str, Needs], commands: str) -> dict[str, Needs]:
    """Add those whom we hear, those who obey and those who look after us; `commands`: the topic of the commands."""
    said = set().union(*(one.publish for one in needs.values()))
    heard = set().union(*(one.subscribe for one in needs.values()))
    services = set().union(*(one.reply for one in needs.values()))
    everyone = set(EVERYONE)
    stop = {topic for topic in heard if topic.endswith('/emergency_stop')}
    others = {
        'sensors': Needs(publish=heard - said - stop | everyone),
        'actuators': Needs(subscribe={commands}, publish=everyone),
        'operator': Needs(subscribe=said | heard, request=services, publish=stop | everyone),
    }
    return {**needs, **others}


def to_xml(needs: dict[str, Needs], enclave: str, namespace: str) -> str:
    """Return the policy as SROS2 reads it (policy.xsd, version 0.2.0)."""
    policy = ElementTree.Element('policy', version='0.2.0')
    enclaves = ElementTree.SubElement(policy, 'enclaves')
    for name, own in needs.items():
        path = f'{enclave}/{name}'
        one = ElementTree.SubElement(enclaves, 'enclave', path=path)
        profiles = ElementTree.SubElement(one, 'profiles')
        profile = ElementTree.SubElement(profiles, 'profile', ns=namespace, node=name)
        for kind, rights in {
            'topic': ('publish', 'subscribe'),
            'service': ('reply', 'request'),
        }.items():
            for right in rights:
                if getattr(own, right):
                    group = ElementTree.SubElement(profile, f'{kind}s', {right: 'ALLOW'})
                    for topic in sorted(getattr(own, right)):
                        ElementTree.SubElement(group, kind).text = topic
    ElementTree.indent(policy)
    text = ElementTree.tostring(policy, encoding='unicode')
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def make(
    params_file: str,
    *,
    bundle: str,
    enclave: str = '/mose',
    namespace: str = '/mose',
    remaps: Sequence[str] = (),
) -> str:
    """Return the policy of our graph with these parameters."""
    arguments = ['--params-file', params_file]
    for remap in remaps:
        arguments += ['-r', remap]
    needs, commands = declared(arguments, bundle, namespace)
    return to_xml(with_others(needs, commands), enclave.rstrip('/'), namespace)


def main(arguments: list[str] | None = None) -> int:
    """Print the policy; return the exit status."""
    parser = argparse.ArgumentParser(prog='policy', description='Print the SROS2 policy.')
    add = parser.add_argument
    add('--params-file', required=True, metavar='YAML', help='parameters of the nodes')
    add('--bundle', default=str(shared('models/mose-tiny')), help='folder of the exported network')
    add('--namespace', default='/mose', help='of the nodes (/mose)')
    add('--enclave', default='/mose', help="the launch file's argument (/mose)")
    add('--remap', action='append', default=[], metavar='A:=B', help='as the launch file remaps')
    options = parser.parse_args(arguments)
    try:
        text = make(
            options.params_file,
            bundle=options.bundle,
            enclave=options.enclave,
            namespace=options.namespace,
            remaps=options.remap,
        )
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(text, end='')
    return 0


if __name__ == '__main__':
    sys.exit(main())
