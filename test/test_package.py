"""The package as colcon, pip and make see it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def clean_copy(folder: Path) -> Path:
    """Copy what git tracks, as a clone would have it."""
    names = subprocess.run(
        ['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, names.stdout.split('\0')):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_colcon_builds_an_ament_python_package(tmp_path):
    pytest.importorskip('colcon_core', reason='colcon is not installed: pip install -e ".[build]"')
    clean_copy(tmp_path / 'src' / 'mose_ros')
    environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    build = [sys.executable, '-m', 'colcon', 'build', '--event-handlers', 'console_direct+']
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    prefix = tmp_path / 'install' / 'mose_ros'
    share = prefix / 'share' / 'mose_ros'
    for wanted in [
        'package.xml',
        'launch/drive.launch.py',
        'config/skills.yaml',
        'config/drive.yaml',
    ]:
        assert (share / wanted).is_file(), f'{wanted} is not in share'
    for manifest in (ROOT / 'models').glob('*/manifest.json'):
        assert (share / 'models' / manifest.parent.name / 'manifest.json').is_file()
    assert (prefix / 'share/ament_index/resource_index/packages/mose_ros').is_file()
    assert (prefix / 'lib/mose_ros/driver').is_file(), 'ros2 run finds executables here'
    assert 'ament' in (share / 'package.sh').read_text() or (share / 'local_setup.sh').is_file()


def run_environment(path: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {'PATH': path, 'HOME': '/nonexistent', **variables}
    script = [str(ROOT / 'scripts/environment.sh'), 'drive']
    return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)


def tools(folder: Path, *names: str, **scripts: str) -> str:
    """Make a folder of links to some of the system's tools, and of scripts that stand in for others."""
    folder.mkdir()
    for name in names:
        os.symlink(shutil.which(name), folder / name)
    for name, text in scripts.items():
        (folder / name).write_text(f'#!/bin/bash\n{text}\n')
        (folder / name).chmod(0o755)
    return str(folder)


COMMON = ('bash', 'env', 'dirname', 'cat', 'sha256sum', 'cut', 'grep', 'rm', 'ldconfig')


def test_environment_names_the_machine_that_cannot_run_the_simulator(tmp_path):
    path = tools(
        tmp_path / 'bin',
        *COMMON,
        uname='[ $1 = -s ] && echo Linux || echo aarch64',
        id='echo 1000',
    )
    done = run_environment(path, VENV=str(tmp_path / 'venv'))
    assert (
        done.returncode == 1 and 'Linux on aarch64' in done.stderr and 'ros2 launch' in done.stderr
    )


def test_environment_says_which_python_it_needs(tmp_path):
    scripts = {'uname': '[ $1 = -s ] && echo Linux || echo x86_64', 'id': 'echo 1000'}
    scripts |= {'python3': 'exit 1', 'ldconfig': 'echo none'}
    path = (
        tools(tmp_path / 'bin', *COMMON[:-1], 'apt-get', **scripts)
        if shutil.which('apt-get')
        else ''
    )
    done = run_environment(path, VENV=str(tmp_path / 'venv'))
    assert (
        done.returncode == 1 and 'needs Python 3.10 or 3.11' in done.stderr and 'uv' in done.stderr
    )
    assert not (tmp_path / 'venv').exists()
