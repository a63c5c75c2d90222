"""Who may import whom. The table is the architecture; docs/architecture.md draws it."""

import ast
import pathlib
import subprocess
import sys

import pytest

import mose_ros

ROOT = pathlib.Path(mose_ros.__file__).parent
ROOMS = {  # room: the other rooms it may import
    'core': set(),
    'sim': {'core'},
    'data': {'core'},
    'engine': {'core'},
    'modeling': {'core'},
    'evaluation': {'core', 'data', 'sim', 'engine'},
    'training': {'core', 'data', 'sim', 'engine', 'modeling', 'evaluation'},
    'nodes': {'core', 'sim', 'engine'},
    'agents': {'core', 'engine', 'evaluation'},
}
HOMES = {  # third party: the only rooms that may import it
    **dict.fromkeys(['rclpy', '*_msgs'], {'nodes'}),
    **dict.fromkeys(['torch', 'transformers', 'accelerate'], {'modeling', 'training'}),
    **dict.fromkeys(['carla', 'leaderboard', 'srunner'], {'agents'}),
    **dict.fromkeys(['metadrive', 'panda3d'], {'sim'}),
    **dict.fromkeys(['onnxruntime', 'tensorrt'], {'engine'}),
    **dict.fromkeys(['fsspec', 'aiohttp'], {'data'}),
    **dict.fromkeys(['matplotlib', 'ray'], {'training'}),
    **dict.fromkeys(['onnx', 'onnxscript'], {'training', 'engine'}),
}
LOAD = """
import importlib, pkgutil, sys
sys.modules.update(torch=None, transformers=None, rclpy=None)  # None blocks the import
for room in ['mose_ros.engine', 'mose_ros.evaluation']:
    for module in pkgutil.walk_packages(importlib.import_module(room).__path__, room + '.'):
        if module.name.endswith('.__main__'): continue
        try: importlib.import_module(module.name)
        except ImportError as error: sys.exit(f'{module.name} does not load: {error}')
"""


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = '.' * node.level + (node.module or '')
            yield from (f'{source}.{alias.name}' for alias in node.names)


def test_imports_follow_the_table():
    wrong = []
    for path in sorted(ROOT.rglob('*.py')):
        room = path.relative_to(ROOT).parts[0]
        if room not in {*ROOMS, '__init__.py'}:
            wrong.append(f'{room} is not in the table of rooms')
        for name in imported_names(path):
            top, target, *_ = f'{name}.'.split('.')
            home = HOMES.get('*_msgs' if top.endswith('_msgs') else top, {room})
            shut = top == 'mose_ros' and target in ROOMS.keys() - ROOMS.get(room, set()) - {room}
            if room not in home or shut or name.startswith('.'):  # own code by its full path
                wrong.append(f'{room} may not import {name}  ({path.relative_to(ROOT)})')
    if wrong:
        pytest.fail('\n'.join(wrong), pytrace=False)


def test_engine_and_evaluation_load_without_torch_and_ros():
    loading = subprocess.run([sys.executable, '-c', LOAD], cwd=ROOT.parent, capture_output=True)
    if loading.returncode:
        pytest.fail(loading.stderr.decode(), pytrace=False)
