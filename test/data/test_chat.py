import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import cv2
import numpy as np
import pytest

pytest.importorskip('httpx2', reason='asking a model is an extra: pip install mose_ros[train]')

from mose_ros.data import chat  # noqa: E402
from mose_ros.data.chat import Client, Endpoint, Rejected, Unanswered, Unusable  # noqa: E402
from mose_ros.data.pictures import Picture  # noqa: E402
from test.data.chat_server import ChatServer, completion  # noqa: E402

KEY = 'sk-secret-1234'
QUESTION = [{'role': 'user', 'content': 'what is this?'}]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv('CHAT_KEY', KEY)


def client_of(server, cache, **more):
    values = {'url': server.url, 'model': 'seer', 'key_env': 'CHAT_KEY', 'backoff': 0.02, **more}
    return Client(Endpoint(**values), cache)


def jpeg(width=64, height=48, level=90):
    image = np.full((height, width, 3), level, np.uint8)
    return cv2.imencode('.jpg', image)[1].tobytes()


def test_a_question_with_a_picture_goes_out_as_the_api_has_it(tmp_path):
    picture = Picture(data=jpeg())
    content = ['camera: front', picture, 'what is this?']
    form = {'type': 'object', 'properties': {}}

    with ChatServer(lambda body, _: completion('a car')) as server:
        client = client_of(server, tmp_path, body='{"temperature": 0.5}')
        answer = client.ask([{'role': 'user', 'content': content}], form)

    ((path, headers, body),) = server.requests
    assert (answer.text, answer.finish, answer.recalled) == ('a car', 'stop', False)
    assert (path, headers['Authorization']) == ('/v1/chat/completions', f'Bearer {KEY}')
    assert (body['model'], body['temperature']) == ('seer', 0.5)
    assert body['response_format']['json_schema']['schema'] == form
    first, shown, last = body['messages'][0]['content']
    assert first == {'type': 'text', 'text': 'camera: front'} and last['text'] == 'what is this?'
    url = shown['image_url']['url']
    assert url == f'data:image/jpeg;base64,{base64.b64encode(picture.data).decode()}'
    assert KEY not in ''.join(path.read_text() for path in tmp_path.rglob('*.json'))


def test_nothing_is_asked_twice(tmp_path):
    with ChatServer(lambda body, number: completion(f'answer {number}')) as server:
        first = client_of(server, tmp_path).ask(QUESTION)
        again = client_of(server, tmp_path).ask(QUESTION)  # as after a restart
        assert (again.text, again.recalled, len(server.requests)) == (first.text, True, 1)

        client_of(server, tmp_path, model='other').ask(QUESTION)
        client_of(server, tmp_path).ask([{'role': 'user', 'content': 'and this?'}])
        client_of(server, tmp_path, body='{"temperature": 1}').ask(QUESTION)
        for level in (90, 91):
            content = ['this?', Picture(data=jpeg(level=level))]
            client_of(server, tmp_path).ask([{'role': 'user', 'content': content}])
        assert len(server.requests) == 6
    with ChatServer(lambda body, _: completion('elsewhere')) as moved:
        assert client_of(moved, tmp_path).ask(QUESTION).text == first.text
        assert not moved.requests


def test_threads_with_the_same_question_pay_once(tmp_path):
    def slow(body, number):
        time.sleep(0.1)
        return completion('yes')

    with ChatServer(slow) as server, ThreadPoolExecutor(6) as pool:
        client = client_of(server, tmp_path)
        answers = list(pool.map(lambda _: client.ask(QUESTION), range(6)))

    assert len(server.requests) == 1
    assert sum(answer.recalled for answer in answers) == 5


def test_errors_that_pass_are_waited_for(tmp_path):
    script = [
        (500, {}, 'oops'),
        None,  # the connection breaks
        (200, {}, '<html>a proxy speaks</html>'),
        (200, {}, {'error': {'message': 'overloaded'}}),
        (429, {'Retry-After': '1'}, {'error': {'message': 'slow down'}}),
        completion('at last'),
    ]
    with ChatServer(lambda body, number: script[number - 1]) as server:
        client = client_of(server, tmp_path)
        started = time.monotonic()
        answer = client.ask(QUESTION)

    assert (answer.text, len(server.requests)) == ('at last', 6)
    assert time.monotonic() - started > 1.0  # as the server asked for
    retries = client.bill()['retries']
    assert (retries['500'], retries['429'], retries['no answer in it']) == (1, 1, 2)
    assert sum(retries.values()) == 5


def test_a_server_that_sleeps_is_asked_again(tmp_path):
    released = threading.Event()

    def first_sleeps(body, number):
        if number == 1:
            released.wait(10)
        return completion('awake')

    with ChatServer(first_sleeps) as server:
        client = client_of(server, tmp_path, timeout=0.8)
        answer = client.ask(QUESTION)
        released.set()

    assert answer.text == 'awake'
    assert client.bill()['retries']['timeout'] >= 1


@pytest.mark.parametrize(('asked', 'waits'), [('0', [1, 2, 4]), ('3', [3, 3, 4])])
def test_a_server_that_asks_for_no_patience_gets_some(tmp_path, monkeypatch, asked, waits):
    refusal = (429, {'Retry-After': asked}, {'error': {'message': 'slow down'}})
    waited = []

    with ChatServer(lambda body, _: refusal) as server:
        client = client_of(server, tmp_path, attempts=4, backoff=1.0)
        monkeypatch.setattr(client._closing, 'wait', waited.append)
        monkeypatch.setattr(client, '_wait_turn', lambda: None)
        monkeypatch.setattr(chat.random, 'uniform', lambda low, high: high)
        with pytest.raises(Unanswered, match='4 attempts, the last one: 429'):
            client.ask(QUESTION)

    assert waited == pytest.approx(waits, abs=0.15)


def test_a_rate_limit_holds_for_all_threads(tmp_path):
    times = []

    def answer(body, number):
        times.append(time.monotonic())
        if number == 1:
            return 429, {'retry-after-ms': '700'}, {'error': {'message': 'slow down'}}
        return completion('yes')

    with ChatServer(answer) as server:
        client = client_of(server, tmp_path)
        with ThreadPoolExecutor(3) as pool:
            one = pool.submit(client.ask, QUESTION)
            while not client.bill()['retries']:
                time.sleep(0.01)
            rest = [
                pool.submit(client.ask, [{'role': 'user', 'content': f'{number}?'}])
                for number in range(2)
            ]
            for future in (one, *rest):
                future.result()

    assert min(times[1:]) - times[0] > 0.6


def test_errors_that_stay_are_told_at_once(tmp_path):
    cases = [
        (400, {'error': {'message': 'the picture is too large'}}, Rejected, 'too large'),
        (401, {'error': {'message': f'wrong key {KEY}'}}, Unusable, 'CHAT_KEY'),
        (404, {'error': {'message': 'no model seer'}}, Unusable, '--model'),
        (429, {'error': {'code': 'insufficient_quota', 'message': 'x'}}, Unusable, 'credit'),
    ]
    for status, body, kind, told in cases:
        with ChatServer(lambda *_, found=(status, {}, body): found) as server:
            with pytest.raises(kind, match=told) as error:
                client_of(server, tmp_path).ask(QUESTION)
            assert len(server.requests) == 1
            assert KEY not in str(error.value)
    assert not list(tmp_path.rglob('*.json'))


def test_attempts_are_bounded_and_a_later_run_may_succeed(tmp_path):
    with ChatServer(lambda *_: (503, {}, 'down')) as server:
        with pytest.raises(Unanswered, match='3 attempts, the last one: 503'):
            client_of(server, tmp_path, attempts=3).ask(QUESTION)
        assert len(server.requests) == 3
        server.answer = lambda *_: completion('up')
        assert client_of(server, tmp_path, attempts=3).ask(QUESTION).text == 'up'


def test_the_bill_counts_tokens_and_money(tmp_path):
    with ChatServer(lambda *_: completion('yes', 2000, 500)) as server:
        client_of(server, tmp_path).ask(QUESTION)
        client = client_of(server, tmp_path, price_in=2.0, price_out=10.0)
        client.ask(QUESTION)
        client.ask([{'role': 'user', 'content': 'else?'}])
        server.answer = lambda *_: {'choices': completion('no')['choices']}  # tells no usage
        client.ask([{'role': 'user', 'content': 'more?'}])

    bill = client.bill()
    assert bill['recalled'] == {
        'answers': 1, 'prompt_tokens': 2000, 'completion_tokens': 500, 'uncounted_answers': 0,
        'money': pytest.approx(0.009),
    }  # fmt: skip
    assert (bill['paid']['answers'], bill['paid']['uncounted_answers']) == (2, 1)
    assert bill['paid']['money'] == pytest.approx(0.009)


def test_a_damaged_kept_answer_is_named(tmp_path):
    with ChatServer(lambda *_: completion('yes')) as server:
        client_of(server, tmp_path).ask(QUESTION)
        (path,) = tmp_path.rglob('*.json')
        path.write_text(json.dumps({'text': 'yes'})[:-3])
        with pytest.raises(ValueError, match=path.name):
            client_of(server, tmp_path).ask(QUESTION)
        assert len(server.requests) == 1


def test_settings_that_make_no_sense_are_named(tmp_path):
    for settings, told in [
        ({'model': ''}, '--model'),
        ({'body': '{"model": "x"}'}, 'without model'),
        ({'body': 'nonsense'}, 'JSON object'),
        ({'structured': 'xml'}, 'json_schema'),
    ]:
        with pytest.raises(ValueError, match=told):
            Client(Endpoint(**{'model': 'seer', **settings}), tmp_path)


def test_retry_after_is_seconds_or_a_date():
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)

    assert chat._retry_after({'retry-after': '2.5'}) == 2.5
    assert 25 < chat._retry_after({'retry-after': soon}) <= 30
    past = format_datetime(datetime.now(timezone.utc) - timedelta(seconds=30), usegmt=True)
    assert chat._retry_after({'retry-after': past}) == 0.0
    assert chat._retry_after({'retry-after': 'nan'}) is None
    assert chat._retry_after({}) is None
    assert chat._retry_after({'retry-after': 'later'}) is None


def test_a_region_is_framed_in_red_and_a_large_picture_made_smaller():
    def decoded(picture, max_side):
        data = base64.b64decode(picture.data_url(max_side).partition(',')[2])
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    file = jpeg(400, 300)
    plain, framed = Picture(data=file), Picture(data=file, box=(100.0, 60.0, 80.0, 40.0))

    assert decoded(plain, 200).shape == (150, 200, 3)
    blue, green, red = decoded(framed, 400)[80, 100].astype(int)
    assert red > blue + 80 and red > green + 80
    assert np.ptp(decoded(plain, 400)[80, 100].astype(int)) < 10
    assert plain.identity() != framed.identity()
    with pytest.raises(ValueError, match='5 bytes cannot be decoded'):
        Picture(data=b'12345').data_url(100)
