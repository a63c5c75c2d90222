"""What this machine can do at best: its largest matrix product and its fastest copy, as measured here and now.

The product runs on ONNX Runtime with the threads of the graphs that are judged by it, so it is a peak that they could reach.
"""

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

SIZES = (512, 1024)  # of square products; the better one counts
COPY = 1 << 27  # bytes, more than a cache holds
_FLOAT = 1  # in ONNX's TensorProto.DataType


class Gemm:
    """Square products in float32 on ONNX Runtime's CPU provider."""

    def __init__(self, threads: int, sizes: tuple[int, ...] = SIZES):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        random = np.random.default_rng(0)
        self._products = {}
        for size in sizes:
            weight = random.standard_normal((size, size), np.float32)
            session = onnxruntime.InferenceSession(
                product(weight), options, providers=['CPUExecutionProvider']
            )
            self._products[size] = session, {'x': weight}

    def rate(self) -> float:
        """Return the FLOP/s of the best of the sizes."""
        return max(2 * size**3 / self._seconds(size) for size in self._products)

    def _seconds(self, size) -> float:
        session, inputs = self._products[size]
        start = perf_counter()
        session.run(None, inputs)
        return perf_counter() - start


class Copy:
    """Copies of memory that no cache holds, by some threads at once."""

    def __init__(self, threads: int, size: int = COPY):
        self._from, self._to = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        self._parts = [slice(*ends) for ends in _ends(size, threads)]
        self._pool = ThreadPoolExecutor(threads)

    def rate(self) -> float:
        """Return the bytes per second that are read and written."""
        start = perf_counter()
        list(self._pool.map(self._copy, self._parts))
        return 2 * len(self._from) / (perf_counter() - start)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _copy(self, part):
        np.copyto(self._to[part], self._from[part])


def _ends(size: int, parts: int) -> list[tuple[int, int]]:
    places = np.linspace(0, size, parts + 1).astype(int).tolist()
    return list(zip(places, places[1:], strict=False))


# ---- a graph without the onnx package ----


def product(weight: np.ndarray) -> bytes:
    """Return an ONNX model that answers y = x @ weight, x of the weight's shape: protobuf, written by hand.

    Field numbers are those of onnx.proto3; test_peaks.py has the onnx package check them.
    """
    node = _text(1, 'x') + _text(1, 'w') + _text(2, 'y') + _text(4, 'MatMul')
    dims = b''.join(_whole(1, size) for size in weight.shape)
    tensor = dims + _whole(2, _FLOAT) + _text(8, 'w') + _bytes(9, weight.tobytes())
    graph = _bytes(1, node) + _text(2, 'product') + _bytes(5, tensor)
    graph += _bytes(11, _value('x', weight.shape)) + _bytes(12, _value('y', weight.shape))
    return _whole(1, 8) + _bytes(7, graph) + _bytes(8, _whole(2, 17))


def _value(name, shape):
    dims = b''.join(_bytes(1, _whole(1, size)) for size in shape)
    tensor = _whole(1, _FLOAT) + _bytes(2, dims)
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


def _whole(number, value):
    return _varint(number << 3) + _varint(value)


def _bytes(number, data):
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _text(number, text):
    return _bytes(number, text.encode())


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
