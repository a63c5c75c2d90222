"""The doctor finds what was broken on purpose, in running graphs and on machines, and says what helps."""

import json
import re

import numpy as np
import pytest
from nav_msgs.msg import Path
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import String

from mose_ros.nodes import conversions, diagnosis, doctor, machine
from mose_ros.nodes.controller_node import ControllerNode
from mose_ros.nodes.diagnosis import Endpoint, Heard, judge_clock, judge_stream, judge_topic
from mose_ros.nodes.driver_node import DriverNode
from mose_ros.nodes.lifecycle import LATCHED
from mose_ros.nodes.processes import DomainLock
from mose_ros.nodes.view_router_node import ViewRouterNode
from nodes.graph import NAMESPACE, Car

IMAGE = 'sensor_msgs/msg/Image'


def endpoint(node='/a', reliability='reliable', durability='volatile', **more):
    kind = more.pop('kind', IMAGE)
    return Endpoint(node=node, kind=kind, reliability=reliability, durability=durability, **more)


# ---- running graphs ----


@pytest.fixture(scope='module')
def taken():
    locks = []
    yield locks
    for lock in locks:
        lock.close()


@pytest.fixture
def fresh_domain(monkeypatch, taken):
    """Let nobody of an earlier test be seen: this process keeps some of them in mind."""
    taken.append(DomainLock())
    monkeypatch.setenv('ROS_DOMAIN_ID', str(taken[-1].number))


def examine(capsys, *arguments):
    """Run the command; return its exit status and the findings that are no fault of this machine."""
    status = doctor.main(['--json', '--seconds', '2', *arguments])
    found = json.loads(capsys.readouterr().out)
    own = {'versions', 'JetPack', 'middleware', 'profile', '/dev/shm', 'limits', 'disk'}
    assert own <= {one['what'] for one in found}
    return status, [one for one in found if one['what'] not in own]


def errors(found):
    return {one['what']: one for one in found if one['level'] == 'error'}


@pytest.fixture
def car(fresh_domain, graph, bundle):
    graph.start(ViewRouterNode, bundle=bundle, camera_topic='camera/{camera}')
    graph.start(DriverNode, bundle=bundle, reasoning=False)
    graph.start(ControllerNode)
    return graph.spin(Car(graph.context))


def test_a_sound_graph_is_found_sound(car, capsys):
    """But for what a starved machine makes late, which is found out and rightly so: streams and what nodes say of them."""
    late = ('mose/', '/mose/camera/', '/mose/odometry')
    for _ in range(3):
        _, found = examine(capsys)
        if all(what.startswith(late) for what in errors(found)):
            break
    says = {one['what']: one['says'] for one in found}
    assert not [what for what in errors(found) if not what.startswith(late)], errors(found)
    for topic in ('/mose/camera/front', '/mose/camera/back', '/mose/odometry'):
        assert re.search('Hz|old|are missing', says[topic]), says[topic]
    assert says['nodes'] == 'view_router, driver, controller are active'
    assert says['QoS'].startswith('both ends meet on ')
    assert says['bundle'].startswith('known')


def test_each_fault_of_a_graph_is_named_with_what_helps(car, graph, capsys):
    """Broken at once, since each look takes seconds: QoS in two ways, a camera's encoding, another's stamps, a third's silence."""
    other = Node('recorder', context=graph.context, namespace=NAMESPACE)
    fast = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    other.create_publisher(String, 'lidar', fast)
    other.create_subscription(String, 'lidar', print, QoSProfile(depth=1))
    other.create_publisher(Path, 'plan', QoSProfile(depth=1))
    other.create_subscription(Path, 'plan', print, LATCHED)
    other.create_publisher(Image, 'views', 2)
    graph.spin(other)
    ahead = {'front_left': 3.0}

    def change(name, msg):
        late = conversions.seconds(msg.header.stamp) + ahead.get(name, 0.0)
        msg.header.stamp = conversions.to_stamp(late)
        msg.encoding = '16UC1' if name == 'back' else msg.encoding
        return msg

    car.change = change
    car.cameras.discard('back_left')
    status, found = examine(capsys)
    assert status == 1
    wrong = errors(found)
    lidar = wrong['/mose/lidar']
    assert 'best effort is offered, reliable asked for' in lidar['says']
    assert 'SensorDataQoS' in lidar['remedy'] and '/mose/recorder' in lidar['says']
    assert 'latched' in wrong['/mose/plan']['says'] and 'bag' in wrong['/mose/plan']['remedy']
    assert '16UC1' in wrong['/mose/camera/back']['says']
    assert 'in the future' in wrong['/mose/camera/front_left']['says']
    assert 'chrony' in wrong['/mose/camera/front_left']['remedy']
    assert 'nothing within' in wrong['/mose/camera/back_left']['says']
    assert '/mose/recorder' in wrong['views']['says']
    assert '/mose/camera/front' not in wrong and all(one['remedy'] for one in wrong.values())


def test_nodes_that_wait_for_a_clock_and_topics_that_nobody_gives_are_named(
    fresh_domain, graph, bundle, capsys
):
    graph.start(ViewRouterNode, bundle=bundle, camera_topic='cam/{camera}', use_sim_time=True)
    status, found = examine(capsys)
    wrong = errors(found)
    assert status == 1 and 'nobody publishes' in wrong['/clock']['says']
    assert 'hears nobody' in wrong['/mose/cam/front']['says']
    assert 'hears nobody' in wrong['/mose/odometry']['says'] and '/mose/route' in wrong
    assert wrong['driver']['says'] == 'is not there'
    other = next(one for one in found if one['what'] == '/mose/cam/back')
    assert other['level'] == 'warning'  # the car drives without


def test_before_the_nodes_run_their_parameters_file_says_what_is_expected(
    fresh_domain, graph, capsys, tmp_path, bundle
):
    file = tmp_path / 'p.yaml'
    file.write_text(
        '/**/view_router:\n  ros__parameters:\n    camera_topic: camera/{camera}\n'
        f'    bundle: {bundle}\n'
    )
    graph.spin(Car(graph.context))
    _, found = examine(capsys, '--params-file', str(file))
    says = {one['what']: one['says'] for one in found}
    assert 'none of ours runs' in says['nodes'] and '/mose/camera/back' in says
    assert 'hears nobody' not in says['/mose/camera/back'] and '/mose/route' not in says


def test_the_files_of_a_platform_are_those_of_the_launch_file(tmp_path):
    mine = tmp_path / 'mine.yaml'
    mine.write_text('/**/view_router:\n  ros__parameters: {threads: 2}\n')
    vehicle = doctor.expectation('vehicle', str(mine), 'mose')
    assert vehicle.threads == 2 and vehicle.camera_topic.startswith('camera/')
    assert doctor.expectation('carla_native', None, 'mose').camera_topic.startswith('/carla/hero')
    with pytest.raises(ValueError, match="write '/[*][*]/driver'"):
        mine.write_text('/car/driver:\n  ros__parameters: {threads: 2}\n')
        doctor.expectation(None, str(mine), 'mose')


@pytest.mark.parametrize(
    'arguments', [['--seconds', '0'], ['--params-file', 'nowhere.yaml'], ['--seconds', 'nan']]
)
def test_wrong_arguments_are_named(arguments, capsys):
    assert doctor.main(arguments) == 2
    assert capsys.readouterr().err.startswith('error: ')


def test_findings_are_printed_with_the_worst_last(capsys):
    made = [
        diagnosis.Finding(level='error', what='x', says='is broken', remedy='mend it'),
        diagnosis.Finding(level='ok', what='y', says='is fine'),
    ]
    doctor.show(made, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith('y: is fine') and lines[2].strip() == '-> mend it'
    assert lines[-1] == '1 ok, 0 warnings, 1 errors'


# ---- the rules ----


@pytest.mark.parametrize(
    ('offered', 'asked', 'rule'),
    [
        ({'reliability': 'best_effort'}, {}, 'reliability'),
        ({}, {'durability': 'transient_local'}, 'durability'),
        ({'deadline_s': 1.0}, {'deadline_s': 0.5}, 'deadline'),
        ({}, {'deadline_s': 0.5}, 'deadline: none is offered'),
        ({}, {'liveliness': 'manual_by_topic'}, 'liveliness'),
        ({'lease_s': 2.0}, {'lease_s': 1.0}, 'lease'),
        ({'kind': 'sensor_msgs/msg/CompressedImage'}, {}, 'type'),
    ],
)
def test_each_rule_of_dds_is_known_and_holds_in_one_direction(offered, asked, rule):
    [finding] = judge_topic('/t', [endpoint(**offered)], [endpoint('/b', **asked)])
    assert rule in finding.says and '/a' in finding.says and finding.remedy
    if rule != 'type':
        assert not judge_topic('/t', [endpoint(**asked)], [endpoint('/b', **offered)])


def test_our_rules_are_those_of_the_middleware():
    """rclpy knows the rules too, without remedies; both must say the same of every pair."""
    qos = pytest.importorskip('rclpy.qos')
    if not hasattr(qos, 'qos_check_compatible'):
        pytest.skip('this rclpy does not check QoS')
    reliability = {'reliable': ReliabilityPolicy.RELIABLE}
    reliability['best_effort'] = ReliabilityPolicy.BEST_EFFORT
    durability = {'volatile': DurabilityPolicy.VOLATILE}
    durability['transient_local'] = DurabilityPolicy.TRANSIENT_LOCAL
    pairs = [(r, d) for r in reliability for d in durability]

    def profile(r, d):
        return QoSProfile(depth=1, reliability=reliability[r], durability=durability[d])

    for one in pairs:
        for two in pairs:
            verdict, _ = qos.qos_check_compatible(profile(*one), profile(*two))
            ours = diagnosis.refusals(endpoint('/a', *one), endpoint('/b', *two))
            assert (verdict != qos.QoSCompatibility.ERROR) == (not ours)


def test_a_route_that_is_asked_for_twice_may_be_refused_once():
    asked = [endpoint('/r', durability='transient_local'), endpoint('/r')]
    assert not judge_topic('/route', [endpoint('/bag')], asked)
    assert judge_topic('/route', [endpoint('/bag')], asked[:1])


def heard(stamps, delay=0.01):
    return Heard(arrived=[stamp + delay for stamp in stamps], stamps=list(stamps), size=10)


@pytest.mark.parametrize(
    ('stamps', 'delay', 'word'),
    [
        ([], 0.0, 'nothing within'),
        (10 + np.arange(0, 3, 0.2), 0.01, '5.0 Hz, 10 are expected'),
        (10 + np.delete(np.arange(0, 3, 0.1), [3, 4, 9]), 0.01, '10 % of its stamps are missing'),
        (10 + np.arange(0, 3, 0.1), -0.2, 'in the future'),
        (10 + np.arange(0, 3, 0.1), 0.8, '0.80 s old'),
        (10 + np.arange(0, 3, 0.1), 1.7e9, 'old'),
        (np.concatenate([np.arange(5, 6, 0.1), np.arange(3, 4, 0.1)]), 0.01, 'go back'),
        (np.zeros(20), 0.01, 'its stamps are 0'),
        (np.full(20, 7.0), 0.01, 'the same stamp again'),
    ],
)
def test_streams_are_judged_by_rate_gaps_and_stamps(stamps, delay, word):
    found = judge_stream('/t', heard(stamps, delay), 3.0, 10.0)
    assert any(word in one.says and one.level != 'ok' for one in found), found
    [fine] = judge_stream('/t', heard(10 + np.arange(0, 3, 0.1)), 3.0, 10.0)
    assert fine.level == 'ok' and fine.says == '10.0 Hz, 10 ms old'


def test_clocks_are_one_and_the_same_for_all():
    both = {'a': True, 'b': True}
    assert not judge_clock(both, [endpoint()], True)
    assert 'nobody' in judge_clock(both, [], False)[0].says
    assert 'stands still' in judge_clock(both, [endpoint()], False)[0].says
    assert judge_clock({'a': True, 'b': False}, [endpoint()], True)[0].what == 'use_sim_time'
    assert '2 publishers' in judge_clock(both, [endpoint(), endpoint('/c')], True)[0].says
    assert not judge_clock({'a': False}, [], False)


def test_small_pictures_are_told():
    found = diagnosis.judge_pictures('/t', (100, 80), 'rgb8', (224, 140), ('rgb8',))
    assert found[0].level == 'warning' and '100x80' in found[0].says
    assert not diagnosis.judge_pictures('/t', (256, 144), 'rgb8', (224, 140), ('rgb8',))


# ---- the machine ----


def profile(folder, size, name='p.xml'):
    path = folder / name
    inner = f'<segment_size>{size}</segment_size><port_queue_capacity>90</port_queue_capacity>'
    path.write_text(f'<a xmlns="urn:x"><b>{inner}</b></a>')
    return str(path)


def machine_root(folder, rmem=2**24):
    (folder / 'dev/shm').mkdir(parents=True)
    (folder / 'proc/sys/net/core').mkdir(parents=True)
    (folder / 'proc/sys/net/core/rmem_max').write_text(f'{rmem}\n')
    return folder


def levels(found):
    worst = {}
    for one in found:
        rank = diagnosis.LEVELS.index(one.level)
        worst[one.what] = max(worst.get(one.what, 0), rank)
    return {what: diagnosis.LEVELS[rank] for what, rank in worst.items()}


def test_a_sound_machine_is_found_sound(tmp_path):
    environment = {machine.PROFILES[0]: profile(tmp_path, 2**20), 'ROS_DOMAIN_ID': '7'}
    found = machine.examine(root=machine_root(tmp_path), environment=environment, moment=1000)
    assert set(levels(found).values()) == {'ok'}, found
    assert any('numpy' in one.says and 'Python' in one.says for one in found)


@pytest.mark.parametrize(
    ('name', 'content', 'what', 'level'),
    [
        (machine.PROFILES[0], 'nowhere.xml', 'profile', 'error'),
        ('RMW_IMPLEMENTATION', 'rmw_cyclonedds_cpp', 'middleware', 'warning'),
        ('ROS_DOMAIN_ID', '300', 'middleware', 'error'),
        ('ROS_DOMAIN_ID', '200', 'middleware', 'warning'),
        ('ROS_DOMAIN_ID', 'x', 'middleware', 'error'),
    ],
)
def test_what_the_environment_sets_wrong_is_named(tmp_path, name, content, what, level):
    environment = {machine.PROFILES[0]: profile(tmp_path, 2**20), name: content}
    found = machine.examine(root=machine_root(tmp_path), environment=environment)
    assert levels(found)[what] == level


def test_profiles_are_held_against_the_pictures(tmp_path):
    root, path = machine_root(tmp_path), profile(tmp_path, 4 * 2**20)

    def level(moment, **environment):
        return levels(machine.examine(root=root, environment=environment, moment=moment))[
            'profile'
        ]

    assert level(20 * machine.PIECE, **{machine.PROFILES[0]: path}) == 'ok'
    assert level(40 * machine.PIECE, **{machine.PROFILES[0]: path}) == 'error'
    assert level(0) == 'warning'
    other = profile(tmp_path, 2**20, 'other.xml')
    assert level(0, **dict(zip(machine.PROFILES, (path, other), strict=True))) == 'error'
    assert level(0, **dict(zip(machine.PROFILES, (path, path), strict=True))) == 'ok'


def test_shared_memory_and_sockets_are_measured(tmp_path):
    root = machine_root(tmp_path, rmem=212992)
    environment = {machine.PROFILES[0]: profile(tmp_path, 2**60)}
    found = machine.examine(root=root, environment=environment)
    assert levels(found)['/dev/shm'] == 'error' and levels(found)['limits'] == 'warning'
    assert any('--ipc=host' in one.remedy for one in found)


def test_a_jetson_and_a_full_disk_are_told(tmp_path, monkeypatch):
    root = machine_root(tmp_path)
    (root / 'etc').mkdir()
    (root / 'etc/nv_tegra_release').write_text('# R36 (release), REVISION: 4.3\n')
    monkeypatch.setattr(machine, 'MIN_FREE', 2**70)
    found = machine.examine(root=root, environment={}, folders={'logs': '~/.ros/log/x/y'})
    says = {one.what: one.says for one in found}
    assert says['JetPack'].startswith('R36') and levels(found)['disk'] == 'warning'


def test_a_bundle_is_checked_to_the_byte(tmp_path):
    from engine.bundles import make_bundle

    made = make_bundle(tmp_path)
    assert machine.check_bundle(str(made)).level == 'ok'
    data = bytearray((made / 'action.onnx').read_bytes())
    data[30] ^= 1
    (made / 'action.onnx').write_bytes(bytes(data))
    assert 'has changed' in machine.check_bundle(str(made)).says
    assert machine.check_bundle(str(tmp_path / 'none')).level == 'error'
