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


def make_choice():
    """Return y = x @ one of three weights, as a tree of conditions; weight `a` is read by two of its branches."""
    random = np.random.default_rng(0)
    weights = {name: random.random((4, 4), np.float32).astype(np.float16) for name in 'ab'}

    def branch(name, nodes):
        out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, (2, 4))
        return helper.make_graph(nodes, name, [], [out])

    def product(name, weight):
        return branch(name, [helper.make_node('MatMul', ['x', weight], [f'{name}_y'])])

    inner = helper.make_node(
        'If',
        ['second'],
        ['inner_y'],
        then_branch=product('then', 'wide_b'),
        else_branch=product('else', 'wide_a'),
    )
    outer = helper.make_node(
        'If',
        ['first'],
        ['y'],
        then_branch=product('outer', 'wide_a'),
        else_branch=branch('tree', [inner]),
    )
    casts = [
        helper.make_node('Cast', [one], [f'wide_{one}'], to=TensorProto.FLOAT) for one in 'ab'
    ]
    inputs = [helper.make_tensor_value_info('x', TensorProto.FLOAT, (2, 4))]
    inputs += [
        helper.make_tensor_value_info(one, TensorProto.BOOL, ()) for one in ('first', 'second')
    ]
    output = helper.make_tensor_value_info('y', TensorProto.FLOAT, (2, 4))
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph([*casts, outer], 'g', inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)


def test_weights_lie_in_the_one_branch_that_reads_them(tmp_path):
    model, x = make_choice(), np.random.default_rng(1).random((2, 4), np.float32)

    def answers(name):
        onnx.save(model, tmp_path / name)
        opened = session.open_session(tmp_path / name, threads=1)
        ways = [(np.array(one), np.array(two)) for one in (True, False) for two in (True, False)]
        return [opened.run({'x': x, 'first': one, 'second': two})['y'] for one, two in ways]

    before = answers('before.onnx')
    folding.sink(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(answers('after.onnx'), before)
    assert not np.allclose(before[2], before[3])
    assert [one.name for one in model.graph.initializer] == ['a']  # two read it
    tree = next(one.g for one in model.graph.node[-1].attribute if one.name == 'else_branch')
    then = next(one.g for one in tree.node[0].attribute if one.name == 'then_branch')
    assert not tree.initializer and [one.name for one in then.initializer] == ['b']
    assert [node.op_type for node in then.node] == ['Cast', 'MatMul']
