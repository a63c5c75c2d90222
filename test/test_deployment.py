"""What goes onto a vehicle, as far as it can be checked without one: images, unit, parameters and dependencies."""

import ast
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from mose_ros.engine.engine_cache import VARIABLE

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / 'docker/Dockerfile'
UNIT = ROOT / 'config/systemd/mose_ros.service'
# of ros/rosdistro (rosdep/python.yaml, August 2026) and of its humble, jazzy and kilted distributions
KEYS = {
    'python3-numpy',
    'python3-onnxruntime-pip',
    'python3-opencv',
    'python3-pytest',
    'python3-yaml',
}
PACKAGES = {
    'ament_index_python',
    'launch',
    'launch_ros',
    'rclpy',
    'ros2bag',
    'ros2launch',
    'rviz2',
}
OPTIONAL = {'carla_msgs'}  # no distribution has it
WITHOUT_KEY = {'jaxtyping', 'tokenizers'}


def instructions():
    """Return the Dockerfile as pairs of instruction and argument, continued lines joined."""
    text = re.sub(r'^\s*#.*\n', '', DOCKERFILE.read_text(), flags=re.M).replace('\\\n', ' ')
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def services():
    return yaml.safe_load((ROOT / 'docker/compose.yaml').read_text())['services']


# ---- images ----


def test_every_source_that_is_copied_exists_and_reaches_the_daemon():
    copied = [words.split() for name, words in instructions() if name == 'COPY']
    sources = [source for *many, _ in copied for source in many]
    assert {'mose_ros', 'launch', 'config', 'models', 'resource', 'package.xml'} <= set(sources)
    allowed = (ROOT / '.dockerignore').read_text().split()
    assert allowed[0] == '*'
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f'!{source.split("/")[0]}' in allowed, f'.dockerignore keeps {source} out'


def test_all_that_setup_installs_is_copied():
    tree = ast.parse((ROOT / 'setup.py').read_text())
    shared = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'share'
    }
    copied = ' '.join(words for name, words in instructions() if name == 'COPY')
    assert shared and all(f'COPY {one} ' in f'COPY {copied} ' or one in copied for one in shared)


def test_each_image_has_a_pinned_base_and_a_known_distribution():
    images = services()
    assert images.keys() == {'orin6', 'orin7', 'desktop'}
    for name, service in images.items():
        arguments = service['build']['args']
        image, _, tag = arguments['BASE'].rpartition(':')
        assert image and tag and tag != 'latest', name
        assert arguments['ROS_DISTRO'] in ('humble', 'jazzy')
        assert (
            service['user'] == arguments['MOSE_UID']
        )  # else shared memory, home and cache are another's
        assert (ROOT / 'docker' / service['build']['context']).resolve() == ROOT
        assert service['ipc'] == service['network_mode'] == 'host'
    assert images['orin6']['build']['args']['ROS_DISTRO'] == 'humble'
    assert 'l4t' in images['orin6']['build']['args']['BASE']
    declared = {words.split('=')[0] for name, words in instructions() if name == 'ARG'}
    assert {'BASE', 'ROS_DISTRO', 'MOSE_UID'} <= declared


def test_the_dockerfile_keeps_the_rules_that_hadolint_knows():
    parts = instructions()
    for name, words in parts:
        if name == 'RUN' and 'apt-get install' in words:
            assert 'apt-get update' in words and 'rm -rf' in words, 'lists in the layer'
            assert '-y --no-install-recommends' in words
        assert 'sudo' not in words and not words.startswith('cd ')
        if name == 'RUN' and 'pip install' in words:
            assert '--no-cache-dir' in words and '--constraint' in words
    names = [name for name, _ in parts]
    assert 'ADD' not in names and names.count('CMD') == names.count('ENTRYPOINT') == 1
    assert ('SHELL', '["/bin/bash", "-o", "pipefail", "-c"]') in parts
    assert names.index('USER') < names.index('CMD')  # not as root


def test_the_vehicles_python_packages_are_pinned_and_one_numpy_serves_all():
    pins = dict(
        line.split('==')
        for line in (ROOT / 'docker/constraints.txt').read_text().splitlines()
        if not line.startswith('#')
    )
    [wanted] = [words for name, words in instructions() if 'pip install' in words]
    asked = wanted.split('constraints.txt')[1].split()
    assert sorted(pins) == sorted(asked) and pins['numpy'].startswith('1.')
    assert pins.keys() >= WITHOUT_KEY


def test_commands_name_a_launch_file_its_arguments_and_files_that_exist():
    tree = ast.parse((ROOT / 'launch/drive.launch.py').read_text())
    [arguments] = [
        {key.value for key in node.value.keys}
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'ARGUMENTS'
    ]
    commands = [service['command'] for service in services().values()]
    commands.append(re.search(r'^ExecStart=.* exec (.*)\'$', UNIT.read_text(), re.M)[1])
    commands += [' '.join(ast.literal_eval(w)) for name, w in instructions() if name == 'CMD']
    for command in commands:
        assert command.startswith('ros2 launch mose_ros drive.launch.py platform:=vehicle')
        assert {word.split(':=')[0] for word in command.split()[4:]} <= arguments
    assert (ROOT / 'config/vehicle_orin.yaml').is_file()


@pytest.mark.skipif(not shutil.which('bash'), reason='there is no bash')
def test_the_entrypoint_is_a_script_that_bash_reads():
    script = ROOT / 'docker/entrypoint.sh'
    assert script.read_text().startswith('#!/bin/bash\n') and script.stat().st_mode & 0o111
    subprocess.run(['bash', '-n', str(script)], check=True)


# ---- systemd ----


def test_the_unit_comes_back_whatever_happens():
    lines = dict(
        line.split('=', 1) for line in UNIT.read_text().splitlines() if re.match(r'\w+=', line)
    )
    assert lines['Restart'] == 'always' and lines['StartLimitIntervalSec'] == '0'
    assert lines['KillSignal'] == 'SIGINT' and int(lines['LimitNOFILE']) >= 1024
    assert lines['WantedBy'] == 'multi-user.target' and lines['User'] != 'root'


def test_engines_are_built_where_the_user_may_write():
    [image] = [
        re.search(f'{VARIABLE}=(\\S+)', words)[1]
        for name, words in instructions()
        if name == 'ENV' and VARIABLE in words
    ]
    assert f'VOLUME {image}' in DOCKERFILE.read_text()
    assert all(f'engines:{image}' in service['volumes'] for service in services().values())
    unit = UNIT.read_text()
    cache = re.search(r'^CacheDirectory=(.*)$', unit, re.M)[1]
    assert f'Environment={VARIABLE}=/var/cache/{cache}\n' in unit


@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='systemd is not installed')
def test_systemd_reads_the_unit(tmp_path):
    def verify(path):
        return subprocess.run(['systemd-analyze', 'verify', str(path)], capture_output=True)

    done = verify(UNIT)
    if b'No such file' in done.stderr and b'bash' in done.stderr:
        pytest.skip('there is no /bin/bash')
    assert done.returncode == 0 and b'Unknown' not in done.stderr, done.stderr
    broken = tmp_path / 'mose_ros.service'
    broken.write_text(UNIT.read_text().replace('ExecStart=/bin/bash', 'ExecStart=bin/bash'))
    assert verify(broken).returncode or verify(broken).stderr


# ---- package.xml ----


def dependencies():
    return {
        one.text
        for one in ElementTree.parse(ROOT / 'package.xml').iter()
        if one.tag.endswith('depend')
    }


def imported():
    """Return the top packages that the vehicle's rooms and the launch file import."""
    files = [
        path
        for room in ('core', 'engine', 'nodes')
        for path in (ROOT / 'mose_ros' / room).glob('*.py')
    ]
    found = set()
    for path in [*files, ROOT / 'launch/drive.launch.py']:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.split('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split('.')[0])
    return found


def test_every_message_package_that_is_used_is_declared():
    used = {one for one in imported() if one.endswith(('_msgs', '_interfaces', '_srvs'))}
    assert len(used) > 8
    assert used - OPTIONAL <= dependencies()


def test_every_dependency_is_known_to_rosdep():
    messages = {one for one in dependencies() if one.endswith(('_msgs', '_interfaces', '_srvs'))}
    assert dependencies() - messages == KEYS | PACKAGES
    assert not dependencies() & (OPTIONAL | WITHOUT_KEY)


def test_the_package_is_valid_to_ros():
    packages = pytest.importorskip(
        'catkin_pkg.package', reason='catkin_pkg is not installed: pip install -e ".[build]"'
    )
    warnings = []
    package = packages.parse_package(str(ROOT / 'package.xml'), warnings=warnings)
    package.validate(warnings=warnings)
    assert package.name == 'mose_ros' and not warnings
