"""Every operator of every shipped graph, with its types, is one that NVIDIA's ONNX parser lists as supported.

A list is a promise, not a proof: TensorRT itself cannot be run here.
"""

import json
from pathlib import Path

import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

from mose_ros.core.bundle import GRAPHS

LISTS = json.loads((Path(__file__).parent / 'tensorrt_operators.json').read_text(encoding='utf-8'))
OPERATORS = LISTS['operators']
MODELS = Path(__file__).parents[2] / 'models'
BUNDLES = sorted(path.parent for path in MODELS.glob('*/manifest.json'))
GROUPS = {
    'float': {'float', 'float16', 'bfloat16'},
    'int': {'int32', 'int64'},
}
INDICES = {'Where': 1}  # the input that holds a node's data, if not the first


def problems(model, version):
    """Yield 'Operator type' and what else a graph has that a version's list has not."""
    low, high = LISTS['lists'][version]['opset']
    for one in model.opset_import:
        if one.domain or not low <= one.version <= high:
            yield f'opset {one.domain or "ai.onnx"} {one.version}'
    yield from _graph_problems(model.graph, version, {}, set())


def _graph_problems(graph, version, kinds, constants):
    kinds, constants = dict(kinds), set(constants)
    for value in [*graph.value_info, *graph.input, *graph.output]:
        kinds[value.name] = value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        kinds[tensor.name] = tensor.data_type
        constants.add(tensor.name)
    for node in graph.node:
        known = OPERATORS.get(node.op_type)
        if known is None or _newer(known.get('since', '0'), version):
            yield f'{node.op_type} is not in the list'
            continue
        if node.op_type == 'Constant':
            constants.update(node.output)
        yield from _type_problems(node, known, version, kinds)
        for index in known.get('constant', ()):
            if len(node.input) > index and node.input[index] not in constants:
                yield f'{node.op_type}: input {index} is no constant'
        if len(node.output) > known.get('outputs', len(node.output)):
            yield f'{node.op_type}: {len(node.output)} outputs'
        bodies = [one.g for one in node.attribute if one.type == AttributeProto.GRAPH]
        if bodies:
            yield from _branch_problems(node, *bodies)
        for body in bodies:
            yield from _graph_problems(body, version, kinds, constants)


def _type_problems(node, known, version, kinds):
    types = next(
        (types for since, types in known.get('later', {}).items() if not _newer(since, version)),
        known['types'],
    )
    allowed = set().union(*(GROUPS.get(one, {one}) for one in types.split()))
    if node.op_type == 'If':
        names = node.output
    elif node.op_type == 'Cast':
        names = [*node.input, *node.output]
    else:
        names = node.input[INDICES.get(node.op_type, 0) :][:1]
    for name in names:
        kind = TensorProto.DataType.Name(kinds[name]).lower()
        if kind not in allowed:
            yield f'{node.op_type} {kind}'


def _branch_problems(node, then, other):
    names = [{one.name for one in body.output} for body in (then, other)]
    ranks = [
        [len(one.type.tensor_type.shape.dim) for one in body.output] for body in (then, other)
    ]
    if names[0] & names[1]:
        yield f'{node.op_type}: both branches name an output {names[0] & names[1]}'
    if ranks[0] != ranks[1]:
        yield f'{node.op_type}: branches of ranks {ranks}'


def _newer(version, than):
    return [int(part) for part in version.split('.')] > [int(part) for part in than.split('.')]


@pytest.mark.parametrize('version', LISTS['lists'])
@pytest.mark.parametrize('graph', GRAPHS)
@pytest.mark.parametrize('bundle', BUNDLES, ids=lambda path: path.name)
def test_every_operator_of_a_shipped_graph_is_listed(bundle, graph, version):
    model = onnx.load(bundle / f'{graph}.onnx', load_external_data=False)
    assert list(problems(model, version)) == []


def make(nodes, initializers=(), opset=20, kind=TensorProto.FLOAT):
    """Return a model from an input x (2, 2) to an output y."""
    ends = [helper.make_tensor_value_info(name, kind, (2, 2)) for name in 'xy']
    graph = helper.make_graph(nodes, 'g', ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', opset)])


def test_what_is_not_listed_is_found():
    assert list(problems(make([helper.make_node('Relu', 'x', 'y')]), '10.1')) == []
    nodes = [helper.make_node('Det', 'x', 'y')]
    assert list(problems(make(nodes), '10.1')) == ['Det is not in the list']
    cosine = make([helper.make_node('Cos', 'x', 'y')], kind=TensorProto.DOUBLE)
    assert list(problems(cosine, '10.1')) == ['Cos double']
    norm = make([helper.make_node('RMSNormalization', 'x', 'y')], opset=23)
    assert list(problems(norm, '10.1')) == [
        'opset ai.onnx 23',
        'RMSNormalization is not in the list',
    ]
    assert list(problems(norm, '10.15')) == []
    power = make([helper.make_node('Pow', ['x', 'x'], 'y')], kind=TensorProto.INT64)
    assert list(problems(power, '10.1')) == ['Pow int64']
    assert list(problems(power, '10.15')) == []
    total = make([helper.make_node('ReduceSum', ['x', 'x'], 'y')])
    assert list(problems(total, '10.15')) == ['ReduceSum: input 1 is no constant']


def test_branches_must_name_their_outputs_differently_and_be_of_one_rank():
    def branch(name, shape):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        return helper.make_graph([helper.make_node('Relu', ['x'], [name])], name, [], [out])

    def condition(then, other):
        return make([helper.make_node('If', ['x'], ['y'], then_branch=then, else_branch=other)])

    good = condition(branch('a', (2, 2)), branch('b', (2, 2)))
    assert list(problems(good, '10.1')) == []
    same = condition(branch('a', (2, 2)), branch('a', (2, 2)))
    assert list(problems(same, '10.1')) == ["If: both branches name an output {'a'}"]
    ranks = condition(branch('a', (2, 2)), branch('b', (4,)))
    assert list(problems(ranks, '10.1')) == ['If: branches of ranks [[1], [2]]']
