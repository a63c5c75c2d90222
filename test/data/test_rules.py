import numpy as np
import pytest

from mose_ros.core.skills import Taxonomy, default_path
from mose_ros.core.types import Command
from mose_ros.data import rules
from mose_ros.data.rules import label
from mose_ros.data.sight import Road, look
from test.data.moments import actor, corridor, plan, scene


def chain(labels):
    return tuple(labels.skills.values())


def test_a_free_road_is_normal():
    labels = label(scene(), plan(7.0))

    assert chain(labels) == ('general', 'general', 'normal')
    assert (labels.camera, labels.action, labels.target) == ('back', 'keep_going', None)
    assert chain(label(scene()))[-1] == 'general'  # nobody knows the plan


def test_a_walker_who_steps_out_asks_for_the_brake():
    walker = actor('walker', 15, -4, velocity=(0, 1.5))

    labels = label(scene(walker), plan(7.0, -4.0))

    assert chain(labels) == ('vulnerable_road_user', 'crossing', 'emergency_brake')
    assert (labels.action, labels.side) == ('brake_hard', 'right')
    along = actor('walker', 15, -4, velocity=(1.5, 0))  # keeps to the pavement
    assert chain(label(scene(along), plan(7.0))) == ('general', 'general', 'normal')
    far = actor('walker', 55, -4, velocity=(0, 1.5))
    assert chain(label(scene(far), plan(7.0, -4.0)))[0] == 'general'


def test_a_walker_hidden_by_a_van_is_not_named():
    walker = actor('walker', 25, -3.5, velocity=(0, 1.5))
    van = actor('vehicle', 18, -3.0, size=(5.6, 2.0, 2.4), type_id='vehicle.parked')

    assert label(scene(walker), plan(7.0, -4.0)).target.actor is walker
    hidden = label(scene(walker, van), plan(7.0, -4.0)).target
    assert hidden is None or hidden.actor is not walker


def test_braking_hard_for_the_car_ahead():
    brakes = actor('vehicle', 18, 0, velocity=(3, 0), state='braking')
    rolls = actor('vehicle', 18, 0, velocity=(5, 0))

    hard = label(scene(brakes), plan(7.0, -5.0))
    mild = label(scene(rolls), plan(7.0, -1.0))

    assert chain(hard) == ('vehicle', 'slowing', 'emergency_brake')
    assert chain(mild) == ('vehicle', 'slowing', 'normal')
    assert (hard.action, mild.action) == ('brake_hard', 'slow_down')
    light = actor('traffic_light', 30, -4, state='red', affects_ego=True, stop_distance=22.0)
    assert chain(label(scene(brakes, light), plan(7.0, -2.0)))[-1] == 'traffic_sign'


def test_a_car_that_comes_into_our_lane():
    car = actor('vehicle', 12, 2.6, velocity=(5, -1.2))

    labels = label(scene(car, way=corridor(lanes_left=1)), plan(7.0, -1.0))

    assert chain(labels) == ('vehicle', 'cut_in', 'emergency_brake')
    assert labels.side == 'left'
    keeps = actor('vehicle', 12, 3.5, velocity=(5, 0))
    assert chain(label(scene(keeps, way=corridor(lanes_left=1)), plan(7.0)))[1] == 'general'


def test_a_siren_from_behind_decides_view_and_skill():
    siren = actor('vehicle', -25, 0, type_id='vehicle.emergency', state='siren', velocity=(12, 0))

    labels = label(scene(siren), plan(7.0, -1.0, lateral=-1.0))

    assert chain(labels) == ('vehicle', 'approaching', 'give_way')
    assert (labels.camera, labels.action) == ('back', 'pull_over')
    beside = actor('vehicle', -2, 4, type_id='vehicle.emergency', state='siren', velocity=(12, 0))
    assert label(scene(beside), plan(2.0)).camera in ('back_left', 'front_left')
    past = actor('vehicle', 20, 0, type_id='vehicle.emergency', state='siren', velocity=(12, 0))
    assert label(scene(past), plan(7.0)).skills['planning'] == 'normal'


@pytest.mark.parametrize(
    ('state', 'acceleration', 'planning', 'action'),
    [('red', -1.8, 'traffic_sign', 'stop'), ('yellow', -1.8, 'traffic_sign', 'stop'),
     ('yellow', 0.0, 'normal', 'keep_going'), ('green', 0.0, 'normal', 'keep_going')],
)  # fmt: skip
def test_lights(state, acceleration, planning, action):
    light = actor('traffic_light', 22, -4, state=state, affects_ego=True, stop_distance=13.0)

    labels = label(scene(light, speed=5.0), plan(5.0, acceleration))

    assert chain(labels) == ('traffic_control', 'general', planning)
    assert labels.action == action


def test_the_light_of_others_does_not_matter():
    light = actor('traffic_light', 22, -4, state='red')

    assert chain(label(scene(light), plan(7.0))) == ('general', 'general', 'normal')


def test_a_stop_sign_holds_until_its_line():
    sign = actor('traffic_sign', 6, -4, affects_ego=True, stop_distance=2.0)

    waiting = label(scene(sign, speed=0.0), plan(0.0))
    going = label(scene(sign, speed=2.0, since_stop=1.0), plan(2.0, 1.5))

    assert (waiting.skills['planning'], waiting.action) == ('traffic_sign', 'wait')
    assert (going.skills['planning'], going.action) == ('traffic_sign', 'keep_going')


@pytest.mark.parametrize(('lanes_left', 'camera'), [(0, 'front_left'), (1, 'back_left')])
def test_passing_looks_at_the_lane_that_is_used(lanes_left, camera):
    parked = actor('vehicle', 22, 0, type_id='vehicle.parked')

    labels = label(scene(parked, way=corridor(lanes_left=lanes_left)), plan(7.0, lateral=3.0))

    assert chain(labels) == ('static_obstacle', 'general', 'overtaking')
    assert (labels.camera, labels.action) == (camera, 'pass_left')
    aside = actor('vehicle', 22, -4, type_id='vehicle.parked')
    assert chain(label(scene(aside), plan(7.0)))[-1] == 'normal'


def test_one_who_comes_towards_is_let_through_before_passing():
    parked = actor('vehicle', 14, 0, type_id='vehicle.parked')
    oncoming = actor('vehicle', 40, 3.5, velocity=(-7, 0), yaw=np.pi)
    decision = {'cause': 'gap', 'actor_id': oncoming.id, 'longitudinal': 'yield'}

    labels = label(scene(parked, oncoming, speed=3.0), plan(3.0, -1.5), decision)

    assert chain(labels) == ('vehicle', 'approaching', 'give_way')


def test_crossing_traffic_is_given_way():
    car = actor('vehicle', 25, 20, velocity=(0, -7))
    way = corridor(junction=(20, 32))

    labels = label(scene(car, way=way, speed=6.0), plan(6.0, -1.8))

    assert chain(labels) == ('vehicle', 'crossing', 'give_way')
    assert (labels.camera, labels.side) == ('front_left', 'left')
    light = actor('traffic_light', 22, -4, state='red', affects_ego=True, stop_distance=12.0)
    waits = label(scene(car, light, way=way, speed=6.0), plan(6.0, -1.8))
    assert waits.skills['planning'] == 'traffic_sign'  # it has green, we don't go anyway


def test_lane_changes_and_parking_places_look_back():
    way = corridor(lanes_left=1, command=Command.LANE_LEFT)
    behind = actor('vehicle', -12, 0, velocity=(8, 0))

    merging = label(scene(behind, way=way, y=-3.5), plan(7.0, lateral=3.0))
    leaving = label(scene(behind, way=way, y=-3.0, speed=0.0, family='parking_exit'), plan(0.0))

    assert chain(merging) == ('vehicle', 'approaching', 'merging')
    assert (merging.camera, merging.action) == ('back', 'change_left')
    assert chain(leaving) == ('vehicle', 'approaching', 'parking_exit')
    assert (leaving.camera, leaving.action) == ('back', 'wait')


@pytest.mark.parametrize(
    ('family', 'behind', 'camera'),
    [
        ('merging', -12, 'back'),
        ('merging', -2, 'back_left'),  # the rear camera doesn't see it any more
        ('merging', None, 'back_left'),  # the published rule
        ('parking_exit', -12, 'back'),
        ('parking_exit', -2, 'back_left'),
        ('parking_exit', None, 'back'),  # the rear side would show no lane further back than 5 m
    ],
)
def test_a_lane_is_joined_after_a_look_at_who_comes_in_it(family, behind, camera):
    way = corridor(lanes_left=1, command=Command.LANE_LEFT)
    others = [] if behind is None else [actor('vehicle', behind, 0, velocity=(8, 0))]
    speed = 0.0 if family == 'parking_exit' else 7.0

    labels = label(scene(*others, way=way, y=-3.3, speed=speed, family=family), plan(speed))

    assert labels.camera == camera


def test_a_turn_looks_towards_its_exit():
    way = corridor(junction=(8, 20), bend=1.5, command=Command.LEFT)

    assert label(scene(way=way, speed=4.0), plan(4.0)).camera == 'front_left'
    far = corridor(junction=(40, 52), bend=1.5, command=Command.LEFT)
    assert label(scene(way=far, speed=4.0), plan(4.0)).camera == 'back'


def test_labels_belong_to_the_taxonomy():
    taxonomy = Taxonomy.load(default_path())
    labels = label(scene(actor('walker', 9, -3, velocity=(0, 1))), plan(7.0, -4))

    assert {level: skill in taxonomy.levels[level] for level, skill in labels.skills.items()} == dict.fromkeys(
        taxonomy.levels, True
    )  # fmt: skip
    assert labels.camera in rules.CAMERAS


def test_the_way_as_coordinates():
    way = corridor(junction=(20, 36), bend=np.pi / 2)
    road = Road(way)

    s, d = road.project(np.array([[5.0, 2.0], [-30.0, 1.0], way.xy[-1] + [0.0, 20.0]]))

    assert s[:2] == pytest.approx([15, -20]) and d[:2] == pytest.approx([2, 1])
    assert s[2] == pytest.approx(road.s[-1] + 20, abs=0.2)


def test_what_is_too_small_or_covered_is_not_seen():
    near, far = actor('static', 20, 3), actor('static', 40, -3)
    covered = actor('vehicle', 30, 0)
    front = actor('vehicle', 15, 0, size=(8.0, 2.4, 3.0))
    moment = scene(near, far, covered, front)

    seen = {one.actor for one in look(moment, Road(moment.corridor))}

    assert seen == {near, front}
