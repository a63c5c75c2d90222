"""Bundles of integers: products of weights and inputs of eight bits, or of weights of four.

A product is a MatMul of tokens (B, T, K) with a constant matrix (K, N), wherever it stands in a graph, also inside conditions.
Float32 stay what has one row (heads, routers), few columns, or two factors that are computed (attention), the view router and the
action expert.

int8: QuantizeLinear and DequantizeLinear in front of both factors, symmetric with zero point 0, as TensorRT takes it. A weight
has a scale for each column, an input has one, from moments that the engine runs over the float32 graphs. ONNX Runtime on x86 makes
products of uint8 and int8 of them, where a product has a pair of its own whose zero point lies in its own graph, and where no bias turns
it into a Gemm. Hence products of one tensor are joined, and biases have three axes. Pixels are whole numbers as they come: less 128
they are int8 with scale 1, and what normalises them is in the weights.

int4: a scale for each column of 64 rows of a weight, which takes ONNX's opset 21; inputs and products stay float32.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from mose_ros.core.bundle import Manifest
from mose_ros.core.types import Observation
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.driver import ACTION, Driver
from mose_ros.engine.session import Session, open_session
from mose_ros.engine.view_router import ViewRouter
from mose_ros.training.graphs import subgraphs

# Not the view router, which decides, nor the action expert: the errors of its steps add up to what is driven, and its 17 rows
# are computed hardly faster as integers.
QUANTISED = ('vision', 'prefill', 'decode')
NARROW = 32  # rows or columns; quantising the input of a smaller weight costs more than it saves
# Of a weight's codes. x86 without VNNI adds two products of a code with an input's, up to 255, in 16 bits, and cuts off what is larger.
LARGEST = 63
BLOCK = 64  # rows of an int4 weight that share a scale; TensorRT takes 64 and 128
INTEGERS = ('int8', 'int4')
INT4_OPSET = 21  # the first with int4 and blocks
BINS = 2048  # of a histogram
SPOKEN = 4  # of so many calibration moments one is put into words
WHOLE = 'pixels.whole'  # the tensor of pixels, less 128
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, eq=False)
class Product:
    """A MatMul of tokens with a constant matrix."""

    place: int  # of its graph among `subgraphs`
    node: NodeProto
    weight: TensorProto  # (K, N), of its graph or of one around it

    @property
    def key(self) -> tuple[int, str]:
        """Return what tells its node from all others."""
        return self.place, self.node.output[0]


def products(model: ModelProto) -> list[Product]:
    """Return what of a model can be computed with integers, in the order of its nodes."""
    found, places = [], iter(range(len(list(subgraphs(model.graph)))))

    def look(graph, matrices, ranks):
        place = next(places)
        matrices = matrices | {one.name: one for one in graph.initializer if len(one.dims) == 2}
        known = [*graph.value_info, *graph.input, *graph.output]
        ranks = ranks | {one.name: len(one.type.tensor_type.shape.dim) for one in known}
        for node in graph.node:
            weight = matrices.get(node.input[1]) if node.op_type == 'MatMul' else None
            if weight is not None and min(weight.dims) >= NARROW and ranks.get(node.input[0]) == 3:
                found.append(Product(place, node, weight))
            for body in _bodies(node):
                look(body, matrices, ranks)

    look(model.graph, {}, {})
    return found


def join(model: ModelProto) -> None:
    """Make the products of one tensor in one graph one product, split behind it, give biases three axes, and leave pixels whole."""
    _leave_whole(model)
    groups: dict[tuple[int, str], list[Product]] = {}
    for one in products(model):
        groups.setdefault((one.place, one.node.input[0]), []).append(one)
    constants = {one.name: one for one in model.graph.initializer}
    biases = _biases(model, constants)
    graphs = list(subgraphs(model.graph))
    new, gone = {}, set()
    for number, members in enumerate(groups.values()):
        adds = [biases.get(one.key) for one in members]
        if len(members) == 1 and adds[0] is None:
            continue
        prefix = f'joined_{number}'
        widths = np.array([one.weight.dims[1] for one in members])
        ends = [
            one.node.output[0] if add is None else add[0].output[0]
            for one, add in zip(members, adds, strict=True)
        ]
        end = ends[0] if len(members) == 1 else f'{prefix}.all'
        weights = np.concatenate([numpy_helper.to_array(one.weight) for one in members], 1)
        made = {'weight': weights}
        product = f'{prefix}.product' if any(adds) else end
        nodes = [
            helper.make_node('MatMul', [members[0].node.input[0], f'{prefix}.weight'], [product])
        ]
        if any(adds):
            rows = [
                np.zeros(width, np.float32) if add is None else numpy_helper.to_array(add[1])
                for width, add in zip(widths, adds, strict=True)
            ]
            made['bias'] = np.concatenate(rows)[None, None]
            nodes.append(helper.make_node('Add', [product, f'{prefix}.bias'], [end]))
        model.graph.initializer.extend(_named(prefix, made))
        if len(members) > 1:
            graphs[members[0].place].initializer.extend(_named(prefix, {'widths': widths}))
            nodes.append(helper.make_node('Split', [end, f'{prefix}.widths'], ends, axis=-1))
        new[members[0].key] = nodes
        gone |= {one.key for one in members}
        gone |= {
            (one.place, add[0].output[0])
            for one, add in zip(members, adds, strict=True)
            if add is not None
        }
    _rewrite(model, new, gone)


def _leave_whole(model: ModelProto) -> None:
    """Move what normalises pixels, a Mul and a Sub of constants, into the weights of the product that reads them.

    int8 on the normalised ones would round them to another grid, by which trajectories moved more than by any other product of the ViT.
    """
    graph = model.graph
    if not any(one.type.tensor_type.elem_type == TensorProto.UINT8 for one in graph.input):
        return
    constants = {one.name: one for one in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    infos = {one.name: one for one in graph.value_info}
    for one in products(model):
        less = makers.get(one.node.input[0])
        times = makers.get(less.input[0]) if less is not None and less.op_type == 'Sub' else None
        if times is None or times.op_type != 'Mul':
            continue
        if less.input[1] not in constants or times.input[1] not in constants:
            continue
        scale, offset = (
            numpy_helper.to_array(constants[node.input[1]]).astype(np.float64)
            for node in (times, less)
        )
        rows = numpy_helper.to_array(one.weight)
        made = {
            'weight': (scale[:, None] * rows).astype(np.float32),
            'bias': ((128 * scale - offset) @ rows).astype(np.float32),
            'middle': np.float32(128),
        }
        graph.initializer.extend(_named('pixels', made))
        for name, like in ((WHOLE, less.output[0]), ('pixels.product', one.node.output[0])):
            info = graph.value_info.add()
            info.CopyFrom(infos[like])
            info.name = name
        nodes = [
            helper.make_node('Sub', [times.input[0], 'pixels.middle'], [WHOLE]),
            helper.make_node('MatMul', [WHOLE, 'pixels.weight'], ['pixels.product']),
            helper.make_node('Add', ['pixels.product', 'pixels.bias'], one.node.output[:]),
        ]
        _rewrite(model, {one.key: nodes}, {(0, times.output[0]), (0, less.output[0])})
        return


def to_int8(model: ModelProto, scales: Sequence[float]) -> None:
    """Let the products of a joined model compute with int8; `scales` are those of their inputs."""
    graphs, new = list(subgraphs(model.graph)), {}
    for number, (one, scale) in enumerate(zip(products(model), scales, strict=True)):
        prefix, rows = f'int8_{number}', numpy_helper.to_array(one.weight)
        steps = np.maximum(np.abs(rows).max(0) / LARGEST, _TINY).astype(np.float32)
        codes = np.clip(np.rint(rows / steps), -LARGEST, LARGEST).astype(np.int8)
        model.graph.initializer.extend(_named(prefix, {'weight': codes, 'steps': steps}))
        exact = one.node.input[0] == WHOLE
        pair = {'step': np.float32(1 if exact else scale), 'zero': np.int8(0)}
        graphs[one.place].initializer.extend(_named(prefix, pair))
        own = [f'{prefix}.{name}' for name in pair]
        matrix = [f'{prefix}.weight', f'{prefix}.steps']
        new[one.key] = [
            helper.make_node('QuantizeLinear', [one.node.input[0], *own], [f'{prefix}.codes']),
            helper.make_node('DequantizeLinear', [f'{prefix}.codes', *own], [f'{prefix}.input']),
            helper.make_node('DequantizeLinear', matrix, [f'{prefix}.matrix'], axis=1),
            helper.make_node(
                'MatMul', [f'{prefix}.input', f'{prefix}.matrix'], one.node.output[:]
            ),
        ]
    _rewrite(model, new)


def to_int4(model: ModelProto) -> None:
    """Let the products of a model whose weights are whole blocks read them as int4, and take its opset to 21."""
    graphs, new = list(subgraphs(model.graph)), {}
    for number, one in enumerate(products(model)):
        rows = numpy_helper.to_array(one.weight)
        if len(rows) % BLOCK:
            continue
        prefix = f'int4_{number}'
        codes, steps = four_bits(rows)
        stored = _named(prefix, {'weight': codes, 'steps': steps})
        graphs[one.place].initializer.extend(stored)  # elsewhere ONNX Runtime does not find them
        matrix = [f'{prefix}.weight', f'{prefix}.steps']
        new[one.key] = [
            helper.make_node(
                'DequantizeLinear', matrix, [f'{prefix}.matrix'], axis=0, block_size=BLOCK
            ),
            helper.make_node(
                'MatMul', [one.node.input[0], f'{prefix}.matrix'], one.node.output[:]
            ),
        ]
    _rewrite(model, new)
    # Between 20 and 21 the operators of the graphs only learn more types.
    model.opset_import[0].version = INT4_OPSET


def four_bits(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight (K, N) as int4 and its scales (K / 64, N), each the one of some with the least squared error."""
    blocks = rows.reshape(-1, BLOCK, rows.shape[1])
    most = np.maximum(np.abs(blocks).max(1), _TINY)
    least, steps = np.full(most.shape, np.inf), most / 7
    for clip in np.linspace(0.6, 1.1, 26):
        step = clip * most / 7
        error = np.square(_codes4(blocks, step) * step[:, None] - blocks).sum(1)
        steps, least = np.where(error < least, step, steps), np.minimum(error, least)
    steps = steps.astype(np.float32)
    return _codes4(blocks, steps).reshape(rows.shape).astype(ml_dtypes.int4), steps


def _codes4(blocks, steps):
    return np.clip(np.rint(blocks / steps[:, None]), -8, 7)


# ---- calibration ----


class Histogram:
    """How large numbers are, counted as they come; its range doubles when a larger one does."""

    def __init__(self):
        self.top, self.counts = 0.0, np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count the magnitudes of some numbers; ValueError when they are not finite."""
        sizes = np.abs(values)
        most = float(sizes.max(initial=0.0))
        if not np.isfinite(most):
            raise ValueError('calibration met numbers that are not finite; export with fp32')
        if not self.top:
            self.top = most
        while most > self.top:
            self.top *= 2
            halves = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([halves, np.zeros_like(halves)])
        if self.top:
            self.counts += np.histogram(sizes, BINS, (0.0, self.top))[0]

    def scale(self) -> float:
        """Return the step of int8 with the least squared error: rare large numbers are clipped where that makes all steps finer."""
        if not self.top:
            raise ValueError(
                'calibration met nothing but zeros where a product reads; export with fp32'
            )
        centres = (np.arange(BINS) + 0.5) * (self.top / BINS)
        clips = (np.arange(BINS // 16, BINS) + 1.0) * (self.top / BINS)
        beyond = np.square(np.maximum(centres - clips[:, None], 0.0)) @ self.counts
        within = np.square(clips / 127) / 12 * self.counts.sum()
        return float(clips[(beyond + within).argmin()] / 127)


def calibrate(
    folder: Path, manifest: Manifest, moments: Sequence[Observation]
) -> dict[str, list[float]]:
    """Return, for each graph of a joined float32 bundle, the scales of what its products read; deterministic.

    The engine plans each moment twice: as it would, and with each level's (and the action's) skills forced in turn, so that
    every expert is met. Writes `watched_*.onnx` beside the graphs.
    """
    seen = {}
    for graph in QUANTISED:
        model = onnx.load(folder / f'{graph}.onnx', load_external_data=False)
        seen[graph] = [Histogram() for _ in watch(model)]
        (folder / f'watched_{graph}.onnx').write_bytes(model.SerializeToString())
    # One thread: what is counted by several at once would be lost, or come in another order.
    bundle = _Watched(
        folder=folder, manifest=manifest, backend='onnxruntime', threads=1, seen=seen
    )
    router, driver = ViewRouter(bundle), Driver(bundle)
    ladders = {**manifest.levels, ACTION: manifest.action_skills}
    most = max(map(len, ladders.values()))
    for index in range(max(len(moments), most)):
        moment = moments[index % len(moments)]
        views = router.select(moment.time, moment.images, moment.ego, moment.guidance)
        forced = {level: skills[index % len(skills)] for level, skills in ladders.items()}
        for force, speaks in ((forced, index < most), ({}, index % SPOKEN == 0)):
            driver.plan(views, moment.ego, moment.guidance, force=force)
            if speaks:
                list(driver.reason())
    return {graph: [one.scale() for one in counted] for graph, counted in seen.items()}


def watch(model: ModelProto) -> list[str]:
    """Give a model the inputs of its products as further outputs `watched_*`, and return their names.

    Where a condition went another way, such an output is an empty array.
    """
    numbers = {one.key: number for number, one in enumerate(products(model))}
    places = iter(range(len(list(subgraphs(model.graph)))))

    def surface(graph: GraphProto, depth: int) -> list[int]:
        place, found, nodes = next(places), [], []
        for node in graph.node:
            nodes.append(node)
            number = numbers.get((place, node.output[0]))
            if number is not None:
                found.append(number)
                seen = helper.make_node('Identity', node.input[:1], [f'watched_{number}.{depth}'])
                nodes.append(seen)
            bodies = list(_bodies(node))
            inner = [surface(body, depth + 1) for body in bodies]
            for body, own in zip(bodies, inner, strict=True):
                for number in sorted(sum(inner, [])):
                    name = f'watched_{number}.{depth + 1}'
                    if number not in own:
                        name += '.none'
                        nothing = numpy_helper.from_array(np.zeros((0, 0, 0), np.float32))
                        body.node.append(helper.make_node('Constant', [], [name], value=nothing))
                    body.output.append(_float_value(name))
            node.output.extend(f'watched_{number}.{depth}' for number in sorted(sum(inner, [])))
            found += sum(inner, [])
        del graph.node[:]
        graph.node.extend(nodes)
        return found

    names = [f'watched_{number}.0' for number in sorted(surface(model.graph, 0))]
    model.graph.output.extend(_float_value(name) for name in names)
    return names


@dataclass(frozen=True, kw_only=True)
class _Watched(Bundle):
    """A bundle whose graphs are watched while the engine runs them."""

    seen: Mapping[str, Sequence[Histogram]] = field(default_factory=dict)

    def session(self, graph: str, *, threads: int | None = None) -> Session:
        if graph not in self.seen:
            return super().session(graph, threads=threads)
        path = self.folder / f'watched_{graph}.onnx'
        opened = open_session(path, backend=self.backend, threads=threads or self.threads)
        return _Counting(opened, self.seen[graph])


class _Counting:
    """A session that counts its watched outputs and hands on the others."""

    def __init__(self, session: Session, histograms: Sequence[Histogram]):
        self._session, self._histograms = session, histograms
        self.inputs = session.inputs
        self.outputs = {
            name: port for name, port in session.outputs.items() if not name.startswith('watched')
        }

    def run(self, inputs: Mapping[str, np.ndarray], keep: Collection[str] = ()):
        answer = self._session.run(inputs)
        for number, histogram in enumerate(self._histograms):
            histogram.add(answer.pop(f'watched_{number}.0'))
        return answer

    def hold(self, name: str, *parts: np.ndarray) -> np.ndarray:
        return self._session.hold(name, *parts)


# ---- graphs ----


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    return (one.g for one in node.attribute if one.type == AttributeProto.GRAPH)


def _float_value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None, None])


def _named(prefix: str, arrays: Mapping[str, np.ndarray]) -> list[TensorProto]:
    return [
        numpy_helper.from_array(np.asarray(array), f'{prefix}.{name}')
        for name, array in arrays.items()
    ]


def _biases(
    model: ModelProto, constants: Mapping[str, TensorProto]
) -> dict[tuple[int, str], tuple[NodeProto, TensorProto]]:
    """Return the Add that alone reads a product's result and its constant row: (place, result) -> both."""
    readers: dict[str, list[tuple[int, NodeProto | None]]] = {}
    for place, graph in enumerate(subgraphs(model.graph)):
        for node in graph.node:
            for name in node.input:
                readers.setdefault(name, []).append((place, node))
        for value in graph.output:
            readers.setdefault(value.name, []).append((place, None))
    found = {}
    for one in products(model):
        result = one.node.output[0]
        (place, node), *others = readers.get(result, [(-1, None)])
        if others or place != one.place or node is None or node.op_type != 'Add':
            continue
        row = constants.get(next((name for name in node.input if name != result), ''))
        if row is not None and list(row.dims) == [one.weight.dims[1]]:
            found[one.key] = node, row
    return found


def _rewrite(
    model: ModelProto,
    new: Mapping[tuple[int, str], Sequence[NodeProto]],
    gone: Collection[tuple[int, str]] = (),
) -> None:
    """Put new nodes where one stood, by place and first output, leave out those that are gone, and what nobody reads then."""
    graphs = list(subgraphs(model.graph))
    for place in reversed(range(len(graphs))):  # inner ones first: an outer one copies them
        nodes = []
        for node in graphs[place].node:
            key = (place, node.output[0])
            nodes.extend(new.get(key, () if key in gone else (node,)))
        del graphs[place].node[:]
        graphs[place].node.extend(nodes)
    graphs = list(subgraphs(model.graph))
    read = {name for graph in graphs for node in graph.node for name in node.input}
    for graph in graphs:
        made = {name for node in graph.node for name in node.output}
        made |= {one.name for one in [*graph.initializer, *graph.input]}
        kept = [one for one in graph.initializer if one.name in read]
        values = [one for one in graph.value_info if one.name in made]
        del graph.initializer[:], graph.value_info[:]
        graph.initializer.extend(kept)
        graph.value_info.extend(values)
