"""`make drive` as its user sees it: one real drive, one real video, and what happens to bad arguments."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.bundles import make_bundle
from mose_ros.core.types import Trajectory
from mose_ros.nodes import film

KEYS = 'plans plan_rate_hz plan_latency_ms deadline_misses route_completion infractions reasoning_count'


def drive(*arguments, **options):
    environment = {key: value for key, value in os.environ.items() if key != 'ROS_DOMAIN_ID'}
    environment['PYTHONPATH'] = str(Path(__file__).parents[2])
    command = [sys.executable, '-m', 'mose_ros.nodes.drive', *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def children(pid):
    listed = subprocess.run(
        ['ps', '-e', '-o', 'pid=,ppid='], capture_output=True, text=True
    ).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return [child for child, parent in pairs if parent == pid]


def test_a_drive_is_shown_measured_filmed_and_leaves_nothing_behind(bundle, tmp_path):
    pytest.importorskip(
        'metadrive', reason='the simulator is not installed: pip install -e ".[sim]"'
    )
    out, video = tmp_path / 'out.json', tmp_path / 'out.mp4'
    running = drive(
        '--bundle', bundle, '--family', 'normal', '--seed', 3, '--json', out, '--video', video
    )
    lines, nodes = [], []
    for line in running.stdout:
        lines.append(line)
        nodes = nodes or children(running.pid)
        if ' m/s ' in line and sum(' m/s ' in one for one in lines) == 4:
            running.send_signal(signal.SIGINT)  # Ctrl-C, once
    assert running.wait(20) == 0, running.stderr.read()
    assert len(nodes) == 4
    assert not any(os.path.exists(f'/proc/{pid}') for pid in nodes)
    text = ''.join(lines)
    assert 'driving after' in text and ' > ' in text and 'front+' in text and 'interrupted' in text

    result = json.loads(out.read_text())
    assert set(KEYS.split()) <= result.keys()
    assert result['frames'] >= result['plans'] >= 5 and result['plan_rate_hz'] > 0
    assert 0 < result['plan_latency_ms']['p50'] <= result['plan_latency_ms']['p99']
    assert result['reasoning_count'] >= 1 and result['memory_mb']['max'] < 2000
    assert set(result['memory_mb']['processes']) == {
        'simulator',
        'view_router',
        'driver',
        'controller',
        'drive',
    }
    reader = cv2.VideoCapture(str(video))
    assert reader.get(cv2.CAP_PROP_FRAME_COUNT) >= 10
    is_there, frame = reader.read()
    assert is_there and frame.shape == (720, 1280, 3) and frame.std() > 10


def test_a_recording_drives_the_front_camera_and_the_others_are_masked(bundle, tmp_path):
    folder, out = tmp_path / 'frames', tmp_path / 'out.json'
    folder.mkdir()
    for index in range(40):
        cv2.imwrite(str(folder / f'{index:03}.png'), np.full((90, 160, 3), 5 * index, np.uint8))
    running = drive('--bundle', bundle, '--frames', folder, '--json', out)
    text, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    result = json.loads(out.read_text())
    assert result['status'] == 'Completed' and result['frames'] >= result['plans'] >= 10
    assert list(result['views']) == ['front']


def test_a_node_that_dies_is_started_again_and_the_drive_goes_on(bundle, tmp_path):
    folder, out = tmp_path / 'frames', tmp_path / 'out.json'
    folder.mkdir()
    for index in range(600):
        cv2.imwrite(str(folder / f'{index:03}.png'), np.full((45, 80, 3), index % 200, np.uint8))
    running = drive('--bundle', bundle, '--frames', folder, '--json', out)
    dead, came_back, is_told = 0, 0, False
    for line in running.stdout:
        if ' m/s ' in line and not dead:
            [dead] = [pid for pid in children(running.pid) if 'driver_node' in command_of(pid)]
            os.kill(dead, signal.SIGKILL)
        came_back += 'driver ended with -9 and is started again' in line
        nodes = [pid for pid in children(running.pid) if 'driver_node' in command_of(pid)]
        if came_back and nodes and nodes != [dead] and not is_told:
            running.send_signal(signal.SIGINT)
            is_told = True
    assert running.wait(20) == 0, running.stderr.read()
    assert came_back == 1 and json.loads(out.read_text())['revived'] == {'driver': 1}


def command_of(pid):
    return Path(f'/proc/{pid}/cmdline').read_text() if os.path.exists(f'/proc/{pid}') else ''


def changed_byte(folder):
    made = make_bundle(folder)
    data = bytearray((made / 'action.onnx').read_bytes())
    data[30] ^= 1
    (made / 'action.onnx').write_bytes(bytes(data))
    return made


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--family', 'flying'], "unknown family 'flying'; choose one of normal"),
        (['--seed', 'x'], "seed 'x' is not an integer"),
        (['--seed', '-1'], 'is not an integer'),
        (['--bundle', 'nowhere'], 'is no bundle'),
        (['--bundle', changed_byte], 'has changed'),
        (['--frames', 'nowhere.mp4'], 'does not exist'),
        (['--json', 'nowhere/out.json'], 'folder'),
        (['--duration', 'nan'], 'not a number of seconds'),
        (['--video', 'film.avi'], '.mp4'),
        (['--speed', '3'], 'unrecognized arguments: --speed'),
        (['--domain', '900'], 'not in 0..232'),
    ],
)
def test_bad_arguments_are_named_before_anything_starts(bundle, tmp_path, arguments, words):
    arguments = [one(tmp_path / 'bundle') if callable(one) else one for one in arguments]
    base = [] if '--bundle' in arguments else ['--bundle', bundle]
    running = drive(*base, *arguments, cwd=tmp_path)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 2 and words in errors
    assert 'Traceback' not in errors


def test_an_unknown_parameter_ends_the_drive_with_its_name(bundle, tmp_path):
    file = tmp_path / 'p.yaml'
    file.write_text('/**/driver:\n  ros__parameters:\n    reasonning: false\n')
    running = drive('--bundle', bundle, '--params-file', file, '--frames', a_picture(tmp_path))
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "unknown parameter 'reasonning'; did you mean 'reasoning'?" in errors


def a_picture(folder):
    cv2.imwrite(str(folder / '0.png'), np.zeros((90, 160, 3), np.uint8))
    return folder


def test_the_film_paints_the_trajectory_onto_the_road():
    picture = np.full((144, 256, 3), 100, np.uint8)
    ahead = Trajectory(time=0.0, dt=0.2, xy=np.array([[2.0 * (k + 1), 0.0] for k in range(10)]))
    shot = film.Shot(pictures={'front': picture}, views=('front',), trajectory=ahead)
    plain = film.Shot(pictures={'front': picture}, views=('front',))
    changed = (film.draw(shot) != film.draw(plain)).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert changed.any() and abs(np.mean(columns) - (16 + 768 / 2)) < 4  # it leads straight ahead
    assert rows.min() > 56 + 432 / 2  # below the horizon


def test_the_film_projects_the_ground_as_the_camera_sees_it():
    straight, left = film.project(np.array([[10.8, 0.0], [10.8, 1.0]]), 256, 144)
    focal = 128 / np.tan(np.deg2rad(35))
    assert straight == pytest.approx([128, 72 + 1.6 * focal / 10])
    assert left == pytest.approx([128 - focal / 10, 72 + 1.6 * focal / 10])
    assert np.isnan(film.project(np.array([[-5.0, 0.0]]), 256, 144)).all()
