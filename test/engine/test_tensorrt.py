"""The TensorRT backend over a fake TensorRT and a fake GPU driver: whole bundles run, and all that may go wrong does.

Nothing here shows that TensorRT itself can build the graphs; see docs/performance.md.
"""

import errno
import gc
import logging
import shutil
import sys
import threading

import numpy as np
import pytest

from engine import bundles
from engine.fake_tensorrt import SCRATCH, Faults
from mose_ros.core.bundle import GRAPHS
from mose_ros.engine import __main__ as command
from mose_ros.engine import cuda, scenery, session, tensorrt_build
from mose_ros.engine.bundle import Bundle, dynamic_sizes
from mose_ros.engine.driver import Driver
from mose_ros.engine.session import BackendError
from mose_ros.engine.view_router import ViewRouter


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return bundles.make_bundle(tmp_path_factory.mktemp('tensorrt') / 'known')


def open_bundle(folder, **options):
    return Bundle.open(folder, backend='tensorrt', **options)


def pictures(manifest, views, seed=0):
    shape = (views, manifest.view_frames, manifest.view_height, manifest.view_width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# running


@pytest.mark.parametrize('version', ['10.3.0', '10.16.1.11', '11.4.0.106'])
@pytest.mark.parametrize('precision', ['float32', 'float16'])
def test_a_bundle_plans_and_reasons_as_on_onnx_runtime(machine, tmp_path, version, precision):
    machine(version)
    folder = bundles.make_bundle(tmp_path / 'known', precision=precision)
    answers = []
    for backend in ('tensorrt', 'onnxruntime'):
        bundle = Bundle.open(folder, backend=backend, threads=1)
        router, driver = ViewRouter(bundle), Driver(bundle)
        seen = scenery.grey(bundle.manifest)
        for _ in range(3):  # a plain run, a recorded one, a replayed one
            router.reset()
            driver.reset()
            views = router.select(seen.time, seen.images, seen.ego, seen.guidance)
            plan = driver.plan(views, seen.ego, seen.guidance)
            answers.append((plan.trajectory.xy.tobytes(), plan.skills, list(driver.reason())))
    assert len(answers[0][2]) > 3
    assert all(answer == answers[0] for answer in answers)


def test_the_ports_are_the_contracts(machine, folder):
    machine()
    bundle = open_bundle(folder)
    for graph in GRAPHS:  # Bundle.session holds both to the contract
        opened = bundle.session(graph)
        on_onnx = session.open_session(folder / f'{graph}.onnx', backend='onnxruntime')
        assert opened.inputs == on_onnx.inputs
        assert opened.outputs.keys() == on_onnx.outputs.keys()


@pytest.mark.parametrize(
    ('inputs', 'message'),
    [
        ({}, 'lacks views'),
        ({'views': np.zeros((1, 2, 28, 55, 3), np.uint8)}, r'views must be .*56, 3.*55, 3'),
        ({'views': np.zeros((7, 2, 28, 56, 3), np.uint8)}, r'\(7, .* is beyond .*\(1, .* to \(6,'),
        ({'views': np.zeros((0, 2, 28, 56, 3), np.uint8)}, r'\(0, .* is beyond'),
    ],
)
def test_wrong_inputs_are_named(machine, folder, inputs, message):
    machine()
    with pytest.raises(ValueError, match=message):
        open_bundle(folder).session('vision').run(inputs)


def test_a_view_that_is_not_contiguous_is_taken_as_its_values(machine, folder):
    machine()
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    wide = pictures(bundle.manifest, 4)
    part = wide[::2]
    expected = vision.run({'views': part.copy()})['embeds']
    assert np.array_equal(vision.run({'views': part})['embeds'], expected)
    assert not np.array_equal(vision.run({'views': wide[:2]})['embeds'], expected)


def test_nothing_is_allocated_once_warm(machine, folder):
    driver, _ = machine()
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    vision.run({'views': pictures(bundle.manifest, 1)})
    before = driver.calls['allocate'], driver.calls['allocate_host'], driver.used()
    for views in (6, 2, 1, 6, 2):  # the largest too: buffers are of its size from the start
        vision.run({'views': pictures(bundle.manifest, views)})
    assert (driver.calls['allocate'], driver.calls['allocate_host'], driver.used()) == before


def test_a_closed_session_gives_all_memory_back(machine, folder):
    driver, _ = machine()
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    vision.run({'views': pictures(bundle.manifest, 1)})
    assert driver.used() > SCRATCH
    del vision
    gc.collect()
    assert driver.used() == 0
    assert not driver.streams


def test_many_threads_get_their_own_answers(machine, folder):
    machine()
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    inputs = [pictures(bundle.manifest, 1 + seed % 3, seed) for seed in range(12)]
    answers = [None] * len(inputs)

    def work(index):
        answers[index] = vision.run({'views': inputs[index]})['embeds']

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for given, answer in zip(inputs, answers, strict=True):
        assert np.array_equal(vision.run({'views': given})['embeds'], answer)


def test_the_texts_lane_yields(machine, folder):
    driver, _ = machine()
    bundle = open_bundle(folder)
    decode, action = bundle.session('decode'), bundle.session('action')
    assert decode is not action
    assert sorted(driver.priorities.values()) == [-5, 0]  # the smaller number goes first


# values that stay on the GPU


def test_embeds_go_from_vision_to_prefill_without_the_host(machine, folder):
    driver, _ = machine()
    bundle = open_bundle(folder)
    m = bundle.manifest
    vision, prefill = bundle.session('vision'), bundle.session('prefill')
    tokens = m.max_prompt_tokens
    rest = {
        'input_ids': np.zeros((1, tokens), np.int64),
        'position_ids': np.zeros((3, 1, tokens), np.int64),
        'skill_override': np.full(len(m.levels), -1),
    }
    seen = {'views': pictures(m, 2)}
    expected = prefill.run({**rest, **vision.run(seen)})
    driver.calls.clear()
    kept = vision.run(seen, keep=['embeds'])
    assert driver.calls['download'] == 0
    answer = prefill.run({**rest, **kept})
    assert driver.calls['upload'] == 4  # views, and three that are the host's own
    assert all(np.array_equal(answer[name], expected[name]) for name in expected)
    assert np.array_equal(kept['embeds'].numpy(), vision.run(seen)['embeds'])
    with pytest.raises(ValueError, match='nothing cannot be kept'):
        vision.run(seen, keep=['nothing'])


def test_a_plan_and_its_words_copy_only_what_is_new(machine, folder):
    driver, _ = machine()
    bundle = open_bundle(folder)
    router, thinker = ViewRouter(bundle), Driver(bundle)
    seen = scenery.grey(bundle.manifest)
    views = router.select(seen.time, seen.images, seen.ego, seen.guidance)
    thinker.plan(views, seen.ego, seen.guidance)
    thinker.reset()
    driver.calls.clear()
    thinker.plan(views, seen.ego, seen.guidance)
    steps = bundle.manifest.num_steps
    assert (
        driver.calls['upload'] == 1 + 3 + 4 * steps
    )  # vision, prefill, action: no embeds, no cache
    driver.calls.clear()
    thinker.plan(views, seen.ego, seen.guidance, force={'planning': 'normal'})
    assert driver.calls['upload'] == 3 + 4 * steps  # the same pictures are not looked at again
    driver.calls.clear()
    words = sum(1 for _ in thinker.reason())
    assert driver.calls['upload'] == 3 * words  # a token, its place, the skills
    assert driver.calls['download'] == words  # logits


def test_what_is_kept_never_changes(machine, folder):
    driver, _ = machine()
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    first = vision.run({'views': pictures(bundle.manifest, 2, 1)}, keep=['embeds'])['embeds']
    before = first.numpy()
    second = vision.run({'views': pictures(bundle.manifest, 2, 2)}, keep=['embeds'])['embeds']
    assert np.array_equal(first.numpy(), before)
    assert not np.array_equal(second.numpy(), before)
    used, address = driver.used(), first.address
    del first
    third = vision.run({'views': pictures(bundle.manifest, 2, 3)}, keep=['embeds'])['embeds']
    assert (driver.used(), third.address) == (used, address)  # what nobody holds is used again


def test_a_cache_grows_on_the_gpu(machine, folder):
    driver, _ = machine()
    bundle = open_bundle(folder)
    decode = bundle.session('decode')
    layers, batch, heads, _, width = decode.inputs['past_k'].shape
    cache = np.random.default_rng(0).random((layers, batch, heads, 20, width), np.float32)
    held = decode.hold('past_k', cache[:, :, :, :5])
    assert np.array_equal(held.numpy(), cache[:, :, :, :5])
    for now in range(5, 20):
        held = decode.hold('past_k', held, cache[:, :, :, now : now + 1])
        if now == 7:
            allocated = driver.calls['allocate']
    assert np.array_equal(held.numpy(), cache)
    assert driver.calls['allocate'] == allocated  # two pieces of memory in turn
    with pytest.raises(ValueError, match='takes at most'):
        decode.hold('past_k', *[held] * 7)
    with pytest.raises(ValueError, match='past_k must be'):
        decode.hold('past_k', cache[0])
    with pytest.raises(ValueError, match='skills has no dynamic axis'):
        decode.hold('skills', *[np.zeros(len(bundle.manifest.levels), np.int64)] * 2)


def test_an_expert_is_chosen_by_its_address(machine, folder):
    """The weights of all experts lie on the GPU; here `skills` plays the part of an input that is a weight."""
    driver, _ = machine()
    bundle = open_bundle(folder)
    decode = bundle.session('decode')
    shape = [1 if size is None else size for size in decode.inputs['past_k'].shape]
    shape[3] = 9
    rest = {
        'input_ids': np.zeros((1, 1), np.int64),
        'position_ids': np.full((3, 1, 1), 9),
        'past_k': np.ones(shape, np.float32),
        'past_v': np.ones(shape, np.float32),
    }
    levels = len(bundle.manifest.levels)
    experts = [decode.hold('skills', np.full(levels, index)) for index in range(2)]
    by_address = [decode.run({**rest, 'skills': expert})['logits'] for expert in experts]
    by_value = [decode.run({**rest, 'skills': np.full(levels, i)})['logits'] for i in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(by_address, by_value, strict=True))
    driver.calls.clear()
    decode.run({**rest, 'skills': experts[1]})
    assert (driver.calls['upload'], driver.calls['copy']) == (4, 0)


# CUDA graphs


def test_the_second_run_of_a_shape_is_recorded_and_the_third_replayed(machine, folder):
    driver, trt = machine()
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    answers = []
    for _ in range(4):
        answers.append(vision.run({'views': pictures(bundle.manifest, 2)})['embeds'])
    assert (driver.calls['record'], driver.calls['launch']) == (1, 2)
    executed = trt.faults.execute_calls
    other = vision.run({'views': pictures(bundle.manifest, 2, seed=9)})['embeds']
    assert trt.faults.execute_calls == executed  # new pictures, the same work
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    assert not np.array_equal(other, answers[0])


def test_another_shape_between_spoils_no_recording(machine, folder):
    driver, _ = machine()
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    expected = {n: vision.run({'views': pictures(bundle.manifest, n)})['embeds'] for n in (1, 2)}
    for views in (1, 2, 1, 2, 2, 1):  # the fake raises where a recording's context was changed
        answer = vision.run({'views': pictures(bundle.manifest, views)})['embeds']
        assert np.array_equal(answer, expected[views])
    assert driver.calls['record'] == 2


def test_only_so_many_recordings_are_kept(machine, folder, monkeypatch):
    monkeypatch.setattr('mose_ros.engine.tensorrt_session.RECORDED', 2)
    driver, _ = machine()
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    for views in (1, 1, 2, 2, 3, 3):
        vision.run({'views': pictures(bundle.manifest, views)})
    assert driver.calls['record'] == 3
    gc.collect()
    assert len(driver.graphs) == 2
    driver.calls.clear()
    vision.run({'views': pictures(bundle.manifest, 3)})  # still there
    vision.run({'views': pictures(bundle.manifest, 1)})  # the oldest has gone: recorded again
    assert (driver.calls['launch'], driver.calls['record']) == (1, 1)


def test_a_graph_with_conditions_is_never_recorded(machine, folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    driver, trt = machine()
    flow = {'CONDITION': 3}
    monkeypatch.setattr(tensorrt_build, '_control_flow', lambda network: flow)
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    for _ in range(4):
        vision.run({'views': pictures(bundle.manifest, 2)})
    assert driver.calls['record'] == 0
    assert "vision: CUDA graphs: none, it has {'CONDITION': 3}" in caplog.text


def test_a_driver_that_cannot_record_is_told_of_once(machine, folder, caplog):
    driver, _ = machine()
    driver.forbids_capture = True
    bundle = open_bundle(folder)
    vision = bundle.session('vision')
    answers = [vision.run({'views': pictures(bundle.manifest, 2)})['embeds'] for _ in range(5)]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    warnings = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert 'vision: runs without CUDA graphs: cuStreamEndCapture: NOT_PERMITTED' in warnings[0]


# building and keeping


def test_an_engine_is_built_once(machine, folder, caplog):
    caplog.set_level(logging.INFO)
    _, trt = machine()
    bundle = open_bundle(folder)
    bundle.session('vision')
    assert 'vision.float32.sm8.7.engine is built anew: there is none yet' in caplog.text
    assert 'vision: Building engine' in caplog.text
    bundle.session('vision')
    assert len(trt.faults.builds) == 1
    assert 'vision.float32.sm8.7.engine: from the cache' in caplog.text
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
    open_bundle(folder).session('vision')
    caplog.clear()
    _, trt = machine(**now)
    open_bundle(folder).session('vision')
    assert len(trt.faults.builds) == 1
    assert f'is built anew: {reason}' in caplog.text


def test_another_bundle_workspace_or_size_builds_anew(machine, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    _, trt = machine()
    folder = bundles.make_bundle(tmp_path / 'known')
    open_bundle(folder).session('prefill')
    open_bundle(folder, workspace=1 << 20).session('prefill')
    assert 'builder was strongly typed, no TF32, level 3, workspace 1073741824' in caplog.text
    caplog.clear()
    bundles.make_bundle(folder, max_prompt_tokens=90)
    open_bundle(folder, workspace=1 << 20).session('prefill')
    assert 'shapes of input_ids was 1x3 1x88 1x96, is 1x3 1x82 1x90' in caplog.text
    caplog.clear()
    bundles.make_bundle(folder, width=12, max_prompt_tokens=90)
    open_bundle(folder, workspace=1 << 20).session('prefill')
    assert 'sha256 of prefill.onnx was' in caplog.text
    assert len(trt.faults.builds) == 4


def test_external_data_is_part_of_the_recipe(machine, folder):
    driver, _ = machine()
    build = open_bundle(folder).build('decode')
    assert set(build.files) == {'decode.onnx', 'weights.bin'}
    recipe = tensorrt_build.make_recipe(build, cuda.device())
    assert recipe['sha256 of weights.bin'] == build.files['weights.bin']


def test_a_damaged_engine_is_built_anew(machine, folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    _, trt = machine()
    bundle = open_bundle(folder)
    bundle.session('vision')
    kept = tmp_path / 'engines' / 'known' / 'vision.float32.sm8.7.engine'
    kept.write_bytes(kept.read_bytes()[:100])
    bundle.session('vision')
    assert 'is built anew: vision.float32.sm8.7.engine has 100 of' in caplog.text
    assert len(trt.faults.builds) == 2


def test_an_engine_that_tensorrt_refuses_is_built_anew_once(machine, folder, caplog):
    caplog.set_level(logging.INFO)
    _, trt = machine()
    bundle = open_bundle(folder)
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
    bundle = open_bundle(folder)
    threads = [threading.Thread(target=bundle.session, args=('vision',)) for _ in range(2)]
    threads[0].start()
    assert first_builds.wait(20)
    threads[1].start()
    go.set()
    [thread.join() for thread in threads]
    assert len(trt.faults.builds) == 1


def test_timings_pass_from_build_to_build(machine, folder, tmp_path, caplog):
    _, trt = machine()
    bundle = open_bundle(folder)
    bundle.session('vision')
    bundle.session('action')
    assert trt.faults.timings_given == [b'', b'+']
    kept = tmp_path / 'engines' / 'timing.10.3.0.Fake_Orin.cache'
    assert kept.read_bytes() == b'++'
    kept.write_bytes(b'foreign')
    bundle.session('decode')
    assert 'is of another TensorRT or GPU: it starts anew' in caplog.text
    assert kept.read_bytes() == b'+'


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
    bundle = open_bundle(folder)
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
    bundle = open_bundle(folder)
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
        open_bundle(folder)


def test_a_version_that_is_too_old_is_named(machine, folder, caplog):
    machine('8.6.1')
    with pytest.raises(BackendError, match='TensorRT 8.6.1 is too old: 10.3 .JetPack 6. or later'):
        open_bundle(folder)
    machine('12.0.1')
    open_bundle(folder)
    assert 'TensorRT 12.0.1 is newer than what this was written for' in caplog.text


def test_a_missing_gpu_or_driver_is_named(machine, folder, monkeypatch):
    machine(gpus=0)
    with pytest.raises(BackendError, match='cuInit: CUDA_ERROR_NO_DEVICE'):
        open_bundle(folder)
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
        open_bundle(folder).session('vision')
    text = str(error.value)
    assert "node 7 'node_Foo_7' (Foo): UNSUPPORTED_NODE no importer" in text
    assert "node 9 'node_Bar_9' (Bar): INVALID_GRAPH a cycle" in text
    assert "use backend 'onnxruntime'" in text


@pytest.mark.parametrize('phase', ['build_error', 'run_error'])
def test_out_of_memory_is_told_with_the_remedy(machine, folder, phase):
    _, trt = machine()
    bundle = open_bundle(folder)
    inputs = {'views': pictures(bundle.manifest, 1)}
    setattr(trt.faults, phase, '[defaultAllocator.cpp] Cuda Runtime (out of memory)')
    with pytest.raises(BackendError, match='out of memory.*lower --workspace'):
        bundle.session('vision').run(inputs)


def test_a_gpu_too_small_for_the_buffers_is_told_of(machine, folder):
    machine(memory=SCRATCH + 1000)
    bundle = open_bundle(folder)
    with pytest.raises(BackendError, match='out of memory.*--precision float16'):
        bundle.session('vision').run({'views': pictures(bundle.manifest, 6)})


def test_a_build_that_fails_leaves_nothing(machine, folder, tmp_path):
    _, trt = machine()
    trt.faults.build_error = 'Error Code 10: Could not find any implementation for node'
    with pytest.raises(BackendError, match='cannot be built: Error Code 10.*report it'):
        open_bundle(folder).session('vision')
    kept = [path.suffix for path in (tmp_path / 'engines').rglob('*') if path.is_file()]
    assert kept == ['.lock']
    trt.faults.build_error = ''
    open_bundle(folder).session('vision')


def test_a_full_disk_ends_the_build_with_nothing_half_written(
    machine, folder, tmp_path, monkeypatch
):
    _, trt = machine()

    def full(file):
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as disk:
        disk.setattr('mose_ros.engine.engine_cache.os.fsync', full)
        with pytest.raises(BackendError, match='vision.*cannot be kept: No space left.*make room'):
            open_bundle(folder).session('vision')
    kept = [path.suffix for path in (tmp_path / 'engines').rglob('*') if path.is_file()]
    assert kept == ['.lock']
    open_bundle(folder).session('vision')
    assert len(trt.faults.builds) == 2


def test_too_little_room_is_told_of_before_the_build(machine, folder, monkeypatch):
    _, trt = machine()
    usage = shutil.disk_usage('.')
    monkeypatch.setattr('shutil.disk_usage', lambda path: usage._replace(free=10))
    with pytest.raises(BackendError, match='too little room on the disk .* 0.0 MB free'):
        open_bundle(folder).session('decode')
    assert not trt.faults.builds


def test_a_build_can_be_interrupted(machine, folder):
    _, trt = machine()
    trt.faults.interrupt_at_step = 1
    with pytest.raises(KeyboardInterrupt):
        open_bundle(folder).session('vision')


def test_a_size_that_nobody_names_is_refused(machine, folder, monkeypatch):
    machine()
    bundle = open_bundle(folder)
    sizes = dynamic_sizes(bundle.manifest)
    monkeypatch.setattr('mose_ros.engine.bundle.dynamic_sizes', lambda m: {**sizes, 'vision': {}})
    with pytest.raises(BackendError, match='input views has a dynamic size, but nobody says'):
        bundle.session('vision')


def test_sizes_that_do_not_fit_the_graph_are_named(machine, folder, monkeypatch):
    _, trt = machine()
    bundle = open_bundle(folder)
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
    bundle = open_bundle(folder)
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
