"""What a manifest holds, and what is refused; that the engine refuses it too is in test/engine/test_bundle.py."""

import dataclasses
import json
import subprocess
import sys

import pytest

from engine import bundles
from mose_ros.core.bundle import GRAPHS, MANIFEST, TOKENIZER, BundleError, Manifest


@pytest.fixture
def folder(tmp_path):
    """Return a folder whose files stand for those of a bundle: a manifest knows nothing of what is in them."""
    folder = tmp_path / 'some'
    folder.mkdir()
    for name in [*(f'{graph}.onnx' for graph in GRAPHS), TOKENIZER]:
        (folder / name).write_text(f'this is {name}')
    return folder


def edit(folder, change):
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_manifest_is_read_as_it_was_written(folder):
    manifest = bundles.make_manifest(quality={'success': 0.5}, commit='abc')
    manifest.save(folder)
    loaded = Manifest.load(folder)
    assert set(loaded.files) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert dataclasses.replace(loaded, files={}) == manifest
    assert not list(folder.glob('*.partial'))


WRITE_ON_A_FULL_DISK = """
import resource, sys
from mose_ros.core.bundle import Manifest
manifest = Manifest.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as `ulimit -f`
manifest.write(sys.argv[1])
"""


def test_a_full_disk_leaves_the_old_manifest_whole(folder):
    bundles.make_manifest().save(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = [sys.executable, '-c', WRITE_ON_A_FULL_DISK, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert 'File too large' in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_sizes_follow_from_the_fields():
    manifest = bundles.make_manifest(view_width=224, view_height=112)
    assert manifest.grid == (4, 8)
    assert manifest.tokens_per_view == 32
    assert manifest.horizon == 15


def test_normalizers_have_the_bounds_of_the_fields():
    manifest = bundles.make_manifest()
    assert manifest.action_normalizer().high.tolist() == [[bundles.REACH] * 2] * 15
    assert manifest.proprio_normalizer().low.tolist() == manifest.proprio_low


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('cameras', ['front', 'front']),
        ('anchor', 'roof'),
        ('fixed_views', ['front', 'roof']),
        ('top_k', 6),
        ('top_k', 0.5),
        ('view_width', 60),
        ('view_width', 56.0),
        ('view_frames', 0),
        ('frame_gap', 0.0),
        ('history', 'front'),
        ('precision', 'bfloat16'),
        ('storage', 'float8'),
        ('std', [0.0, 1.0, 1.0]),
        ('mean', [0.5]),
        ('levels', {}),
        ('levels', {'perception': []}),
        ('dt', -0.2),
        ('num_steps', 0),
        ('max_new_tokens', 0),
        ('noise', [[0.0, 0.0]]),
        ('noise', [[0.0, float('nan')]] * 15),
        ('action_high', [[-bundles.REACH, -bundles.REACH]] * 15),
        ('proprio', ['speed']),
        ('proprio', list(reversed(bundles.make_manifest().proprio))),
        ('proprio_high', [1.0]),
        ('num_layers', '2'),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_by_field(folder, field, value):
    bundles.make_manifest().save(folder)
    edit(folder, lambda data: data.update({field: value}))
    with pytest.raises(BundleError, match=f'{field}|a value has the wrong type'):
        Manifest.load(folder)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda data: data.pop('dt'), 'lacks dt'),
        (lambda data: data.update(colour='red'), 'unknown colour'),
        (lambda data: data.update(format_version=99), 'format version 99'),
        (lambda data: data.pop('format_version'), 'format version None'),
        (lambda data: data['files'].pop('action.onnx'), 'does not list action.onnx'),
        (lambda data: data.update(files=['action.onnx']), 'wrong type'),
        (lambda data: data.update(files={'action.onnx': 3}), 'files'),
        (lambda data: data.update(levels=['perception']), 'wrong type'),
        (lambda data: data.update(mean=None), 'mean|wrong type'),
        (lambda data: data.update(action_low=[[0.0, 1.0], [0.0]]), 'wrong type'),
        (lambda data: data['files'].update({'../secret': '0' * 64}), 'outside the bundle'),
        (lambda data: data['files'].update({'gone.bin': '0' * 64}), 'gone.bin is missing'),
        (lambda data: data['files'].update({TOKENIZER: '0' * 64}), f'{TOKENIZER} has changed'),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(folder, change, message):
    bundles.make_manifest().save(folder)
    edit(folder, change)
    with pytest.raises(BundleError, match=message):
        Manifest.load(folder)


@pytest.mark.parametrize('content', [b'', b'{"name": ', b'[1, 2]', b'\xff\xfe', b'null'])
def test_what_is_no_manifest_is_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=MANIFEST):
        Manifest.load(folder)


def test_a_changed_file_is_found_unless_nobody_looks(folder):
    bundles.make_manifest().save(folder)
    (folder / 'vision.onnx').write_text('this is something else')
    Manifest.load(folder, verify=False)
    with pytest.raises(BundleError, match='vision.onnx has changed'):
        Manifest.load(folder)


def test_numbers_that_are_not_finite_are_not_written(folder):
    with pytest.raises(ValueError):
        bundles.make_manifest(quality={'loss': float('nan')}).save(folder)
    assert not (folder / MANIFEST).exists()
