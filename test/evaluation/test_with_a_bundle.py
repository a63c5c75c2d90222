"""Both verbs with a real bundle on ONNX Runtime, whose answers are known (see test/engine/bundles.py)."""

import json

import pytest

from mose_ros.core.bundle import MANIFEST
from mose_ros.evaluation.__main__ import main
from test.engine.bundles import make_bundle


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp('bundles') / 'known')


def test_a_bundle_drives_in_lock_step(bundle, tmp_path):
    arguments = ['--families', 'emergency_brake', '--seeds', '20003', '--policies', 'bundle']

    assert (
        main(['closed-loop', str(bundle), *arguments, '--json', str(tmp_path / 'out.json')]) == 0
    )

    result = json.loads((tmp_path / 'out.json').read_text())
    (route,) = result['policies']['bundle']['routes']
    assert route['status'] and route['seconds'] > 1 and route['plan_ms']['p50'] > 0
    assert len(result['bundle']['manifest_sha256']) == 64


def test_a_bundle_is_heard(bundle, tmp_path):
    arguments = ['--families', 'normal', '--seeds', '21000', '--frames', '3']

    assert main(['language', str(bundle), *arguments, '--json', str(tmp_path / 'out.json')]) == 0

    result = json.loads((tmp_path / 'out.json').read_text())
    assert result['frames'] == 3 and len(result['examples']) == 3
    assert (
        'drive' in result['examples'][0]['generated']
        or 'stop' in result['examples'][0]['generated']
    )
    assert result['f1']['perception'] < 1.0  # it knows nothing of our words


def test_a_changed_bundle_is_refused(bundle, tmp_path, capsys):
    broken = tmp_path / 'broken'
    broken.mkdir()
    for path in bundle.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    graph = bytearray((broken / 'decode.onnx').read_bytes())
    graph[50] ^= 1
    (broken / 'decode.onnx').write_bytes(graph)

    for verb in ('closed-loop', 'language'):
        assert main([verb, str(broken)]) == 2
        assert 'decode.onnx has changed' in capsys.readouterr().err
    assert (broken / MANIFEST).is_file()
