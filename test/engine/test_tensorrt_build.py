"""Building on TensorRT: engines are built once and kept, over a fake TensorRT, and all that may go wrong does.

Nothing here shows that TensorRT itself can build the graphs; see docs/performance.md.
"""

import errno
import json
import logging
import shutil
import sys
import threading
import time

import numpy as np
import pytest

from engine import bundles
from engine.bundles import on_tensorrt, pictures
from engine.fake_tensorrt import SCRATCH, Faults
from mose_ros.core.bundle import GRAPHS
from mose_ros.engine import __main__ as command
from mose_ros.engine import cuda, session, tensorrt_build
from mose_ros.engine.bundle import dynamic_sizes
from mose_ros.engine.session import BackendError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return bundles.make_bundle(tmp_path_factory.mktemp('tensorrt') / 'known')


# building and keeping


def test_an_engine_is_built_once(machine, folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    _, trt = machine()
    bundle = on_tensorrt(folder)
    bundle.session('vision')
    [kept] = (tmp_path / 'engines/known').glob('vision.float32.sm8.7.*.engine')
    assert f'{kept} is built anew: there is none yet' in caplog.text
    assert 'vision: Building engine' in caplog.text
    bundle.session('vision')
    assert len(trt.faults.builds) == 1
    assert f'{kept}: from the cache' in caplog.text
    bundle.session('action')
    assert len(trt.faults.builds) == 2


@pytest.mark.parametrize(
    ('now', 'reason'),
    [
        ({'version': '10.16.1.11'}, 'TensorRT was 10.3.0, is 10.16.1.11'),
        ({'cuda': 13000}, 'CUDA was 12.6, is 13.0'),
        ({'name': 'Fake NX'}, 'GPU was Fake Orin, is Fake NX'),
        ({'architecture': (8, 9)}, 'there is none yet'),  # lies beside the other
    ],
)
def test_another_machine_builds_its_own(machine, folder, caplog, now, reason):
    caplog.set_level(logging.INFO)
    machine()
    on_tensorrt(folder).session('vision')
    caplog.clear()
    _, trt = machine(**now)
    on_tensorrt(folder).session('vision')
    assert len(trt.faults.builds) == 1
    assert f'is built anew: {reason}' in caplog.text


def test_engines_of_other_bundles_and_sizes_lie_side_by_side(machine, tmp_path):
    _, trt = machine()
    changes = [{}, {'max_prompt_tokens': 90}, {'width': 12}]
    folders = [
        bundles.make_bundle(tmp_path / str(number) / 'bundle', **one)  # twins are called so
        for number, one in enumerate(changes)
    ]
    for _ in range(2):
        for folder in folders:
            on_tensorrt(folder).session('prefill')
    assert len(trt.faults.builds) == len(changes)
    assert len(list((tmp_path / 'engines/bundle').glob('prefill.*.engine'))) == len(changes)


def test_what_one_builds_with_less_memory_all_use(machine, folder, tmp_path, capsys):
    _, trt = machine()
    arguments = ['build', str(folder), '--backend', 'tensorrt', '--workspace', '512']
    assert command.main(arguments) == 0
    built = len(trt.faults.builds)
    on_tensorrt(folder).session('vision')  # as a node does, which has no such parameter
    assert len(trt.faults.builds) == built
    [header] = (tmp_path / 'engines/known').glob('vision.*.json')
    assert json.loads(header.read_text())['notes']['workspace'] == 512 << 20


def test_external_data_is_part_of_the_recipe(machine, folder):
    driver, _ = machine()
    build = on_tensorrt(folder).build('decode')
    assert set(build.files) == {'decode.onnx', 'weights.bin'}
    recipe = tensorrt_build.make_recipe(build, cuda.device())
    assert recipe['sha256 of weights.bin'] == build.files['weights.bin']


def test_a_damaged_engine_is_built_anew(machine, folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    _, trt = machine()
    bundle = on_tensorrt(folder)
    bundle.session('vision')
    [kept] = (tmp_path / 'engines/known').glob('vision.*.engine')
    kept.write_bytes(kept.read_bytes()[:100])
    bundle.session('vision')
    assert f'is built anew: {kept.name} has 100 of' in caplog.text
    assert len(trt.faults.builds) == 2


def test_an_engine_that_tensorrt_refuses_is_built_anew_once(machine, folder, caplog):
    caplog.set_level(logging.INFO)
    _, trt = machine()
    bundle = on_tensorrt(folder)
    bundle.session('vision')
    trt.faults.opening_error = 'serialization version mismatch'
    with pytest.raises(BackendError, match='was built, but TensorRT 10.3.0 cannot open'):
        bundle.session('vision')
    assert 'anew: TensorRT cannot open it (serialization version mismatch)' in caplog.text
    assert len(trt.faults.builds) == 2


def test_two_who_want_the_same_engine_build_it_once(machine, folder):
    first_builds, go = threading.Event(), threading.Event()

    def hook():
        first_builds.set()
        assert go.wait(20)

    _, trt = machine(faults=Faults(build_hook=hook))
    bundle = on_tensorrt(folder)
    threads = [threading.Thread(target=bundle.session, args=('vision',)) for _ in range(2)]
    threads[0].start()
    assert first_builds.wait(20)
    threads[1].start()
    go.set()
    [thread.join() for thread in threads]
    assert len(trt.faults.builds) == 1


def test_timings_pass_from_build_to_build(machine, folder, tmp_path, caplog):
    _, trt = machine()
    bundle = on_tensorrt(folder)
    bundle.session('vision')
    bundle.session('action')
    assert trt.faults.timings_given == [b'', b'+']
    kept = tmp_path / 'engines' / 'timing.10.3.0.Fake_Orin.cache'
    assert kept.read_bytes() == b'++'
    kept.write_bytes(b'foreign')
    bundle.session('decode')
    assert 'is of another TensorRT or GPU: it starts anew' in caplog.text
    assert kept.read_bytes() == b'+'


def test_timings_are_written_by_one_at_a_time(machine, folder, tmp_path, monkeypatch):
    machine()
    bundle = on_tensorrt(folder)
    write, inside, most = tensorrt_build.write_bytes, [], []

    def slow(path, data, lasting=False):
        inside.append(path)
        most.append(len(inside))
        time.sleep(0.2)
        write(path, data, lasting)
        inside.pop()

    monkeypatch.setattr(tensorrt_build, 'write_bytes', slow)
    threads = [
        threading.Thread(target=bundle.session, args=(graph,)) for graph in ('vision', 'action')
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == [1, 1]
    kept = {path.name for path in (tmp_path / 'engines').iterdir() if path.is_file()}
    assert kept == {'timing.10.3.0.Fake_Orin.cache', 'timing.10.3.0.Fake_Orin.lock'}


def test_build_only(machine, folder, tmp_path, capsys):
    _, trt = machine()
    arguments = [
        'build',
        str(folder),
        '--backend',
        'tensorrt',
        '--engines',
        str(tmp_path / 'mine'),
    ]
    assert command.main(arguments) == 0
    assert 'decode: its engine is ready' in capsys.readouterr().out
    assert len(trt.faults.builds) == len(GRAPHS)
    assert len(list((tmp_path / 'mine' / 'known').glob('*.engine'))) == len(GRAPHS)
    assert command.main(arguments) == 0
    assert len(trt.faults.builds) == len(GRAPHS)


def test_sizes_are_the_manifests(machine, folder):
    machine()
    bundle = on_tensorrt(folder)
    m, n = bundle.manifest, bundle.manifest.tokens_per_view
    sizes = dynamic_sizes(m)
    assert sizes['vision']['views'] == (1, 2, 6)
    assert sizes['prefill']['input_ids'][2] == sizes['action']['past_k'][2] == m.max_prompt_tokens
    assert sizes['decode']['past_k'][2] == m.max_prompt_tokens + m.max_new_tokens
    for three in (three for graph in sizes.values() for three in graph.values()):
        assert list(three) == sorted(three)
    least, usual, largest = bundle.build('prefill').shapes['embeds']
    assert (least, usual, largest) == ((1, n, 8), (2, n, 8), (6, n, 8))


def test_an_input_whose_values_are_shapes_stays_on_the_host(machine, folder):
    """None of our graphs has one; TensorRT decides that, so the session follows it."""
    driver, trt = machine()
    trt.shape_inputs = ('skills',)
    bundle = on_tensorrt(folder)
    decode = bundle.session('decode')
    shape = [9 if size is None else size for size in decode.inputs['past_k'].shape]
    inputs = {
        'input_ids': np.zeros((1, 1), np.int64),
        'position_ids': np.full((3, 1, 1), 9),
        'past_k': np.ones(shape, np.float32),
        'past_v': np.ones(shape, np.float32),
        'skills': np.zeros(len(bundle.manifest.levels), np.int64),
    }
    onnx = session.open_session(folder / 'decode.onnx', backend='onnxruntime')
    for _ in range(3):
        driver.calls.clear()
        assert np.array_equal(decode.run(inputs)['logits'], onnx.run(inputs)['logits'])
        assert (driver.calls['upload'], driver.calls['record']) == (4, 0)


# what may be missing or fail


def refuse(monkeypatch, error):
    """Make `import tensorrt` fail."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == 'tensorrt':
                raise error
            return None

    monkeypatch.delitem(sys.modules, 'tensorrt', raising=False)
    monkeypatch.setattr(sys, 'meta_path', [Finder(), *sys.meta_path])


@pytest.mark.parametrize(
    ('error', 'message'),
    [
        (ModuleNotFoundError('no', name='tensorrt'), 'TensorRT: it is not installed; .*apt inst'),
        (ModuleNotFoundError('x', name='tensorrt_libs'), 'a part of it is not installed'),
        (ImportError('libnvinfer.so.10: cannot open'), 'its libraries do not load .libnvinfer'),
    ],
)
def test_a_missing_tensorrt_is_named_with_the_remedy(machine, folder, monkeypatch, error, message):
    machine()
    refuse(monkeypatch, error)
    with pytest.raises(BackendError, match=f"{message}.*use backend 'onnxruntime'"):
        on_tensorrt(folder)


def test_a_version_that_is_too_old_is_named(machine, folder, caplog):
    machine('8.6.1')
    with pytest.raises(BackendError, match='TensorRT 8.6.1 is too old: 10.3 .JetPack 6. or later'):
        on_tensorrt(folder)
    machine('12.0.1')
    on_tensorrt(folder)
    assert 'TensorRT 12.0.1 is newer than what this was written for' in caplog.text


def test_a_missing_gpu_or_driver_is_named(machine, folder, monkeypatch):
    machine(gpus=0)
    with pytest.raises(BackendError, match='cuInit: CUDA_ERROR_NO_DEVICE'):
        on_tensorrt(folder)
    machine()
    monkeypatch.undo()
    cuda.device.cache_clear()
    monkeypatch.setattr(cuda, 'LIBRARY', 'libnowhere.so.1')
    with pytest.raises(BackendError, match="no GPU driver here .*libnowhere.*'onnxruntime'"):
        cuda.device()
    monkeypatch.setattr(cuda, 'LIBRARY', 'libc.so.6')  # a library without what is asked of it
    with pytest.raises(BackendError, match='has no cuInit: the GPU driver is older than CUDA 12'):
        cuda.device()


def test_auto_takes_tensorrt_where_it_can_and_says_why_not(machine, folder, caplog):
    caplog.set_level(logging.INFO)
    machine()
    assert session.choose_backend('auto') == 'tensorrt'
    assert 'backend tensorrt: it is installed and a GPU is there' in caplog.text
    machine(gpus=0)
    assert session.choose_backend('auto') == 'onnxruntime'
    assert 'backend onnxruntime on CPU: this onnxruntime has no CUDA provider' in caplog.text
    assert 'not tensorrt: cuInit: CUDA_ERROR_NO_DEVICE' in caplog.text
    assert session.choose_backend('onnxruntime') == 'onnxruntime'


def test_all_errors_of_the_parser_are_listed(machine, folder):
    _, trt = machine()
    trt.faults.parser_errors = [
        ('UNSUPPORTED_NODE', 'no importer', 7, 'node_Foo_7', 'Foo'),
        ('INVALID_GRAPH', 'a cycle', 9, 'node_Bar_9', 'Bar'),
    ]
    with pytest.raises(BackendError) as error:
        on_tensorrt(folder).session('vision')
    text = str(error.value)
    assert "node 7 'node_Foo_7' (Foo): UNSUPPORTED_NODE no importer" in text
    assert "node 9 'node_Bar_9' (Bar): INVALID_GRAPH a cycle" in text
    assert "use backend 'onnxruntime'" in text


@pytest.mark.parametrize('phase', ['build_error', 'run_error'])
def test_out_of_memory_is_told_with_the_remedy(machine, folder, phase):
    _, trt = machine()
    bundle = on_tensorrt(folder)
    inputs = {'views': pictures(bundle.manifest, 1)}
    setattr(trt.faults, phase, '[defaultAllocator.cpp] Cuda Runtime (out of memory)')
    with pytest.raises(BackendError, match='out of memory.*lower --workspace'):
        bundle.session('vision').run(inputs)


def test_a_gpu_too_small_for_the_buffers_is_told_of(machine, folder):
    machine(memory=SCRATCH + 1000)
    bundle = on_tensorrt(folder)
    with pytest.raises(BackendError, match='out of memory.*--precision float16'):
        bundle.session('vision').run({'views': pictures(bundle.manifest, 6)})


def test_a_build_that_fails_leaves_nothing(machine, folder, tmp_path):
    _, trt = machine()
    trt.faults.build_error = 'Error Code 10: Could not find any implementation for node'
    with pytest.raises(BackendError, match='cannot be built: Error Code 10.*report it'):
        on_tensorrt(folder).session('vision')
    kept = [path.suffix for path in (tmp_path / 'engines').rglob('*') if path.is_file()]
    assert kept == ['.lock']
    trt.faults.build_error = ''
    on_tensorrt(folder).session('vision')


def test_a_full_disk_ends_the_build_with_nothing_half_written(
    machine, folder, tmp_path, monkeypatch
):
    _, trt = machine()

    def full(file):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as disk:
        disk.setattr('mose_ros.engine.engine_cache.os.fsync', full)
        with pytest.raises(BackendError, match='vision.*cannot be kept: No space left.*make room'):
            on_tensorrt(folder).session('vision')
    kept = {path.suffix for path in (tmp_path / 'engines').rglob('*') if path.is_file()}
    assert kept == {'.lock'}
    on_tensorrt(folder).session('vision')
    assert len(trt.faults.builds) == 2


def test_too_little_room_is_told_of_before_the_build(machine, folder, monkeypatch):
    _, trt = machine()
    usage = shutil.disk_usage('.')
    monkeypatch.setattr('shutil.disk_usage', lambda path: usage._replace(free=10))
    with pytest.raises(BackendError, match='too little room on the disk .* 0.0 MB free'):
        on_tensorrt(folder).session('decode')
    assert not trt.faults.builds


def test_a_build_can_be_interrupted(machine, folder):
    _, trt = machine()
    trt.faults.interrupt_at_step = 1
    with pytest.raises(KeyboardInterrupt):
        on_tensorrt(folder).session('vision')


def test_a_size_that_nobody_names_is_refused(machine, folder, monkeypatch):
    machine()
    bundle = on_tensorrt(folder)
    sizes = dynamic_sizes(bundle.manifest)
    monkeypatch.setattr('mose_ros.engine.bundle.dynamic_sizes', lambda m: {**sizes, 'vision': {}})
    with pytest.raises(BackendError, match='input views has a dynamic size, but nobody says'):
        bundle.session('vision')


def test_sizes_that_do_not_fit_the_graph_are_named(machine, folder, monkeypatch):
    _, trt = machine()
    bundle = on_tensorrt(folder)
    sizes = dynamic_sizes(bundle.manifest)
    trt.faults.profile_error = 'no'
    with pytest.raises(BackendError, match='its sizes are refused'):
        bundle.session('vision')
    wrong = {**sizes, 'vision': {'views': (3, 2, 1)}}
    monkeypatch.setattr('mose_ros.engine.bundle.dynamic_sizes', lambda m: wrong)
    with pytest.raises(BackendError, match=r'input views \(-1, .*does not get the sizes \(3, '):
        bundle.session('vision')


def test_shapes_that_cannot_be_inferred_are_told_of(machine, folder):
    _, trt = machine()
    bundle = on_tensorrt(folder)
    vision = bundle.session('vision')
    trt.faults.shape_error = 'IShapeLayer: broadcast of 3 and 2'
    with pytest.raises(BackendError, match='cannot infer shapes .IShapeLayer: broadcast'):
        vision.run({'views': pictures(bundle.manifest, 1)})


def test_a_gpu_that_onnx_runtime_can_use_is_used(machine, folder, monkeypatch, caplog):
    """As far as one can see without one: asked for by name it is an error here, by `auto` a warning."""
    machine()
    assert session.choose_provider()[0] == 'CPU'
    providers = ['CUDAExecutionProvider', 'CPUExecutionProvider']
    monkeypatch.setattr('onnxruntime.get_available_providers', lambda: providers)
    assert session.choose_provider() == ('CUDA', 'there is a Fake Orin')
    path = folder / 'vision.onnx'
    with (
        pytest.warns(UserWarning),
        pytest.raises(BackendError, match="'CUDA' does not start here"),
    ):
        session.open_session(path, backend='onnxruntime', provider='CUDA')
    with pytest.warns(UserWarning):
        opened = session.open_session(path, backend='onnxruntime')
    assert 'does not start here' in caplog.text and 'the CPU does it' in caplog.text
    assert opened.run({'views': np.zeros((1, 2, 28, 56, 3), np.uint8)})['embeds'].shape == (
        1,
        2,
        8,
    )
    machine(gpus=0)
    assert session.choose_provider()[0] == 'CPU'


def test_tensorrt_needs_the_bundle(machine, folder):
    machine()
    with pytest.raises(ValueError, match='needs `build`: open it from its bundle'):
        session.open_session(folder / 'vision.onnx', backend='tensorrt')
