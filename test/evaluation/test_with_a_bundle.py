"""Both verbs with a real bundle on ONNX Runtime, whose answers are known (see test/engine/bundles.py)."""

import json
from dataclasses import replace

import pytest

from mose_ros.core.bundle import MANIFEST, Manifest
from mose_ros.evaluation.__main__ import main
from test.engine.bundles import make_bundle


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp('bundles') / 'known')


def test_a_bundle_drives_in_lock_step(bundle, tmp_path):
    arguments = ['--families', 'emergency_brake', '--seeds', '20003', '--policies', 'bundle']

    before = Manifest.load(bundle)
    (bundle / 'notes.txt').write_text('not listed in the manifest')
    arguments += ['--record', '--json', str(tmp_path / 'out.json')]

    assert main(['closed-loop', str(bundle), *arguments]) == 0

    result = json.loads((tmp_path / 'out.json').read_text())
    after = Manifest.load(bundle)
    recorded = after.quality['closed_loop']
    assert replace(after, quality=before.quality) == before != after
    assert recorded['seeds'] == '20003' and recorded['command'].startswith(
        f'python -m mose_ros.evaluation closed-loop {bundle} --families emergency_brake'
    )
    rate = result['policies']['bundle']['success_rate']
    assert recorded['policies']['bundle'] == {
        'success_rate': rate,
        'driving_score': round(result['policies']['bundle']['driving_score'], 2),
        'routes': 1,
        'families': {'emergency_brake': rate},
    }
    (route,) = result['policies']['bundle']['routes']
    assert route['status'] and route['seconds'] > 1 and route['plan_ms']['p50'] > 0
    assert len(result['bundle']['manifest_sha256']) == 64


def test_a_bundle_is_heard(bundle, tmp_path):
    arguments = ['--families', 'normal', '--seeds', '21000', '--frames', '3']

    quality = Manifest.load(bundle).quality
    arguments += ['--record', '--json', str(tmp_path / 'out.json')]

    assert main(['language', str(bundle), *arguments]) == 0

    result = json.loads((tmp_path / 'out.json').read_text())
    after = Manifest.load(bundle).quality
    recorded = after['language']
    assert {name: after[name] for name in quality if name != 'language'} == quality
    assert recorded['f1']['perception'] == round(result['f1']['perception'], 4)
    assert set(recorded['router_accuracy']) == {'view', *result['skill_routers'], 'action'}
    assert (recorded['frames'], recorded['seeds']) == (3, '21000')
    assert result['frames'] == 3 and len(result['examples']) == 3
    assert (
        'drive' in result['examples'][0]['generated']
        or 'stop' in result['examples'][0]['generated']
    )
    assert result['f1']['perception'] < 1.0  # it knows nothing of our words


def test_figures_without_the_bundle_are_not_recorded(bundle, capsys):
    before = (bundle / MANIFEST).read_bytes()

    assert main(['closed-loop', str(bundle), '--policies', 'expert', '--record']) == 2

    assert 'add it to --policies' in capsys.readouterr().err
    assert (bundle / MANIFEST).read_bytes() == before


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
