import numpy as np
import pytest

from engine import bundles
from mose_ros.engine import session


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return bundles.make_bundle(tmp_path_factory.mktemp('session') / 'known')


def test_a_session_takes_and_gives_named_arrays(folder):
    vision = session.open_session(folder / 'vision.onnx', threads=1)
    answer = vision.run({'patches': np.full((3, 8, 1176), 0.5, np.float32)})
    assert list(answer) == ['embeds']
    np.testing.assert_allclose(answer['embeds'], np.full((3, 2, 8), 0.5), rtol=1e-5)
    assert vision.inputs['patches'].shape == (None, 8, 1176)


@pytest.mark.parametrize(
    ('inputs', 'message'),
    [
        ({}, 'lacks patches'),
        ({'patches': np.zeros((1, 8, 1176), np.float32), 'more': np.zeros(1)}, 'not know more'),
        ({'patches': np.zeros((1, 8, 1175), np.float32)}, r'patches must be .*1176.*1175'),
        ({'patches': np.zeros((8, 1176), np.float32)}, r'patches must be .*got float32 \(8, 1176'),
        ({'patches': np.zeros((1, 8, 1176))}, 'patches must be float32.*got float64'),
    ],
)
def test_wrong_inputs_are_named(folder, inputs, message):
    with pytest.raises(ValueError, match=message):
        session.open_session(folder / 'vision.onnx', threads=1).run(inputs)


def test_a_slice_of_a_larger_array_is_taken_as_its_values(folder):
    vision = session.open_session(folder / 'vision.onnx', threads=1)
    roomy = np.random.default_rng(0).random((4, 16, 1176), np.float32)
    part = roomy[1:3, 4:12]
    expected = vision.run({'patches': part.copy()})['embeds']
    assert np.array_equal(vision.run({'patches': part})['embeds'], expected)
    assert not np.array_equal(vision.run({'patches': roomy[1:3, :8]})['embeds'], expected)


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
        return vision.run({'patches': np.full((3, 8, 1176), value, np.float32)})['embeds']

    def address(array):
        return array.__array_interface__['data'][0]

    assert len({address(see(value)) for value in range(20)}) == 1  # nothing is allocated
    held = [see(value) for value in range(4)]
    assert len({address(one) for one in held}) == 4
    for value in range(20):
        see(value)
    assert [one.mean().round(3) for one in held] == [0, 1, 2, 3]


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


def test_files_that_cannot_be_opened_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.onnx is missing'):
        session.open_session(tmp_path / 'nowhere.onnx')
    truncated = tmp_path / 'truncated.onnx'
    truncated.write_bytes((folder / 'vision.onnx').read_bytes()[:100])
    with pytest.raises(session.BackendError, match='truncated.onnx cannot be opened'):
        session.open_session(truncated)
    with pytest.raises(ValueError, match='threads must be at least 1, not 0'):
        session.open_session(folder / 'vision.onnx', threads=0)
