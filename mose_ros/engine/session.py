"""One graph, opened on an inference runtime: named numpy arrays in, named numpy arrays out.

The seam between the engine and the runtimes. It knows nothing of bundles and of what a graph means. A runtime is
imported where a session of its is opened, so a machine needs only the one that it uses.
"""

import importlib.util
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

BACKENDS = ('auto', 'onnxruntime', 'tensorrt')
_log = logging.getLogger(__name__)


class BackendError(RuntimeError):
    """A runtime that is not installed or cannot run a graph; the message names it and the remedy."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; a dimension that is not fixed is None."""

    dtype: np.dtype
    shape: tuple[int | None, ...]

    def accepts(self, array: 'np.ndarray | Resident') -> bool:
        """Return whether the array has this type and fits this shape."""
        if array.dtype != self.dtype or array.ndim != len(self.shape):
            return False
        return array.shape == self.shape or all(
            size is None or size == actual
            for size, actual in zip(self.shape, array.shape, strict=True)
        )

    def __str__(self):
        sizes = ', '.join('any' if size is None else str(size) for size in self.shape)
        return f'{self.dtype} ({sizes})'


class Resident(Protocol):
    """A value that stays where a runtime computed it; on a CPU an array is one.

    Nobody changes it, and its memory is used again once nobody holds it.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    ndim: int


class Session(Protocol):
    """An opened graph. May be run from several threads at once."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    provider: str  # what computes: 'CPU' or 'CUDA' of ONNX Runtime, or 'TensorRT'

    def run(
        self, inputs: Mapping[str, np.ndarray | Resident], keep: Collection[str] = ()
    ) -> dict[str, np.ndarray | Resident]:
        """Return all outputs; those named in `keep` stay on the runtime's device, for its other graphs to take.

        ValueError names an input that is missing, foreign or of wrong type or shape.
        """

    def hold(self, name: str, *parts: np.ndarray | Resident) -> np.ndarray | Resident:
        """Return an input's value on the runtime's device, its parts joined along the input's dynamic axis.

        So a cache grows from token to token, and so the weights of all experts lie ready: another one is chosen by
        handing over another value.
        """


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a runtime that builds ahead must know of a graph beside its file. Shapes: the least, the usual, the largest."""

    files: Mapping[str, str]  # the ONNX file and its external data, beside each other -> sha256
    precision: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # if dynamic
    values: Mapping[str, tuple[int, int]]  # of integer inputs: the least and the largest
    folder: Path | None = None  # for what is built; None: engine_cache.default_folder()
    workspace: int  # bytes that the builder may use beside the weights
    background: bool = False  # yields to the sessions that are not
    model: bytes | None = None  # a part of the file, with the same weights, instead of it
    part: str = ''  # its name


def choose_backend(backend: str) -> str:
    """Return the backend to use: the named one, or for 'auto' the best that can be used here, with the reason logged."""
    if backend not in BACKENDS:
        raise ValueError(f'no backend {backend!r}; known: {", ".join(BACKENDS)}')
    lack = '' if backend == 'onnxruntime' else _why_not_tensorrt()
    if backend == 'tensorrt' and lack:
        raise BackendError(lack)
    if backend == 'tensorrt':
        return backend
    if not lack and backend == 'auto':
        _log.info('backend tensorrt: it is installed and a GPU is there')
        return 'tensorrt'
    if importlib.util.find_spec('onnxruntime') is None:
        raise BackendError('onnxruntime is not installed; pip install onnxruntime')
    if backend == 'auto':
        provider, reason = choose_provider()
        _log.info(
            'backend onnxruntime on %s: %s; not tensorrt: %s', provider, reason, lack.split(';')[0]
        )
    return 'onnxruntime'


def choose_provider() -> tuple[str, str]:
    """Return the best execution provider of the installed ONNX Runtime that can be used here, and the reason."""
    import onnxruntime

    from mose_ros.engine import cuda

    if 'CUDAExecutionProvider' not in onnxruntime.get_available_providers():
        return 'CPU', 'this onnxruntime has no CUDA provider'
    try:
        return 'CUDA', f'there is a {cuda.device().name}'
    except BackendError as error:
        return 'CPU', str(error).split(';')[0]


def _why_not_tensorrt() -> str:
    """Return what TensorRT lacks here, with the remedy, or nothing."""
    from mose_ros.engine import cuda, tensorrt_build

    try:
        tensorrt_build.load()
        cuda.device()
    except BackendError as error:
        return str(error)
    return ''


def check_inputs(
    graph: str, ports: Mapping[str, Port], inputs: Mapping[str, np.ndarray | Resident]
) -> None:
    """Raise ValueError naming an input that is missing, foreign or of wrong type or shape."""
    if inputs.keys() != ports.keys():
        raise ValueError(f'{graph}: {_difference(ports, inputs)}')
    for name, port in ports.items():
        value = inputs[name]
        if not port.accepts(value):
            raise ValueError(f'{graph}: {name} must be {port}, got {value.dtype} {value.shape}')


def open_session(
    path: str | Path,
    *,
    backend: str = 'auto',
    threads: int = 2,
    provider: str = '',
    build: Build | None = None,
) -> Session:
    """Open an ONNX file; its external data is looked for beside it.

    Args:
        threads: of one run on a CPU; more than the cores that nobody else uses makes it slower.
        provider: execution provider of ONNX Runtime without its suffix, such as 'CPU' or 'CUDA'; the best by default.
        build: needed by 'tensorrt' alone; without it 'auto' is 'onnxruntime'.
    """
    chosen = choose_backend('onnxruntime' if backend == 'auto' and build is None else backend)
    if chosen == 'tensorrt':
        from mose_ros.engine.staged_session import open_tensorrt

        if build is None:
            raise ValueError(f"{path}: backend 'tensorrt' needs `build`: open it from its bundle")
        return open_tensorrt(path, build)
    from mose_ros.engine.onnxruntime_session import OnnxRuntimeSession

    if provider:
        return OnnxRuntimeSession(path, threads=threads, provider=provider)
    provider, _ = choose_provider()
    if provider != 'CPU':
        try:
            return OnnxRuntimeSession(path, threads=threads, provider=provider)
        except BackendError as error:  # it is built in, but its libraries are not there
            _log.warning('%s; the CPU does it', error)
    return OnnxRuntimeSession(path, threads=threads, provider='CPU')


def join_axis(graph: str, name: str, port: Port, parts: Sequence[np.ndarray | Resident]) -> int:
    """Return the axis along which an input's value is joined from parts; ValueError where that cannot be."""
    for part in parts:
        if not port.accepts(part):
            raise ValueError(f'{graph}: {name} must be {port}, got {part.dtype} {part.shape}')
    if None in port.shape:
        return port.shape.index(None)
    if len(parts) > 1:
        raise ValueError(f'{graph}: {name} has no dynamic axis to join along')
    return 0


def _difference(expected: Sequence[str], actual: Sequence[str]) -> str:
    missing = [name for name in expected if name not in actual]
    foreign = [name for name in actual if name not in expected]
    parts = [f'lacks {", ".join(missing)}'] if missing else []
    parts += [f'does not know {", ".join(foreign)}'] if foreign else []
    return ' and '.join(parts)
