"""The little of CUDA that a session needs: memory, one stream, copies, captured graphs. Knows nothing of TensorRT.

It calls the driver's own library, libcuda.so.1, through ctypes. That library comes with the GPU's driver, so it is on
every machine that can run TensorRT, under one name from CUDA 12 (JetPack 6) to 13 (JetPack 7); cuda-python is on neither
JetPack, and libcudart changes its name with each of them. TensorRT and this module meet in the device's primary context.
"""

import ctypes
import functools
import hashlib
import logging
import threading
import weakref

import numpy as np

from mose_ros.engine.session import BackendError

LIBRARY = 'libcuda.so.1'
_POINTER = ctypes.c_void_p
C_TYPES = {  # of cuda.h -> of ctypes
    'CUdevice': ctypes.c_int,
    'CUdevice_attribute': ctypes.c_int,
    'CUdeviceptr': ctypes.c_uint64,
    'CUstreamCaptureMode': ctypes.c_int,
    'CUresult': ctypes.c_int,
    'int': ctypes.c_int,
    'size_t': ctypes.c_size_t,
    'unsigned int': ctypes.c_uint,
    'unsigned long long': ctypes.c_ulonglong,
    **dict.fromkeys(['CUcontext', 'CUgraph', 'CUgraphExec', 'CUstream'], _POINTER),
}
PROTOTYPES = {  # as cuda.h declares them; each returns a CUresult
    'cuInit': ('unsigned int',),
    'cuDriverGetVersion': ('int *',),
    'cuDeviceGetCount': ('int *',),
    'cuDeviceGet': ('CUdevice *', 'int'),
    'cuDeviceGetName': ('char *', 'int', 'CUdevice'),
    'cuDeviceGetAttribute': ('int *', 'CUdevice_attribute', 'CUdevice'),
    'cuDevicePrimaryCtxRetain': ('CUcontext *', 'CUdevice'),
    'cuCtxSetCurrent': ('CUcontext',),
    'cuCtxGetStreamPriorityRange': ('int *', 'int *'),
    'cuGetErrorName': ('CUresult', 'const char **'),
    'cuMemGetInfo_v2': ('size_t *', 'size_t *'),
    'cuMemAlloc_v2': ('CUdeviceptr *', 'size_t'),
    'cuMemFree_v2': ('CUdeviceptr',),
    'cuMemAllocHost_v2': ('void **', 'size_t'),
    'cuMemFreeHost': ('void *',),
    'cuMemcpyHtoDAsync_v2': ('CUdeviceptr', 'const void *', 'size_t', 'CUstream'),
    'cuMemcpyDtoHAsync_v2': ('void *', 'CUdeviceptr', 'size_t', 'CUstream'),
    'cuMemcpy2DAsync_v2': ('const CUDA_MEMCPY2D *', 'CUstream'),
    'cuStreamCreateWithPriority': ('CUstream *', 'unsigned int', 'int'),
    'cuStreamDestroy_v2': ('CUstream',),
    'cuStreamSynchronize': ('CUstream',),
    'cuStreamBeginCapture_v2': ('CUstream', 'CUstreamCaptureMode'),
    'cuStreamEndCapture': ('CUstream', 'CUgraph *'),
    'cuGraphInstantiateWithFlags': ('CUgraphExec *', 'CUgraph', 'unsigned long long'),
    'cuGraphLaunch': ('CUgraphExec', 'CUstream'),
    'cuGraphDestroy': ('CUgraph',),
    'cuGraphExecDestroy': ('CUgraphExec',),
}
CONSTANTS = {  # of cuda.h's enumerations
    'CUDA_ERROR_OUT_OF_MEMORY': 2,
    'CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR': 75,
    'CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR': 76,
    'CU_MEMORYTYPE_DEVICE': 2,
    'CU_STREAM_CAPTURE_MODE_THREAD_LOCAL': 1,
    'CU_STREAM_NON_BLOCKING': 1,
}
_log = logging.getLogger(__name__)


class CUDA_MEMCPY2D(ctypes.Structure):  # noqa: N801 - the header's name
    """What cuMemcpy2DAsync copies."""

    _fields_ = (
        *(('srcXInBytes', ctypes.c_size_t), ('srcY', ctypes.c_size_t)),
        *(('srcMemoryType', ctypes.c_int), ('srcHost', _POINTER)),
        *(('srcDevice', ctypes.c_uint64), ('srcArray', _POINTER), ('srcPitch', ctypes.c_size_t)),
        *(('dstXInBytes', ctypes.c_size_t), ('dstY', ctypes.c_size_t)),
        *(('dstMemoryType', ctypes.c_int), ('dstHost', _POINTER)),
        *(('dstDevice', ctypes.c_uint64), ('dstArray', _POINTER), ('dstPitch', ctypes.c_size_t)),
        *(('WidthInBytes', ctypes.c_size_t), ('Height', ctypes.c_size_t)),
    )


def load():
    """Return the driver's library with its prototypes set; BackendError where it is missing."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise BackendError(
            f"there is no GPU driver here ({error}); install NVIDIA's driver, or use "
            "backend 'onnxruntime'"
        ) from None
    for name, types in PROTOTYPES.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise BackendError(
                f'{LIBRARY} has no {name}: the GPU driver is older than CUDA 12; update it'
            ) from None
        function.argtypes = [_POINTER if one.endswith('*') else C_TYPES[one] for one in types]
        function.restype = C_TYPES['CUresult']
    return library


@functools.lru_cache(maxsize=1)
def device() -> 'Device':
    """Return this process's GPU, opened once; BackendError where there is none."""
    return Device(load())


class Device:
    """A GPU. What it allocates lives as long as the buffer objects that it returns."""

    def __init__(self, library, index: int = 0):
        """Open the GPU; BackendError where the driver has none or does not answer."""
        self._library = library
        self._call('cuInit', 0)
        count = self._get('cuDeviceGetCount', ctypes.c_int())
        if index >= count:
            raise BackendError(
                f"the driver sees {count} GPUs; make one visible, or use backend 'onnxruntime'"
            )
        handle = self._get('cuDeviceGet', ctypes.c_int(), index)
        name = ctypes.create_string_buffer(256)
        self._call('cuDeviceGetName', name, len(name), handle)
        self.name = name.value.decode()
        major, minor = (
            self._get(
                'cuDeviceGetAttribute',
                ctypes.c_int(),
                CONSTANTS[f'CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}'],
                handle,
            )
            for part in ('MAJOR', 'MINOR')
        )
        self.architecture = f'{major}.{minor}'  # SM
        version = self._get('cuDriverGetVersion', ctypes.c_int())
        self.cuda = f'{version // 1000}.{version % 1000 // 10}'  # what the driver speaks
        self._constants = weakref.WeakValueDictionary()  # by the sha256 of their bytes
        self._holding = threading.Lock()
        self._context = self._get('cuDevicePrimaryCtxRetain', _POINTER(), handle)
        self.activate()

    def activate(self) -> None:
        """Make the GPU the calling thread's; each thread once before its first call."""
        self._call('cuCtxSetCurrent', self._context)

    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free and all there are."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call('cuMemGetInfo_v2', ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, nbytes: int) -> 'DeviceBuffer':
        """Return memory on the GPU."""
        address = self._get('cuMemAlloc_v2', ctypes.c_uint64(), max(nbytes, 1))
        buffer = DeviceBuffer(address, nbytes)
        weakref.finalize(buffer, self._release, 'cuMemFree_v2', address)
        return buffer

    def allocate_host(self, nbytes: int) -> 'HostBuffer':
        """Return page-locked memory of the host, which the GPU copies from and to by itself."""
        address = self._get('cuMemAllocHost_v2', _POINTER(), max(nbytes, 1))
        buffer = HostBuffer(address, nbytes)
        weakref.finalize(buffer, self._release, 'cuMemFreeHost', address)
        return buffer

    def constant(self, value: np.ndarray, stream: 'Stream') -> 'DeviceBuffer':
        """Return memory on the GPU with these bytes, which nobody changes: one piece for all who ask for the same."""
        key = value.nbytes, hashlib.sha256(np.ascontiguousarray(value)).digest()
        with self._holding:
            buffer = self._constants.get(key)
            if buffer is None:
                source = self.allocate_host(value.nbytes)  # is given back at once
                np.copyto(source.view(value.dtype, value.shape), value)
                buffer = self.allocate(value.nbytes)
                stream.upload(buffer.address, source, value.nbytes)
                stream.wait()
                self._constants[key] = buffer
            return buffer

    def open_stream(self, *, background: bool = False) -> 'Stream':
        """Return a queue of work; one in the background yields to all that are not."""
        least, greatest = ctypes.c_int(), ctypes.c_int()
        self._call('cuCtxGetStreamPriorityRange', ctypes.byref(least), ctypes.byref(greatest))
        handle = self._get(
            'cuStreamCreateWithPriority',
            _POINTER(),
            CONSTANTS['CU_STREAM_NON_BLOCKING'],
            (least if background else greatest).value,
        )
        stream = Stream(self, handle)
        weakref.finalize(stream, self._release, 'cuStreamDestroy_v2', handle)
        return stream

    def _call(self, name, *arguments):
        result = getattr(self._library, name)(*arguments)
        if not result:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(result, ctypes.byref(text))
        what = text.value.decode() if text.value else f'error {result}'
        if result == CONSTANTS['CUDA_ERROR_OUT_OF_MEMORY']:
            raise BackendError(
                f'{name}: the GPU is out of memory ({what}); end what else uses it, or export '
                'the bundle with --precision float16'
            )
        raise BackendError(f'{name}: {what}; see the messages of the GPU driver (dmesg)')

    def _get(self, name, value, *arguments):
        self._call(name, ctypes.byref(value), *arguments)
        return value.value

    def _release(self, name, handle):
        try:
            self.activate()
            self._call(name, handle)
        except BackendError as error:  # the process ends, or an earlier error has said why
            _log.debug('%s', error)


class DeviceBuffer:
    """Memory on the GPU."""

    def __init__(self, address: int, nbytes: int):
        self.address, self.nbytes = address, nbytes


class HostBuffer:
    """Page-locked memory of the host."""

    def __init__(self, address: int, nbytes: int):
        self.address, self.nbytes = address, nbytes

    def view(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """Return the memory's beginning as an array, valid as long as this buffer."""
        count = int(np.prod(shape, dtype=np.int64))
        raw = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(self.address)
        return np.frombuffer(raw, dtype, count).reshape(shape)


class Stream:
    """A queue of work on the GPU. Not for several threads at once."""

    def __init__(self, owner: Device, handle: int):
        self._owner, self.handle = owner, handle

    def upload(self, target: int, source: HostBuffer, nbytes: int) -> None:
        """Queue a copy from the host to an address on the GPU."""
        self._owner._call('cuMemcpyHtoDAsync_v2', target, source.address, nbytes, self.handle)

    def download(self, target: HostBuffer, source: int, nbytes: int) -> None:
        """Queue a copy from an address on the GPU to the host."""
        self._owner._call('cuMemcpyDtoHAsync_v2', target.address, source, nbytes, self.handle)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Queue a copy on the GPU of `rows` rows of `width` bytes that lie a pitch apart.

        The driver may refuse pitches that are not of its own choice (cuda.h, cuMemcpy2DAsync); a refusal is raised.
        """
        kind = CONSTANTS['CU_MEMORYTYPE_DEVICE']
        order = CUDA_MEMCPY2D(
            srcMemoryType=kind,
            srcDevice=source,
            srcPitch=source_pitch,
            dstMemoryType=kind,
            dstDevice=target,
            dstPitch=target_pitch,
            WidthInBytes=width,
            Height=rows,
        )
        self._owner._call('cuMemcpy2DAsync_v2', ctypes.byref(order), self.handle)

    def wait(self) -> None:
        """Wait until all queued work is done; what went wrong in it is raised here."""
        self._owner._call('cuStreamSynchronize', self.handle)

    def begin_capture(self) -> None:
        """Record what is queued from here on instead of doing it."""
        mode = CONSTANTS['CU_STREAM_CAPTURE_MODE_THREAD_LOCAL']
        self._owner._call('cuStreamBeginCapture_v2', self.handle, mode)

    def end_capture(self) -> 'Graph':
        """Return what was recorded; BackendError where something in it cannot be recorded."""
        recorded = _POINTER()
        self._owner._call('cuStreamEndCapture', self.handle, ctypes.byref(recorded))
        template = recorded.value
        try:
            handle = self._owner._get('cuGraphInstantiateWithFlags', _POINTER(), template, 0)
        finally:
            self._owner._call('cuGraphDestroy', template)
        graph = Graph(handle)
        weakref.finalize(graph, self._owner._release, 'cuGraphExecDestroy', handle)
        return graph

    def launch(self, graph: 'Graph') -> None:
        """Queue all that was recorded, at the cost of one call."""
        self._owner._call('cuGraphLaunch', graph.handle, self.handle)


class Graph:
    """Recorded work."""

    def __init__(self, handle: int):
        self.handle = handle
