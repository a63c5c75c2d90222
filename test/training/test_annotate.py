"""Training labels of genuine Bench2Drive clips; those of our own are in test_chain."""

import pytest

pytest.importorskip(
    'metadrive', reason='collecting is beside annotating: pip install mose_ros[sim]'
)

from mose_ros.training import annotate  # noqa: E402
from mose_ros.training.config import Data  # noqa: E402
from test.data.test_skill_sources import STOPPING, STRAIGHT, TIMES, box, write_official  # noqa: E402


def skills(root, name, xs, others):
    write_official(root / name, xs, 0 * TIMES, others=others)
    target = annotate.Target(horizon=10, dt=0.2, data=Data(future='driven'))
    annotate.annotate(root, target, processes=0, bar=False)
    return [record['skills']['planning'] for record in annotate.read_labels(root / name)[0]]


def test_what_was_driven_stands_for_a_plan(tmp_path):
    sign = {'affects_ego': True, 'trigger_volume_location': [32.0, 0.0, 0.0]}
    stop = box('traffic_sign', 34.0, 4.0, type_id='traffic.stop', **sign)
    limit = box('traffic_sign', 34.0, 4.0, type_id='traffic.speed_limit.30', **sign)

    stopping = skills(tmp_path / 'a', 'Vanilla_Town03_1', STOPPING, [stop])
    going_on = skills(tmp_path / 'b', 'Vanilla_Town03_2', STRAIGHT, [limit])

    assert stopping[30] == 'traffic_sign' and len(stopping) == 60
    assert set(going_on) == {'normal'}  # a limit is no sign to obey, and nothing is `general`


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
