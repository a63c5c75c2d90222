import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine import bundles
from mose_ros.engine import counting, peaks
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.contestants import Engine
from mose_ros.engine.scenery import Scenery

FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL


def write(path, nodes, inputs, outputs, weights):
    values = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in side.items()]
        for side in (inputs, outputs)
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, 'graph', *values, initializer=constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save_model(model, path)
    return path


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_a_layer_costs_what_counting_by_hand_says(tmp_path):
    tokens, width, wide = 7, 16, 40
    weights = {'up': noise(width, wide), 'down': noise(wide, width)}
    nodes = [
        helper.make_node('Transpose', ['x'], ['k'], perm=[0, 2, 1]),
        helper.make_node('MatMul', ['x', 'k'], ['scores']),
        helper.make_node('Softmax', ['scores'], ['shares']),
        helper.make_node('MatMul', ['shares', 'x'], ['seen']),
        helper.make_node('MatMul', ['seen', 'up'], ['inner']),
        helper.make_node('Relu', ['inner'], ['active']),
        helper.make_node('MatMul', ['active', 'down'], ['y']),
    ]
    shape = (FLOAT, [1, 'T', width])
    path = write(tmp_path / 'layer.onnx', nodes, {'x': shape}, {'y': shape}, weights)
    found = counting.cost(path, {'x': noise(1, tokens, width)})
    attention = 2 * (2 * tokens * tokens * width)
    ffn = 2 * (2 * tokens * width * wide)
    assert found.flops == attention + ffn
    assert found.bytes > 4 * 2 * width * wide  # the weights at least
    assert counting.cost(path, {'x': noise(1, 2 * tokens, width)}).flops > 2 * found.flops


def test_only_the_branch_that_was_taken_is_counted(tmp_path):
    weights = {'thin': noise(8, 3), 'thick': noise(8, 30), 'back': noise(30, 3)}

    def branch(*nodes):
        result = helper.make_tensor_value_info(nodes[-1].output[0], FLOAT, [5, 3])
        return helper.make_graph(list(nodes), 'branch', [], [result])

    node = helper.make_node(
        *('If', ['which'], ['y']),
        then_branch=branch(helper.make_node('MatMul', ['x', 'thin'], ['a'])),
        else_branch=branch(
            helper.make_node('MatMul', ['x', 'thick'], ['b']),
            helper.make_node('MatMul', ['b', 'back'], ['c']),
        ),
    )
    inputs = {'x': (FLOAT, [5, 8]), 'which': (BOOL, [])}
    path = write(tmp_path / 'if.onnx', [node], inputs, {'y': (FLOAT, [5, 3])}, weights)
    costs = [counting.cost(path, {'x': noise(5, 8), 'which': np.array(w)}) for w in (True, False)]
    assert [one.flops for one in costs] == [2 * 5 * 8 * 3, 2 * 5 * 8 * 30 + 2 * 5 * 30 * 3]


def test_convolutions_and_transposed_products_are_counted(tmp_path):
    nodes = [
        helper.make_node('Conv', ['x', 'kernel'], ['y'], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node('Gemm', ['a', 'b'], ['c'], transA=1, transB=1),
    ]
    weights = {'kernel': noise(6, 3, 3, 3), 'b': noise(5, 4)}
    inputs = {'x': (FLOAT, [1, 3, 8, 10]), 'a': (FLOAT, [4, 9])}
    outputs = {'y': (FLOAT, [1, 6, 4, 5]), 'c': (FLOAT, [9, 5])}
    path = write(tmp_path / 'both.onnx', nodes, inputs, outputs, weights)
    found = counting.cost(path, {'x': noise(1, 3, 8, 10), 'a': noise(4, 9)})
    assert found.flops == 2 * (6 * 4 * 5) * (3 * 3 * 3) + 2 * 9 * 5 * 4


def test_a_product_that_cannot_be_counted_is_not_left_out(tmp_path):
    node = helper.make_node('Einsum', ['x', 'x'], ['y'], equation='ij,kj->ik')
    shape = {'x': (FLOAT, [3, 4])}
    path = write(tmp_path / 'einsum.onnx', [node], shape, {'y': (FLOAT, [3, 3])}, {})
    with pytest.raises(ValueError, match='FLOPs of Einsum cannot be counted'):
        counting.cost(path, {'x': noise(3, 4)})


@pytest.mark.parametrize(
    ('kind', 'bits'), [('INT8', 8), ('UINT8', 8), ('INT4', 4), ('UINT4', 4), ('FLOAT', 32)]
)
def test_quantised_weights_are_read_as_they_are_stored(tmp_path, kind, bits):
    rows, columns, tokens = 64, 32, 5
    code = getattr(TensorProto, kind)
    weight = helper.make_tensor('w', code, [rows, columns], [1] * (rows * columns))
    nodes = [
        helper.make_node('DequantizeLinear', ['w', 's'], ['f'], axis=1),
        helper.make_node('MatMul', ['x', 'f'], ['y']),
    ]
    scales = numpy_helper.from_array(np.ones(columns, np.float32), 's')
    constants = [weight, scales]
    if kind == 'FLOAT':
        nodes, constants = [helper.make_node('MatMul', ['x', 'w'], ['y'])], [weight]
    value = helper.make_tensor_value_info
    ends = [[value('x', FLOAT, [tokens, rows])], [value('y', FLOAT, [tokens, columns])]]
    graph = helper.make_graph(nodes, 'graph', *ends, initializer=constants)
    path = tmp_path / 'quantised.onnx'
    opset = [helper.make_opsetid('', 21)]
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    found = counting.cost(path, {'x': noise(tokens, rows)})
    stored = rows * columns * bits // 8 + (4 * columns if kind != 'FLOAT' else 0)
    assert found.bytes == stored + 4 * tokens * (rows + columns)
    assert found.flops == 2 * tokens * rows * columns


def test_a_tensor_of_unknown_size_is_not_left_out():
    asked = counting.Executed(op='Add', inputs=[('float8', (3,))], outputs=[], ms=0.0)
    with pytest.raises(ValueError, match='bytes of a tensor of float8'):
        asked.bytes  # noqa: B018


def test_a_bundles_stages_are_those_of_its_runs(tmp_path):
    bundle = Bundle.open(bundles.make_bundle(tmp_path / 'known'), backend='onnxruntime')
    runs = counting.watch(Engine(bundle, Scenery(bundle.manifest)))
    assert [one.graph for one in runs] == [
        *(
            'view_router',
            'vision',
            'vision',
            'prefill',
            *['action'] * bundle.manifest.num_steps,
            'decode',
        )
    ]
    costs = counting.stage_costs(bundle, runs)
    assert set(costs) == {'glance', 'vision', 'prefill', 'flow', 'decode'}
    assert all(one.bytes > 0 for one in costs.values())
    once = counting.cost(bundle.folder / 'action.onnx', runs[4].inputs)
    assert costs['flow'].bytes == bundle.manifest.num_steps * once.bytes


def test_a_profile_says_where_the_time_goes(tmp_path, monkeypatch):
    path = tmp_path / 'product.onnx'
    path.write_bytes(peaks.product(noise(64, 64)))
    asked, add = [], onnxruntime.SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        onnxruntime.SessionOptions,
        'add_session_config_entry',
        lambda options, *entry: (asked.append(entry), add(options, *entry))[1],
    )
    done = counting.profile(path, {'x': noise(64, 64)}, runs=3)
    assert asked == [('session.intra_op.allow_spinning', '0')]  # threads wait as the engine's do
    rows = counting.operators(done)
    assert rows['MatMul']['share'] == 1.0 and rows['MatMul']['count'] == 1


def test_the_hand_written_product_is_onnx_and_the_peaks_are_positive(tmp_path):
    weight = noise(300, 300)  # sizes of more than one byte
    onnx.checker.check_model(onnx.load_from_string(peaks.product(weight)))
    path = tmp_path / 'product.onnx'
    path.write_bytes(peaks.product(weight))
    assert counting.cost(path, {'x': weight}).flops == 2 * 300**3
    assert peaks.Gemm(1, sizes=(128,)).rate() > 1e6
    copy = peaks.Copy(2, size=1001)
    assert copy.rate() > 1e3
    assert (copy._to == 1).all()  # both threads' parts, whole
    copy.close()
