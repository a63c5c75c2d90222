"""A real HTTP server on loopback that speaks the chat API and does what a test tells it to."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, prompt_tokens=100, completion_tokens=10, finish='stop', refusal=None):
    """Return the body of an answer as OpenAI's API has it."""
    message = {'role': 'assistant', 'content': text, 'refusal': refusal}
    usage = {'prompt_tokens': prompt_tokens, 'completion_tokens': completion_tokens}
    return {'choices': [{'index': 0, 'message': message, 'finish_reason': finish}], 'usage': usage}


class ChatServer:
    """Answers each request with `answer(body, number)`: a dict (status 200), or (status, headers, body).

    `number` counts the requests. `paid` counts the answers with status 200 by the content asked for, once they are sent.
    """

    def __init__(self, answer):
        self.answer = answer
        self.requests, self.paid, self.lock = [], Counter(), threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    number = len(outer.requests)
                found = outer.answer(body, number)
                if found is None:  # hang up
                    self.close_connection = True
                    return
                status, headers, body_out = found if isinstance(found, tuple) else (200, {}, found)
                data = (
                    body_out.encode()
                    if isinstance(body_out, str)
                    else json.dumps(body_out).encode()
                )
                try:
                    self.send_response(status)
                    for name, value in {**headers, 'Content-Length': str(len(data))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    return  # the client went away: not paid
                if status == 200:
                    with outer.lock:
                        outer.paid[json.dumps(body, sort_keys=True)] += 1

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_port}/v1'

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
