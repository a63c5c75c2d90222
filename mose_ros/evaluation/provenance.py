"""What a figure depends on: code, bundle, versions, machine; and finished parts of a run, kept while the same holds."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import mose_ros
from mose_ros.core.bundle import MANIFEST, sha256
from mose_ros.core.provenance import commit, machine, versions

_LOG = logging.getLogger(__name__)


class Store:
    """Finished routes on disk, one line each, so that a run that was cut off can go on; of one identity only."""

    def __init__(self, path: Path | None, identity: str):
        self._path, self.results = path, {}
        if path is None:
            return
        lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
        if lines and lines[0] == identity:
            for line in lines[1:]:
                try:
                    key, result = json.loads(line)
                except ValueError:
                    continue  # the line that was being written when the run was cut off
                self.results[key] = result
            _LOG.info('%d routes of an earlier run are kept (%s)', len(self.results), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        rest = [json.dumps([key, result]) for key, result in self.results.items()]
        path.write_text('\n'.join([identity, *rest]) + '\n', encoding='utf-8')

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Keep one result."""
        self.results[key] = result
        if self._path is not None:
            with self._path.open('a', encoding='utf-8') as file:
                file.write(json.dumps([key, result]) + '\n')

    def remove(self) -> None:
        """Forget the file: all is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def identity(bundle: str | None, *more: str) -> str:
    """Return a hash of all that a result depends on: the code, the bundle, and whatever else is named."""
    root, digest = Path(mose_ros.__file__).parent, hashlib.sha256(' '.join(more).encode())
    for room in ('core', 'sim', 'data', 'engine', 'evaluation'):
        for path in sorted((root / room).rglob('*.py')):
            digest.update(path.read_bytes())
    if bundle is not None:
        digest.update((Path(bundle) / MANIFEST).read_bytes())
    return digest.hexdigest()


def provenance(bundle: str | None) -> dict[str, Any]:
    """Return versions, commit, machine and the bundle's hash."""
    data = {'versions': versions(), 'commit': commit(), 'machine': machine()}
    if bundle is not None:
        data['bundle'] = {'folder': bundle, 'manifest_sha256': sha256(Path(bundle) / MANIFEST)}
    return data
