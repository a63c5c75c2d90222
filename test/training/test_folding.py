import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mose_ros.engine import session
from mose_ros.training import folding


def make_model(rows=3):
    """Return y = x @ concat(a, b)^T, whose weights are turned round and joined at each run."""
    random = np.random.default_rng(0)
    weights = {name: random.random((rows, 4), np.float32) for name in 'ab'}
    nodes = [
        helper.make_node('Concat', ['a', 'b'], ['ab'], axis=0),
        helper.make_node('Transpose', ['ab'], ['turned']),
        helper.make_node('MatMul', ['x', 'turned'], ['y']),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in (('x', (2, 4)), ('y', (2, 2 * rows)))
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, 'g', *ends, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)


def run(model, path, x):
    onnx.save(model, path)
    return session.open_session(path, threads=1).run({'x': x})['y']


def test_what_depends_on_weights_alone_is_computed_once(tmp_path):
    model, x = make_model(), np.random.default_rng(1).random((2, 4), np.float32)
    want = run(model, tmp_path / 'slow.onnx', x)
    folding.fold(model)
    assert [node.op_type for node in model.graph.node] == ['MatMul']
    assert [one.name for one in model.graph.initializer] == ['turned']
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(run(model, tmp_path / 'fast.onnx', x), want)
    assert not np.allclose(run(model, tmp_path / 'fast.onnx', x[::-1].copy()), want)


def test_what_conditions_read_stays():
    branch = {}
    for name, weight in (('then', 'turned'), ('else', 'a')):
        out = helper.make_tensor_value_info(f'{name}_y', TensorProto.FLOAT, None)
        node = helper.make_node('Identity', [weight], [f'{name}_y'])
        branch[f'{name}_branch'] = helper.make_graph([node], name, [], [out])
    model = make_model()
    model.graph.input.append(helper.make_tensor_value_info('which', TensorProto.BOOL, ()))
    model.graph.node.append(helper.make_node('If', ['which'], ['z'], **branch))
    folding.fold(model)
    assert {one.name for one in model.graph.initializer} == {'turned', 'a'}


def test_what_would_grow_too_large_is_left_to_the_runtime(monkeypatch):
    nodes = [
        helper.make_node('Expand', ['one', 'shape'], ['wide']),
        helper.make_node('Add', ['x', 'wide'], ['y']),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, (64, 64))] for name in 'xy']
    constants = [
        numpy_helper.from_array(np.ones((1, 1), np.float32), 'one'),
        numpy_helper.from_array(np.array([64, 64]), 'shape'),
    ]
    model = helper.make_model(helper.make_graph(nodes, 'g', *ends, constants))
    monkeypatch.setattr(folding, 'GROWTH', 1024)
    folding.fold(model)
    assert [node.op_type for node in model.graph.node] == ['Expand', 'Add']
    monkeypatch.undo()
    folding.fold(model)
    assert [node.op_type for node in model.graph.node] == ['Add']
