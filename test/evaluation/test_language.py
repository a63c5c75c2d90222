import json
from dataclasses import replace

import numpy as np
import pytest

from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import Plan
from mose_ros.data import narration, rules
from mose_ros.data.clips import ClipWriter
from mose_ros.evaluation import language
from test.data.moments import actor, plan, scene

BLACK = {name: np.zeros((36, 64, 3), np.uint8) for name in CAMERAS}
PLAN = plan(7.0, -4.0)
MOMENTS = [
    scene(actor('walker', 15, -4, velocity=(0, 1.5)), time=2.0),
    scene(time=2.0),
    scene(
        actor('traffic_light', 22, -4, state='red', affects_ego=True, stop_distance=13.0), time=2.0
    ),
]


class Truthful:
    """Answers from the rules, as a perfect policy would; `lie` turns its answers into those of an empty road."""

    def __init__(self, truths, lie=False):
        self._truths, self._lie = iter(truths), lie

    def reset(self):
        self._labels = next(self._truths)

    def plan(self, observation, scene=None):
        labels = self._labels
        return Plan(
            trajectory=replace(PLAN, time=observation.time),
            skills=dict.fromkeys(labels.skills, 'general') if self._lie else labels.skills,
            action_skill='normal' if self._lie else labels.skills['planning'],
            views=('front', 'back_left' if self._lie else labels.camera),
        )

    def reason(self):
        empty = rules.label(scene(), plan(7.0))
        text = narration.tell(empty if self._lie else self._labels)
        words = text.split()
        for count in range(1, len(words) + 1):
            yield ' '.join(words[:count])


def frames():
    for moment in MOMENTS:
        truth = rules.label(moment, PLAN)
        observation = language._observation(moment, BLACK)
        yield language.Frame(name='m', observations=[observation], truth=truth, trajectory=PLAN)


def test_a_perfect_policy_is_perfect_and_a_liar_is_not():
    truths = [frame.truth for frame in frames()]

    perfect = language.judge(Truthful(truths), frames(), ['front'], 3, bar=False)
    liar = language.judge(Truthful(truths, lie=True), frames(), ['front'], 3, bar=False)

    assert perfect['f1'] == {'perception': 1.0, 'prediction': 1.0, 'planning': 1.0}
    assert perfect['view_router']['accuracy'] == perfect['action_router']['accuracy'] == 1.0
    assert all(one['accuracy'] == 1.0 for one in perfect['skill_routers'].values())
    assert perfect['trajectory_l2_m'] == 0.0 and perfect['incomplete_texts'] == 0
    assert 0 < liar['f1']['perception'] < 0.5 and liar['f1']['planning'] < 0.5
    assert liar['view_router'] == {'accuracy': 0.0, 'confusion': {'back': {'back_left': 3}}}
    json.dumps(perfect, allow_nan=False)


def test_no_frames_is_an_error():
    with pytest.raises(ValueError, match='no frame'):
        language.judge(Truthful([]), [], ['front'], 0, bar=False)


def test_frames_of_clips_come_with_what_was_seen_before(tmp_path):
    with ClipWriter(tmp_path / 'normal_1', frame_dt=0.2) as writer:
        for index in range(6):
            writer.write(replace(MOMENTS[0], time=0.2 * index), BLACK, expert=PLAN)

    drawn = list(language.frames_of_clips(tmp_path, 6, gap=0.4))

    assert len(drawn) == 6
    spans = [frame.observations[-1].time - frame.observations[0].time for frame in drawn]
    assert sorted(spans) == pytest.approx([0, 0, 0.4, 0.4, 0.4, 0.4])
    assert drawn[0].truth.skills['planning'] == 'emergency_brake'
    with pytest.raises(ValueError, match='7 are needed'):
        list(language.frames_of_clips(tmp_path, 7, gap=0.4))
    with pytest.raises(ValueError, match='no such clip'):
        list(language.frames_of_clips(tmp_path / 'normal_1/camera', 1, gap=0.4))


def test_frames_of_the_simulator_are_seen_and_labelled():
    drawn = list(language.frames_of_world([21000], 2, gap=0.4, families=['parking_exit']))

    assert len(drawn) == 2
    for frame in drawn:
        assert frame.observations[-1].images.keys() == set(CAMERAS)
        assert frame.trajectory.time == pytest.approx(frame.observations[-1].time)
        assert narration.tell(frame.truth)
    assert drawn[0].name != drawn[1].name
