"""From an ONNX file to a TensorRT engine, built once and kept. Knows nothing of running it.

Strongly typed always: the types in the ONNX decide, so one file builds alike on TensorRT 10.3 (JetPack 6) to 11.4, where
the old precision flags are gone. Only names that TensorRT 10.3, 10.16 and 11.4 all have are used; test/engine holds
every one of them to the real bindings, by the annotations here, which is why each TensorRT object has one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from mose_ros.core.files import write_bytes
from mose_ros.engine import engine_cache
from mose_ros.engine.cuda import Device
from mose_ros.engine.engine_cache import Slot, Stale
from mose_ros.engine.session import BackendError, Build

if TYPE_CHECKING:
    import tensorrt as trt

OLDEST, NEWEST = (10, 3), (11, 4)  # checked against their bindings
LEVEL = 3  # TensorRT's default of 0 to 5: higher ones build for longer
CONTROL_FLOW = ('CONDITION', 'LOOP_OUTPUT')  # one layer of these for each `If` and each loop
_log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def load():
    """Return the tensorrt module; BackendError where it, its libraries or a version that is known are missing."""
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        if error.name != 'tensorrt':
            raise BackendError(_missing(f'a part of it is not installed ({error})')) from None
        raise BackendError(_missing('it is not installed')) from None
    except (ImportError, OSError) as error:  # the module is there, libnvinfer is not
        raise BackendError(_missing(f'its libraries do not load ({error})')) from None
    version = tuple(int(part) for part in trt.__version__.split('.')[:2])
    if version < OLDEST:
        raise BackendError(
            f'TensorRT {trt.__version__} is too old: {".".join(map(str, OLDEST))} (JetPack 6) or '
            "later is needed; use backend 'onnxruntime'"
        )
    if version > NEWEST:
        _log.warning('TensorRT %s is newer than what this was written for', trt.__version__)
    return trt


@functools.lru_cache(maxsize=1)
def listener():
    """Return the process's one listener to TensorRT: it logs what it hears and remembers the errors."""
    trt = load()

    class Listener(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self._errors = []
            self._levels = {
                trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
                trt.ILogger.Severity.ERROR: logging.ERROR,
                trt.ILogger.Severity.WARNING: logging.WARNING,
            }

        def log(self, severity, msg):
            level = self._levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self._errors.append(msg)
            _log.log(level, 'tensorrt: %s', msg)

        def take_errors(self):
            """Return the errors since the last time it was asked, as one text."""
            errors, self._errors = self._errors, []
            return '; '.join(dict.fromkeys(errors)) or 'TensorRT says no more'

    return Listener()


@functools.lru_cache(maxsize=1)
def runtime():
    """Return the process's one runtime, which engines are opened with."""
    trt = load()
    try:
        return trt.Runtime(listener())
    except TypeError:  # how the bindings say that the library returned nothing
        raise BackendError(
            f'TensorRT {trt.__version__} does not start: {explain(listener().take_errors())}'
        ) from None


def open_engine(path: Path, build: Build, gpu: Device) -> tuple[trt.ICudaEngine, dict]:
    """Return the engine of an ONNX file and the notes of its build: from the cache, or built now and kept.

    Raises:
        BackendError: it cannot be parsed, built, kept or opened; the message names the remedy.
    """
    recipe = make_recipe(build, gpu)
    slot = make_slot(path, build, gpu)
    with contextlib.suppress(Stale):  # the reason is told once nobody else is building
        stored = slot.load(recipe)
        engine = _deserialize(stored.engine)
        if engine is not None:
            _log.info('engine %s: from the cache', slot.engine)
            return engine, dict(stored.notes)
    with slot.locked():
        try:
            stored = slot.load(recipe)
            engine = _deserialize(stored.engine)
            if engine is not None:
                return engine, dict(stored.notes)
            reason = f'TensorRT cannot open it ({listener().take_errors()})'
        except Stale as stale:
            reason = str(stale)
        _log.info('engine %s is built anew: %s', slot.engine, reason)
        sources = [path.parent / name for name in build.files]
        slot.require_room(sum(one.stat().st_size for one in sources))
        plan, notes = build_engine(path, build, gpu)
        slot.store(recipe, memoryview(plan), notes)
    engine = _deserialize(memoryview(plan))
    if engine is None:
        raise BackendError(
            f'{path} was built, but TensorRT {load().__version__} cannot open the engine: '
            f'{explain(listener().take_errors())}'
        )
    return engine, notes


def make_recipe(build: Build, gpu: Device) -> dict[str, str]:
    """Return all that decides whether an engine may be used: name -> value, as text.

    How much memory the builder had does not: with less it finds other kernels, which compute the same.
    """
    return {
        **_source(build),
        'TensorRT': load().__version__,
        'CUDA': gpu.cuda,
        'GPU': gpu.name,
        'GPU architecture': gpu.architecture,
        'builder': f'strongly typed, no TF32, level {LEVEL}',
    }


def _source(build: Build) -> dict[str, str]:
    """Return the part of the recipe that is the bundle's: it tells engines apart that may lie side by side."""
    return {
        **{f'sha256 of {name}': digest for name, digest in build.files.items()},
        **({'part': hashlib.sha256(build.model).hexdigest()} if build.model else {}),
        'precision': build.precision,
        **{
            f'shapes of {name}': ' '.join('x'.join(map(str, shape)) for shape in shapes)
            for name, shapes in build.shapes.items()
        },
        **{f'values of {name}': f'{low} to {high}' for name, (low, high) in build.values.items()},
    }


def graph_name(path: Path, build: Build) -> str:
    """Return what a graph, or a part of one, is called in logs and in the cache."""
    return f'{path.stem}.{build.part}' if build.part else path.stem


def make_slot(path: Path, build: Build, gpu: Device) -> Slot:
    """Return where a graph's engine is kept: architectures, and bundles in folders of one name, lie side by side."""
    folder = build.folder or engine_cache.default_folder()
    digest = hashlib.sha256(json.dumps(_source(build), sort_keys=True).encode()).hexdigest()[:8]
    name = f'{graph_name(path, build)}.{build.precision}.sm{gpu.architecture}.{digest}'
    return Slot(folder, f'{path.resolve().parent.name}/{name}')


def build_engine(path: Path, build: Build, gpu: Device) -> tuple[trt.IHostMemory, dict]:
    """Return the serialized engine of an ONNX file and notes: its control flow, what the build took and might take."""
    trt, started = load(), time.monotonic()
    gpu.activate()
    listener().take_errors()
    try:
        builder: trt.Builder = trt.Builder(listener())
    except TypeError:  # how the bindings say that the library returned nothing
        raise BackendError(
            f'TensorRT {trt.__version__} makes no builder on {gpu.name}: '
            f'{explain(listener().take_errors())}'
        ) from None
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network: trt.INetworkDefinition = builder.create_network(typed)
    parser: trt.OnnxParser = trt.OnnxParser(network, listener())
    if build.model is None:
        is_parsed = parser.parse_from_file(str(path))
    else:  # its weights lie beside the file
        is_parsed = parser.parse(build.model, str(path))
    if not is_parsed:
        raise BackendError(
            f'TensorRT {trt.__version__} cannot parse {path}: {_parser_errors(parser)}; use '
            "backend 'onnxruntime', or export the bundle with this version of mose_ros"
        )
    config: trt.IBuilderConfig = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, build.workspace)
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the ONNX means float32
    config.builder_optimization_level = LEVEL
    if config.add_optimization_profile(_profile(builder, network, path, build)) < 0:
        raise BackendError(f'{path}: its sizes are refused: {listener().take_errors()}')
    monitor = _monitor(graph_name(path, build))
    config.progress_monitor = monitor
    timing_file = _timing_file(build, gpu)
    _read_timings(config, timing_file)

    plan: trt.IHostMemory = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise BackendError(f'{path} cannot be built: {explain(listener().take_errors())}')
    _write_timings(config, timing_file)
    seconds = round(time.monotonic() - started, 1)
    _log.info('%s: built in %.1f s, %.1f MB', graph_name(path, build), seconds, plan.nbytes / 1e6)
    return plan, {
        'control_flow': _control_flow(network),
        'seconds': seconds,
        'workspace': build.workspace,
    }


def _profile(
    builder: trt.Builder, network: trt.INetworkDefinition, path: Path, build: Build
) -> trt.IOptimizationProfile:
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    names = []
    for index in range(network.num_inputs):
        tensor: trt.ITensor = network.get_input(index)
        name = tensor.name
        names.append(name)
        if -1 in tuple(tensor.shape):
            if name not in build.shapes:
                raise BackendError(
                    f'{path}: input {name} has a dynamic size, but nobody says how large it gets; '
                    'export the bundle again'
                )
            least, usual, largest = build.shapes[name]
            try:
                profile.set_shape(name, least, usual, largest)
            except (RuntimeError, ValueError) as error:
                raise BackendError(
                    f'{path}: input {name} {tuple(tensor.shape)} does not get the sizes {least} to '
                    f'{largest} of its manifest ({error}); export the bundle again'
                ) from None
        if tensor.is_shape_tensor:  # its values decide about shapes, so TensorRT asks for them
            if name not in build.values:
                raise BackendError(
                    f'{path}: the values of input {name} decide about shapes, which the contract '
                    'does not know; export the bundle again'
                )
            low, high = build.values[name]
            count = max(1, *tuple(tensor.shape))
            usual = max(low, 0)
            profile.set_shape_input(name, [low] * count, [usual] * count, [high] * count)
    foreign = sorted({*build.shapes} - {*names})
    if foreign:
        raise BackendError(f'{path} has no input {", ".join(foreign)}; export the bundle again')
    return profile


def _control_flow(network: trt.INetworkDefinition) -> dict[str, int]:
    """Return how many conditions and loops there are: with one of them no CUDA graph can be recorded."""
    counts = Counter()
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        counts[layer.type.name] += 1
    return {name: counts[name] for name in CONTROL_FLOW if counts[name]}


def _parser_errors(parser: trt.OnnxParser) -> str:
    lines = []
    for index in range(parser.num_errors):
        fault: trt.ParserError = parser.get_error(index)
        node = f'node {fault.node()} {fault.node_name()!r} ({fault.node_operator()})'
        lines.append(f'{node}: {fault.code().name} {fault.desc()}')
    return '; '.join(lines) or listener().take_errors()


def _monitor(graph: str):
    trt = load()

    class Monitor(trt.IProgressMonitor):
        """Tells of the build's outermost phase every few seconds, and lets Ctrl-C end it."""

        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._outer, self._steps = '', 1
            self._told = time.monotonic()

        def phase_start(self, phase_name, parent_phase, num_steps):
            if not parent_phase:
                self._outer, self._steps = phase_name, max(num_steps, 1)
                _log.info('%s: %s', graph, phase_name)

        def step_complete(self, phase_name, step):
            try:
                now = time.monotonic()
                if phase_name == self._outer and now - self._told > 2.0:
                    self._told = now
                    share = 100 * (step + 1) / self._steps
                    _log.info('%s: %s, %.0f %%', graph, phase_name, share)
            except KeyboardInterrupt:  # must not travel through TensorRT's own code
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name):
            if phase_name == self._outer:
                self._outer = ''

    return Monitor()


def _timing_file(build: Build, gpu: Device) -> Path:
    folder = build.folder or engine_cache.default_folder()
    gpu_name = gpu.name.replace(' ', '_').replace('/', '_')
    return folder / f'timing.{load().__version__}.{gpu_name}.cache'


def _read_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Give the builder what it measured before: the next graph builds several times faster."""
    try:
        known = path.read_bytes()
    except OSError:  # the first build
        known = b''
    timings: trt.ITimingCache = config.create_timing_cache(known)
    if timings is None or not config.set_timing_cache(timings, False):
        _log.warning('%s is of another TensorRT or GPU: it starts anew', path)
        fresh: trt.ITimingCache = config.create_timing_cache(b'')
        config.set_timing_cache(fresh, False)


def _write_timings(config: trt.IBuilderConfig, path: Path) -> None:
    timings: trt.ITimingCache = config.get_timing_cache()
    if timings is None:
        return
    data: trt.IHostMemory = timings.serialize()
    try:
        # other graphs are built at the same time, under locks of their own
        with engine_cache.locked(path.with_suffix('.lock'), path.name):
            write_bytes(path, memoryview(data), lasting=True)
    except OSError as error:  # the engine counts; the next build is slower
        _log.warning('%s cannot be kept: %s', path, error)


def _deserialize(data) -> trt.ICudaEngine | None:
    opener: trt.Runtime = runtime()
    listener().take_errors()  # what is heard from here on is about this engine
    return opener.deserialize_cuda_engine(data)


def explain(message: str) -> str:
    """Return an error of TensorRT with its remedy."""
    words = message.lower()
    if 'memory' in words and ('out' in words or 'insufficient' in words or 'alloc' in words):
        return f'{message}; the GPU is out of memory: end what else uses it, or lower --workspace'
    if 'no cuda' in words or 'device' in words and 'no ' in words:
        return f"{message}; make a GPU visible, or use backend 'onnxruntime'"
    return f"{message}; use backend 'onnxruntime', and report it with the bundle's manifest"


def _missing(what: str) -> str:
    return (
        f'TensorRT: {what}; on a Jetson: apt install python3-libnvinfer, elsewhere: pip install '
        "tensorrt (10.3 or later), or use backend 'onnxruntime'"
    )
