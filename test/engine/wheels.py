"""Wheels that tests look into but nobody installs or ships: kept in the user's cache, each in a folder of its own."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@functools.cache
def unpacked(package: str, version: str) -> Path:
    """Return the folder of an unpacked wheel; skips the test where it can be had neither from the cache nor by pip."""
    cache = (
        Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mose_ros' / 'wheels'
    )
    python = f'cp{sys.version_info.major}{sys.version_info.minor}'
    folder = cache / f'{package}-{version}-{python}'
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache))
    except OSError as error:
        pytest.skip(f'no place for the wheel of {package}: {error}')
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target']
    options = ['--only-binary=:all:', '--no-compile', '--retries=0', '--timeout=15']
    try:
        done = subprocess.run(
            [*command, str(partial), *options, f'{package}=={version}'],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            pytest.skip(f'{package} {version} cannot be had: {done.stderr.strip()[-200:]}')
        if not folder.exists():
            partial.rename(folder)
    except (subprocess.TimeoutExpired, OSError) as error:
        pytest.skip(f'{package} {version} cannot be had: {error}')
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def compiler() -> str:
    """Return gcc; skips the test where there is none."""
    found = shutil.which('gcc')
    if not found:
        pytest.skip('there is no gcc')
    return found
