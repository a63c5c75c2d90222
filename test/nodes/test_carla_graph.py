"""Our nodes, with the files and remappings of the launch file, drive a vehicle that speaks CARLA's exact topics, types and QoS."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Twist
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as NavPath
from std_msgs.msg import Bool, String

from agents.stand_in import ORIGIN
from mose_ros.core.carla import LINCOLN
from mose_ros.nodes import conversions
from mose_ros.nodes.carla_state_node import CarlaStateNode
from mose_ros.nodes.controller_node import ControllerNode
from mose_ros.nodes.driver_node import DriverNode
from mose_ros.nodes.lifecycle import ERROR
from mose_ros.nodes.view_router_node import ViewRouterNode
from nodes import bridge
from nodes.graph import NAMESPACE, Ear, overrides

CONFIG = Path(__file__).parents[2] / 'config'
PATIENCE_S = 90.0  # on a machine that is busy with something else
KINDS = {
    'view_router': ViewRouterNode,
    'driver': DriverNode,
    'controller': ControllerNode,
    'carla_state': CarlaStateNode,
}


@pytest.fixture
def start(graph, bundle):
    """Return a function that starts nodes as `drive.launch.py platform:=<name>` does."""

    def launch(platform, role, route, names, **changes):
        nodes = {}
        for name in names:
            own = {'use_sim_time': True, **changes.get(name, {})}
            if name == 'controller':
                own['heartbeat_timeout_s'] = 5.0  # for function, not for speed
            if name in ('view_router', 'driver'):
                own['bundle'] = bundle
            remaps = [f'odometry:=/carla/{role}/odometry', f'route:=/carla/{role}/{route}']
            arguments = ['--ros-args', '--params-file', str(CONFIG / f'{platform}.yaml')]
            for one in remaps:
                arguments += ['-r', one]
            nodes[name] = graph.spin(
                KINDS[name](
                    context=graph.context,
                    namespace=NAMESPACE,
                    cli_args=arguments,
                    parameter_overrides=overrides(**own),
                )
            )
        return nodes

    return launch


def test_the_bridges_vehicle_is_driven_with_carla_msgs(graph, start, vehicle_messages):
    from carla_msgs.msg import CarlaEgoVehicleControl

    topic = '/carla/ego_vehicle/vehicle_control_cmd'
    car = graph.spin(
        bridge.Bridge(
            graph.context, 'ego_vehicle', 'bridge', CarlaEgoVehicleControl, topic, bridge.of_carla
        )
    )
    car.publish_route()  # before anyone listens: it is latched
    start('carla_bridge', 'ego_vehicle', 'waypoints', ('view_router', 'driver', 'controller'))

    assert car.drive(1.5, PATIENCE_S) >= 1.5
    assert not car.strays  # each stamp is a tick's
    assert abs(car.car.y + 6.0) < 0.3
    [heard] = graph_types(car, topic)
    assert heard == 'carla_msgs/msg/CarlaEgoVehicleControl'


@pytest.mark.parametrize('begin', [2.0, 5000.0])  # s: ten seconds back, and far ahead
def test_a_new_episode_in_another_time_is_driven_as_well(graph, start, vehicle_messages, begin):
    from carla_msgs.msg import CarlaEgoVehicleControl

    topic = '/carla/ego_vehicle/vehicle_control_cmd'
    car = graph.spin(
        bridge.Bridge(
            graph.context, 'ego_vehicle', 'bridge', CarlaEgoVehicleControl, topic, bridge.of_carla
        )
    )
    car.publish_route()
    start('carla_bridge', 'ego_vehicle', 'waypoints', ('view_router', 'driver', 'controller'))
    assert car.drive(0.5, PATIENCE_S) >= 0.5
    car.begin(begin)  # CARLA has loaded its world again
    assert car.drive(1.0, PATIENCE_S) >= 1.0


def test_the_bridges_vehicle_is_driven_with_a_twist(graph, start):
    topic = '/carla/ego_vehicle/twist'
    car = graph.spin(
        bridge.Bridge(graph.context, 'ego_vehicle', 'bridge', Twist, topic, bridge.of_twist)
    )
    car.publish_route()
    names = ('view_router', 'driver', 'controller')
    changes = {'controller': {'control_backend': 'twist'}}
    start('carla_bridge', 'ego_vehicle', 'waypoints', names, **changes)
    assert car.drive(1.0, PATIENCE_S) >= 1.0


def test_native_ros_2_is_driven_by_sensors_alone(graph, start, vehicle_messages):
    """No odometry, no speed: both are estimated, from an IMU that is left-handed and turned by 45 degrees."""
    from ackermann_msgs.msg import AckermannDriveStamped

    topic = '/carla/hero/ackermann_control_cmd'
    read = bridge.of_ackermann(LINCOLN)
    car = graph.spin(
        bridge.Bridge(graph.context, 'hero', 'native', AckermannDriveStamped, topic, read)
    )
    car.publish_route()
    ear = graph.spin(
        Ear(graph.context, **{'/carla/hero/odometry': Odometry}, diagnostics=DiagnosticArray)
    )
    changes = {
        'controller': {'control_backend': 'ackermann_stamped'},
        'carla_state': {'latitude': ORIGIN[0], 'longitude': ORIGIN[1]},
    }
    start('carla_native', 'hero', 'global_plan', KINDS, **changes)

    assert car.drive(2.0, PATIENCE_S) >= 2.0
    estimated = ear.heard['/carla/hero/odometry'][-1][1]
    tick = round((conversions.seconds(estimated.header.stamp) - bridge.START) / bridge.TICK_S)
    found, true = conversions.ego_from_msg(estimated), car.odometry[tick]
    assert np.hypot(found.x - true.x, found.y - true.y) < 0.3
    assert found.yaw == pytest.approx(true.yaw, abs=0.02)
    assert found.speed == pytest.approx(true.speed, abs=0.4)
    assert not any('course' in name for name in ear.states(ERROR))


def test_an_imu_read_by_the_wrong_convention_is_complained_of(graph, start, vehicle_messages):
    from ackermann_msgs.msg import AckermannDriveStamped

    topic = '/carla/hero/ackermann_control_cmd'
    read = bridge.of_ackermann(LINCOLN)
    car = graph.spin(
        bridge.Bridge(graph.context, 'hero', 'native', AckermannDriveStamped, topic, read)
    )
    ear = graph.spin(Ear(graph.context, diagnostics=DiagnosticArray))
    wrong = {'latitude': ORIGIN[0], 'longitude': ORIGIN[1], 'imu': 'bridge'}
    start('carla_native', 'hero', 'global_plan', ['carla_state'], carla_state=wrong)
    car.car.speed = 5.0  # rolling by itself
    for _ in range(200):
        car.step(0.05)
        if any('course' in name for name in ear.states(ERROR)):
            break
    [said] = [text for name, text in ear.states(ERROR).items() if 'course' in name]
    assert '45 degrees' in said and 'check `imu`' in said


def leaderboard(graph):
    """Return the Leaderboard's vehicle, under way."""
    from carla_msgs.msg import CarlaEgoVehicleControl

    topic, read = '/carla/hero/vehicle_control_cmd', bridge.of_carla
    return graph.spin(
        bridge.Bridge(graph.context, 'hero', 'leaderboard', CarlaEgoVehicleControl, topic, read)
    )


def test_the_leaderboard_gets_its_status_and_one_answer_for_every_tick(
    graph, start, vehicle_messages
):
    car = leaderboard(graph)
    changes = {'carla_state': {'latitude': ORIGIN[0], 'longitude': ORIGIN[1], 'plan': 'path'}}
    nodes = start('leaderboard', 'hero', 'route', KINDS, **changes)
    assert car.ready.wait(PATIENCE_S)  # though the simulated time stands still
    ear = graph.spin(Ear(graph.context, emergency=Bool))
    car.publish_route()

    assert all(car.step(30.0) for _ in range(5))
    assert car.drive(1.0, PATIENCE_S, limit_s=30.0) >= 1.0
    graph.kill(nodes['controller'])
    with ThreadPoolExecutor() as pool:
        came = pool.submit(car.step, 60.0)
        time.sleep(0.5)  # a new controller hears nothing of this tick any more
        start('leaderboard', 'hero', 'route', ['controller'])
        assert came.result()
    assert all(car.step(30.0) for _ in range(3))
    graph.kill(nodes['view_router'])  # and so without any plan
    assert all(car.step(30.0) for _ in range(4))
    ear.wait('emergency', lambda msg: msg.data, timeout=10.0)
    assert {len(found) for found in car.answers.values()} == {1}
    assert sorted(car.answers) == list(range(car.ticks)) and not car.strays


def test_a_route_that_came_early_is_told_and_a_dead_speedometer_makes_no_odometry(
    graph, start, vehicle_messages
):
    car = leaderboard(graph)
    odometry, route = '/carla/hero/odometry', '/carla/hero/route'
    topics = {odometry: Odometry, route: NavPath, 'diagnostics': DiagnosticArray}
    ear = graph.spin(Ear(graph.context, **topics))
    changes = {'autostart': False, 'plan': 'path', 'announce': False}
    changes |= {'latitude': ORIGIN[0], 'longitude': ORIGIN[1]}
    node = start('leaderboard', 'hero', 'route', ['carla_state'], carla_state=changes)[
        'carla_state'
    ]
    node.trigger_configure()
    car.publish_route()
    until(lambda: node._route is not None)
    assert not ear.heard[route]  # it is not active yet
    node.trigger_activate()
    until(lambda: car.step(0.05) or (ear.heard[route] and ear.heard[odometry]))

    car.has_speed = False
    until(lambda: car.step(0.05) or 'silent' in str(ear.states(ERROR)))
    said = len(ear.heard[odometry])
    for _ in range(5):
        car.step(0.05)
    assert len(ear.heard[odometry]) == said
    car.has_speed = True
    until(lambda: car.step(0.05) or len(ear.heard[odometry]) > said)


def until(is_so):
    """Wait until it is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize('latitude', [ORIGIN[0], ORIGIN[0] + 0.1])
def test_bench2drives_route_asks_for_its_turns_and_a_wrong_origin_is_told(
    graph, start, vehicle_messages, latitude
):
    from carla_msgs.msg import CarlaEgoVehicleControl, CarlaRoute

    car = graph.spin(
        bridge.Bridge(
            graph.context,
            'hero',
            'leaderboard',
            CarlaEgoVehicleControl,
            '/carla/hero/vehicle_control_cmd',
            bridge.of_carla,
            plan=CarlaRoute,
        )
    )
    car.publish_route()
    topics = {'/carla/hero/route': NavPath, 'command': String, 'diagnostics': DiagnosticArray}
    ear = graph.spin(Ear(graph.context, **topics))
    origin = {'latitude': latitude, 'longitude': ORIGIN[1], 'plan': 'auto', 'announce': False}
    start('leaderboard', 'hero', 'route', ['carla_state'], carla_state=origin)
    for _ in range(200):
        car.step(0.05)
        if ear.heard['command']:
            break
    if latitude == ORIGIN[0]:
        assert ear.wait('command')[1].data == 'left'  # 20 m before it begins
        _, route = ear.wait('/carla/hero/route')
        assert [pose.pose.position.x for pose in route.poses] == [40.0, 60.0, 120.0, 300.0]
        assert not any(name.endswith(': route') for name in ear.states(ERROR))
    else:
        ear.wait('diagnostics', lambda msg: any('`latitude`' in one.message for one in msg.status))
        [said] = [text for name, text in ear.states(ERROR).items() if name.endswith(': route')]
        assert 'away from the fixes' in said


def graph_types(node, topic):
    """Return the types under which a topic is known."""
    return dict(node.get_topic_names_and_types())[topic]
