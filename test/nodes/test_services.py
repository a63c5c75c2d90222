"""What an operator may ask of running nodes: be silent, forget, take another network, explain."""

import time

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64, Header, String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import MultiDOFJointTrajectory

from engine.bundles import BRIGHT, DARK, make_bundle
from mose_ros.core.rig import CAMERAS
from mose_ros.nodes.controller_node import ControllerNode
from mose_ros.nodes.driver_node import DriverNode
from mose_ros.nodes.lifecycle import OK, WARN
from mose_ros.nodes.view_router_node import ViewRouterNode
from nodes.graph import Car, Ear, overrides


@pytest.fixture
def drive(graph, bundle):
    """Return a graph that plans, its car and an ear."""
    topics = {'driver/heartbeat': Header, 'trajectory': MultiDOFJointTrajectory, 'skills': String}
    topics |= {'driver/debug/processing_time/prefill_ms': Float64}
    topics |= {'view_router/debug/cyclic_time_ms': Float64, 'vehicle_command': JointState}
    ear = graph.spin(Ear(graph.context, diagnostics=DiagnosticArray, **topics))
    slow = {
        'bundle': bundle,
        'max_age_s': 5.0,
        'log_period_s': 60.0,
    }  # a loaded machine is no fault here
    graph.router = graph.start(ViewRouterNode, camera_topic='camera/{camera}', **slow)
    graph.driver = graph.start(DriverNode, reasoning_period_s=0.3, **slow)
    car = graph.spin(Car(graph.context))
    ear.wait('trajectory', timeout=20.0)
    return graph, car, ear


def call(ear, name, kind=Trigger, timeout=30.0, **request):
    """Call a service and return its answer."""
    client = ear.create_client(kind, name)
    assert client.wait_for_service(10.0), f'there is no service {name}'
    answer = client.call_async(kind.Request(**request))
    deadline = time.monotonic() + timeout
    while not answer.done():
        assert time.monotonic() < deadline, f'{name} does not answer'
        time.sleep(0.01)
    return answer.result()


def test_a_disabled_driver_is_silent_but_stays_loaded(drive):
    graph, _, ear = drive
    answer = call(ear, 'driver/set_enabled', SetBool, data=False)
    assert answer.success and answer.message == 'active, disabled by set_enabled'
    time.sleep(0.5)
    count = len(ear.heard['trajectory'])
    time.sleep(0.5)
    assert len(ear.heard['trajectory']) == count and graph.driver.state == 'active'
    assert 'disabled by set_enabled' in ear.states(WARN).values()
    assert call(ear, 'driver/set_enabled', SetBool, data=True).success
    ear.wait('trajectory', since=time.monotonic())


def test_a_disabled_controller_brakes_instead_of_falling_silent(drive):
    graph, _, ear = drive
    graph.controller = graph.start(ControllerNode, trajectory_max_age_s=2.0)
    ear.wait('vehicle_command', timeout=10.0)
    since = time.monotonic()
    assert call(ear, 'controller/set_enabled', SetBool, data=False).success
    ear.wait(
        'diagnostics',
        lambda msg: any('STOP' in s.message and 'disabled' in s.message for s in msg.status),
        since=since,
    )
    _, command = ear.wait('vehicle_command', since=time.monotonic())
    assert dict(zip(command.name, command.position, strict=True))['throttle'] == 0


def test_reset_forgets_and_planning_goes_on(drive):
    graph, _, ear = drive
    for name in ('view_router', 'driver'):
        assert call(ear, f'{name}/reset').success
    ear.wait('trajectory', since=time.monotonic())
    graph.driver.trigger_deactivate()
    graph.driver.trigger_cleanup()
    answer = call(ear, 'driver/reset')
    assert not answer.success and answer.message == 'it is unconfigured'


def test_explain_answers_with_the_whole_text_of_the_newest_plan(drive):
    graph, car, ear = drive
    answer = call(ear, 'driver/explain')
    assert answer.success and f'reasoning: {DARK}' in answer.message
    car.brightness = dict.fromkeys(CAMERAS, 240)
    ear.wait('skills', lambda msg: msg.data.startswith('vehicle'))
    told = call(ear, 'driver/explain').message
    assert f'reasoning: {BRIGHT}' in told
    assert 'views: front, ' in told and 'planning: normal; action: ' in told and ' m/s' in told


def test_explain_before_the_first_plan_says_so(graph, bundle):
    graph.start(DriverNode, bundle=bundle)
    ear = graph.spin(Ear(graph.context))
    answer = call(ear, 'driver/explain')
    assert not answer.success and 'no plan yet' in answer.message


def test_another_bundle_takes_over_while_the_node_runs(drive, tmp_path):
    graph, _, ear = drive
    other = str(make_bundle(tmp_path / 'other', name='other'))
    beats = len(ear.heard['driver/heartbeat'])
    for name, node in (('view_router', graph.router), ('driver', graph.driver)):
        assert node.set_parameters(overrides(bundle=other))[0].successful
        answer = call(ear, f'{name}/reload_bundle')
        assert answer.success and answer.message == f'{other} is in use'
    ear.wait('diagnostics', lambda msg: any('other runs on' in one.message for one in msg.status))
    ear.wait('trajectory', since=time.monotonic())
    ear.wait('driver/heartbeat', since=time.monotonic())
    states = {msg.frame_id for _, msg in ear.heard['driver/heartbeat'][beats:]}
    assert states == {'active'} and graph.driver._driver.manifest.name == 'other'


def test_planning_goes_on_while_the_new_bundle_is_opened(drive, monkeypatch):
    graph, _, ear = drive
    load = graph.driver.load

    def slow(bundle):
        time.sleep(2.0)
        return load(bundle)

    monkeypatch.setattr(graph.driver, 'load', slow)
    count = {topic: len(ear.heard[topic]) for topic in ('driver/heartbeat', 'trajectory')}
    assert call(ear, 'driver/reload_bundle').success
    for topic, before in count.items():
        assert len(ear.heard[topic]) - before >= 5, f'{topic} fell silent'


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda folder: folder / 'nowhere', 'is no bundle'),
        (lambda folder: broken(folder), 'has changed'),
        (lambda folder: make_bundle(folder, precision='float16'), 'not float32'),
    ],
)
def test_a_bad_bundle_changes_nothing_but_the_answer(drive, tmp_path, change, words):
    graph, _, ear = drive
    before = graph.driver._driver
    bad = str(change(tmp_path / 'bad'))
    graph.driver.parameters = graph.driver.parameters.__class__(
        **{**vars(graph.driver.parameters), 'bundle': bad, 'precision': 'float32'}
    )
    answer = call(ear, 'driver/reload_bundle')
    assert not answer.success and words in answer.message
    assert answer.message.startswith('the old bundle stays in use: ')
    assert graph.driver._driver is before
    ear.wait('trajectory', since=time.monotonic())


def broken(folder):
    made = make_bundle(folder)
    data = bytearray((made / 'vision.onnx').read_bytes())
    data[20] ^= 1
    (made / 'vision.onnx').write_bytes(bytes(data))
    return made


def test_cameras_tell_rate_age_drops_and_exposure(drive):
    _, car, ear = drive
    time.sleep(1.0)

    def cameras(msg):
        return {
            one.name.rpartition(' ')[2]: {pair.key: pair.value for pair in one.values}
            for one in msg.status
            if ': camera ' in one.name and one.level == OK
        }

    def is_told(msg):  # a rate takes two pictures
        return len(cameras(msg)) == len(CAMERAS) and 'rate_hz' in cameras(msg)['back_left']

    _, msg = ear.wait('diagnostics', is_told)
    told = cameras(msg)['back_left']
    assert told['size'] == '128x72' and float(told['brightness']) == 90
    assert 2 < float(told['rate_hz']) < 30 and float(told['age_ms']) < 5000
    assert int(told['received']) > 3 and {'dropped', 'same_stamp', 'clipped'} <= told.keys()


def test_a_black_picture_is_masked_as_if_it_were_not_there(drive):
    _, car, ear = drive
    car.brightness['back'] = 2
    ear.wait(
        'diagnostics',
        lambda msg: any('camera back' in s.name and 'black' in s.message for s in msg.status),
    )


def test_where_to_look_is_changed_while_driving_and_nonsense_is_refused(drive):
    graph, _, ear = drive
    views = graph.spin(Ear(graph.context, views=Image))
    [taken] = graph.router.set_parameters(overrides(force_view='back_right'))
    assert taken.successful, taken.reason
    views.wait('views', lambda msg: 'back_right' in msg.header.frame_id, timeout=20.0)
    [refused] = graph.router.set_parameters(overrides(force_view='roof'))
    assert not refused.successful and "no view 'roof'" in refused.reason
    [unknown] = graph.router.set_parameters(overrides(mode='guess'))
    assert 'choose one of learned, fixed, all' in unknown.reason
    assert graph.router.parameters.force_view == 'back_right'


def test_the_debug_topics_bear_autowares_names(drive):
    _, _, ear = drive
    for topic in ('driver/debug/processing_time/prefill_ms', 'view_router/debug/cyclic_time_ms'):
        _, msg = ear.wait(topic)
        assert msg.data >= 0
