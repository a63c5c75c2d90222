"""Runs a TensorRT engine: fixed buffers, one stream, CUDA graphs. Knows neither how it was built nor what it means.

All that runs need is allocated when the session is opened or the first time that it is used, at the largest size that the
engine takes: a run allocates nothing. Where the same shapes come at the same addresses again, the work is recorded and
replayed; that needs a graph without conditions and loops, which TensorRT runs in step with the host.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mose_ros.engine import cuda, tensorrt_build
from mose_ros.engine.session import BackendError, Build, Port, check_inputs, join_axis

if TYPE_CHECKING:
    import tensorrt as trt

# CUDA graphs that are kept, the least recently used goes; each costs some MB. What returns only after so many others is not
# recorded: it would be gone before it is replayed, as each token of a text, whose cache has a length of its own.
RECORDED = 8
_DTYPES = {  # by the name of a trt.DataType
    'FLOAT': np.dtype(np.float32),
    'HALF': np.dtype(np.float16),
    'INT64': np.dtype(np.int64),
    'INT32': np.dtype(np.int32),
    'BOOL': np.dtype(np.bool_),
    'UINT8': np.dtype(np.uint8),
}
_log = logging.getLogger(__name__)


class DeviceArray:
    """A value of an input or output on the GPU that never changes; its memory is used again once nobody holds it."""

    def __init__(
        self,
        session: TensorRTSession,
        name: str,
        buffer: cuda.DeviceBuffer,
        dtype: np.dtype,
        shape: tuple[int, ...],
    ):
        self._session, self.name, self._buffer = session, name, buffer
        self.address, self.dtype, self.shape = buffer.address, dtype, shape

    @property
    def ndim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return _nbytes(self.dtype, self.shape)

    def numpy(self) -> np.ndarray:
        """Return a copy on the host."""
        return self._session.fetch(self)


class TensorRTSession:
    """A graph on TensorRT, built where the cache does not have it."""

    provider = 'TensorRT'

    def __init__(self, path: str | Path, build: Build):
        """Open the engine and its stream.

        Raises:
            FileNotFoundError: there is no such ONNX file.
            BackendError: no GPU, no TensorRT, or the engine cannot be built, kept or opened.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'{self.path} is missing; fetch or export the bundle again')
        trt = tensorrt_build.load()
        self._gpu = cuda.device()
        self._gpu.activate()
        self._name = tensorrt_build.graph_name(self.path, build)
        opened, notes = tensorrt_build.open_engine(self.path, build, self._gpu)
        self._engine: trt.ICudaEngine = opened
        self._strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._lock = threading.RLock()
        self._stream = self._gpu.open_stream(background=build.background)

        self.inputs, self.outputs, self._on_host = {}, {}, set()
        self._limits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self.inputs[name] = port = self._port(name)
                least = largest = port.shape
                if None in port.shape:
                    least, _, largest = self._engine.get_tensor_profile_shape(name, 0)
                self._limits[name] = (tuple(least), tuple(largest))
            else:
                self.outputs[name] = self._port(name)
            if self._engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                self._on_host.add(name)

        # All contexts work in the same memory, one after the other: a recorded graph belongs to its context.
        self._scratch = self._gpu.allocate(self._engine.device_memory_size_v2)
        self._context: trt.IExecutionContext = self._open_context()
        self._shapes: dict[str, tuple[int, ...]] = {}  # that the context has been told
        self._staged: dict[str, cuda.HostBuffer] = {}
        self._placed: dict[str, cuda.DeviceBuffer] = {}
        self._pools: dict[str, _Pool] = {}
        self._largest_outputs = self._measure_outputs()
        self._seen: OrderedDict = OrderedDict()  # shapes and addresses of the last runs
        self._recorded: OrderedDict = OrderedDict()
        flow = notes['control_flow']
        self._records = not flow and not self._on_host
        why = f'none, it has {flow}' if flow else 'recorded where a shape returns soon'
        _log.info('%s: CUDA graphs: %s', self._name, why)

    def run(
        self, inputs: Mapping[str, np.ndarray | DeviceArray], keep: Collection[str] = ()
    ) -> dict[str, np.ndarray | DeviceArray]:
        """Return all outputs, those named in `keep` as DeviceArrays; inputs may be such of any session.

        Raises:
            ValueError: an input is missing, foreign, of wrong type or shape, or beyond what the engine was built for.
            BackendError: TensorRT or the GPU fail.
        """
        check_inputs(self.path.name, self.inputs, inputs)
        foreign = [name for name in keep if name not in self.outputs or name in self._on_host]
        if foreign:
            raise ValueError(f'{self.path.name}: {", ".join(foreign)} cannot be kept')
        for name, value in inputs.items():
            self._check_limits(name, tuple(value.shape))
        with self._lock:
            self._gpu.activate()
            shapes = {name: tuple(value.shape) for name, value in inputs.items()}
            addresses = {name: self._place(name, value) for name, value in inputs.items()}
            answers = self._infer(shapes, addresses)
            addresses.update((name, answer.address) for name, answer in answers.items())
            self._execute(shapes, addresses)
            for name, answer in answers.items():
                if name not in keep and name not in self._on_host:
                    self._stream.download(self._stage(name), answer.address, answer.nbytes)
            self._stream.wait()
            return {
                name: answer if name in keep else self._stage(name).view(*kind).copy()
                for name, answer in answers.items()
                for kind in [(answer.dtype, answer.shape)]
            }

    def hold(self, name: str, *parts: np.ndarray | DeviceArray) -> DeviceArray:
        """Return an input's value on the GPU, its parts joined along the input's dynamic axis, without the host.

        To choose one of several held values costs an address and no copy. Values of an input without such an axis, as
        weights are, lie there once for all sessions that hold the same.
        """
        axis = join_axis(self.path.name, name, self.inputs[name], parts)
        if None not in self.inputs[name].shape:
            return self._hold_constant(name, parts[0])
        length = sum(part.shape[axis] for part in parts)
        shape = (*parts[0].shape[:axis], length, *parts[0].shape[axis + 1 :])
        largest = self._limits[name][1]
        if any(size > limit for size, limit in zip(shape, largest, strict=True)):
            raise ValueError(f'{self.path.name}: {name} takes at most {largest}, not {shape}')
        with self._lock:
            self._gpu.activate()
            joined = self._new(name, self.inputs[name].dtype, shape)
            rows = int(np.prod(shape[:axis], dtype=np.int64))
            pitch, done = joined.nbytes // rows, 0
            for part in parts:
                width = part.nbytes // rows
                source = self._place(name, part)
                self._stream.copy_rows(joined.address + done, pitch, source, width, width, rows)
                if not isinstance(part, DeviceArray):
                    self._stream.wait()  # the next part comes through the same memory
                done += width
            self._stream.wait()
            return joined

    def _hold_constant(self, name, value):
        if isinstance(value, DeviceArray):
            return value
        with self._lock:
            self._gpu.activate()
            buffer = self._gpu.constant(value, self._stream)
        return DeviceArray(self, name, buffer, value.dtype, tuple(value.shape))

    def fetch(self, value: DeviceArray) -> np.ndarray:
        """Return a copy on the host of a value that this session made."""
        with self._lock:
            self._gpu.activate()
            stage = self._stage(value.name)
            self._stream.download(stage, value.address, value.nbytes)
            self._stream.wait()
            return stage.view(value.dtype, value.shape).copy()

    def _port(self, name):
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise BackendError(f'{name} is a {kind}, which the engine does not handle')
        shape = tuple(self._engine.get_tensor_shape(name))
        return Port(_DTYPES[kind], tuple(None if size < 0 else size for size in shape))

    def _open_context(self) -> trt.IExecutionContext:
        context: trt.IExecutionContext = self._engine.create_execution_context(self._strategy)
        if context is None:
            said = tensorrt_build.listener().take_errors()
            raise BackendError(f'{self.path} cannot be run: {tensorrt_build.explain(said)}')
        context.set_device_memory(self._scratch.address, self._engine.device_memory_size_v2)
        return context

    def _measure_outputs(self):
        """Return the bytes of each output when all inputs are at their largest."""
        for name in self.inputs:
            self._context.set_input_shape(name, self._limits[name][1])
        sizes = {name: self._context.get_max_output_size(name) for name in self.outputs}
        unknown = [name for name, size in sizes.items() if size < 0]
        if unknown:
            raise BackendError(
                f'{self.path}: the size of output {", ".join(unknown)} depends on values; export '
                'the bundle again'
            )
        return sizes

    def _check_limits(self, name, shape):
        least, largest = self._limits[name]
        for size, low, high in zip(shape, least, largest, strict=True):
            if not low <= size <= high:
                raise ValueError(
                    f'{self.path.name}: {name} {shape} is beyond what the engine was built for, '
                    f'{least} to {largest}'
                )

    def _stage(self, name):
        """Return the page-locked memory that an input or output passes through."""
        if name not in self._staged:
            self._staged[name] = self._gpu.allocate_host(self._largest(name))
        return self._staged[name]

    def _largest(self, name):
        if name in self.outputs:
            return self._largest_outputs[name]
        return _nbytes(self.inputs[name].dtype, self._limits[name][1])

    def _place(self, name, value):
        """Return where TensorRT finds an input; an array of the host is on its way there."""
        if isinstance(value, DeviceArray):
            if name not in self._on_host:
                return value.address
            value = value.numpy()
        stage = self._stage(name)
        np.copyto(stage.view(value.dtype, value.shape), value)
        if name in self._on_host:
            return stage.address
        if name not in self._placed:
            self._placed[name] = self._gpu.allocate(self._largest(name))
        target = self._placed[name].address
        self._stream.upload(target, stage, value.nbytes)
        return target

    def _new(self, name, dtype, shape):
        if name not in self._pools:
            self._pools[name] = _Pool(self, name, self._largest(name))
        return self._pools[name].new(dtype, shape)

    def _infer(self, shapes, addresses):
        """Tell the context the inputs' shapes and return the outputs' places."""
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                if not self._context.set_input_shape(name, shape):
                    self._shapes.clear()
                    raise BackendError(self._failure(f'refuses {name} {shape}'))
                self._shapes[name] = shape
        for name in self._on_host & self.inputs.keys():
            self._context.set_tensor_address(name, addresses[name])
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise BackendError(self._failure(f'cannot infer shapes ({error})')) from None
        if missing:
            raise BackendError(self._failure(f'lacks {", ".join(missing)}'))
        answers = {}
        for name, port in self.outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            answers[name] = (
                _HostArray(self._stage(name), port.dtype, shape)
                if name in self._on_host
                else self._new(name, port.dtype, shape)
            )
        return answers

    def _execute(self, shapes, addresses):
        key = (tuple(shapes.items()), tuple(sorted(addresses.items())))
        returns = self._seen.pop(key, False)
        self._seen[key] = True
        while len(self._seen) > RECORDED:
            self._seen.popitem(last=False)
        if key in self._recorded:
            self._recorded.move_to_end(key)
            self._stream.launch(self._recorded[key][1])
            return
        self._enqueue(self._context, addresses)
        if returns and self._records:
            self._record(key, shapes, addresses)

    def _enqueue(self, context: trt.IExecutionContext, addresses):
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(self._failure(f'refuses the address of {name}'))
        if not context.execute_async_v3(self._stream.handle):
            raise BackendError(self._failure('failed'))

    def _record(self, key, shapes, addresses):
        """Record this work in a context of its own, since one that goes on would spoil what was recorded in it."""
        while len(self._recorded) >= RECORDED:
            self._recorded.popitem(last=False)
        self._stream.wait()
        context = self._open_context()
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        self._enqueue(context, addresses)  # what a new shape sets off must not be recorded
        self._stream.wait()
        failure, graph = '', None
        self._stream.begin_capture()
        try:
            self._enqueue(context, addresses)
        except BackendError as error:
            failure = str(error)
        try:  # also after a failure: it is what ends the recording
            graph = self._stream.end_capture()
        except BackendError as error:
            failure = failure or str(error)
        if failure:
            self._records = False
            _log.warning('%s: runs without CUDA graphs: %s', self._name, failure)
            return
        self._recorded[key] = (context, graph)

    def _failure(self, what):
        said = tensorrt_build.listener().take_errors()
        return f'{self.path}: TensorRT {what}: {tensorrt_build.explain(said)}'


class _HostArray:
    """An output that TensorRT leaves on the host."""

    def __init__(self, buffer, dtype, shape):
        self.address, self.dtype, self.shape = buffer.address, dtype, shape


class _Pool:
    """Memory for the values of one input or output, each piece as large as the largest of them."""

    def __init__(self, session: TensorRTSession, name: str, size: int):
        self._session, self._name, self._size = session, name, size
        self._free: list[cuda.DeviceBuffer] = []

    def new(self, dtype, shape) -> DeviceArray:
        """Return a value in the last piece given back: the same address as in the last run, where nobody kept that."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = self._session._gpu.allocate(self._size)
        value = DeviceArray(self._session, self._name, buffer, dtype, shape)
        weakref.finalize(value, self._free.append, buffer)
        return value


def _nbytes(dtype, shape):
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
