"""The engine refuses a bundle that is not what its manifest or the contract says."""

import json
import subprocess
import sys

import onnx
import pytest

from engine import bundles
from mose_ros.core.bundle import BundleError, sha256
from mose_ros.core.prompt import word_tokenizer
from mose_ros.engine import scenery
from mose_ros.engine.bundle import Bundle, contract
from mose_ros.engine.policy import Policy


@pytest.fixture
def folder(tmp_path):
    return bundles.make_bundle(tmp_path / 'known')


def edit_manifest(folder, **changes):
    path = folder / 'manifest.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rehash(folder):
    """Make the manifest agree with the files as they are now."""
    bundles.make_manifest().save(folder)


def test_a_whole_bundle_opens(folder):
    bundle = Bundle.open(folder, threads=1)
    assert bundle.backend == 'onnxruntime'
    for graph in contract(bundle.manifest):
        bundle.session(graph)


@pytest.mark.parametrize('name', ['decode.onnx', 'weights.bin', 'tokenizer.json'])
def test_a_changed_byte_is_refused(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=f'{name} has changed'):
        Policy.load(folder)


def test_a_missing_file_is_refused(folder):
    (folder / 'action.onnx').unlink()
    with pytest.raises(BundleError, match='action.onnx is missing'):
        Policy.load(folder)


def test_a_folder_that_is_no_bundle_names_those_beside_it(folder):
    with pytest.raises(BundleError, match='other is no bundle.*beside it there are: known'):
        Policy.load(folder.parent / 'other')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'format_version': 1}, 'format version 1, this engine reads 2'),
        ({'lidar': True}, 'unknown lidar'),
        ({'files': {}}, 'does not list view_router.onnx'),
    ],
)
def test_a_manifest_from_elsewhere_is_refused(folder, changes, message):
    edit_manifest(folder, **changes)
    with pytest.raises(BundleError, match=message):
        Policy.load(folder)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'view_width': 84}, 'vision.*views is uint8'),
        ({'top_k': 0, 'cameras': ['front']}, 'thumbnails is float32'),
        ({'head_dim': 8}, 'past_k is float32'),
        ({'vocab_size': 200}, 'logits is float32'),
        ({'levels': {'perception': ['general']}}, 'skill_override is int64'),
        ({'action_skills': ['normal']}, 'skill_scores is float32'),
    ],
)
def test_graphs_that_the_manifest_does_not_describe_are_refused(folder, changes, message):
    bundles.make_manifest(**changes).save(folder)
    with pytest.raises(BundleError, match=message):
        Policy.load(folder)


@pytest.mark.parametrize(
    'text', ['', '{"name": "known"', '[' * 100_000, '[]', '\0\0\0\0', '<html>404</html>']
)
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / 'manifest.json').write_text(text)
    with pytest.raises(BundleError, match='manifest.json .*; fetch or export the bundle again'):
        Policy.load(folder)


AS_ON_THE_VEHICLE = """
import json, pathlib, sys
from mose_ros.core.bundle import BundleError, Manifest
path, refused = pathlib.Path(sys.argv[1]), []
good = json.loads(path.read_text())
for name in good:
    for value in [None, 5, 0, -1.5, 'front', [], ['front', 'front'], {'a': 1}, [[[]]], 1e300]:
        path.write_text(json.dumps(good | {name: value}))
        try: Manifest.load(path.parent)
        except BundleError: refused.append(name)
print(*sorted(set(good) - set(refused)))
"""


def test_whatever_a_field_of_the_manifest_holds_it_is_taken_or_refused(folder):
    """Any other error is a bug. Where annotations are checked, as in tests, they would answer in place of our checks."""
    command = [sys.executable, '-c', AS_ON_THE_VEHICLE, str(folder / 'manifest.json')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken = done.stdout.split()
    assert 'name' in taken and not {'cameras', 'levels', 'noise', 'files', 'anchor'} & set(taken)


def test_running_a_bundle_writes_nothing(folder):
    def files():
        return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}

    before = files()
    policy = Policy.load(folder, threads=1)
    policy.plan(scenery.grey(policy.manifest))
    assert list(policy.reason())
    assert files() == before


def test_a_graph_without_an_input_of_the_contract_is_refused(folder):
    model = onnx.load(folder / 'view_router.onnx')
    model.graph.input.pop()  # proprio
    onnx.save(model, folder / 'view_router.onnx')
    rehash(folder)
    with pytest.raises(BundleError, match='view_router.onnx: input proprio is missing'):
        Policy.load(folder)


def test_a_graph_with_a_fixed_number_of_views_is_refused(folder):
    model = onnx.load(folder / 'vision.onnx')
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, folder / 'vision.onnx')
    rehash(folder)
    with pytest.raises(BundleError, match=r'views is uint8 \(2, 2, 28, 56, 3\), not .*\(any, 2'):
        Policy.load(folder)


def test_a_tokenizer_with_more_tokens_than_the_graphs_is_refused(folder):
    word_tokenizer([f'word{n}' for n in range(200)]).save(str(folder / 'tokenizer.json'))
    rehash(folder)
    with pytest.raises(BundleError, match='tokens, the graphs know'):
        Policy.load(folder)


def test_hashes_are_those_of_the_files(folder):
    listed = json.loads((folder / 'manifest.json').read_text())['files']
    assert {name: sha256(folder / name) for name in listed} == listed
    assert set(listed) == {path.name for path in folder.iterdir()} - {'manifest.json'}
