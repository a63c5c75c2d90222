"""Training labels of genuine Bench2Drive clips; those of our own are in test_chain."""

import pytest

pytest.importorskip(
    'metadrive', reason='collecting is beside annotating: pip install mose_ros[sim]'
)

from mose_ros.data import narration  # noqa: E402
from mose_ros.training import annotate  # noqa: E402
from mose_ros.training.config import Data  # noqa: E402
from test.data.test_skill_sources import (  # noqa: E402
    AROUND,
    STOPPING,
    STRAIGHT,
    TIMES,
    box,
    write_official,
)


def labels(root, name, xs, ys=0 * TIMES, others=()):
    write_official(root / name, xs, ys, others=others)
    target = annotate.Target(horizon=10, dt=0.2, data=Data(future='driven'))
    annotate.annotate(root, target, processes=0, bar=False)
    return annotate.read_labels(root, name)[0]


def skills(root, name, xs, others):
    return [record['skills']['planning'] for record in labels(root, name, xs, others=others)]


def test_what_was_driven_stands_for_a_plan(tmp_path):
    sign = {'affects_ego': True, 'trigger_volume_location': [32.0, 0.0, 0.0]}
    stop = box('traffic_sign', 34.0, 4.0, type_id='traffic.stop', **sign)
    limit = box('traffic_sign', 34.0, 4.0, type_id='traffic.speed_limit.30', **sign)

    stopping = skills(tmp_path / 'a', 'Vanilla_Town03_1', STOPPING, [stop])
    going_on = skills(tmp_path / 'b', 'Vanilla_Town03_2', STRAIGHT, [limit])

    assert stopping[30] == 'traffic_sign' and len(stopping) == 60
    assert set(going_on) == {'normal'}  # a limit is no sign to obey, and nothing is `general`


def test_the_scenario_says_what_geometry_cannot_see(tmp_path):
    parked = box('vehicle', 52.0, -5.4, state='static')  # more than 30 m away yet
    lead = box('vehicle', 36.0, 0.0, state='dynamic', speed=4.0)

    around = labels(tmp_path / 'a', 'Accident_Town03_1', STRAIGHT, AROUND, [parked])
    unseen = labels(tmp_path / 'b', 'Accident_Town03_1', STRAIGHT, AROUND)
    change = labels(tmp_path / 'c', 'LaneChange_Town03_1', STRAIGHT, AROUND)
    brakes = labels(tmp_path / 'd', 'ControlLoss_Town03_1', STOPPING, others=[lead])
    vanilla = labels(tmp_path / 'e', 'Vanilla_Town03_1', STRAIGHT, AROUND)

    def planning(record):
        told = narration.parse(record['answer'])['planning']
        return record['skills']['planning'], told.skill, told.object

    assert planning(around[28]) == ('overtaking', 'overtaking', 'parked car')
    assert planning(unseen[28]) == ('overtaking', 'normal', '')  # nothing is there to be named
    assert planning(change[28]) == ('merging', 'merging', '')
    assert planning(brakes[35]) == ('emergency_brake', 'emergency_brake', 'car')
    assert planning(vanilla[28]) == planning(unseen[0]) == ('normal', 'normal', '')
    assert {one['skills']['planning'] for one in unseen} == {'normal', 'overtaking'}


def test_clips_in_folders_of_scenarios_are_told_apart(tmp_path):
    for scenario in ('Accident', 'ParkingExit'):
        write_official(tmp_path / scenario / 'Town12_Route1', STRAIGHT, AROUND)
    (tmp_path / 'Accident/Town12_Route1/anno/00030.json.gz').write_bytes(b'cut')
    target = annotate.Target(horizon=10, dt=0.2, data=Data(future='driven'))

    found = annotate.annotate(tmp_path, target, processes=0, bar=False)

    assert (found['clips'], list(found['skipped'])) == (1, ['Accident/Town12_Route1'])
    assert found['counts']['family'] == {'ParkingExit': 60}
    assert annotate.labelled(tmp_path) == ['ParkingExit/Town12_Route1']


def test_code_that_makes_no_label_of_clips_does_not_void_them(monkeypatch):
    def version_without(name):
        glob = annotate.Path.glob
        monkeypatch.setattr(
            annotate.Path, 'glob', lambda *a: (path for path in glob(*a) if path.stem != name)
        )
        found = annotate.Target(horizon=10, dt=0.2, data=Data()).version
        monkeypatch.undo()
        return found

    whole = version_without('nothing')
    assert version_without('chat') == whole != version_without('rules')
