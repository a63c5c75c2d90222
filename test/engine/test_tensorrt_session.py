"""Running on TensorRT: whole bundles over a fake TensorRT and a fake GPU driver, values that stay there, CUDA graphs.

Nothing here shows that TensorRT itself can build the graphs; see docs/performance.md.
"""

import gc
import logging
import threading

import numpy as np
import pytest

from engine import bundles
from engine.bundles import on_tensorrt, pictures
from engine.fake_tensorrt import SCRATCH
from mose_ros.core.bundle import GRAPHS
from mose_ros.engine import scenery, session, tensorrt_build
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.driver import Driver
from mose_ros.engine.tensorrt_session import RECORDED
from mose_ros.engine.view_router import ViewRouter


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return bundles.make_bundle(tmp_path_factory.mktemp('tensorrt') / 'known')


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
    bundle = on_tensorrt(folder)
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
        on_tensorrt(folder).session('vision').run(inputs)


def test_a_view_that_is_not_contiguous_is_taken_as_its_values(machine, folder):
    machine()
    bundle = on_tensorrt(folder)
    vision = bundle.session('vision')
    wide = pictures(bundle.manifest, 4)
    part = wide[::2]
    expected = vision.run({'views': part.copy()})['embeds']
    assert np.array_equal(vision.run({'views': part})['embeds'], expected)
    assert not np.array_equal(vision.run({'views': wide[:2]})['embeds'], expected)


def test_nothing_is_allocated_once_warm(machine, folder):
    driver, _ = machine()
    bundle = on_tensorrt(folder)
    vision = bundle.session('vision')
    vision.run({'views': pictures(bundle.manifest, 1)})
    before = driver.calls['allocate'], driver.calls['allocate_host'], driver.used()
    for views in (6, 2, 1, 6, 2):  # the largest too: buffers are of its size from the start
        vision.run({'views': pictures(bundle.manifest, views)})
    assert (driver.calls['allocate'], driver.calls['allocate_host'], driver.used()) == before


def test_a_closed_session_gives_all_memory_back(machine, folder):
    driver, _ = machine()
    bundle = on_tensorrt(folder)
    vision = bundle.session('vision')
    vision.run({'views': pictures(bundle.manifest, 1)})
    assert driver.used() > SCRATCH
    del vision
    gc.collect()
    assert driver.used() == 0
    assert not driver.streams


def test_many_threads_get_their_own_answers(machine, folder):
    machine()
    bundle = on_tensorrt(folder)
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
    bundle = on_tensorrt(folder)
    decode, action = bundle.session('decode'), bundle.session('action')
    assert decode is not action
    assert sorted(driver.priorities.values()) == [-5, 0]  # the smaller number goes first


# values that stay on the GPU


def test_embeds_go_from_vision_to_prefill_without_the_host(machine, folder):
    driver, _ = machine()
    bundle = on_tensorrt(folder)
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
    bundle = on_tensorrt(folder)
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
    bundle = on_tensorrt(folder)
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
    bundle = on_tensorrt(folder)
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
    bundle = on_tensorrt(folder)
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
    bundle = on_tensorrt(folder)
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
    bundle = on_tensorrt(folder)
    vision = bundle.session('vision')
    expected = {n: vision.run({'views': pictures(bundle.manifest, n)})['embeds'] for n in (1, 2)}
    for views in (1, 2, 1, 2, 2, 1):  # the fake raises where a recording's context was changed
        answer = vision.run({'views': pictures(bundle.manifest, views)})['embeds']
        assert np.array_equal(answer, expected[views])
    assert driver.calls['record'] == 2


def test_only_so_many_recordings_are_kept(machine, folder, monkeypatch):
    monkeypatch.setattr('mose_ros.engine.tensorrt_session.RECORDED', 2)
    driver, _ = machine()
    bundle = on_tensorrt(folder)
    vision = bundle.session('vision')
    for views in (1, 1, 2, 2, 3, 3):
        vision.run({'views': pictures(bundle.manifest, views)})
    assert driver.calls['record'] == 3
    gc.collect()
    assert len(driver.graphs) == 2
    driver.calls.clear()
    vision.run({'views': pictures(bundle.manifest, 3)})  # still there
    for _ in range(2):  # the oldest has gone: recorded again once it returns
        vision.run({'views': pictures(bundle.manifest, 1)})
    assert (driver.calls['launch'], driver.calls['record']) == (1, 1)


def test_what_returns_too_late_to_be_replayed_is_not_recorded(machine, folder):
    driver, _ = machine()
    bundle = on_tensorrt(folder)
    router, thinker = ViewRouter(bundle), Driver(bundle)
    seen = scenery.grey(bundle.manifest)
    views = router.select(seen.time, seen.images, seen.ego, seen.guidance)
    thinker.plan(views, seen.ego, seen.guidance)
    driver.calls.clear()
    for _ in range(3):
        assert sum(1 for _ in thinker.reason()) > RECORDED  # each token has a cache of its length
    assert (driver.calls['record'], driver.calls['launch']) == (0, 0)
    for _ in range(3):  # the flow has one shape in all its steps
        thinker.plan(views, seen.ego, seen.guidance)
    assert driver.calls['record'] > 0
    assert driver.calls['launch'] > driver.calls['record']


def test_a_graph_with_conditions_is_never_recorded(machine, folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    driver, trt = machine()
    flow = {'CONDITION': 3}
    monkeypatch.setattr(tensorrt_build, '_control_flow', lambda network: flow)
    bundle = on_tensorrt(folder)
    vision = bundle.session('vision')
    for _ in range(4):
        vision.run({'views': pictures(bundle.manifest, 2)})
    assert driver.calls['record'] == 0
    assert "vision: CUDA graphs: none, it has {'CONDITION': 3}" in caplog.text


def test_a_driver_that_cannot_record_is_told_of_once(machine, folder, caplog):
    driver, _ = machine()
    driver.forbids_capture = True
    bundle = on_tensorrt(folder)
    vision = bundle.session('vision')
    answers = [vision.run({'views': pictures(bundle.manifest, 2)})['embeds'] for _ in range(5)]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    warnings = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert 'vision: runs without CUDA graphs: cuStreamEndCapture: NOT_PERMITTED' in warnings[0]
