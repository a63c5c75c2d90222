"""A real HTTP server on loopback that serves a folder, and fails as a test tells it to."""

import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer:
    """Serves a folder; `with FileServer(folder) as server: server.url`.

    requests: the paths asked for. cuts: how often the answer to a path breaks off in the middle. ranges: whether it can send a
    part of a file, which Python's own server can't. lists: whether folders can be listed.
    """

    def __init__(self, folder: Path, ranges: bool = False, lists: bool = True):
        self.requests: list[str] = []
        self.cuts: dict[str, int] = {}
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                if outer.cuts.get(self.path, 0) > 0:
                    outer.cuts[self.path] -= 1
                    return self.send(0.5)
                path = Path(self.translate_path(self.path))
                return self.send(1.0) if ranges and path.is_file() else super().do_GET()

            def send(self, share):
                data = Path(self.translate_path(self.path)).read_bytes()
                first, last = 0, len(data) - 1
                asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
                if asked and ranges:
                    first, last = int(asked[1]), min(int(asked[2] or last), last)
                self.send_response(206 if asked and ranges else 200)
                if ranges:
                    self.send_header('Accept-Ranges', 'bytes')
                    self.send_header('Content-Range', f'bytes {first}-{last}/{len(data)}')
                self.send_header('Content-Length', str(last + 1 - first))
                self.end_headers()
                self.wfile.write(data[first : first + int(share * (last + 1 - first))])
                self.close_connection = True

            def list_directory(self, path):
                if lists:
                    return super().list_directory(path)
                return self.send_error(403)

            def log_message(self, *_):
                pass

        handler = partial(Handler, directory=str(folder))
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Return the address of the folder."""
        return f'http://127.0.0.1:{self._server.server_port}'

    def __enter__(self) -> 'FileServer':
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
