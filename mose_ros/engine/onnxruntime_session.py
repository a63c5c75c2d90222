"""Runs a graph on ONNX Runtime. Knows neither bundles nor what a graph means.

On a CPU the runtime reads inputs where they lie and lends its arena's memory for outputs, which it takes back once
nobody holds them: nothing is copied, and once warm nothing is allocated. Bindings to buffers of our own were measured and
win nothing there (docs/performance.md). On a GPU what is kept stays there.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from mose_ros.engine.session import BackendError, Port, check_inputs, join_axis

_DTYPES = {
    'tensor(float)': np.dtype(np.float32),
    'tensor(float16)': np.dtype(np.float16),
    'tensor(double)': np.dtype(np.float64),
    'tensor(int64)': np.dtype(np.int64),
    'tensor(int32)': np.dtype(np.int32),
    'tensor(uint8)': np.dtype(np.uint8),
    'tensor(bool)': np.dtype(np.bool_),
}
_MEMORIES = {'CUDA': 'cuda'}  # provider -> its memory, where that is not the host's
_OPTIONS = {
    'CUDA': {
        'use_tf32': '0',  # float32 in the ONNX means float32, as on TensorRT
        'cudnn_conv_algo_search': 'HEURISTIC',  # the default tries all, whenever a shape is new
    }
}
_NO_MEMORY = re.compile(
    'std::bad_alloc|failed to allocate|cannot allocate|out of memory|not enough memory', re.I
)


class DeviceValue:
    """A value on the GPU that never changes; the runtime uses its memory again once nobody holds it."""

    def __init__(self, value, dtype: np.dtype):
        self.value, self.dtype, self.shape = value, dtype, tuple(value.shape())

    @property
    def ndim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def numpy(self) -> np.ndarray:
        """Return a copy on the host."""
        return self.value.numpy()


class OnnxRuntimeSession:
    """A graph on ONNX Runtime."""

    def __init__(self, path: str | Path, *, threads: int = 2, provider: str = 'CPU'):
        """Open an ONNX file; threads and provider as in `session.open_session`.

        Raises:
            FileNotFoundError: there is no such ONNX file.
            BackendError: ONNX Runtime cannot open it, or lacks the provider.
        """
        import onnxruntime

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'{self.path} is missing; fetch or export the bundle again')
        if threads < 1:
            raise ValueError(f'threads must be at least 1, not {threads}')
        available = onnxruntime.get_available_providers()
        if f'{provider}ExecutionProvider' not in available:
            known = ', '.join(name.removesuffix('ExecutionProvider') for name in available)
            raise BackendError(
                f'onnxruntime here has no provider {provider!r}, only {known}; '
                'install the onnxruntime package that has it'
            )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin while they wait take the cores from the other nodes (docs/performance.md).
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        options.log_severity_level = 4  # errors are raised; to print them as well says them twice
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.path),
                options,
                providers=[(f'{provider}ExecutionProvider', _OPTIONS.get(provider, {}))],
                enable_fallback=0,  # it would print, and try the same once more
            )
        except Exception as error:  # the runtime raises a dozen unrelated types
            why = _explain(
                error, 'fetch or export the bundle again, or install a newer onnxruntime'
            )
            version = onnxruntime.__version__
            raise BackendError(
                f'{self.path} cannot be opened by onnxruntime {version}: {why}'
            ) from None
        if f'{provider}ExecutionProvider' not in self._session.get_providers():
            raise BackendError(
                f"onnxruntime's provider {provider!r} does not start here; install its libraries "
                "(for CUDA: pip install onnxruntime-gpu[cuda,cudnn]), or name provider 'CPU'"
            )
        self.provider, self._memory = provider, _MEMORIES.get(provider)
        self.inputs = {one.name: _port(one) for one in self._session.get_inputs()}
        self.outputs = {one.name: _port(one) for one in self._session.get_outputs()}
        self._names = list(self.outputs)

    def run(
        self, inputs: Mapping[str, np.ndarray | DeviceValue], keep: Collection[str] = ()
    ) -> dict[str, np.ndarray | DeviceValue]:
        """Return all outputs; those named in `keep` stay on the GPU, on a CPU they are arrays like the others."""
        check_inputs(self.path.name, self.inputs, inputs)
        try:
            if self._memory:
                return self._run_bound(inputs, keep)
            values = self._session.run(self._names, inputs)
        except Exception as error:
            raise BackendError(f'{self.path} failed: {_explain(error)}') from None
        return dict(zip(self._names, values, strict=True))

    def hold(self, name: str, *parts: np.ndarray | DeviceValue) -> np.ndarray:
        """Return an input's value as an array in one piece, its parts joined along the input's dynamic axis.

        Also on a GPU, where the runtime has no way to join: the text's cache lies on the host there.
        """
        axis = join_axis(self.path.name, name, self.inputs[name], parts)
        arrays = [part.numpy() if isinstance(part, DeviceValue) else part for part in parts]
        try:
            return np.concatenate(arrays, axis)
        except MemoryError as error:
            raise BackendError(f'{self.path}: {_explain(error)}') from None

    def _run_bound(self, inputs, keep):
        binding = self._session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, DeviceValue):
                binding.bind_ortvalue_input(name, value.value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in self._names:
            binding.bind_output(name, self._memory if name in keep else 'cpu')
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return {
            name: DeviceValue(value, self.outputs[name].dtype) if name in keep else value.numpy()
            for name, value in zip(self._names, binding.get_outputs(), strict=True)
        }


def _port(value) -> Port:
    if value.type not in _DTYPES:
        raise BackendError(f'{value.name} is a {value.type}, which the engine does not handle')
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Port(_DTYPES[value.type], shape)


def _explain(error: Exception, remedy: str = '') -> str:
    """Return what went wrong in one line, and what to do about it."""
    said = ' '.join(str(error).split()) or type(error).__name__
    said = re.sub(r'^\[ONNXRuntimeError\] : \d+ : \w+ : ', '', said)
    lack = _NO_MEMORY.search(said)
    if lack or isinstance(error, MemoryError):
        said = f'no memory is left ({said[lack.start() :] if lack else said})'
        remedy = 'stop other programs, or take fewer views or a smaller bundle'
    return f'{said}; {remedy}' if remedy else said
