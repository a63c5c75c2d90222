"""Every name of TensorRT and CUDA that the engine uses, and that the fakes of the tests have, exists in the real ones.

The real bindings of TensorRT 10.3, 10.16 and 11.4 are loaded over stub libraries: they know all names and parameters but
can do nothing. CUDA's functions are held to cuda.h of CUDA 12 and 13 by a compiler. What is not here: a wheel or gcc; then
the test is skipped with the reason. The wheels are proprietary: they stay in the user's cache and are never committed.
"""

import ast
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import wheels
from engine.fake_cuda import FakeDriver
from mose_ros.engine import cuda, tensorrt_build, tensorrt_session

HERE = Path(__file__).parent
SOURCES = [Path(one.__file__) for one in (tensorrt_build, tensorrt_session)]
VERSIONS = [
    ('tensorrt_cu12_bindings', '10.3.0'),
    ('tensorrt_cu12_bindings', '10.16.1.11'),
    ('tensorrt_cu13_bindings', '11.4.0.106'),
]
HEADERS = [
    ('nvidia-cuda-runtime-cu12', '12.6.77', 'nvidia/cuda_runtime/include'),  # of JetPack 6
    ('nvidia-cuda-runtime', '13.0.96', 'nvidia/cu13/include'),
]
LIBRARIES = ('nvinfer', 'nvinfer_plugin', 'nvonnxparser')
SYMBOLS = [  # what the bindings look for when they are loaded
    *(
        'createInferBuilder_INTERNAL',
        'createInferRefitter_INTERNAL',
        'createInferRuntime_INTERNAL',
    ),
    *('createNvOnnxParser_INTERNAL', 'createNvOnnxParserRefitter_INTERNAL', 'getPluginRegistry'),
    *('getBuilderPluginRegistry', 'getNvOnnxParserVersion', 'initLibNvInferPlugins'),
]


class Asked:
    """What a source file asks of TensorRT: names, calls with their arguments, methods that it implements."""

    def __init__(self):
        self.names, self.calls, self.methods = set(), set(), set()

    def json(self):
        """Return the question for probe_tensorrt.py."""
        calls = [[path, count, list(keys)] for path, count, keys in sorted(self.calls)]
        methods = [[path, list(names)] for path, names in sorted(self.methods)]
        return {'names': sorted(self.names), 'calls': calls, 'methods': methods}


def dotted(node):
    """Return 'a.b.c' of such an expression, or nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return f'{front}.{node.attr}'
    return ''


def trt_class(annotation):
    """Return X of an annotation trt.X, also of trt.X | None."""
    if isinstance(annotation, ast.BinOp):
        annotation = annotation.left
    path = dotted(annotation) if annotation is not None else ''
    return path.removeprefix('trt.') if path.startswith('trt.') else ''


def asked_by_code(source):
    """Collect from code what it asks of TensorRT; objects are known by their annotations."""
    tree, asked = ast.parse(source), Asked()
    classes = {}  # the source of a variable's name is enough: one name has one class in a module
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and trt_class(node.annotation):
            classes[dotted(node.target)] = trt_class(node.annotation)
        elif isinstance(node, ast.arg) and trt_class(node.annotation):
            classes[node.arg] = trt_class(node.annotation)
    called = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called[node.func] = (len(node.args), tuple(one.arg for one in node.keywords))
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                if trt_class(base):
                    asked.methods.update(implemented(node, trt_class(base)))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = dotted(node.value)
        path = f'{owner}.{node.attr}'.removeprefix('trt.') if owner.startswith('trt') else ''
        if owner in classes:
            path = f'{classes[owner]}.{node.attr}'
        if not path or node.attr == '__version__':
            continue
        asked.names.add(path)
        if node in called and not node.attr.startswith('__'):
            is_class = owner == 'trt'
            asked.calls.add((f'{path}.__init__' if is_class else path, *called[node]))
    return asked


def implemented(node, base):
    """Yield the methods of a class, with their parameters, that the real base must have too."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith('_'):
            if method.name == 'take_errors':  # the listener's own
                continue
            yield f'{base}.{method.name}', tuple(one.arg for one in method.args.args[1:])


def asked_by_fake(source):
    """Collect the surface of the fake TensorRT: all that is public in its classes."""
    asked = Asked()
    make = next(one for one in ast.parse(source).body if getattr(one, 'name', '') == 'make')
    for node in make.body:
        if not isinstance(node, ast.ClassDef):
            continue
        name = 'ILogger.Severity' if node.name == 'Severity' else node.name
        asked.names.add(name)
        properties = {
            one.name
            for one in node.body
            if isinstance(one, ast.FunctionDef)
            and any(dotted(mark) == 'property' for mark in one.decorator_list)
        }
        asked.names.update(f'{name}.{one}' for one in properties)
        asked.methods.update(
            (path, names)
            for path, names in implemented(node, name)
            if path.split('.')[-1] not in properties
        )
        for one in ast.walk(node):
            if isinstance(one, ast.Assign):
                for target in one.targets:
                    public = target.elts if isinstance(target, ast.Tuple) else [target]
                    own = [dotted(each).removeprefix('self.') for each in public]
                    of_class = one in node.body or dotted(public[0]).startswith('self.')
                    if of_class:
                        asked.names.update(
                            f'{name}.{each}'
                            for each in own
                            if each and '.' not in each and not each.startswith('_')
                        )
    return asked


@pytest.fixture(scope='module', params=VERSIONS, ids=[version for _, version in VERSIONS])
def probe(request, tmp_path_factory):
    """Return a function that asks one version of the real bindings."""
    package, version = request.param
    bindings, gcc = wheels.unpacked(package, version), wheels.compiler()
    stubs = tmp_path_factory.mktemp('stubs')
    code = ''.join(f'void *{name}(void) {{ return 0; }}\n' for name in SYMBOLS)
    for library in LIBRARIES:
        soname = f'lib{library}.so.{version.split(".")[0]}'
        command = [gcc, '-shared', '-fPIC', f'-Wl,-soname,{soname}', '-xc', '-', '-o']
        subprocess.run([*command, str(stubs / soname)], input=code, text=True, check=True)
    environment = {**os.environ, 'LD_LIBRARY_PATH': str(stubs), 'PYTHONPATH': str(bindings)}

    def ask(question):
        done = subprocess.run(
            [sys.executable, str(HERE / 'probe_tensorrt.py')],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer['version'] == version
        return answer['problems']

    return ask


def test_every_name_that_the_engine_uses_is_real(probe):
    for path in SOURCES:
        asked = asked_by_code(path.read_text(encoding='utf-8'))
        asked.names.update(f'DataType.{name}' for name in tensorrt_session._DTYPES)
        asked.names.update(f'LayerType.{name}' for name in tensorrt_build.CONTROL_FLOW)
        assert probe(asked.json()) == []


def test_every_name_of_the_fake_is_real(probe):
    asked = asked_by_fake((HERE / 'fake_tensorrt.py').read_text(encoding='utf-8'))
    assert len(asked.methods) > 40
    assert probe(asked.json()) == []


WRONG = """
def f(builder: trt.Builder, config: trt.IBuilderConfig):
    builder.build_cuda_engine()
    config.set_flag(trt.BuilderFlag.TURBO)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    config.add_optimization_profile(profil=None)
    context: trt.IExecutionContext = None
    context.execute_async_v3(1, 2)

class Listener(trt.ILogger):
    def log(self, level, msg): pass
"""


def test_wrong_names_are_found(probe):
    found = '\n'.join(probe(asked_by_code(WRONG).json()))
    for name in (
        'no Builder.build_cuda_engine',
        'no BuilderFlag.TURBO',
        'IBuilderConfig.set_memory_pool_limit does not take 1',
        'IBuilderConfig.add_optimization_profile does not take 0',
        'IExecutionContext.execute_async_v3 does not take 2',
        "ILogger.log has not the parameters ['level', 'msg']",
    ):
        assert name in found
    assert 'set_flag does not' not in found


def test_the_collector_sees_what_the_engine_uses():
    build, run = (asked_by_code(path.read_text(encoding='utf-8')) for path in SOURCES)
    assert {'Builder', 'NetworkDefinitionCreationFlag.STRONGLY_TYPED'} <= build.names
    assert ('OnnxParser.parse_from_file', 1, ()) in build.calls
    assert ('IProgressMonitor.step_complete', ('phase_name', 'step')) in build.methods
    assert ('IExecutionContext.execute_async_v3', 1, ()) in run.calls
    assert ('ICudaEngine.create_execution_context', 1, ()) in run.calls
    assert 'ICudaEngine.device_memory_size_v2' in run.names


@pytest.mark.parametrize(('package', 'version', 'include'), HEADERS)
def test_every_function_of_cuda_is_declared_as_in_its_header(package, version, include, tmp_path):
    """A compiler checks each prototype, constant and the layout of the one structure against cuda.h."""
    header = wheels.unpacked(package, version) / include
    good = check_by_compiler(wheels.compiler(), header, cuda.PROTOTYPES, cuda.CONSTANTS)
    assert good == ''
    swapped = {'cuStreamEndCapture': ('CUgraph *', 'CUstream')}
    assert 'incompatible' in check_by_compiler(wheels.compiler(), header, swapped, {})
    wrong = {'CU_MEMORYTYPE_DEVICE': 3}
    assert 'CU_MEMORYTYPE_DEVICE' in check_by_compiler(wheels.compiler(), header, {}, wrong)


def check_by_compiler(gcc, header, prototypes, constants):
    """Return what a compiler says about our declarations beside cuda.h."""
    lines = ['#include <stddef.h>', '#include <cuda.h>']
    for index, (name, types) in enumerate(prototypes.items()):
        lines.append(f'CUresult (*p{index})({", ".join(types)}) = {name};')
    lines += [f'_Static_assert({key} == {value}, "{key}");' for key, value in constants.items()]
    structure = cuda.CUDA_MEMCPY2D
    size = ctypes.sizeof(structure)
    lines.append(f'_Static_assert(sizeof(CUDA_MEMCPY2D) == {size}, "CUDA_MEMCPY2D");')
    for name, _ in structure._fields_:
        place = getattr(structure, name).offset
        lines.append(f'_Static_assert(offsetof(CUDA_MEMCPY2D, {name}) == {place}, "{name}");')
    for name, kind in cuda.C_TYPES.items():
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}");')
    done = subprocess.run(
        [gcc, '-fsyntax-only', '-Werror', '-xc', '-', f'-I{header}'],
        input='\n'.join(lines) + '\n',
        capture_output=True,
        text=True,
    )
    return done.stderr


def test_the_fake_driver_has_the_functions_that_the_engine_calls():
    own = {name for name in vars(FakeDriver) if name.startswith('cu')}
    assert own == cuda.PROTOTYPES.keys()


def test_the_driver_is_called_as_its_prototypes_say():
    """ctypes refuses what does not fit: each call of cuda.py goes through real argument types, to functions in Python."""
    fake = FakeDriver()

    class Typed:
        pass

    library = Typed()
    for name, types in cuda.PROTOTYPES.items():
        kinds = [ctypes.c_void_p if one.endswith('*') else cuda.C_TYPES[one] for one in types]

        def call(*arguments, name=name, kinds=kinds):
            assert len(arguments) == len(kinds), name
            [kind.from_param(one) for kind, one in zip(kinds, arguments, strict=True)]
            return getattr(fake, name)(*arguments)

        setattr(library, name, call)
    gpu = cuda.Device(library)
    assert (gpu.name, gpu.architecture, gpu.cuda) == ('Fake Orin', '8.7', '12.6')
    stream = gpu.open_stream()
    host, there, elsewhere = gpu.allocate_host(64), gpu.allocate(64), gpu.allocate(64)
    host.view('f4', (16,))[:] = range(16)
    stream.upload(there.address, host, 64)
    stream.copy_rows(elsewhere.address, 32, there.address, 16, 16, 2)
    stream.wait()
    stream.download(host, elsewhere.address, 64)
    stream.wait()
    rows = host.view('f4', (2, 8))[:, :4].tolist()
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]
    stream.begin_capture()
    stream.upload(there.address, host, 64)
    graph = stream.end_capture()
    stream.launch(graph)
    stream.wait()
    assert gpu.memory() == (fake.total - 192, fake.total)
