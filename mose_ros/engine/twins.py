"""Networks of a bundle's shape that are made for a measurement, by a process that has PyTorch; kept, so that each is made once."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mose_ros.core.bundle import MANIFEST, sha256
from mose_ros.engine.bundle import Bundle

MAKER = 'mose_ros.training.twin'
DENSE = ('--set', 'mose.routing=none')
TOKENS = 8  # experts of a token mixture
TOKEN = ('--set', 'mose.routing=token', '--set', f'mose.token_experts={TOKENS}')


def default_folder() -> Path:
    """Return the user's folder for twins."""
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(cache) / 'mose_ros' / 'twins'


def made(bundle: Bundle, folder: Path, changes: Sequence[str] = ()) -> Path:
    """Return the folder with the twin's `bundle` and `checkpoint`, made now if need be; ValueError where that fails.

    changes: the maker's options, as `--layers 3`.
    """
    key = hashlib.sha256(' '.join([sha256(bundle.folder / MANIFEST), *changes]).encode())
    words = '-'.join(one.lstrip('-').replace('/', '_') for one in changes if one != '--set')
    out = folder / f'{words or "same"}-{key.hexdigest()[:8]}'
    command = [sys.executable, '-m', MAKER, str(bundle.folder), str(out), *changes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = '\n'.join(done.stderr.strip().splitlines()[-4:])
        raise ValueError(
            f'{" ".join(command[1:])} failed with status {done.returncode}; it needs the extra '
            f'mose_ros[train]. Its last words:\n{last}'
        )
    return out


def opened(bundle: Bundle, folder: Path, changes: Sequence[str] = ()) -> Bundle:
    """Return a twin's bundle, to be run as the other is."""
    own = Bundle.open(
        made(bundle, folder, changes) / 'bundle', backend=bundle.backend, threads=bundle.threads
    )
    return replace(own, engines=bundle.engines, workspace=bundle.workspace)
