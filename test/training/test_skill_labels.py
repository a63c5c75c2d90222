"""Labelling a subset with skills, against a real server on loopback; what is paid for is kept, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('httpx2', reason='asking a model is an extra: pip install mose_ros[train]')

from mose_ros.core.skills import Taxonomy, default_path  # noqa: E402
from mose_ros.data.chat import Endpoint, Unanswered, Unusable  # noqa: E402
from mose_ros.training import skill_labels  # noqa: E402
from mose_ros.training.skill_labels import Labelling  # noqa: E402
from test.data.chat_server import ChatServer, completion  # noqa: E402
from test.data.test_skill_sources import ANNOTATION, write_coda  # noqa: E402

ROOT = Path(__file__).parents[2]
TAXONOMY = Taxonomy.load(default_path())
SKILLS = {'perception': 'vehicle', 'prediction': 'general', 'planning': 'normal'}


@pytest.fixture
def data(tmp_path):
    """Ten pictures of CODA-LM with four questions each, all of them different."""
    write_coda(tmp_path, [ANNOTATION] * 10)
    for number in range(1, 11):
        image = np.full((18, 32, 3), 20 * number, np.uint8)
        path = tmp_path / f'val/images/{number:04d}.jpg'
        path.write_bytes(cv2.imencode('.jpg', image)[1].tobytes())
    return tmp_path


def labelling(server=None, **more):
    values = {'source': 'coda_lm', 'annotator': 'vlm' if server else 'rules', 'samples': 0}
    if server:
        values['vlm'] = Endpoint(
            url=server.url, model='seer', key_env='NO_KEY', concurrency=4, backoff=0.02, backoff_max=0.1, attempts=40,
            price_in=1.0, price_out=2.0,
        )  # fmt: skip
    return Labelling(**{**values, **more})


def label(work, data, wanted):
    return skill_labels.run(wanted, data, work / 'out', work / 'cache', bar=False)


def records(work):
    lines = (work / 'out/labels.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def question(body):
    return body['messages'][1]['content'][-1]['text']


def answer(body, number=0):
    asks_planning = 'What should the ego vehicle do' in question(body)
    return completion(
        json.dumps({**SKILLS, 'planning': 'merging' if asks_planning else 'general'})
    )


def test_rules_label_and_report_their_coverage(data):
    found = label(data, data, labelling())

    assert found['statuses']['labelled'] == found['samples'] == 40
    assert found['coverage']['planning']['give_way'] == 10
    assert found['coverage']['prediction'] == {
        'general': 40, 'slowing': 0, 'cut_in': 0, 'crossing': 0, 'approaching': 0
    }  # fmt: skip
    assert found['cost'] is None and found['against_rules'] == {}
    assert json.loads((data / 'out/report.json').read_text()) == found
    text = (data / 'out/report.txt').read_text()
    assert '10  25.0%  give_way' in text and '(unused)' in text
    labels = skill_labels.read(data / 'out/labels.jsonl', TAXONOMY)
    assert len(labels) == 40
    assert labels['Train/val_0003:driving_suggestion']['planning'] == 'give_way'
    with pytest.raises(ValueError, match='label again'):
        skill_labels.read(data / 'out/labels.jsonl', Taxonomy({'planning': {'general': ''}}))


def test_a_model_labels_beside_the_rules(data):
    (data / 'val/images/0005.jpg').unlink()
    with ChatServer(answer) as server:
        found = label(data, data, labelling(server))

    assert found['statuses'] == {
        'labelled': 36, 'malformed': 0, 'refused': 0, 'rejected': 0, 'unanswered': 0, 'skipped': 4
    }  # fmt: skip
    assert all('0005.jpg' in why for why in found['failures'].values())
    planning = found['against_rules']['planning']
    assert planning == {
        'agreement': 0.75,
        'confusion': {'general': {'general': 27}, 'give_way': {'merging': 9}},
    }
    assert found['coverage']['perception']['vehicle'] == 36
    assert found['cost']['paid'] == {
        'answers': 36, 'prompt_tokens': 3600, 'completion_tokens': 360, 'uncounted_answers': 0,
        'money': pytest.approx(0.00432),
    }  # fmt: skip
    text = (data / 'out/report.txt').read_text()
    assert 'planning, 75.0% as the rules' in text
    assert 'rules say give_way, the model: merging 9' in text
    assert 'paid: 36 answers, 3600 + 360 tokens, 0.0043 at the prices given' in text
    names = [record['name'] for record in records(data) if record['status'] == 'labelled']
    assert names == sorted(names, key=lambda name: name.split(':')[0])  # in order


def test_a_model_may_label_with_skills_that_no_rule_knows(data):
    taxonomy = data / 'mine.yaml'
    taxonomy.write_text('levels: {mood: {general: none, calm: nothing to do, tense: danger}}')

    with ChatServer(lambda *_: completion('{"mood": "tense"}')) as server:
        found = label(data, data, labelling(server, taxonomy=str(taxonomy), samples=5))

    assert found['coverage'] == {'mood': {'general': 0, 'calm': 0, 'tense': 5}}
    assert found['against_rules'] == {}
    with pytest.raises(ValueError, match='perception: vulnerable_road_user'):
        label(data, data, labelling(taxonomy=str(taxonomy)))


def test_a_stormy_server_costs_nothing_twice(data):
    def stormy(body, number):
        if number % 7 == 0:
            return 500, {}, 'oops'
        if number % 7 == 2:
            return 429, {'retry-after-ms': '30'}, {'error': {'message': 'slow down'}}
        if number % 7 == 4:
            return None
        if 'red frame' in question(body) and len(body['messages']) == 2:
            return completion('I see a thing.')
        return answer(body)

    with ChatServer(stormy) as server:
        found = label(data, data, labelling(server))
        again = label(data, data, labelling(server))

    assert found['statuses']['labelled'] == 40 and found['repaired'] == 20
    assert set(server.paid.values()) == {1} and len(server.paid) == 60
    assert {'500', '429'} < set(found['cost']['retries'])
    assert again['cost']['paid']['answers'] == 0 and again['cost']['recalled']['answers'] == 60
    assert again['coverage'] == found['coverage']


KILLED = """
import sys
from pathlib import Path
from mose_ros.data.chat import Endpoint
from mose_ros.training.skill_labels import Labelling, run
url, work = sys.argv[1], Path(sys.argv[2])
endpoint = Endpoint(url=url, model='seer', key_env='NO_KEY', concurrency=4, timeout=60)
labelling = Labelling(source='coda_lm', annotator='vlm', samples=0, vlm=endpoint)
run(labelling, work, work / 'out', work / 'cache', bar=False)
"""


def test_a_kill_in_the_middle_loses_nothing(data):
    """The server answers 15, then lets everybody wait; when the 15 are kept the process is killed."""
    going_on = threading.Event()

    def answer_some(body, number):
        if number > 15:
            going_on.wait(60)
        return answer(body)

    def kept():
        return len(list((data / 'cache').rglob('*.json')))

    def start():
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        command = [sys.executable, '-c', KILLED, server.url, str(data)]
        return subprocess.Popen(command, env=environment, cwd=data)

    with ChatServer(answer_some) as server:
        process = start()
        deadline = time.monotonic() + 60
        while (kept() < 15 or len(server.requests) < 19) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert kept() == 15 == sum(server.paid.values())
        assert not (data / 'out').exists()

        time.sleep(0.1)
        cut_off = len(server.requests)
        server.answer = answer
        second = start()
        assert second.wait(60) == 0
        going_on.set()

    first = [body for _, _, body in server.requests[:cut_off]]
    later = [body for _, _, body in server.requests[cut_off:]]
    assert len(later) == 25  # the other 25 of 40: those that hung at the kill were never answered
    answered = {json.dumps(body, sort_keys=True) for body in first[:15]}
    assert not answered & {json.dumps(body, sort_keys=True) for body in later}
    assert [record['status'] for record in records(data)] == ['labelled'] * 40
    report = json.loads((data / 'out/report.json').read_text())
    assert (report['cost']['paid']['answers'], report['cost']['recalled']['answers']) == (25, 15)


def test_a_server_that_goes_away_stops_the_run_and_keeps_what_it_said(data):
    def dies(body, number):
        return answer(body) if number <= 10 else (503, {}, 'gone')

    with ChatServer(dies) as server:
        wanted = labelling(server)
        wanted = replace(wanted, vlm=replace(wanted.vlm, attempts=2))
        with pytest.raises(Unanswered, match='503; what was answered is kept'):
            label(data, data, wanted)
        assert len(list((data / 'cache').rglob('*.json'))) == 10
        assert len(server.requests) < 40
        server.answer = answer
        assert label(data, data, wanted)['cost']['recalled']['answers'] == 10


def test_no_access_stops_the_run_at_once(data):
    denied = (401, {}, {'error': {'message': 'who are you?'}})
    with ChatServer(lambda *_: denied) as server, pytest.raises(Unusable, match='NO_KEY'):
        label(data, data, labelling(server))
    assert len(server.requests) <= 8


def test_two_runs_do_not_share_a_cache_at_a_time(data):
    release = threading.Event()

    def waits(body, number):
        release.wait(30)
        return answer(body)

    with ChatServer(waits) as server:
        first = threading.Thread(target=label, args=(data, data, labelling(server, samples=2)))
        first.start()
        while not server.requests:
            time.sleep(0.01)
        with pytest.raises(ValueError, match='in use by another run'):
            label(data, data, labelling(server))
        release.set()
        first.join()


def test_a_larger_subset_holds_the_smaller_one(data):
    def chosen(**more):
        wanted = labelling(**more)
        return skill_labels.choose(skill_labels.open_source(wanted, data, TAXONOMY), wanted)

    small, large = chosen(samples=8, seed=3), chosen(samples=20, seed=3)
    assert set(small) < set(large) and small == sorted(small)
    assert small != chosen(samples=8, seed=4)
    assert chosen() == list(range(40))


def test_a_pool_makes_rare_skills_as_frequent_as_others(data):
    plain = json.loads(json.dumps(ANNOTATION))
    plain['driving_suggestion'] = 'Keep a safe distance.'
    for number in range(2, 11):
        (data / f'CODA-LM/Train/val_{number:04d}.json').write_text(json.dumps(plain))

    found = label(data, data, labelling(samples=5, pool=8))

    chains = {tuple(record['skills'].values()) for record in records(data)}
    assert len(chains) == 5  # every chain there is, once; `give_way` is one of 40 samples
    assert found['coverage']['planning']['give_way'] == 1


def test_the_command(data, capsys):
    pytest.importorskip('torch', reason='the command trains, too: pip install mose_ros[train]')
    from mose_ros.training.__main__ import main

    base = ['annotate', '--data', str(data), '--work', str(data / 'run'), '--quiet']
    assert main([*base, '--source', 'coda_lm', '--samples', '6']) == 0
    assert json.loads((data / 'run/skills/coda_lm-rules/report.json').read_text())['samples'] == 6

    with ChatServer(answer) as server:
        model = ['--annotator', 'vlm', '--url', server.url, '--model', 'seer', '--samples', '6']
        settings = ['--set', 'labels.vlm.key_env=NO_KEY', '--seed', '1']
        assert main([*base, '--source', 'coda_lm', *model, *settings]) == 0
    assert len(server.requests) == 6
    head = (data / 'run/skills/coda_lm-vlm/labels.jsonl').read_text().splitlines()[0]
    assert json.loads(head)['model'] == 'seer'

    for wrong, told in [
        (['--source', 'coda_lm', '--annotator', 'vlm'], '--model'),
        (['--source', 'coda_lm', '--url', 'http://x'], '--annotator vlm'),
        (['--samples', '5'], '--source'),
        (['--source', 'coda_lm', '--set', 'labels.sed=1'], 'did you mean'),
        (['--source', 'robo2vlm'], 'neither train-'),
        (
            ['--source', 'coda_lm', '--skills', str(default_path('skills_robot.yaml'))],
            'perception: vehicle',
        ),
    ]:
        assert main([*base, *wrong]) == 1
        assert told in capsys.readouterr().err
