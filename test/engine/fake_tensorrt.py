"""A TensorRT for tests: it builds from real ONNX files and computes with ONNX Runtime, in the fake driver's memory.

test_tensorrt_api.py holds every public name of its classes, and of their arguments, to the real bindings, so what the
engine calls here exists there. It is as strict as the documentation of the real one: what that calls undefined raises.
"""

import base64
import ctypes
import enum
import json
import types
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import AttributeProto, TensorProto

KINDS = {
    TensorProto.FLOAT: 'FLOAT',
    TensorProto.FLOAT16: 'HALF',
    TensorProto.INT64: 'INT64',
    TensorProto.INT32: 'INT32',
    TensorProto.BOOL: 'BOOL',
    TensorProto.UINT8: 'UINT8',
}
WEIGHTS = 'session.model_external_initializers_file_folder_path'
SCRATCH = 4096  # bytes that an execution context asks for


@dataclass
class Faults:
    """What shall go wrong, and what was done."""

    parser_errors: list = field(default_factory=list)  # (code, description, node, name, operator)
    profile_error: str = ''
    build_error: str = ''
    opening_error: str = ''
    shape_error: str = ''
    run_error: str = ''
    interrupt_at_step: int = -1
    build_hook: object = None  # called while building
    builds: list = field(default_factory=list)  # the files
    timings_given: list = field(default_factory=list)
    execute_calls: int = 0


def make(driver, *, version='10.3.0', libraries=True, faults=None):
    """Return a module `tensorrt` of some version over a fake driver."""
    trt = types.ModuleType('tensorrt')
    faults = faults or Faults()
    trt.__version__ = version

    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        def log(self, severity, msg):
            raise NotImplementedError

    ILogger.Severity = Severity

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 1 if version < '11' else 0

    class MemoryPoolType(enum.Enum):
        WORKSPACE = 0

    class BuilderFlag(enum.Enum):
        TF32 = 0

    class TensorIOMode(enum.Enum):
        NONE, INPUT, OUTPUT = range(3)

    class TensorLocation(enum.Enum):
        DEVICE, HOST = range(2)

    class ExecutionContextAllocationStrategy(enum.Enum):
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    class DataType(enum.Enum):
        FLOAT, HALF, INT64, INT32, BOOL, UINT8 = range(6)

    class LayerType(enum.Enum):
        CONDITION, LOOP_OUTPUT, MATRIX_MULTIPLY, ELEMENTWISE = range(4)

    class ErrorCode(enum.Enum):
        UNSUPPORTED_NODE, INVALID_GRAPH = range(2)

    class IProgressMonitor:
        def phase_start(self, phase_name, parent_phase, num_steps):
            raise NotImplementedError

        def step_complete(self, phase_name, step):
            raise NotImplementedError

        def phase_finish(self, phase_name):
            raise NotImplementedError

    class IHostMemory(bytes):  # a buffer, as the real one
        @property
        def nbytes(self):
            return len(self)

    class ITensor:
        def __init__(self, value, is_shape_tensor):
            sizes = value.type.tensor_type.shape.dim
            self.name = value.name
            self.shape = tuple(d.dim_value if d.HasField('dim_value') else -1 for d in sizes)
            self.is_shape_tensor = is_shape_tensor

    class ILayer:
        def __init__(self, kind):
            self.type = kind

    class INetworkDefinition:
        def __init__(self, flags):
            assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            self._inputs, self._layers, self._path, self._data = [], [], '', None

        @property
        def num_inputs(self):
            return len(self._inputs)

        @property
        def num_layers(self):
            return len(self._layers)

        def get_input(self, index):
            return self._inputs[index]

        def get_layer(self, index):
            return self._layers[index]

    class ParserError:
        def __init__(self, values):
            self._code, self._desc, self._node, self._name, self._operator = values

        def code(self):
            return ErrorCode[self._code]

        def desc(self):
            return self._desc

        def node(self):
            return self._node

        def node_name(self):
            return self._name

        def node_operator(self):
            return self._operator

    class OnnxParser:
        def __init__(self, network, logger):
            self._network = network

        @property
        def num_errors(self):
            return len(faults.parser_errors)

        def get_error(self, index):
            return ParserError(faults.parser_errors[index])

        def parse_from_file(self, model):
            return self._parse(onnx.load(model, load_external_data=False), model, None)

        def parse(self, model, path=None):
            return self._parse(onnx.load_from_string(model), path, model)

        def _parse(self, model, path, data):
            if faults.parser_errors:
                return False
            graph = model.graph
            shape_inputs = getattr(trt, 'shape_inputs', ())
            self._network._inputs = [ITensor(one, one.name in shape_inputs) for one in graph.input]
            self._network._path, self._network._data = path, data
            for node in _nodes(graph):
                kind = {'If': 'CONDITION', 'CumSum': 'LOOP_OUTPUT', 'Add': 'ELEMENTWISE'}
                name = kind.get(node.op_type, 'MATRIX_MULTIPLY')
                self._network._layers.append(ILayer(LayerType[name]))
            return True

    class IOptimizationProfile:
        def __init__(self):
            self._shapes, self._values = {}, {}

        def set_shape(self, input, min, opt, max):
            if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
                raise RuntimeError('Shape provided for max is inconsistent with other shapes.')
            self._shapes[input] = [list(min), list(opt), list(max)]

        def set_shape_input(self, input, min, opt, max):
            self._values[input] = [min, opt, max]

    class ITimingCache:
        def __init__(self, data):
            self._data = data

        def serialize(self):
            return IHostMemory(self._data + b'+')

    class IBuilderConfig:
        def __init__(self):
            self.progress_monitor = None
            self.builder_optimization_level = 3
            self._profile, self._timings, self._limits, self._flags = None, None, {}, {'TF32'}

        def set_memory_pool_limit(self, pool, pool_size):
            self._limits[pool] = pool_size

        def clear_flag(self, flag):
            self._flags.discard(flag.name)

        def add_optimization_profile(self, profile):
            self._profile = profile
            return -1 if faults.profile_error else 0

        def create_timing_cache(self, serialized_timing_cache):
            faults.timings_given.append(bytes(serialized_timing_cache))
            return ITimingCache(bytes(serialized_timing_cache))

        def set_timing_cache(self, cache, ignore_mismatch):
            self._timings = cache
            return not cache._data.startswith(b'foreign')

        def get_timing_cache(self):
            return self._timings

    class Builder:
        def __init__(self, logger):
            if not driver.gpus:
                raise TypeError('factory function returned nullptr')
            self._logger = logger

        def create_network(self, flags=0):
            return INetworkDefinition(flags)

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            faults.builds.append(network._path)
            assert not config._flags, 'float32 would be computed in TF32'
            if faults.build_hook:
                faults.build_hook()
            monitor, phase = config.progress_monitor, 'Building engine'
            monitor.phase_start(phase, None, 3)
            monitor.phase_start('Tactics', phase, 9)
            for step in range(3):
                if step == faults.interrupt_at_step:
                    monitor.interrupted = True
                if not monitor.step_complete(phase, step):
                    return None
            monitor.phase_finish('Tactics')
            monitor.phase_finish(phase)
            if faults.build_error:
                self._logger.log(Severity.ERROR, faults.build_error)
                return None
            dynamic = {one.name for one in network._inputs if -1 in one.shape}
            assert dynamic == config._profile._shapes.keys()
            plan = {
                'path': network._path,
                'data': network._data and base64.b64encode(network._data).decode(),
                'shapes': config._profile._shapes,
                'values': config._profile._values,
                'version': version,
            }
            return IHostMemory(json.dumps(plan).encode())

    class ICudaEngine:
        def __init__(self, plan, logger):
            self._plan, self._logger = plan, logger
            data, options = plan['data'] and base64.b64decode(plan['data']), _options()
            if data:
                options.add_session_config_entry(WEIGHTS, str(Path(plan['path']).parent))
                self._graph = onnx.load_from_string(data).graph
            else:
                self._graph = onnx.load(plan['path'], load_external_data=False).graph
            self._session = onnxruntime.InferenceSession(data or plan['path'], options)
            self._ports = {one.name: one for one in [*self._graph.input, *self._graph.output]}
            self._inputs = [one.name for one in self._graph.input]
            self._output_shapes = lru_cache(self._output_shapes)

        device_memory_size_v2 = SCRATCH

        @property
        def num_io_tensors(self):
            return len(self._ports)

        def get_tensor_name(self, index):
            return list(self._ports)[index]

        def get_tensor_mode(self, name):
            return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

        def get_tensor_location(self, name):
            is_host = name in getattr(trt, 'shape_inputs', ())
            return TensorLocation.HOST if is_host else TensorLocation.DEVICE

        def get_tensor_dtype(self, name):
            return DataType[KINDS[self._ports[name].type.tensor_type.elem_type]]

        def get_tensor_shape(self, name):
            return ITensor(self._ports[name], False).shape

        def get_tensor_profile_shape(self, name, profile_index):
            return self._plan['shapes'][name]

        def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
            assert strategy == ExecutionContextAllocationStrategy.USER_MANAGED
            return IExecutionContext(self)

        def _dtype(self, name):
            kind = self._ports[name].type.tensor_type.elem_type
            return onnx.helper.tensor_dtype_to_np_dtype(kind)

        def _output_shapes(self, shapes):
            zeros = {name: np.zeros(shape, self._dtype(name)) for name, shape in shapes}
            names = [one.name for one in self._graph.output]
            values = self._session.run(names, zeros)
            return {name: value.shape for name, value in zip(names, values, strict=True)}

    class IExecutionContext:
        def __init__(self, engine):
            self._engine, self._shapes, self._addresses = engine, {}, {}
            self._memory, self._changes = None, 0
            for name in engine._inputs:
                shape = engine.get_tensor_shape(name)
                if -1 not in shape:
                    self._shapes[name] = shape

        def set_device_memory(self, memory, size):
            assert size >= SCRATCH
            self._memory = driver.check(memory, size)

        def set_input_shape(self, name, shape):
            self._changes += 1
            if name in self._engine._plan['shapes']:
                least, _, largest = self._engine._plan['shapes'][name]
                sizes = zip(least, shape, largest, strict=True)
                if not all(low <= size <= high for low, size, high in sizes):
                    return False
            elif tuple(shape) != self._engine.get_tensor_shape(name):
                return False
            self._shapes[name] = tuple(shape)
            return True

        def set_tensor_address(self, name, memory):
            self._changes += 1
            self._addresses[name] = memory
            return name in self._engine._ports

        def infer_shapes(self):
            if faults.shape_error:
                raise RuntimeError(faults.shape_error)
            return [name for name in self._engine._inputs if name not in self._shapes]

        def get_tensor_shape(self, name):
            known = tuple(sorted(self._shapes.items()))
            return self._shapes.get(name) or self._engine._output_shapes(known)[name]

        def get_max_output_size(self, name):
            if self.infer_shapes():
                return -1
            item = self._engine._dtype(name).itemsize
            return int(np.prod(self.get_tensor_shape(name), dtype=np.int64)) * item

        def execute_async_v3(self, stream_handle):
            faults.execute_calls += 1
            assert self._memory, 'a context without memory'
            if faults.run_error:
                self._engine._logger.log(Severity.ERROR, faults.run_error)
                return False
            if self._engine._ports.keys() - self._addresses.keys():
                return False
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            changes, recorded = self._changes, driver.is_capturing(stream_handle)

            def work():
                assert not recorded or changes == self._changes, 'its context was changed'
                inputs = {name: _read(name, shape) for name, shape in shapes.items()}
                names = [one.name for one in self._engine._graph.output]
                values = self._engine._session.run(names, inputs)
                for name, value in zip(names, values, strict=True):
                    value = np.ascontiguousarray(value)
                    driver.check(addresses[name], value.nbytes)
                    ctypes.memmove(addresses[name], value.ctypes.data, value.nbytes)

            def _read(name, shape):
                array = np.empty(shape, self._engine._dtype(name))
                driver.check(addresses[name], array.nbytes)
                ctypes.memmove(array.ctypes.data, addresses[name], array.nbytes)
                return array

            driver.submit(stream_handle, work)
            return True

    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            if faults.opening_error:
                self._logger.log(Severity.ERROR, faults.opening_error)
                return None
            return ICudaEngine(json.loads(bytes(serialized_engine)), self._logger)

    for one in list(locals().values()):
        if isinstance(one, type) and one is not Severity:
            setattr(trt, one.__name__, one)
    trt.faults = faults
    return trt


def _nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _options():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options
