"""Graphs without conditions: cut at the decisions of their routers, they answer as they did, whichever expert is chosen."""

import builtins
import gc
import logging
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine.fake_tensorrt import WEIGHTS
from mose_ros import engine
from mose_ros.engine import scenery, session, staging
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.driver import Driver
from mose_ros.engine.onnx_graph import Uncut, size_of
from mose_ros.engine.session import BackendError
from mose_ros.engine.staging import cut
from mose_ros.engine.view_router import ViewRouter

TINY = Path(__file__).parents[2] / 'models' / 'mose-tiny'
TOKENS, WIDTH, EXPERTS = 5, 8, 5


# ---- graphs made here: two layers of one level, five experts in each ----


def expert(x, out, seed, kind=np.float16, op='MatMul'):
    """Return one branch: a product with weights of its own, which are stored as halves."""
    weight = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype(kind)
    nodes = [
        helper.make_node('Cast', [f'w{seed}'], [f'f{seed}'], to=TensorProto.FLOAT),
        helper.make_node(op, [x, f'f{seed}'], [out]),
    ]
    info = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
    own = [numpy_helper.from_array(weight, f'w{seed}')]
    return helper.make_graph(nodes, out, [], [info], own)


def tree(x, number, first, count, name, leaf, begin=None):
    """Return the nodes that choose one of `count` experts by a number, which each level counts from its own first.

    begin: the first expert's number, where levels hold what they compare it with and hand it down as it is.
    """
    if count == 1:
        raise ValueError('a tree has two branches')
    half = count // 2
    branches = []
    for side, (skip, size) in enumerate(((0, half), (half, count - half))):
        inside, sub, held = f'{name}{side}', number, []
        if size == 1:
            branches.append(leaf(x, f'{inside}_out', first + skip))
            continue
        nodes = []
        if begin is not None:
            border = np.array(begin + skip + size // 2)
            held.append(numpy_helper.from_array(border, f'{inside}_border'))
        elif skip:
            nodes.append(helper.make_node('Sub', [number, f'c{skip}'], [f'{inside}_n']))
            sub = f'{inside}_n'
        below = None if begin is None else begin + skip
        nodes += tree(x, sub, first + skip, size, inside, leaf, below)
        info = helper.make_tensor_value_info(f'{inside}_out', TensorProto.FLOAT, None)
        branches.append(helper.make_graph(nodes, inside, [], [info], held))
    border = f'{name}_border' if begin is not None and len(name) > 2 else f'c{half}'
    return [
        helper.make_node('Less', [number, border], [f'{name}_less']),
        helper.make_node(
            'If',
            [f'{name}_less'],
            [f'{name}_out'],
            then_branch=branches[0],
            else_branch=branches[1],
        ),
    ]


def graph(folder, leaf=expert, levels=(0, 0), begin=None):
    """Write a graph that routes by its input's first row and sends it through experts, once for each of these levels."""
    nodes = [
        helper.make_node('ReduceSum', ['x', 'c_axes'], ['scores'], keepdims=0),
        helper.make_node('ArgMax', ['scores'], ['best'], axis=0, keepdims=1),
        helper.make_node('Less', ['forced', 'c0'], ['free']),
        helper.make_node('Where', ['free', 'best', 'forced'], ['chosen']),
    ]
    last = 'x'
    for layer, level in enumerate(levels):
        nodes.append(helper.make_node('Gather', ['chosen', f'i{level}'], [f'number{layer}']))
        nodes += tree(last, f'number{layer}', 100 * layer, EXPERTS, f'l{layer}', leaf, begin)
        nodes.append(helper.make_node('Add', [last, f'l{layer}_out'], [f'sum{layer}']))
        last = f'sum{layer}'
    nodes.append(helper.make_node('Concat', [last, 'x'], ['y'], axis=0))
    constants = {f'c{one}': np.array(one, np.int64) for one in range(EXPERTS)}
    constants |= {f'i{level}': np.array([level], np.int64) for level in (0, 1)}
    layers = len(levels)
    shape = ['tokens', WIDTH]
    infos = {
        'scores': (TensorProto.FLOAT, [WIDTH]),
        'best': (TensorProto.INT64, [1]),
        'chosen': (TensorProto.INT64, [2]),
        **{f'number{one}': (TensorProto.INT64, [1]) for one in range(layers)},
        **{f'sum{one}': (TensorProto.FLOAT, shape) for one in range(layers)},
        **{f'l{one}_out': (TensorProto.FLOAT, shape) for one in range(layers)},
    }
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        'routed',
        [value('x', TensorProto.FLOAT, shape), value('forced', TensorProto.INT64, [2])],
        [
            value('y', TensorProto.FLOAT, ['2*tokens', WIDTH]),
            value('chosen', TensorProto.INT64, [2]),
        ],
        [
            *(numpy_helper.from_array(array, name) for name, array in constants.items()),
            numpy_helper.from_array(np.array([0], np.int64), 'c_axes'),
        ],
        value_info=[value(name, *info) for name, info in infos.items() if name != 'chosen'],
    )
    path = folder / 'routed.onnx'
    model = helper.make_model(made, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    onnx.save(model, path)
    return path


def options(path):
    asked = onnxruntime.SessionOptions()
    asked.add_session_config_entry(WEIGHTS, str(path.parent))
    return asked


def run_whole(path, inputs):
    opened = onnxruntime.InferenceSession(path, options(path))
    names = [one.name for one in opened.get_outputs()]
    return dict(zip(names, opened.run(names, inputs), strict=True))


def run_stages(path, found, inputs):
    """Do by hand what a session of stages does."""
    values = {**inputs, **found.decide(inputs)}
    for stage in found.stages:
        opened = onnxruntime.InferenceSession(stage.model.SerializeToString(), options(path))
        feed = {name: values[name] for name in stage.inputs if name not in stage.choices}
        for name, choice in stage.choices.items():
            feed[name] = choice.values[int(values[choice.decision].reshape(()))]
        names = list(stage.outputs)
        values.update(zip(names, opened.run(names, feed), strict=True))
    return {name: values[name] for name in found.outputs}


def operators(found):
    return {node.op_type for stage in found.stages for node in stage.model.graph.node}


@pytest.mark.parametrize('begin', [None, 0], ids=['counted anew', 'held'])
def test_layers_of_a_level_share_one_decision_and_every_expert_answers_as_before(tmp_path, begin):
    path = graph(tmp_path, begin=begin)
    found = cut(path)
    assert len(found.stages) == 2 and 'If' not in operators(found)
    [first, second] = found.stages
    assert not first.choices and len(second.choices) == 2
    assert {one.decision for one in second.choices.values()} == {'number0'}
    assert {one.dtype for c in second.choices.values() for one in c.values} == {np.dtype('f4')}
    x = np.random.default_rng(7).standard_normal((TOKENS, WIDTH)).astype(np.float32)
    seen = []
    for forced in range(-1, EXPERTS):
        inputs = {'x': x, 'forced': np.full(2, forced)}
        if forced < 0:
            inputs['x'] = np.where(np.arange(WIDTH) == 3, 1.0, 0.0).astype('f4') * np.ones(
                (TOKENS, 1), 'f4'
            )
        a, b = run_whole(path, inputs), run_stages(path, found, inputs)
        assert all(np.allclose(a[name], b[name], atol=1e-5) for name in a)
        assert set(a['chosen']) == {3 if forced < 0 else forced}
        seen.append(b['y'][0].tobytes())
    assert len(set(seen)) == EXPERTS + 1


def test_what_is_known_from_the_inputs_is_reckoned_by_one_evaluator(monkeypatch):
    made = []

    class Counted(staging.ReferenceEvaluator):
        def __init__(self, model):
            made.append(model)
            super().__init__(model)

    monkeypatch.setattr(staging, 'ReferenceEvaluator', Counted)
    found = cut(TINY / 'decode.onnx')
    known = [found.decide({'skills': np.full(3, one)}) for one in (1, 2)]
    assert len(made) == 1
    assert [{value.item() for value in one.values()} for one in known] == [{1}, {2}]


def test_layers_of_different_levels_have_decisions_of_their_own(tmp_path):
    path = graph(tmp_path, levels=(0, 1))
    found = cut(path)
    assert {c.decision for s in found.stages for c in s.choices.values()} == {'number0', 'number1'}
    x = np.ones((TOKENS, WIDTH), np.float32)
    for forced in ((1, 4), (4, 1), (2, 2)):
        inputs = {'x': x, 'forced': np.array(forced)}
        a, b = run_whole(path, inputs), run_stages(path, found, inputs)
        assert np.allclose(a['y'], b['y'], atol=1e-5)


def test_sizes_of_the_stages_are_the_graphs(tmp_path):
    found = cut(graph(tmp_path))
    assert found.sizes['x'] == ('tokens', WIDTH)
    assert found.stages[1].sizes['x'] == ('tokens', WIDTH)
    known = {'tokens': 5, 'past_tokens': 7}
    assert [size_of(one, known) for one in (4, 'tokens', '3*tokens', 'past_tokens + 18')] == [
        4,
        5,
        15,
        25,
    ]
    for bad in ('views', 'tokens.x', 'tokens//2', '__import__("os")', ''):
        with pytest.raises(Uncut, match='nobody knows'):
            size_of(bad, known)


def quantized(x, out, seed):
    branch = expert(x, out, seed, kind=np.int8)
    branch.node[0].CopyFrom(helper.make_node('DequantizeLinear', [f'w{seed}', 's'], [f'f{seed}']))
    branch.initializer.append(numpy_helper.from_array(np.float32(0.1), 's'))
    return branch


def uneven(x, out, seed):
    return expert(x, out, seed, op='MatMul' if seed % 100 else 'Add')


@pytest.mark.parametrize(
    ('leaf', 'reason'), [(quantized, 'constants'), (uneven, 'differ in more than their weights')]
)
def test_experts_that_cannot_be_inputs_stay_conditions(tmp_path, leaf, reason):
    with pytest.raises(Uncut, match=reason):
        cut(graph(tmp_path, leaf))


def test_a_tree_that_forgets_an_expert_is_left_alone(tmp_path):
    with pytest.raises(Uncut, match='an expert of its own'):
        cut(graph(tmp_path, begin=2))  # the borders of other experts


def test_a_graph_without_conditions_is_left_alone():
    with pytest.raises(Uncut, match='no conditions'):
        cut(TINY / 'vision.onnx')


@pytest.mark.parametrize(('name', 'stages'), [('prefill', 4), ('decode', 1), ('action', 2)])
def test_the_shipped_graphs_are_cut_at_each_level(name, stages):
    found = cut(TINY / f'{name}.onnx')
    assert len(found.stages) == stages and 'If' not in operators(found)
    counts = [len(c.values) for stage in found.stages for c in stage.choices.values()]
    manifest = Bundle.open(TINY, backend='onnxruntime').manifest
    skills = {len(one) for one in (*manifest.levels.values(), manifest.action_skills)}
    assert set(counts) <= skills and len(counts) >= 6
    carried = [
        one for stage in found.stages[1:] for one in stage.inputs if one not in stage.choices
    ]
    assert len(carried) <= 3 * 10 + 4  # keys and values of each layer, and little more


# ---- on TensorRT, as far as it can be had ----


def answers(backend, chains):
    """Return what the shipped bundle says: trajectory, skills and text, free and with each chain of skills."""
    bundle = Bundle.open(TINY, backend=backend, threads=1)
    driver, seen, said = Driver(bundle), scenery.grey(bundle.manifest), []
    views = ViewRouter(bundle).select(seen.time, seen.images, seen.ego, seen.guidance)
    for force in chains:
        plan = driver.plan(views, seen.ego, seen.guidance, force=force)
        said.append(
            (plan.trajectory.xy, plan.skills, plan.action_skill, list(driver.reason())[-1])
        )
    return said


def test_the_shipped_bundle_runs_in_stages_and_all_of_it_is_recorded(machine, caplog):
    caplog.set_level(logging.INFO)
    driver, _ = machine()
    levels = Bundle.open(TINY, backend='onnxruntime').manifest
    ladders = {**levels.levels, 'action': levels.action_skills}
    longest = max(map(len, ladders.values()))
    chains = [{}, *({n: s[i % len(s)] for n, s in ladders.items()} for i in range(longest))]
    ours, theirs = (answers(backend, chains) for backend in ('tensorrt', 'onnxruntime'))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a[0] - b[0]).max() < 1e-4 and a[1:] == b[1:]
    assert len({one[0].tobytes() for one in ours}) >= longest
    names = ['vision', 'decode.1of1', 'action.1of2', 'action.2of2']
    names += [f'prefill.{number}of4' for number in (1, 2, 3, 4)]
    for name in names:
        assert f'{name}: CUDA graphs: recorded where a shape returns' in caplog.text
    assert 'CUDA graphs: none' not in caplog.text and driver.calls['record'] >= 6


def test_the_weights_of_all_experts_lie_on_the_gpu(machine, monkeypatch):
    driver, _ = machine()
    bundle = Bundle.open(TINY, backend='tensorrt')
    decode, m = bundle.session('decode'), bundle.manifest
    past = np.zeros((m.num_layers, 1, m.num_kv_heads, 40, m.head_dim), np.float32)
    held = {name: decode.hold(name, past) for name in ('past_k', 'past_v')}
    rest = {
        'input_ids': np.zeros((1, 1), np.int64),
        'position_ids': np.full((3, 1, 1), 40),
        **held,
    }
    decode.run({**rest, 'skills': np.zeros(3, np.int64)})
    driver.calls.clear()
    said = [decode.run({**rest, 'skills': np.full(3, one)})['logits'] for one in (1, 2)]
    assert not np.array_equal(*said)
    assert driver.calls['upload'] == 2 * 2 and driver.calls['copy'] == 0  # a token and its place
    kept = decode.run({**rest, 'skills': np.full(3, 2)}, keep=['new_k'])
    assert not isinstance(kept['new_k'], np.ndarray) and np.array_equal(kept['logits'], said[1])
    for skills, error in ((np.full(3, 99), BackendError), (np.full(3, 1.0), ValueError)):
        with pytest.raises(error, match='expert 99 of|skills must be int64'):
            decode.run({**rest, 'skills': skills})
    with pytest.raises(ValueError, match='read on the host'):
        decode.hold('skills', np.zeros(3, np.int64))


def test_each_expert_is_held_once(machine, monkeypatch):
    """Not on the host beside the GPU, and not by each of the graphs that choose of the same experts."""
    alive = []

    def watched(path):
        found = cut(path)
        choices = [c for stage in found.stages for c in stage.choices.values()]
        alive.extend(weakref.ref(value) for c in choices for value in c.values)
        return found

    monkeypatch.setattr(staging, 'cut', watched)
    driver, _ = machine()
    bundle = Bundle.open(TINY, backend='tensorrt')
    choices = [c for stage in cut(TINY / 'decode.onnx').stages for c in stage.choices.values()]
    experts = sum(value.nbytes for choice in choices for value in choice.values)
    decode = bundle.session('decode')
    gc.collect()
    assert alive and not any(one() is not None for one in alive)
    rest = 2**16  # contexts' memory
    assert experts <= driver.used() < experts + rest
    prefill = bundle.session('prefill')  # another graph with the same experts
    gc.collect()
    assert driver.used() < experts + 5 * rest
    action = bundle.session('action')  # has its own
    assert driver.used() > experts + 10 * rest
    del prefill, action
    gc.collect()
    m = bundle.manifest  # what the one let go the other still has
    past = np.zeros((m.num_layers, 1, m.num_kv_heads, 40, m.head_dim), np.float32)
    inputs = {
        'input_ids': np.zeros((1, 1), np.int64),
        'position_ids': np.full((3, 1, 1), 40),
        'past_k': past,
        'past_v': past,
        'skills': np.full(3, 1),
    }
    on_onnx = session.open_session(TINY / 'decode.onnx', backend='onnxruntime')
    answers = [opened.run(inputs)['logits'] for opened in (decode, on_onnx)]
    assert np.abs(answers[0] - answers[1]).max() < 1e-4


def test_engines_of_stages_are_kept_each_for_itself(machine, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    _, trt = machine()
    bundle = Bundle.open(TINY, backend='tensorrt')
    bundle.session('action')
    bundle.session('action')
    assert len(trt.faults.builds) == 2 and caplog.text.count('from the cache') == 2
    kept = sorted(one.name for one in (tmp_path / 'engines/mose-tiny').glob('*.engine'))
    parts = [f'action.{one}of2.float32.sm8.7' for one in (1, 2)]
    assert [name.rsplit('.', 2)[0] for name in kept] == parts


def test_without_onnx_the_conditions_stay_and_it_is_said(machine, monkeypatch, caplog):
    machine()
    imported = builtins.__import__

    def without(name, *rest):
        if name == 'onnx':
            raise ImportError("No module named 'onnx'")
        return imported(name, *rest)

    monkeypatch.delitem(sys.modules, 'mose_ros.engine.staging')
    monkeypatch.delattr(engine, 'staging')
    monkeypatch.setattr(builtins, '__import__', without)
    opened = session.open_session(
        TINY / 'action.onnx',
        backend='tensorrt',
        build=Bundle.open(TINY, backend='onnxruntime').build('action'),
    )
    assert type(opened).__name__ == 'TensorRTSession'
    assert 'pip install mose_ros[tensorrt]' in caplog.text
