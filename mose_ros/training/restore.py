"""The checkpoint that a bundle was exported from, made anew of its graphs: to train on from, or to export in another precision.

An export turns weights round, joins them and moves them into conditions. None of that is undone by rules: a network of the bundle's
shape is traced whose every number says which it is, so its graphs say where each went, and the bundle's graphs are read there.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from mose_ros.core.bundle import GRAPHS, TOKENIZER, Manifest
from mose_ros.core.files import folder_beside
from mose_ros.core.prompt import Tokenizer
from mose_ros.modeling.driver import VLM, MoseDriver
from mose_ros.training.fit import VIEWS, Fit
from mose_ros.training.graphs import trace
from mose_ros.training.stored import check_out
from mose_ros.training.twin import config_of

# Bits of the least normal number of float32 and of 2**-100: between them each pattern is a number of its own, which copies keep.
LEAST, GREATEST = 0x00800000, 0x0D800000
Key = tuple[
    str, ...
]  # where a node reads a constant: graph, node, branch and node within it, input
_LOG = logging.getLogger(__name__)


def restore(bundle: str | Path, out: str | Path, seed: int = 0) -> list[str]:
    """Write the checkpoint of a float32 bundle (`MoseDriver.load` reads it) and return the parameters that no graph holds.

    Those serve the training alone, as the head for semantics, and are drawn by the seed. Weights stored as float16 come back as
    rounded. At the end the checkpoint is traced: its graphs must hold the bundle's numbers, bit for bit. ValueError, with nothing
    written, where they don't, and for a bundle that has changed, is of another precision, or does not say what it was made of.
    """
    bundle, out = Path(bundle), Path(out)
    check_out(out)
    m = Manifest.load(bundle)
    if m.precision != 'float32':
        raise ValueError(
            f'{bundle} computes in {m.precision}, which has lost what its weights were; name the float32 bundle'
        )
    config = config_of(m)
    image_id = Tokenizer.load(bundle / TOKENIZER).image_id
    torch.manual_seed(seed)
    driver = MoseDriver(replace(config, decoder=replace(config.decoder, image_id=image_id)))
    driver.eval().requires_grad_(False)
    held = dict(_held(bundle))
    values, known = _read(driver, held, bundle)
    _fill(driver, lambda numbers: values[numbers])
    _compare(dict(_traced(driver)), held, bundle)
    starts = _starts(driver)
    drawn = [
        name for name, (start, p) in starts.items() if not known[start : start + p.numel()].all()
    ]
    with folder_beside(out) as partial:
        driver.vlm.save_pretrained(partial / VLM)
        driver.save_rest(partial)
        _fit(m).save(partial, bundle / TOKENIZER)
    _LOG.info('%s: %d parameters; drawn anew: %s', out, len(starts), ', '.join(drawn) or 'none')
    return drawn


def _fit(m: Manifest) -> Fit:
    return Fit(
        action_low=m.action_low,
        action_high=m.action_high,
        proprio_low=m.proprio_low,
        proprio_high=m.proprio_high,
        **{name: getattr(m, name) for name in VIEWS},
        training=m.training,
        data=m.data,
    )


# ---- where each number of the network lies in the graphs ----


def _read(
    driver: MoseDriver, held: dict[Key, np.ndarray], bundle: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return all numbers of the network one after the other, and which of them the graphs hold; the rest are as they were."""
    values = np.concatenate([p.detach().numpy().ravel() for _, p in _starts(driver).values()])
    known = np.zeros(len(values), bool)
    if len(values) > GREATEST - LEAST:
        raise ValueError(f'{bundle} has more numbers than there are names for, {len(values)}')
    # So near to zero that what is computed of names is no name; were it one, the comparison at the end would refuse it.
    _fill(driver, lambda numbers: (LEAST + numbers).astype(np.uint32).view(np.float32))
    for graph in GRAPHS:  # a foreign bundle is refused at its first graph that differs
        traced = dict(_traced(driver, graph))
        there = {key: value for key, value in held.items() if key[0] == graph}
        there = {key: np.zeros_like(one) for key, one in traced.items() if _is_bias(key)} | there
        _check_places(traced, there, bundle)
        for key, value in there.items():
            if value.dtype != np.float32:
                continue
            names = traced[key].view(np.uint32).astype(np.int64) - LEAST
            is_copy = (names >= 0) & (names < len(values))
            values[names[is_copy]] = value[is_copy]
            known[names[is_copy]] = True
    return values, known


def _starts(driver: MoseDriver) -> dict[str, tuple[int, nn.Parameter]]:
    """Return each parameter and the number of its first number; what is tied comes once."""
    found, start = {}, 0
    for name, parameter in driver.named_parameters():
        found[name] = start, parameter
        start += parameter.numel()
    return found


def _fill(driver: MoseDriver, of: Callable[[np.ndarray], np.ndarray]) -> None:
    """Give every number of the network the value of its number."""
    for start, parameter in _starts(driver).values():
        value = of(np.arange(start, start + parameter.numel()))
        parameter.copy_(torch.from_numpy(value).view(parameter.shape))


def _check_places(
    traced: Mapping[Key, np.ndarray], there: Mapping[Key, np.ndarray], bundle: Path
) -> None:
    other = traced.keys() ^ there.keys()
    other |= {
        key
        for key in traced.keys() & there.keys()
        if (there[key].shape, there[key].dtype) != (traced[key].shape, traced[key].dtype)
    }
    if other:
        raise ValueError(
            f'{bundle}: {_at(min(other))} is not where this version exports it; restore it with the version of '
            'mose_ros that made it (`commit` in its manifest)'
        )


def _traced(driver: MoseDriver, *graphs: str) -> Iterator[tuple[Key, np.ndarray]]:
    """Yield what the nodes of the network's graphs, of all if none is named, read of constants."""
    for graph in graphs or GRAPHS:
        yield from _read_by_nodes(trace(driver, graph).graph, (graph,))


def _held(bundle: Path) -> Iterator[tuple[Key, np.ndarray]]:
    """Yield what the nodes of a bundle's graphs read of constants; what is stored as float16 as the float32 that is computed with."""
    for graph in GRAPHS:
        yield from _read_by_nodes(onnx.load(bundle / f'{graph}.onnx').graph, (graph,))


def _read_by_nodes(
    graph: onnx.GraphProto, place: Key, around: Mapping[str, np.ndarray] | None = None
) -> Iterator[tuple[Key, np.ndarray]]:
    """Yield each constant that a node reads with the node's place.

    Constants have no place of their own: equal ones are merged by the exporter, and an export moves them into branches.
    """
    known = {
        **(around or {}),
        **{one.name: numpy_helper.to_array(one) for one in graph.initializer},
    }
    nodes = []
    for node in graph.node:
        if node.op_type == 'Cast' and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]].astype(np.float32)
        else:
            nodes.append(node)
    for number, node in enumerate(nodes):
        here = (*place, f'{node.op_type} {number}')
        for index, name in enumerate(node.input):
            if name in known:
                yield (*here, f'input {index}'), known[name]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _read_by_nodes(attribute.g, (*here, attribute.name), known)


def _is_bias(key: Key) -> bool:
    """Say whether this is a bias, which the exporter leaves out where it is 0."""
    node, read = key[-2:]
    return read == 'input 2' and node.startswith(('Gemm ', 'Conv '))


def _compare(made: Mapping[Key, np.ndarray], held: Mapping[Key, np.ndarray], bundle: Path) -> None:
    """Raise ValueError, naming where, unless all constants are there with the same bits."""
    for key, value in held.items():
        if key not in made or value.tobytes() != made[key].tobytes():
            raise ValueError(
                f'{bundle}: {_at(key)} cannot be made of weights again; train from the checkpoint that it was exported from'
            )


def _at(key: Key) -> str:
    graph, *place = key
    return f'{", ".join(place)} of {graph}.onnx'
