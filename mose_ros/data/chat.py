"""Ask a model behind an OpenAI-compatible chat API, and pay for no answer twice.

An answer is kept in a file named by the hash of all that was asked (model, messages, pictures, options; not the address), written
beside and renamed the moment it arrives. Whoever asks the same again, in this run or after a kill, gets it from there.
Knows nothing of skills; `vlm` does. The way of the API: POST /chat/completions as OpenAI's API reference has it,
which vLLM, Ollama and others speak too.
"""

import hashlib
import json
import logging
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from mose_ros.core.files import write_json
from mose_ros.data.pictures import Picture

LONGEST_WAIT = 3600.0  # s; no server is waited for longer, whatever its Retry-After says
RETRIED = (408, 409, 425, 429)  # beside all 5xx
STRUCTURED = ('json_schema', 'json_object', 'none')


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the model is and how it is asked."""

    url: str = 'https://api.openai.com/v1'
    model: str = ''
    key_env: str = 'OPENAI_API_KEY'  # the environment variable with the key; unset: none is sent
    body: str = '{"temperature": 0, "max_tokens": 400}'  # what else each request says, as JSON
    structured: str = 'json_schema'  # how the form of the answer is asked for, one of STRUCTURED
    max_side: int = 768  # px; larger pictures are made smaller
    concurrency: int = 8  # requests at a time
    timeout: float = 120.0  # s until an answer must be there
    attempts: int = 8  # of one request, over rate limits, server errors and time-outs
    backoff: float = 1.0  # s before the second attempt, doubled for each further one
    backoff_max: float = 60.0  # s
    price_in: float = 0.0  # money for a million prompt tokens; 0: not known
    price_out: float = 0.0  # money for a million tokens of answers


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said."""

    text: str
    finish: str  # 'stop', 'length', 'content_filter' ...
    refusal: str = ''  # why it does not answer, in its words
    recalled: bool = False  # from the cache, so not paid for now


class Rejected(ValueError):
    """This very request can never be answered; others may do well."""


class Unanswered(OSError):
    """Every attempt failed; a later run may have more luck."""


class Unusable(OSError):
    """No request can succeed: no access, no credit, no such model or address."""


Message = Mapping[str, Any]  # role; content: text, or a list of texts and Pictures


class Client:
    """Asks, remembers, counts. Threads may share one."""

    def __init__(self, endpoint: Endpoint, cache: str | Path):
        import httpx2  # who only reads cached data needs no HTTP

        if not endpoint.model:
            raise ValueError('no model is named; give --model, as the server lists it in /models')
        if endpoint.structured not in STRUCTURED:
            raise ValueError(
                f'structured {endpoint.structured!r}: expected one of {", ".join(STRUCTURED)}'
            )
        self.endpoint, self.cache = endpoint, Path(cache)
        self._options = _options(endpoint.body)
        self._key = os.environ.get(endpoint.key_env, '')
        headers = {'Authorization': f'Bearer {self._key}'} if self._key else {}
        logging.getLogger('httpx2').setLevel(logging.WARNING)  # else a line for each request
        self._http = httpx2.Client(
            base_url=endpoint.url.rstrip('/') + '/',
            headers=headers,
            timeout=httpx2.Timeout(endpoint.timeout, connect=min(endpoint.timeout, 15.0)),
        )
        self._timeout_error, self._transport_error = httpx2.TimeoutException, httpx2.TransportError
        self._lock = threading.Lock()
        self._claims: dict[str, threading.Lock] = {}
        self._closing = threading.Event()
        self._not_before = 0.0  # monotonic; nobody asks earlier
        self._bill: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()

    def stop(self) -> None:
        """Let no thread ask again or wait any longer; answers under way still arrive and are kept."""
        self._closing.set()

    def close(self) -> None:
        """Stop, and hang up."""
        self.stop()
        self._http.close()

    def ask(self, messages: Sequence[Message], schema: Mapping[str, Any] | None = None) -> Answer:
        """Return the answer to messages, as JSON of `schema` where one is given.

        Raises Rejected, Unanswered or Unusable; ValueError where a kept answer is damaged.
        """
        request = self._request(messages, schema)
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        with self._lock:
            claim = self._claims.setdefault(key, threading.Lock())
        with claim:  # two threads with the same question: the second gets the first one's answer
            record = self._recall(key)
            recalled = record is not None
            if record is None:
                try:
                    body = {**request, 'messages': [self._rendered(one) for one in messages]}
                except ValueError as error:
                    raise Rejected(str(error)) from None
                record = self._post(body, key)
                self._keep(key, record)
        self._count(record, 'recalled' if recalled else 'paid')
        return Answer(
            text=record['text'],
            finish=record['finish'],
            refusal=record['refusal'],
            recalled=recalled,
        )

    def bill(self) -> dict[str, Any]:
        """Return what was paid for now and what was recalled, in answers, tokens and, with prices given, money."""
        with self._lock:
            bill, retries = Counter(self._bill), dict(sorted(self._retries.items()))
        found: dict[str, Any] = {}
        for kind in ('paid', 'recalled'):
            tokens_in, tokens_out = bill[f'{kind}_prompt'], bill[f'{kind}_completion']
            prices = self.endpoint.price_in, self.endpoint.price_out
            money = (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6
            found[kind] = {
                'answers': bill[f'{kind}_answers'],
                'prompt_tokens': tokens_in,
                'completion_tokens': tokens_out,
                'uncounted_answers': bill[f'{kind}_uncounted'],  # whose server told no usage
                'money': round(money, 6) if any(prices) else None,
            }
        return {**found, 'retries': retries}

    # ---- the request ----

    def _request(self, messages, schema) -> dict[str, Any]:
        """Return the request with pictures as hashes of their files: what an answer is remembered by."""
        request = {**self._options, 'model': self.endpoint.model}
        if schema is not None and self.endpoint.structured == 'json_schema':
            form = {'name': 'answer', 'strict': True, 'schema': schema}
            request['response_format'] = {'type': 'json_schema', 'json_schema': form}
        elif schema is not None and self.endpoint.structured == 'json_object':
            request['response_format'] = {'type': 'json_object'}
        request['messages'] = [
            {**one, 'content': [self._named(part) for part in _parts(one)]} for one in messages
        ]
        return request

    def _named(self, part: str | Picture) -> Any:
        if isinstance(part, str):
            return part
        return {**part.identity(), 'max_side': self.endpoint.max_side}

    def _rendered(self, message: Message) -> dict[str, Any]:
        if isinstance(message['content'], str):
            return dict(message)
        parts = [
            {'type': 'text', 'text': part}
            if isinstance(part, str)
            else {'type': 'image_url', 'image_url': {'url': part.data_url(self.endpoint.max_side)}}
            for part in message['content']
        ]
        return {**message, 'content': parts}

    # ---- over the wire ----

    def _post(self, body: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Return what is to be remembered of an answer; see `ask` for what it raises."""
        started, why = time.monotonic(), ''
        for attempt in range(1, self.endpoint.attempts + 1):
            self._wait_turn()
            asked_to_wait = None
            try:
                # a proxy that knows the key can tell a second attempt from a second question
                response = self._http.post(
                    'chat/completions', json=body, headers={'Idempotency-Key': key}
                )
            except self._timeout_error:
                why = 'timeout'
            except self._transport_error as error:
                why = type(error).__name__
            else:
                if response.status_code == 200:
                    record = _record(response)
                    if record is not None:
                        return {
                            'model': self.endpoint.model,
                            **record,
                            'seconds': round(time.monotonic() - started, 3),
                            'created': datetime.now(timezone.utc).isoformat(timespec='seconds'),
                        }
                    why = 'no answer in it'
                else:
                    self._check(response)
                    why = str(response.status_code)
                    asked_to_wait = _retry_after(response.headers)
            with self._lock:
                self._retries[why] += 1
            if attempt < self.endpoint.attempts:
                self._hold_back(attempt, asked_to_wait)
        raise Unanswered(
            f'{self.endpoint.url} gave no answer in {self.endpoint.attempts} attempts, '
            f'the last one: {why}'
        )

    def _check(self, response) -> None:
        """Raise where asking again cannot help."""
        status = response.status_code
        told = self._told(response)
        if status in (400, 413, 415, 422):
            raise Rejected(f'the server rejects the request ({status}): {told}')
        credit = status == 402 or (status == 429 and 'insufficient_quota' in response.text)
        if credit:
            raise Unusable(f'{self.endpoint.url}: no credit is left ({status}): {told}')
        if status in (401, 403):
            raise Unusable(
                f'{self.endpoint.url} denies access ({status}): {told}; '
                f'set the environment variable {self.endpoint.key_env}'
            )
        if status not in RETRIED and status < 500:
            raise Unusable(
                f'{self.endpoint.url} answers {status}: {told}; check --url and --model'
            )

    def _told(self, response) -> str:
        """Return the server's words on an error, without the key, which some repeat."""
        try:
            text = str(response.json()['error']['message'])
        except (ValueError, KeyError, TypeError):
            text = response.text
        return (text.replace(self._key, '***') if self._key else text)[:300].strip()

    def _wait_turn(self) -> None:
        while True:
            with self._lock:
                delay = self._not_before - time.monotonic()
            if self._closing.is_set():
                raise Unanswered('stopped')
            if delay <= 0:
                return
            self._closing.wait(delay)

    def _hold_back(self, attempt: int, asked_to_wait: float | None) -> None:
        """Wait before the next attempt, exponentially longer, and no less than the server asks for, which holds for all threads."""
        jitter = random.uniform(0.5, 1.0)
        delay = jitter * min(self.endpoint.backoff * 2 ** (attempt - 1), self.endpoint.backoff_max)
        if asked_to_wait is not None:
            asked = min(asked_to_wait, LONGEST_WAIT)
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + asked)
            delay = max(delay, asked + 0.1 * jitter)
        self._closing.wait(delay)

    # ---- memory ----

    def _path(self, key: str) -> Path:
        return self.cache / key[:2] / f'{key}.json'

    def _recall(self, key: str) -> dict[str, Any] | None:
        path = self._path(key)
        try:
            record = json.loads(path.read_text(encoding='utf-8'))
            return {name: record[name] for name in ('text', 'finish', 'refusal', 'usage')}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} is no kept answer ({type(error).__name__}: {error}); remove it to ask again'
            ) from None

    def _keep(self, key: str, record: Mapping[str, Any]) -> None:
        write_json(self._path(key), record)

    def _count(self, record: Mapping[str, Any], kind: str) -> None:
        usage = record['usage'] or {}
        with self._lock:
            self._bill[f'{kind}_answers'] += 1
            self._bill[f'{kind}_uncounted'] += not usage
            self._bill[f'{kind}_prompt'] += usage.get('prompt_tokens', 0)
            self._bill[f'{kind}_completion'] += usage.get('completion_tokens', 0)


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict) or {'model', 'messages', 'stream'} & set(options):
        raise ValueError(
            f'body {text!r}: expected a JSON object of options, as {Endpoint.body}, without model, '
            'messages and stream'
        )
    return options


def _parts(message: Message) -> list[Any]:
    content = message['content']
    return [content] if isinstance(content, str) else list(content)


def _record(response) -> dict[str, Any] | None:
    """Return what an answer says, or None where there is no answer in it."""
    try:
        data = response.json()
        choice = data['choices'][0]
        message = choice['message']
        text = message.get('content') or ''
        if isinstance(text, list):  # some servers answer in parts
            text = ''.join(part.get('text', '') for part in text)
        usage = data.get('usage') or {}
        return {
            'text': str(text),
            'finish': str(choice.get('finish_reason') or ''),
            'refusal': str(message.get('refusal') or ''),
            'usage': {
                name: int(usage[name])
                for name in ('prompt_tokens', 'completion_tokens')
                if usage.get(name) is not None
            },
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds a server asks to wait: a number, or a date (RFC 9110, 10.2.3)."""
    if headers.get('retry-after-ms', '').isdecimal():
        return int(headers['retry-after-ms']) / 1000
    text = headers.get('retry-after', '').strip()
    try:
        seconds = float(text)
        return None if math.isnan(seconds) else max(seconds, 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
