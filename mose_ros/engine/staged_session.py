"""Runs a graph in stages on TensorRT: reads each decision, and hands over the weights of the expert that it names.

The weights of all experts lie on the GPU from the start; to take another one is to name another address.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mose_ros.engine.session import BackendError, Build, Port, Resident, Session, check_inputs
from mose_ros.engine.tensorrt_session import TensorRTSession

_log = logging.getLogger(__name__)


def open_tensorrt(path: str | Path, build: Build) -> Session:
    """Open a graph on TensorRT, in stages where it chooses experts; else, and where it cannot be cut, as it is.

    Raises what `TensorRTSession` does.
    """
    path = Path(path)
    if not path.is_file():
        return TensorRTSession(path, build)  # which says so
    try:
        from mose_ros.engine import staging
    except ImportError as error:
        reason = f'{error}; pip install mose_ros[tensorrt]'
        _log.warning('%s: its conditions stay, no CUDA graph is recorded: %s', path.stem, reason)
        return TensorRTSession(path, build)
    try:
        found = staging.cut(path)
        builds = [
            replace(
                build,
                part=f'{number + 1}of{len(found.stages)}',
                model=stage.model.SerializeToString(),
                shapes=_shapes(found, stage, build),
                values={name: one for name, one in build.values.items() if name in stage.inputs},
            )
            for number, stage in enumerate(found.stages)
        ]
    except staging.Uncut as reason:
        _log.info('%s: in one piece: %s', path.stem, reason)
        return TensorRTSession(path, build)
    return StagedSession(path, found, [TensorRTSession(path, one) for one in builds])


def _shapes(found, stage, build: Build) -> dict:
    """Return the sizes of a stage's inputs, the least, the usual and the largest, by those of the graph's."""
    from mose_ros.engine.onnx_graph import size_of

    known = [
        {
            size: shapes[place][axis]
            for name, shapes in build.shapes.items()
            for axis, size in enumerate(found.sizes[name])
            if isinstance(size, str)
        }
        for place in range(3)
    ]
    return {
        name: tuple(tuple(size_of(size, one) for size in sizes) for one in known)
        for name, sizes in stage.sizes.items()
        if any(isinstance(size, str) for size in sizes)
    }


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A stage as it is run."""

    part: Session
    inputs: Sequence[str]  # but for the weights
    outputs: Sequence[str]
    experts: Mapping[str, tuple[str, Sequence[Resident]]]  # by input: decision, weights of each


class StagedSession:
    """A graph whose stages are sessions of their own; from outside it is one."""

    provider = TensorRTSession.provider

    def __init__(self, path: Path, staging, parts: Sequence[Session]):
        """Put the weights of all experts on the GPU; of the staging nothing large is kept."""
        self.path, self._decide = path, staging.decide
        self.inputs: Mapping[str, Port] = staging.inputs
        self.outputs: Mapping[str, Port] = staging.outputs
        self._steps = [
            _Step(
                part=part,
                inputs=[name for name in stage.inputs if name not in stage.choices],
                outputs=stage.outputs,
                experts={
                    name: (choice.decision, [part.hold(name, value) for value in choice.values])
                    for name, choice in stage.choices.items()
                },
            )
            for stage, part in zip(staging.stages, parts, strict=True)
        ]
        # numbers and flags pass through the host, where the decisions are read
        self._crossing = {
            name
            for stage in staging.stages
            for name, port in stage.inputs.items()
            if port.dtype.kind == 'f' and name not in stage.choices
        }

    def run(
        self, inputs: Mapping[str, np.ndarray | Resident], keep: Collection[str] = ()
    ) -> dict[str, np.ndarray | Resident]:
        """Return all outputs, those named in `keep` as they lie on the GPU.

        Raises:
            ValueError: an input is missing, foreign, of wrong type or shape, or beyond what the engines were built for.
            BackendError: TensorRT or the GPU fail.
        """
        check_inputs(self.path.name, self.inputs, inputs)
        foreign = [name for name in keep if name not in self.outputs]
        if foreign:
            raise ValueError(f'{self.path.name}: {", ".join(foreign)} cannot be kept')
        values = {**inputs, **self._decide(inputs)}
        for step in self._steps:
            feed = {name: values[name] for name in step.inputs}
            for name, (decision, weights) in step.experts.items():
                feed[name] = self._expert(weights, decision, values[decision])
            kept = [name for name in step.outputs if name in keep or name in self._crossing]
            values.update(step.part.run(feed, keep=kept))
        return {
            name: values[name] if name in keep else _on_host(values[name]) for name in self.outputs
        }

    def hold(self, name: str, *parts: np.ndarray | Resident) -> np.ndarray | Resident:
        """Return an input's value on the GPU, its parts joined along the input's dynamic axis."""
        if name not in self.inputs:
            raise ValueError(f'{self.path.name} has no input {name}')
        for step in self._steps:
            if name in step.inputs:
                return step.part.hold(name, *parts)
        raise ValueError(f'{self.path.name}: {name} is read on the host; hand it over as it is')

    def _expert(self, weights: Sequence[Resident], decision: str, chosen: np.ndarray) -> Resident:
        number = int(np.asarray(chosen).reshape(()))
        if not 0 <= number < len(weights):
            raise BackendError(f'{self.path}: {decision} names expert {number} of {len(weights)}')
        return weights[number]


def _on_host(value: np.ndarray | Resident) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()
