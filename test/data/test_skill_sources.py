"""The sources of skill labels, each on small files made as its publisher writes them."""

import gzip
import json

import cv2
import numpy as np
import pytest

from mose_ros.core.skills import Taxonomy, default_path
from mose_ros.core.types import Trajectory
from mose_ros.data import bench2drive, coda_lm, robo2vlm
from mose_ros.data.clips import ClipReader
from mose_ros.data.moment import shift
from mose_ros.data.skill_samples import chain, check, missing
from test.data.test_clips import write_clip

DRIVING = Taxonomy.load(default_path())
ROBOT = Taxonomy.load(default_path('skills_robot.yaml'))
JPEG = cv2.imencode('.jpg', np.zeros((9, 16, 3), np.uint8))[1].tobytes()


def test_a_label_has_one_known_skill_on_each_level():
    skills = {'planning': 'normal', 'perception': 'vehicle', 'prediction': 'cut_in'}

    assert list(check(DRIVING, skills)) == ['perception', 'prediction', 'planning']
    assert chain(DRIVING, planning='merging') == {
        'perception': 'general', 'prediction': 'general', 'planning': 'merging'
    }  # fmt: skip
    for wrong, told in [
        ({**skills, 'planning': 'fly'}, "no skill 'fly'"),
        ({**skills, 'planning': ['normal']}, 'one skill'),
        ({**skills, 'mood': 'good'}, "no level 'mood'"),
        ({'planning': 'normal'}, "'perception'"),
        (['normal'], 'each level'),
    ]:
        with pytest.raises(ValueError, match=told):
            check(DRIVING, wrong)


# ---- clips: ours, and Bench2Drive's ----


def box(kind, x, y, **more):
    return {
        'class': kind, 'id': f'{kind}{x}', 'type_id': f'{kind}.x', 'location': [x, y, 0.1], 'speed': 0.0,
        'rotation': [0.0, 0.0, 0.0], 'center': [x, y, 0.8], 'extent': [2.2, 0.95, 0.75], **more,
    }  # fmt: skip


def write_official(folder, xs, ys, command=4, others=()):
    """Write a drive as Bench2Drive does: CARLA's y to the right, the ego's class and signs as its recorder has them."""
    (folder / 'anno').mkdir(parents=True)
    speeds = np.hypot(np.gradient(xs), np.gradient(ys)) / 0.1
    yaws = np.where(speeds > 0.1, np.arctan2(np.gradient(ys), np.gradient(xs)), 0.0)
    for index, (x, y, speed, yaw) in enumerate(zip(xs, ys, speeds, yaws, strict=True)):
        ego = box('ego_vehicle', x, y, rotation=[0.0, 0.0, np.degrees(yaw)], speed=speed)
        data = {
            'x': x, 'y': y, 'theta': yaw + np.pi / 2, 'speed': speed, 'command_near': command,
            'x_command_near': x + 10, 'y_command_near': y, 'command_far': command,
            'x_command_far': x + 25, 'y_command_far': y, 'acceleration': [0.0, 0.0, 9.8],
            'angular_velocity': [0.0, 0.0, 0.0], 'weather': {}, 'sensors': {},
            'bounding_boxes': [ego, *others],
        }  # fmt: skip
        (folder / f'anno/{index:05d}.json.gz').write_bytes(
            gzip.compress(json.dumps(data).encode())
        )
    return ClipReader(folder)


TIMES = 0.1 * np.arange(80)
STRAIGHT = 6.0 * TIMES
STOPPING = np.minimum(6.0 * TIMES, 24 + 6 * (TIMES - 4) - 1.5 * (TIMES - 4) ** 2)
STOPPING[TIMES > 6] = STOPPING[TIMES <= 6][-1]
AROUND = -3.5 / (1 + np.exp(-3.0 * (TIMES - 4)))  # one lane to the left, at 4 s


def test_the_scenario_says_what_geometry_cannot_see(tmp_path):
    def planning(scenario, index, xs=STRAIGHT, ys=0 * TIMES, **more):
        folder = tmp_path / f'{scenario}_Town03_Route{len(list(tmp_path.iterdir()))}_Weather0'
        return bench2drive.skills(write_official(folder, xs, ys, **more), index)['planning']

    assert planning('ConstructionObstacle', 35, ys=AROUND) == 'overtaking'
    assert planning('ConstructionObstacle', 0, ys=AROUND) == 'normal'  # long before
    assert planning('ControlLoss', 35, xs=STOPPING) == 'emergency_brake'
    assert planning('ControlLoss', 35) == 'normal'  # the ego does not react
    assert planning('HighwayExit', 35, ys=AROUND) == 'merging'
    assert planning('YieldToEmergencyVehicle', 35, xs=STOPPING) == 'give_way'
    assert planning('VanillaNonSignalizedTurn', 35, xs=STOPPING) == 'normal'  # none of its own
    assert (
        planning('ControlLoss', 79, xs=STOPPING) == 'general'
    )  # nothing is known of what follows


def test_a_seen_reason_goes_before_the_scenario(tmp_path):
    stop = box(
        'traffic_sign', 34.0, 4.0, type_id='traffic.stop', affects_ego=True,
        trigger_volume_location=[32.0, 0.0, 0.0],
    )  # fmt: skip
    clip = write_official(tmp_path / 'ControlLoss/Town03_1', STOPPING, 0 * TIMES, others=[stop])

    assert clip.scene(30).family == 'ControlLoss'
    assert bench2drive.skills(clip, 30)['planning'] == 'traffic_sign'


def test_only_stop_signs_are_signs_to_obey(tmp_path):
    signs = [
        box('traffic_sign', 30.0, 4.0, type_id='traffic.speed_limit.30', affects_ego=True,
            trigger_volume_location=[30.0, 0.0, 0.0]),
        box('traffic_sign', 31.0, 4.0, type_id='static.prop.constructioncone', affects_ego=False),
        box('traffic_sign', 32.0, 4.0, type_id='static.prop.warningconstruction', affects_ego=True),
        box('traffic_sign', 33.0, 0.0, type_id='static.prop.dirtdebris02', affects_ego=False),
    ]  # fmt: skip
    clip = write_official(tmp_path / 'Vanilla_1', STRAIGHT, 0 * TIMES, others=signs)

    limit, cone, barrier = bench2drive.mend(clip.scene(10)).actors

    assert (limit.kind, limit.affects_ego) == ('traffic_sign', False)
    assert (cone.kind, cone.type_id) == ('static', 'static.cone')
    assert (barrier.type_id, barrier.affects_ego) == ('static.barrier', False)
    assert bench2drive.skills(clip, 10)['planning'] == 'normal'


@pytest.mark.parametrize(('command', 'left', 'side'), [(5, 1, 'left'), (6, -1, 'right')])
def test_the_route_says_to_which_side_a_driven_way_changes(tmp_path, command, left, side):
    def car(x, y):
        return box('vehicle', x, y, speed=6.0, state='dynamic')

    def label(name, *others):
        clip = write_official(tmp_path / name, STRAIGHT, left * AROUND, command, others)
        return bench2drive.label(clip, 28, clip.scene(28), clip.future_trajectory(28, 15, 0.2))[0]

    ours, theirs = car(7.0, 0.0), car(6.0, -3.5 * left)  # who follows us, and in the lane to join
    alone, followed = label('a', ours), label('b', ours, theirs)

    assert (alone.target, alone.camera) == (None, f'back_{side}')
    assert followed.target.actor.id == theirs['id'] and followed.camera == 'back'
    assert (alone.skills['planning'], alone.action) == ('merging', f'change_{side}')


def test_a_bend_is_no_change_of_lane():
    angles = np.linspace(0, 1.2, 16)[1:]
    bend = np.stack([30 * np.sin(angles), 30 * (1 - np.cos(angles))], axis=1)
    sideways = np.stack([1.2 * np.arange(1, 16), 3.5 / (1 + np.exp(8 - np.arange(1, 16)))], axis=1)
    path = {name: Trajectory(time=0.0, dt=0.2, xy=xy) for name, xy in [('bend', bend), ('sideways', sideways)]}  # fmt: skip

    assert bench2drive.turn(path['bend']) == pytest.approx(1.2, abs=0.1)
    assert abs(shift(path['bend'])) < 0.3
    assert shift(path['sideways']) == pytest.approx(3.5, abs=0.2)
    assert bench2drive.turn(Trajectory(time=0.0, dt=0.2, xy=np.zeros((15, 2)))) == 0


def test_the_taxonomies_know_all_that_rules_say():
    for source, taxonomy, other in [
        (bench2drive.ClipSource, DRIVING, ROBOT),
        (coda_lm.CodaLmSource, DRIVING, ROBOT),
        (robo2vlm.Robo2VlmSource, ROBOT, DRIVING),
    ]:
        assert missing(taxonomy, source.SKILLS) == [] != missing(other, source.SKILLS)


def test_every_scenario_has_a_skill():
    assert bench2drive.SCENARIOS['AccidentTwoWays'] == 'overtaking'
    assert bench2drive.SCENARIOS['SignalizedJunctionLeftTurnEnterFlow'] == 'merging'


def test_frames_of_clips_are_samples(tmp_path):
    write_clip(tmp_path / 'ours', count=3)
    write_official(tmp_path / 'Accident_Town03_Route156_Weather0', STRAIGHT, AROUND)

    source = bench2drive.ClipSource(tmp_path, DRIVING, cameras=('front', 'back_left'))

    assert len(source) == 83
    official, ours = source.sample(35), source.sample(81)
    assert (ours.name, official.name) == ('ours:00001', 'Accident_Town03_Route156_Weather0:00035')
    assert ours.rules == bench2drive.skills(ClipReader(tmp_path / 'ours'), 1)
    assert (
        'speed 7.0 m/s' in ours.facts['ego vehicle'] and 'turn left' in ours.facts['ego vehicle']
    )
    assert ours.facts['trajectory'].startswith('0.6 s: 3.8 m ahead, 0.0 m left, 6.0 m/s; 1.2 s')
    assert list(ours.pictures()) == ['front', 'back left']
    assert official.rules['planning'] == 'overtaking' and 'left' in official.facts['trajectory']
    with pytest.raises(ValueError, match='rgb_front/00035.jpg'):
        official.pictures()
    assert 'ends here' in source.sample(79).facts['trajectory']


# ---- CODA-LM ----

ANNOTATION = {
    'general_perception': {
        'vehicles': [{'description': 'a white car', 'explanation': 'it is ahead'}],
        'vulnerable_road_users': [],
        'traffic signs': [],
        'traffic lights': [{'description': 'a red light', 'explanation': 'stop'}],
        'traffic cones': [],
        'barriers': [],
        'other objects': [],
        'description and explanation': 'A white car is ahead at a red light.',
    },
    'region_perception': {
        '1': {
            'description and explanation': 'A cone.',
            'box': [2.0, 1, 5, 5],
            'category_name': 'traffic_cone',
        },
        '2': {
            'description and explanation': 'A man.',
            'box': [1.0, 1, 2, 2],
            'category_name': 'pedestrian',
        },
    },
    'driving_suggestion': 'Slow down, do not overtake, and yield to the pedestrian.',
}


def write_coda(root, annotations, split='Train'):
    (root / 'CODA-LM' / split).mkdir(parents=True)
    (root / 'val/images').mkdir(parents=True)
    for number, annotation in enumerate(annotations, start=1):
        path = root / 'CODA-LM' / split / f'val_{number:04d}.json'
        path.write_text(
            annotation if isinstance(annotation, str) else json.dumps(annotation), encoding='utf-8'
        )
        (root / f'val/images/{number:04d}.jpg').write_bytes(JPEG)


def test_coda_lm_asks_of_the_whole_a_region_and_what_to_do(tmp_path):
    underscored = json.loads(json.dumps(ANNOTATION).replace('description and explanation', 'description_and_explanation'))  # fmt: skip
    write_coda(tmp_path, [ANNOTATION, underscored])

    source = coda_lm.CodaLmSource(tmp_path, DRIVING, 'train')

    assert len(source) == 8
    whole, cone, man, suggestion = (source.sample(index) for index in range(4))
    assert whole.name == 'Train/val_0001:general_perception'
    assert cone.name == 'Train/val_0001:region_perception:1'
    assert whole.rules == chain(DRIVING, perception='vehicle')
    assert cone.rules == chain(DRIVING, perception='static_obstacle')
    assert man.rules == chain(DRIVING, perception='vulnerable_road_user')
    assert suggestion.rules == chain(DRIVING, perception='vehicle', planning='give_way')
    assert whole.facts['answer of people who know'].startswith('A white car')
    assert whole.facts == source.sample(4).facts  # keys with underscores
    assert whole.pictures()['front'].box is None
    assert cone.pictures()['front'].box == (2.0, 1.0, 5.0, 5.0)
    (tmp_path / 'val/images/0001.jpg').unlink()
    with pytest.raises(ValueError, match='val/images/0001.jpg'):
        whole.pictures()


def test_broken_coda_lm_is_named_when_its_turn_comes(tmp_path):
    boxless = json.loads(json.dumps(ANNOTATION))
    boxless['region_perception']['1']['box'] = [1, 2]
    write_coda(tmp_path, [ANNOTATION, '{"general_perception": ', boxless, '[]'])

    source = coda_lm.CodaLmSource(tmp_path, DRIVING)

    assert len(source) == 7  # one place for each broken file
    for index, file in [(4, 'val_0002.json'), (5, 'val_0003.json'), (6, 'val_0004.json')]:
        with pytest.raises(ValueError, match=file):
            source.sample(index)
    with pytest.raises(ValueError, match='no split'):
        coda_lm.CodaLmSource(tmp_path, DRIVING, 'dev')
    with pytest.raises(ValueError, match='fetch CODA-LM'):
        coda_lm.CodaLmSource(tmp_path, DRIVING, 'Val')
    with pytest.raises(ValueError, match='taxonomy|no level|no skill'):
        coda_lm.CodaLmSource(tmp_path, Taxonomy({'seeing': {'general': ''}})).sample(0)


@pytest.mark.parametrize(
    ('suggestion', 'skill'),
    [
        ('Brake hard for the truck ahead.', 'emergency_brake'),
        ('The ego car should stop immediately.', 'emergency_brake'),
        ('Slow down and let the cyclist cross.', 'give_way'),
        ('Wait at the red light until it is green.', 'traffic_sign'),
        ('Steer around the cones on the left.', 'overtaking'),
        ('Change to the left lane early.', 'merging'),
        ('Never change lanes here, keep your speed.', 'normal'),
        ('There is no need to brake hard; follow the road.', 'normal'),
        ('Keep a safe distance to the car ahead.', 'normal'),
        ('  ', 'general'),
    ],
)
def test_a_suggestion_has_one_skill(suggestion, skill):
    assert coda_lm.planning(suggestion) == skill


# ---- Robo2VLM ----

ROWS = [
    {'id': 'traj_1_q1', 'question': "Is the robot's gripper open?",
     'choices': "['Yes', 'No', \"Can't tell\", 'Partly']", 'correct_answer': 1},
    {'id': 'traj_1_q2', 'question': "Is the robot's grasp of the cup stable?",
     'choices': '["Yes", "No"]', 'correct_answer': 'A'},
    {'id': 'traj_2_q1', 'question': "The robot is tasked to stack cups. After Closing gripper, what will be the robot's NEXT action phase?",
     'choices': ['Lift', 'Release', 'None of the above'], 'correct_answer': 2},
    {'id': 'traj_2_q2', 'question': 'Is it raining?', 'choices': ['Yes', 'No'], 'correct_answer': '0'},
]  # fmt: skip


def assert_robot_rules(source):
    rules = [source.sample(index).rules for index in range(len(source))]
    assert rules == [
        chain(ROBOT, perception='robot_state'),
        chain(ROBOT, interpretation_and_reasoning='grasp'),
        chain(ROBOT, planning='next_action'),
        chain(ROBOT),  # nobody knows this question
    ]
    sample = source.sample(0)
    assert sample.name == 'traj_1_q1'
    assert sample.facts['choices'] == "(A) Yes (B) No (C) Can't tell (D) Partly"
    assert sample.facts['right choice'] == '(B) No'
    assert sample.pictures()['robot'].data == JPEG


def test_robo2vlm_in_parquet_as_on_the_hub(tmp_path):
    pyarrow = pytest.importorskip('pyarrow', reason='pip install mose_ros[train]')
    from pyarrow import parquet

    rows = [
        {**row, 'choices': str(row['choices']), 'correct_answer': str(row['correct_answer']),
         'image': {'bytes': JPEG, 'path': None}}
        for row in ROWS
    ]  # fmt: skip
    rows[3]['image'] = {'bytes': None, 'path': None}
    (tmp_path / 'data').mkdir()
    path = tmp_path / 'data/train-00000-of-00001.parquet'
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)

    source = robo2vlm.Robo2VlmSource(tmp_path, ROBOT)

    assert_robot_rules(source)
    with pytest.raises(ValueError, match='row 3 has no picture'):
        source.sample(3).pictures()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match='train-00000'):
        robo2vlm.Robo2VlmSource(tmp_path, ROBOT)


def test_robo2vlm_in_lines(tmp_path):
    (tmp_path / 'one.jpg').write_bytes(JPEG)
    rows = [json.dumps({**row, 'image': 'one.jpg'}) for row in ROWS]
    (tmp_path / 'train.jsonl').write_text('\n'.join(rows) + '\n')

    assert_robot_rules(robo2vlm.Robo2VlmSource(tmp_path, ROBOT))
    odd = [
        *rows,
        '',
        json.dumps({**ROWS[3], 'question': 'Is it\u2028 raining?\x85'}, ensure_ascii=False),
    ]
    (tmp_path / 'odd').mkdir()
    (tmp_path / 'odd/train.jsonl').write_bytes('\r\n'.join([*odd, ' ', '{"id":']).encode())
    source = robo2vlm.Robo2VlmSource(tmp_path / 'odd', ROBOT)
    assert len(source) == 6 and '\u2028 raining?\x85' in source.sample(4).facts['question']
    with pytest.raises(ValueError, match='train.jsonl, row 5 is no JSON'):
        source.sample(5)
    with pytest.raises(ValueError, match='neither test-'):
        robo2vlm.Robo2VlmSource(tmp_path, ROBOT, 'test')
    with pytest.raises(ValueError, match="no level 'perception'|no skill"):
        robo2vlm.Robo2VlmSource(tmp_path, Taxonomy({'act': {'general': ''}})).sample(0)


@pytest.mark.parametrize(
    'wrong', [{'correct_answer': 4}, {'correct_answer': 'E'}, {'correct_answer': None}, {'choices': "['Yes' 'No']"}, {'choices': 'Yes'}, {'choices': 'import os'}]
)  # fmt: skip
def test_an_answer_that_is_none_of_the_choices_is_an_error(wrong):
    with pytest.raises(ValueError, match='file, row 0'):
        robo2vlm.parse({**ROWS[0], **wrong}, 'file, row 0')
