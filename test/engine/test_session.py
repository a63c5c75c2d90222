import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engine import bundles
from mose_ros.engine import session

VIEW = (2, 28, 56, 3)  # frames, rows, columns, colours


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return bundles.make_bundle(tmp_path_factory.mktemp('session') / 'known')


def test_a_session_takes_and_gives_named_arrays(folder):
    vision = session.open_session(folder / 'vision.onnx', threads=1)
    answer = vision.run({'views': np.full((3, *VIEW), 204, np.uint8)})
    assert list(answer) == ['embeds']
    np.testing.assert_allclose(answer['embeds'], np.full((3, 2, 8), (0.8 - 0.5) / 0.25), rtol=1e-4)
    assert vision.inputs['views'].shape == (None, *VIEW)


@pytest.mark.parametrize(
    ('inputs', 'message'),
    [
        ({}, 'lacks views'),
        ({'views': np.zeros((1, *VIEW), np.uint8), 'more': np.zeros(1)}, 'not know more'),
        ({'views': np.zeros((1, 2, 28, 55, 3), np.uint8)}, r'views must be .*56, 3.*55, 3'),
        ({'views': np.zeros(VIEW, np.uint8)}, r'views must be .*got uint8 \(2, 28, 56'),
        ({'views': np.zeros((1, *VIEW))}, 'views must be uint8.*got float64'),
    ],
)
def test_wrong_inputs_are_named(folder, inputs, message):
    with pytest.raises(ValueError, match=message):
        session.open_session(folder / 'vision.onnx', threads=1).run(inputs)


def test_a_slice_of_a_larger_array_is_taken_as_its_values(folder):
    vision = session.open_session(folder / 'vision.onnx', threads=1)
    roomy = np.random.default_rng(0).integers(0, 256, (4, 2, 40, 56, 3), np.uint8)
    part = roomy[1:3, :, 4:32]
    expected = vision.run({'views': part.copy()})['embeds']
    assert np.array_equal(vision.run({'views': part})['embeds'], expected)
    assert not np.array_equal(vision.run({'views': roomy[1:3, :, :28]})['embeds'], expected)


def test_a_cache_is_held_in_one_piece(folder):
    decode = session.open_session(folder / 'decode.onnx', threads=1)
    past = np.random.default_rng(0).random((2, 1, 1, 5, 4), np.float32)
    held = decode.hold('past_k', past[:, :, :, :4], past[:, :, :, 4:])
    assert np.array_equal(held, past) and held.flags.c_contiguous
    assert not np.array_equal(decode.hold('past_k', past[:, :, :, 1:], past[:, :, :, :1]), past)
    with pytest.raises(ValueError, match='past_k must be float32'):
        decode.hold('past_k', past.astype(np.float64))
    with pytest.raises(ValueError, match='skills has no dynamic axis to join along'):
        decode.hold('skills', np.zeros(3, np.int64), np.zeros(3, np.int64))


def test_memory_that_nobody_holds_is_used_again_and_what_is_held_never_changes(folder):
    vision = session.open_session(folder / 'vision.onnx', threads=1)

    def see(value):
        return vision.run({'views': np.full((3, *VIEW), value, np.uint8)})['embeds']

    def address(array):
        return array.__array_interface__['data'][0]

    see(0)  # the first run finds out what memory a run takes
    assert len({address(see(value)) for value in range(20)}) == 1  # nothing is allocated
    held = [see(value) for value in range(4)]
    assert len({address(one) for one in held}) == 4
    for value in range(20):
        see(value)
    means = [one.mean() for one in held]
    np.testing.assert_allclose(
        means, [(value / 255 - 0.5) / 0.25 for value in range(4)], rtol=1e-3
    )


def test_auto_says_what_it_takes(caplog):
    caplog.set_level('INFO')
    assert session.choose_backend('auto') == 'onnxruntime'
    assert 'onnxruntime' in caplog.text


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no backend 'openvino'; known: auto"):
        session.choose_backend('openvino')


def test_a_missing_provider_is_named_with_those_that_are_there(folder):
    with pytest.raises(session.BackendError, match="no provider 'ROCM', only .*CPU"):
        session.open_session(folder / 'vision.onnx', provider='ROCM')


@pytest.mark.parametrize(
    ('provider', 'options'),
    [('CUDA', {'use_tf32': '0', 'cudnn_conv_algo_search': 'HEURISTIC'}), ('CPU', {})],
)
def test_float32_is_float32_on_a_gpu_too(folder, monkeypatch, provider, options):
    """What is asked of ONNX Runtime: there is no GPU here."""
    given, opened = [], onnxruntime.InferenceSession

    def open_on_cpu(path, settings, providers, **rest):
        given.extend(providers)
        session = opened(path, settings, providers=['CPUExecutionProvider'], **rest)
        monkeypatch.setattr(session, 'get_providers', lambda: [name for name, _ in providers])
        return session

    monkeypatch.setattr(onnxruntime, 'InferenceSession', open_on_cpu)
    name = f'{provider}ExecutionProvider'
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: [name])
    session.open_session(folder / 'vision.onnx', backend='onnxruntime', provider=provider)
    assert given == [(name, options)]


def changed(folder, change):
    """Return the bytes of vision.onnx after a change of its model."""
    model = onnx.load(folder / 'vision.onnx')
    change(model)
    return model.SerializeToString()


def forget(model):
    model.graph.node[0].op_type = 'Telepathy'


DAMAGE = {  # what befalls files -> what is then said
    'empty': (lambda folder: b'', 'No graph was found|does not have a graph'),
    'truncated': (lambda folder: (folder / 'vision.onnx').read_bytes()[:100], 'parsing failed'),
    'foreign': (lambda folder: b'<html>404 Not Found</html>', 'parsing failed'),
    'future opset': (
        lambda folder: changed(folder, lambda m: setattr(m.opset_import[0], 'version', 99)),
        'Opset 99 is under development',
    ),
    'future format': (
        lambda folder: changed(folder, lambda m: setattr(m, 'ir_version', 99)),
        'Unsupported model IR version: 99',
    ),
    'unknown operator': (lambda folder: changed(folder, forget), 'Telepathy'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_graph_is_one_line_with_file_and_remedy(folder, tmp_path, damage, capfd):
    make, said = DAMAGE[damage]
    path = tmp_path / 'damaged.onnx'
    path.write_bytes(make(folder))
    with pytest.raises(session.BackendError) as error:
        session.open_session(path)
    message = str(error.value)
    assert message.startswith(f'{path} cannot be opened by onnxruntime ')
    # the words differ between onnxruntime 1.23 (the last on Python 3.10) and later ones
    assert any(words in message for words in said.split('|')) and '\n' not in message
    assert message.endswith('; fetch or export the bundle again, or install a newer onnxruntime')
    assert capfd.readouterr() == ('', '')  # once is enough


def test_weights_that_are_missing_or_truncated_are_named(folder, tmp_path):
    path = shutil.copy(folder / 'decode.onnx', tmp_path)
    with pytest.raises(session.BackendError, match='decode.onnx cannot be .*weights.bin'):
        session.open_session(path)
    weights = (folder / 'weights.bin').read_bytes()
    (tmp_path / 'weights.bin').write_bytes(weights[: len(weights) // 2])
    with pytest.raises(session.BackendError, match='decode.onnx cannot be .*export the bundle'):
        session.open_session(path)
    (tmp_path / 'weights.bin').write_bytes(weights)
    assert session.open_session(path).inputs.keys() == {
        *('input_ids', 'position_ids', 'past_k', 'past_v', 'skills')
    }


def test_a_graph_or_a_number_of_threads_that_is_not_there(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.onnx is missing'):
        session.open_session(tmp_path / 'nowhere.onnx')
    with pytest.raises(ValueError, match='threads must be at least 1, not 0'):
        session.open_session(folder / 'vision.onnx', threads=0)


# ---- out of memory ----


def save(path, node, inputs, outputs, initializers=()):
    graph = helper.make_graph(
        [helper.make_node(*node)],
        'graph',
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
        initializer=initializers,
    )
    opset = helper.make_opsetid('', 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_run_without_memory_says_so_and_the_next_one_answers(tmp_path):
    path = save(
        tmp_path / 'greedy.onnx',
        ('ConstantOfShape', ['size'], ['zeros']),
        [('size', TensorProto.INT64, [1])],
        [('zeros', TensorProto.FLOAT, ['n'])],
    )
    greedy = session.open_session(path, threads=1)
    with pytest.raises(session.BackendError) as error:
        greedy.run({'size': np.array([1 << 44])})
    assert f'{path} failed: no memory is left (Failed to allocate memory' in str(error.value)
    assert str(error.value).endswith(
        'stop other programs, or take fewer views or a smaller bundle'
    )
    assert greedy.run({'size': np.array([3])})['zeros'].tolist() == [0, 0, 0]


OPEN_IN_LITTLE_MEMORY = """
import resource, sys
from mose_ros.engine import session
import onnxruntime
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, 2 * (used + (64 << 20),))
try: session.open_session(sys.argv[1], threads=1)
except session.BackendError as error: sys.exit(f'error: {error}')
"""


@pytest.mark.parametrize(('megabytes', 'fits'), [(1, True), (512, False)])
def test_weights_that_do_not_fit_into_memory_are_an_error(tmp_path, megabytes, fits):
    size = megabytes << 20
    weights = TensorProto(name='weights', data_type=TensorProto.FLOAT, dims=[size // 4])
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (('location', 'weights.bin'), ('offset', '0'), ('length', str(size))):
        weights.external_data.add(key=key, value=value)
    with open(tmp_path / 'weights.bin', 'wb') as file:
        file.truncate(size)  # all holes: it takes no room on the disk
    path = save(
        tmp_path / 'heavy.onnx',
        ('Add', ['x', 'weights'], ['y']),
        [('x', TensorProto.FLOAT, [1])],
        [('y', TensorProto.FLOAT, [size // 4])],
        [weights],
    )
    done = subprocess.run(
        [sys.executable, '-c', OPEN_IN_LITTLE_MEMORY, str(path)], capture_output=True, text=True
    )
    assert done.returncode == (0 if fits else 1), done.stderr
    assert ('no memory is left' in done.stderr) is not fits
    assert (f'error: {path} cannot be opened' in done.stderr) is not fits
