import json

import cv2
import numpy as np
import pytest

pytest.importorskip('httpx2', reason='asking a model is an extra: pip install mose_ros[train]')

from mose_ros.core.skills import Taxonomy, default_path  # noqa: E402
from mose_ros.data import vlm  # noqa: E402
from mose_ros.data.chat import Client, Endpoint, Unusable  # noqa: E402
from mose_ros.data.pictures import Picture  # noqa: E402
from mose_ros.data.skill_samples import SkillSample, chain  # noqa: E402
from test.data.chat_server import ChatServer, completion  # noqa: E402

TAXONOMY = Taxonomy.load(default_path())
SKILLS = {'perception': 'vehicle', 'prediction': 'cut_in', 'planning': 'emergency_brake'}
GOOD = json.dumps({**SKILLS, 'reason': 'a car cuts in'})
SAMPLE = SkillSample(
    name='clip:00001',
    facts={'ego vehicle': 'speed 7.1 m/s', 'trajectory': '0.6 s: 3.8 m ahead'},
    rules=chain(TAXONOMY, planning='normal'),
    pictures=lambda: {
        name: Picture(data=cv2.imencode('.jpg', np.zeros((9, 16, 3), np.uint8))[1].tobytes())
        for name in ('front', 'back left')
    },
)


def annotator(server, cache, **more):
    endpoint = Endpoint(url=server.url, model='seer', key_env='NO_KEY', backoff=0.01)
    return vlm.VlmAnnotator(Client(endpoint, cache), TAXONOMY, **more)


def asked(server):
    return [body for _, _, body in server.requests]


def test_the_model_sees_pictures_ego_state_trajectory_and_rules(tmp_path):
    with ChatServer(lambda *_: completion(GOOD)) as server:
        verdict = annotator(server, tmp_path).annotate(SAMPLE)

    assert (verdict.status, verdict.skills) == ('labelled', SKILLS)
    assert (verdict.reason, verdict.repairs) == ('a car cuts in', 0)
    (body,) = asked(server)
    system, user = body['messages']
    for level in TAXONOMY.levels:
        for skill, definition in TAXONOMY.levels[level].items():
            assert f'- {skill}: {definition}' in system['content']
    assert all(rule in system['content'] for rule in vlm.RULES)
    kinds = [part['type'] for part in user['content']]
    assert kinds == ['text', 'image_url', 'text', 'image_url', 'text']
    assert user['content'][2]['text'] == 'Camera: back left'
    assert 'ego vehicle: speed 7.1 m/s' in user['content'][-1]['text']
    assert 'trajectory: 0.6 s: 3.8 m ahead' in user['content'][-1]['text']
    assert 'normal' not in user['content'][-1]['text']  # what the rules say is not told
    form = body['response_format']['json_schema']['schema']
    assert form['properties']['planning']['enum'] == list(TAXONOMY.names('planning'))


@pytest.mark.parametrize(
    ('bad', 'told'),
    [
        ('I think it is a car.', 'no JSON object'),
        ('{"perception": "vehicle", ', 'no JSON object'),
        ('{"perception": "vehicle", }', 'no valid JSON'),
        (json.dumps({**SKILLS, 'planning': 'fly'}), "no skill 'fly'"),
        (json.dumps({'perception': 'vehicle'}), "no skill for level 'prediction'"),
        (json.dumps({**SKILLS, 'planning': ['normal', 'merging']}), 'expected one skill'),
        (json.dumps({**SKILLS, 'mood': 'good'}), "no level 'mood'"),
    ],
)
def test_a_malformed_answer_goes_back_with_what_is_wrong(tmp_path, bad, told):
    def answer(body, number):
        return completion(bad if number == 1 else GOOD)

    with ChatServer(answer) as server:
        verdict = annotator(server, tmp_path).annotate(SAMPLE)

    assert (verdict.status, verdict.skills, verdict.repairs) == ('labelled', SKILLS, 1)
    said, complaint = asked(server)[1]['messages'][-2:]
    assert (said['role'], said['content']) == ('assistant', bad)
    assert told in complaint['content']


def test_who_never_answers_well_is_malformed_and_not_asked_again(tmp_path):
    with ChatServer(lambda *_: completion('no idea')) as server:
        verdict = annotator(server, tmp_path, repairs=2).annotate(SAMPLE)
        again = annotator(server, tmp_path, repairs=2).annotate(SAMPLE)

    assert (verdict.status, verdict.repairs, dict(verdict.skills)) == ('malformed', 2, {})
    assert again == verdict and len(server.requests) == 3  # paid for once


def test_a_fence_and_talk_around_an_answer_do_no_harm():
    for text in (f'Here it is:\n```json\n{GOOD}\n```\nDone.', f'<think>{{or not?}}</think>{GOOD}'):
        assert vlm.read(text, TAXONOMY) == (SKILLS, 'a car cuts in')


def test_a_cut_off_answer_is_told_so(tmp_path):
    def answer(body, number):
        return completion('{"perc', finish='length') if number == 1 else completion(GOOD)

    with ChatServer(answer) as server:
        assert annotator(server, tmp_path).annotate(SAMPLE).status == 'labelled'
    assert 'cut off' in asked(server)[1]['messages'][-1]['content']


def test_refusals_and_rejections_are_told_apart(tmp_path):
    refused = completion(None, refusal='I must not judge people')
    filtered = completion('', finish='content_filter')
    rejected = (400, {}, {'error': {'message': 'context too long'}})
    for found, status, reason in [
        (refused, 'refused', 'I must not judge people'),
        (filtered, 'refused', 'filtered by the server'),
        (rejected, 'rejected', 'context too long'),
    ]:
        with ChatServer(lambda *_, found=found: found) as server:
            verdict = annotator(server, tmp_path / reason[:6]).annotate(SAMPLE)
        assert verdict.status == status and reason in verdict.reason
        assert len(server.requests) == 1

    with ChatServer(lambda *_: (401, {}, 'no')) as server, pytest.raises(Unusable):
        annotator(server, tmp_path / 'denied').annotate(SAMPLE)
