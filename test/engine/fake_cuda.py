"""A GPU driver whose memory is the host's, for tests: what is queued happens when somebody waits, as on a GPU.

It stands in the place of libcuda.so.1, below mose_ros/engine/cuda.py, so that all above the driver runs for real. Addresses
are checked: whatever reaches outside of what is allocated, or into what was freed, raises.
"""

import ctypes
from collections import Counter

from mose_ros.engine.cuda import CONSTANTS

NO_DEVICE, NOT_PERMITTED = 100, 800  # of CUresult
NAMES = {2: b'CUDA_ERROR_OUT_OF_MEMORY', 100: b'CUDA_ERROR_NO_DEVICE', 800: b'NOT_PERMITTED'}


class FakeDriver:
    """The functions of PROTOTYPES, and `submit` and `array`, by which the fake TensorRT takes part."""

    def __init__(
        self, *, gpus=1, name='Fake Orin', architecture=(8, 7), cuda=12060, memory=1 << 32
    ):
        self.gpus, self.name, self.architecture, self.cuda = gpus, name, architecture, cuda
        self.total, self.calls = memory, Counter()
        self.blocks: dict[int, ctypes.Array] = {}  # address -> memory
        self.streams: dict[int, list] = {}  # handle -> queued work
        self.priorities: dict[int, int] = {}
        self.graphs: dict[int, list] = {}  # handle -> recorded work
        self._recording: dict[int, list] = {}
        self._handles = iter(range(1, 1 << 30))
        self.forbids_capture = False

    # what the fake TensorRT needs

    def submit(self, stream, work):
        """Queue a function, or record it."""
        self._recording.get(stream, self.streams[stream]).append(work)

    def is_capturing(self, stream):
        """Return whether the stream records."""
        return stream in self._recording

    def check(self, address, nbytes):
        """Raise where memory is not allocated, or not that large."""
        for start, block in self.blocks.items():
            if start <= address and address + nbytes <= start + len(block):
                return address
        raise AssertionError(f'{nbytes} bytes at {address:#x} are not allocated')

    def used(self):
        """Return the bytes that are allocated."""
        return sum(map(len, self.blocks.values()))

    # the driver

    def cuInit(self, flags):
        return 0 if self.gpus else NO_DEVICE

    def cuDriverGetVersion(self, version):
        return _set(version, self.cuda)

    def cuDeviceGetCount(self, count):
        return _set(count, self.gpus)

    def cuDeviceGet(self, device, ordinal):
        return _set(device, ordinal)

    def cuDeviceGetName(self, name, length, device):
        name.value = self.name.encode()
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        major = CONSTANTS['CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR']
        return _set(value, self.architecture[attribute - major])

    def cuDevicePrimaryCtxRetain(self, context, device):
        return _set(context, 7)

    def cuCtxSetCurrent(self, context):
        return 0

    def cuCtxGetStreamPriorityRange(self, least, greatest):
        return _set(least, 0) or _set(greatest, -5)

    def cuGetErrorName(self, error, text):
        return _set(text, NAMES.get(error, b'CUDA_ERROR_UNKNOWN'))

    def cuMemGetInfo_v2(self, free, total):
        return _set(free, self.total - self.used()) or _set(total, self.total)

    def cuMemAlloc_v2(self, address, nbytes):
        self.calls['allocate'] += 1
        return self._allocate(address, nbytes)

    def cuMemAllocHost_v2(self, address, nbytes):
        self.calls['allocate_host'] += 1
        return self._allocate(address, nbytes)

    def cuMemFree_v2(self, address):
        del self.blocks[address]
        return 0

    cuMemFreeHost = cuMemFree_v2

    def cuMemcpyHtoDAsync_v2(self, target, source, nbytes, stream):
        self.calls['upload'] += 1
        return self._copy(target, source, nbytes, stream)

    def cuMemcpyDtoHAsync_v2(self, target, source, nbytes, stream):
        self.calls['download'] += 1
        return self._copy(target, source, nbytes, stream)

    def cuMemcpy2DAsync_v2(self, order, stream):
        self.calls['copy'] += 1
        o = order._obj
        for row in range(o.Height):
            target, source = o.dstDevice + row * o.dstPitch, o.srcDevice + row * o.srcPitch
            self._copy(target, source, o.WidthInBytes, stream)
        return 0

    def cuStreamCreateWithPriority(self, stream, flags, priority):
        handle = next(self._handles)
        self.streams[handle], self.priorities[handle] = [], priority
        return _set(stream, handle)

    def cuStreamDestroy_v2(self, stream):
        del self.streams[stream]
        return 0

    def cuStreamSynchronize(self, stream):
        self.calls['wait'] += 1
        work, self.streams[stream] = self.streams[stream], []
        for one in work:
            one()
        return 0

    def cuStreamBeginCapture_v2(self, stream, mode):
        self._recording[stream] = []
        return 0

    def cuStreamEndCapture(self, stream, graph):
        work = self._recording.pop(stream)
        if self.forbids_capture:
            return NOT_PERMITTED
        handle = next(self._handles)
        self.graphs[handle] = work
        return _set(graph, handle)

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        self.calls['record'] += 1
        handle = next(self._handles)
        self.graphs[handle] = self.graphs[graph]
        return _set(executable, handle)

    def cuGraphLaunch(self, executable, stream):
        self.calls['launch'] += 1
        for work in self.graphs[executable]:
            self.submit(stream, work)
        return 0

    def cuGraphDestroy(self, graph):
        del self.graphs[graph]
        return 0

    cuGraphExecDestroy = cuGraphDestroy

    def _allocate(self, address, nbytes):
        if self.used() + nbytes > self.total:
            return CONSTANTS['CUDA_ERROR_OUT_OF_MEMORY']
        block = (ctypes.c_char * nbytes)()
        ctypes.memset(block, 0xA5, nbytes)  # what nobody wrote is not zero
        self.blocks[ctypes.addressof(block)] = block
        return _set(address, ctypes.addressof(block))

    def _copy(self, target, source, nbytes, stream):
        self.check(target, nbytes), self.check(source, nbytes)
        self.submit(stream, lambda: ctypes.memmove(target, source, nbytes))
        return 0


def _set(pointer, value):
    pointer._obj.value = value
    return 0
