"""Graphs put in order at the export: what depends on weights alone is computed once and for all, and weights lie where they are read.

Joined weights, weights turned round and tables of angles are constants then; and a condition is handed nothing but what it decides on.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

GROWTH = 1 << 20  # bytes that a folded tensor may be larger than what it is made of


def fold(model: onnx.ModelProto) -> None:
    """Replace the nodes of a model that read nothing but constants by what they say; conditions are left as they are."""
    graph = model.graph
    known = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    kept, made = [], {}
    for node in graph.node:
        inputs = {name: known[name] for name in node.input if name in known}
        whole = len(inputs) == len(set(node.input) - {''})
        if not whole or _branches(node):
            kept.append(node)
            continue
        answers = _compute(model, node, inputs)
        if sum(one.nbytes for one in answers) > GROWTH + sum(
            one.nbytes for one in inputs.values()
        ):
            kept.append(node)
            continue
        made.update(zip(node.output, answers, strict=True))
        known.update(made)
    used = set(_names(kept)) | {one.name for one in graph.output}
    old = [one for one in graph.initializer if one.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(old)
    infos = [one for one in graph.value_info if one.name not in made]
    for name, value in made.items():
        if name in used:
            graph.initializer.append(numpy_helper.from_array(value, name))
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            infos.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    del graph.value_info[:]
    graph.value_info.extend(infos)


def sink(graph: onnx.GraphProto) -> None:
    """Move constants that a single branch of a condition reads into it, with the Casts behind them; also in branches.

    ONNX Runtime hands a condition all that its branches read from outside, one by one and at each level of a tree: with the weights
    of eight experts that takes as long as a small expert.
    """
    readers = defaultdict(set)
    for place, node in enumerate(graph.node):
        for name in node.input:
            readers[name].add((place, ''))
        for attribute in _branches(node):
            for name in _read_within(attribute.g):
                readers[name].add((place, attribute.name))
    for output in graph.output:
        readers[output.name].add(('output', ''))
    constants = {one.name: one for one in graph.initializer}
    infos = {one.name: one for one in graph.value_info}
    moved = set()

    def move(branch, name, cast=None):
        branch.initializer.append(constants[name])
        moved.add(name)
        for known in (name, *(cast.output if cast else ())):
            if known in infos:
                branch.value_info.append(infos.pop(known))

    for place, node in enumerate(graph.node):
        for attribute in _branches(node):
            mine = {name for name, who in readers.items() if who == {(place, attribute.name)}}
            for name in sorted(mine & constants.keys()):
                move(attribute.g, name)
            casts = [
                one
                for number, one in enumerate(graph.node)
                if one.op_type == 'Cast'
                and one.output[0] in mine
                and one.input[0] in constants
                and readers[one.input[0]] == {(number, '')}
            ]
            for cast in casts:
                move(attribute.g, cast.input[0], cast)
            nodes = [*casts, *attribute.g.node]
            del attribute.g.node[:]
            attribute.g.node.extend(nodes)
    kept = [one for one in graph.node if not (one.op_type == 'Cast' and one.input[0] in moved)]
    left = [one for name, one in constants.items() if name not in moved]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(left)
    graph.value_info.extend(infos.values())
    for node in graph.node:
        for attribute in _branches(node):
            sink(attribute.g)


def _branches(node: onnx.NodeProto) -> list[onnx.AttributeProto]:
    return [one for one in node.attribute if one.type == onnx.AttributeProto.GRAPH]


def _read_within(graph: onnx.GraphProto) -> set[str]:
    """Return the names that a branch reads, its own and those from outside."""
    return set(_names(graph.node)) | {one.name for one in graph.output}


def _compute(
    model: onnx.ModelProto, node: onnx.NodeProto, inputs: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Return what one node answers."""
    ends = [
        [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in pairs]
        for pairs in (
            [(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype)) for n, a in inputs.items()],
            [(n, onnx.TensorProto.UNDEFINED) for n in node.output],
        )
    ]
    alone = onnx.helper.make_graph([node], 'alone', *ends)
    made = onnx.helper.make_model(
        alone, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    return [np.ascontiguousarray(one) for one in ReferenceEvaluator(made).run(None, dict(inputs))]


def _names(nodes) -> Iterator[str]:
    """Yield all names that nodes read, those inside their conditions too."""
    for node in nodes:
        yield from node.input
        for attribute in _branches(node):
            yield from _names(attribute.g.node)
            yield from (one.name for one in attribute.g.output)
