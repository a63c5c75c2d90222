"""Looking, thinking and acting as real nodes over real DDS, with a bundle whose answers are known; and what happens when one fails."""

import time

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float32MultiArray, Header, String
from trajectory_msgs.msg import MultiDOFJointTrajectory

from engine.bundles import BRIGHT, DARK, make_bundle
from mose_ros.core.rig import CAMERAS
from mose_ros.nodes import conversions
from mose_ros.nodes.controller_node import ControllerNode
from mose_ros.nodes.driver_node import DriverNode
from mose_ros.nodes.lifecycle import ERROR, WARN
from mose_ros.nodes.vehicle_command import command_from_joint_state
from mose_ros.nodes.view_router_node import ViewRouterNode
from nodes.graph import Car, Ear, overrides


@pytest.fixture
def drive(graph, bundle):
    """Return a graph that drives, its car and an ear."""
    graph.bundle = bundle
    ear = graph.spin(
        Ear(
            graph.context,
            views=Image,
            view_weights=Float32MultiArray,
            trajectory=MultiDOFJointTrajectory,
            skills=String,
            reasoning=String,
            reasoning_partial=String,
            vehicle_command=JointState,
            emergency=Bool,
            diagnostics=DiagnosticArray,
            **{'driver/heartbeat': Header},
        )
    )
    graph.router = graph.start(ViewRouterNode, bundle=bundle, camera_topic='camera/{camera}')
    graph.driver = graph.start(DriverNode, bundle=bundle, reasoning_period_s=0.3)
    graph.controller = graph.start(ControllerNode)
    car = graph.spin(Car(graph.context))
    ear.wait('vehicle_command', is_driving, timeout=10.0)
    return graph, car, ear


def is_driving(msg):
    return command_from_joint_state(msg).throttle > 0.2


def is_braking(msg):
    command = command_from_joint_state(msg)
    return command.throttle == 0 and command.brake > 0.05


def test_outputs_carry_the_stamp_of_the_anchor_and_say_what_was_seen(drive):
    _, car, ear = drive
    car.brightness['back_left'] = 250  # the test bundle looks where it is bright
    time.sleep(0.5)
    _, views = ear.wait('views', lambda msg: 'back_left' in msg.header.frame_id)
    _, trajectory = ear.wait('trajectory', lambda msg: msg.header.stamp == views.header.stamp)

    assert views.header.frame_id == 'front,back_left' and views.encoding == 'rgb8'
    stamps = [(msg.header.stamp.sec, msg.header.stamp.nanosec) for msg in (views, trajectory)]
    assert stamps[0] == stamps[1] and stamps[0] in car.stamps
    assert trajectory.header.frame_id == 'ego_vehicle'
    way = conversions.trajectory_from_msg(trajectory)
    assert way.xy[-1] == pytest.approx([10.0, 0.0], abs=0.5)  # it ends in the near point
    weights = ear.newest('view_weights')
    assert [dim.label for dim in weights.layout.dim] == list(CAMERAS)
    assert max(weights.data[1:]) == weights.data[CAMERAS.index('back_left')]


def test_a_frame_that_comes_while_others_are_waited_for_is_not_mixed_in(drive, monkeypatch):
    graph, car, ear = drive
    looked = []

    def select(time, *rest):
        looked.append(time)
        return type(graph.router._router).select(graph.router._router, time, *rest)

    def late(name, msg):  # a camera that never has the picture of the moment
        if name == 'back':
            msg.header.stamp = conversions.to_stamp(conversions.seconds(msg.header.stamp) - 0.1)
        return msg

    car.change = late
    # waits longer than from frame to frame, and drops nothing on a busy machine
    graph.router.set_parameters(overrides(sync_wait_s=0.15, max_age_s=5.0))
    ear.wait('views', since=time.monotonic() + 0.3)
    monkeypatch.setattr(graph.router._router, 'select', select)
    ear.wait('views', lambda msg: len(looked) > 8, since=time.monotonic(), timeout=10.0)
    published = [stamp(msg) for _, msg in ear.heard['views'] if stamp(msg) >= looked[0]]
    assert len(published) > 4
    assert published == looked[: len(published)]


def test_the_driver_says_what_it_thinks_and_the_text_grows(drive):
    _, car, ear = drive
    since, dark = ear.wait('reasoning')
    assert dark.data == DARK and ear.newest('skills').data == 'general > general > general'
    car.brightness = dict.fromkeys(CAMERAS, 240)
    ear.wait('reasoning', lambda msg: msg.data == BRIGHT, since=since)
    assert ear.newest('skills').data == 'vehicle > slowing > normal'
    partial = [msg.data for _, msg in ear.heard['reasoning_partial']]
    assert any(DARK.startswith(text) and text != DARK for text in partial)


def test_plans_keep_the_rate_of_the_frames(drive):
    _, car, ear = drive
    start = len(ear.heard['trajectory'])
    time.sleep(2.0)
    assert len(ear.heard['trajectory']) - start >= 18


def test_a_missing_camera_is_masked_and_warned_of_and_the_car_drives_on(drive):
    _, car, ear = drive
    car.brightness['back'] = 250
    ear.wait('views', lambda msg: 'back' in msg.header.frame_id.split(','))
    car.cameras.discard('back')
    since = time.monotonic() + 0.6
    _, views = ear.wait('views', since=since)
    assert 'back' not in views.header.frame_id.split(',')
    masked = lambda msg: any('camera back' in one.name and one.level == WARN for one in msg.status)  # noqa: E731
    ear.wait('diagnostics', masked)
    ear.wait('emergency', lambda msg: not msg.data, since=since)
    car.cameras.add('back')
    ear.wait('views', lambda msg: 'back' in msg.header.frame_id.split(','), since=since)


def test_a_missing_anchor_stops_the_car_and_its_return_lets_it_go(drive):
    _, car, ear = drive
    car.cameras.discard('front')
    lost = time.monotonic()
    heard, _ = ear.wait('vehicle_command', is_braking, since=lost)
    assert heard - lost < 0.7
    assert ear.wait('emergency', lambda msg: msg.data, since=lost)
    car.cameras.add('front')
    ear.wait('vehicle_command', is_driving, since=heard)
    ear.wait('emergency', lambda msg: not msg.data, since=heard)


@pytest.mark.parametrize('fault', ['truncated', 'encoding', 'step', 'size'])
def test_a_broken_picture_of_the_anchor_stops_the_car(drive, fault):
    _, car, ear = drive

    def broken(name, msg):
        if name == 'front':
            if fault == 'truncated':
                msg.data = msg.data[:100]
            elif fault == 'encoding':
                msg.encoding = 'yuv422'
            elif fault == 'step':
                msg.step = 7
            else:
                msg.width = msg.height = 0
        return msg

    car.change = broken
    lost = time.monotonic()
    heard, _ = ear.wait('vehicle_command', is_braking, since=lost)
    assert heard - lost < 0.7

    def is_told(msg):
        return any('camera front' in one.name and one.level == ERROR for one in msg.status)

    ear.wait('diagnostics', is_told, since=lost)  # a machine that stumbles brakes for less, before


def test_odometry_that_is_not_finite_brakes_and_is_reported(drive):
    _, car, ear = drive
    car.speed = float('nan')
    lost = time.monotonic()
    heard, _ = ear.wait('vehicle_command', is_braking, since=lost)
    assert heard - lost < 0.5
    ear.wait('emergency', lambda msg: msg.data, since=lost)

    def is_told(msg):
        told = [one.message for one in msg.status if 'controller' in one.name]
        return any('odometry is not finite' in message for message in told)

    ear.wait('diagnostics', is_told, since=lost)
    car.speed = 2.0
    ear.wait('vehicle_command', is_driving, since=heard)


def test_without_odometry_nobody_drives(drive):
    _, car, ear = drive
    car.has_odometry = False
    lost = time.monotonic()
    heard, _ = ear.wait('vehicle_command', is_braking, since=lost)
    assert heard - lost < 0.6


def test_the_end_of_the_driver_is_noticed_and_a_new_one_is_obeyed(drive):
    graph, car, ear = drive
    lost = time.monotonic()
    graph.kill(graph.driver)
    heard, _ = ear.wait('vehicle_command', is_braking, since=lost)
    assert heard - lost < 0.5
    _, hard = ear.wait(
        'vehicle_command', lambda m: command_from_joint_state(m).brake > 0.3, since=heard
    )
    graph.start(DriverNode, bundle=graph.bundle)
    ear.wait('vehicle_command', is_driving, since=time.monotonic(), timeout=8.0)
    ear.wait('emergency', lambda msg: not msg.data, since=time.monotonic())


def test_deactivated_nodes_are_silent_and_activated_ones_speak_again(drive):
    graph, car, ear = drive
    graph.driver.trigger_deactivate()
    time.sleep(0.3)
    count = len(ear.heard['trajectory'])
    time.sleep(0.4)
    assert len(ear.heard['trajectory']) == count
    assert ear.newest('driver/heartbeat').frame_id == 'inactive'
    graph.driver.trigger_activate()
    ear.wait('trajectory', since=time.monotonic())


@pytest.mark.parametrize('end', ['deactivated', 'ended'])
def test_a_controller_that_goes_leaves_a_full_brake_behind(drive, end):
    graph, _, ear = drive
    assert is_driving(ear.newest('vehicle_command'))
    if end == 'deactivated':
        graph.controller.trigger_deactivate()
    else:
        graph.kill(graph.controller)
    ear.wait('vehicle_command', lambda msg: command_from_joint_state(msg).brake == 1.0)
    time.sleep(0.3)
    last = command_from_joint_state(ear.newest('vehicle_command'))
    assert last.brake == 1.0 and last.throttle == 0.0


def test_time_that_goes_backwards_is_told_and_driven_on_from(drive):
    """Time goes back by 1.6 s and stays there: whoever clung to the old time would be silent until it is reached again."""
    graph, car, ear = drive
    for node in (graph.router, graph.driver):
        node.set_parameters(overrides(max_age_s=5.0))
    graph.controller.set_parameters(overrides(trajectory_max_age_s=2.0))
    car.cameras, car.has_odometry = set(), False
    time.sleep(0.25)  # until nothing of before is under way
    last = max(stamp(msg) for _, msg in ear.heard['vehicle_command'] if is_driving(msg))
    car.offset = -1.6
    car.cameras, car.has_odometry = set(CAMERAS), True
    back = lambda msg: stamp(msg) < last - 0.1  # noqa: E731 - a time that has been before
    since = time.monotonic()

    for topic in ('views', 'trajectory'):
        ear.wait(topic, back, since=since)
    heard, _ = ear.wait('vehicle_command', lambda msg: back(msg) and is_driving(msg), since=since)
    ear.wait('emergency', lambda msg: not msg.data, since=heard)
    ear.wait('diagnostics', lambda msg: len(who_says_time_went_back(ear)) == 3)


def stamp(msg):
    return conversions.seconds(msg.header.stamp)


def who_says_time_went_back(ear):
    return [name for name, text in ear.states(WARN).items() if 'went back by' in text]


def test_plans_that_are_too_old_are_not_published(drive):
    graph, car, ear = drive
    car.offset = -1.0
    time.sleep(0.4)
    count = len(ear.heard['trajectory'])
    time.sleep(0.5)
    assert len(ear.heard['trajectory']) == count
    assert ear.newest('emergency').data
    assert is_braking(ear.newest('vehicle_command'))


def test_a_network_that_has_gone_mad_moves_nothing(graph, tmp_path):
    mad = str(make_bundle(tmp_path / 'mad', velocity_gain=float('nan')))
    topics = {'trajectory': MultiDOFJointTrajectory, 'vehicle_command': JointState}
    ear = graph.spin(Ear(graph.context, diagnostics=DiagnosticArray, **topics))
    graph.start(ViewRouterNode, bundle=mad, camera_topic='camera/{camera}')
    graph.start(DriverNode, bundle=mad)
    graph.start(ControllerNode)
    graph.spin(Car(graph.context))
    broken = lambda msg: any('not finite' in status.message for status in msg.status)  # noqa: E731
    ear.wait('diagnostics', broken, timeout=10.0)
    ear.wait('vehicle_command')
    assert not ear.heard['trajectory']
    assert all(is_braking(msg) for _, msg in ear.heard['vehicle_command'])


def test_a_changed_bundle_is_refused_and_the_node_says_so(graph, tmp_path):
    changed = make_bundle(tmp_path / 'changed')
    with open(changed / 'vision.onnx', 'r+b') as file:
        file.seek(20)
        byte = file.read(1)
        file.seek(20)
        file.write(bytes([byte[0] ^ 1]))
    ear = graph.spin(Ear(graph.context, diagnostics=DiagnosticArray))
    node = graph.start(DriverNode, bundle=str(changed))
    refused = lambda msg: any('has changed' in status.message for status in msg.status)  # noqa: E731
    ear.wait('diagnostics', refused)
    assert node.state == 'unconfigured'
