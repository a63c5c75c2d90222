"""What nodes find in files: those that come with the package, and ROS parameters files as rcl reads them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import mose_ros

ROOT = Path(mose_ros.__file__).resolve().parents[1]
NODES = ('view_router', 'driver', 'controller')  # those that drive
OTHERS = ('carla_state', 'simulator', 'replay', 'bag')


def shared(name: str) -> Path:
    """Return a file or folder that comes with the package, as 'config/drive.yaml': beside it, or in an installation's share."""
    places = [ROOT / name, *(parent / 'share/mose_ros' / name for parent in ROOT.parents)]
    for path in places:
        if path.exists():
            return path
    raise ValueError(f'{name} was not found near {ROOT}; install mose_ros again')


def check_params_file(path: str | Path, namespace: str = 'mose') -> None:
    """Raise ValueError unless it is a ROS parameters file for our nodes; names in it are the nodes' to check."""
    for name, section in _sections(path).items():
        _, _, node = str(name).rpartition('/')
        if node not in (*NODES, *OTHERS, '*', '**'):
            known = ', '.join((*NODES, *OTHERS))
            raise ValueError(f'{path}: there is no node {name!r}; known: {known}')
        if node.strip('*') and not speaks_of(name, namespace, node):
            raise ValueError(
                f"{path}: {name!r} is not in our namespace /{namespace.strip('/')}: write '/**/{node}'"
            )
        if not (isinstance(section, dict) and isinstance(section.get('ros__parameters'), dict)):
            raise ValueError(f'{path}: {name!r} needs `ros__parameters:` with names and values')


def parameters_of(
    paths: Iterable[str | Path], node: str, namespace: str = 'mose'
) -> dict[str, Any]:
    """Return what parameters files say of one node, the later over the earlier; ValueError as `check_params_file`."""
    found = {}
    for path in paths:
        check_params_file(path, namespace)
        for name, section in _sections(path).items():
            if speaks_of(name, namespace, node):
                found |= section['ros__parameters']
    return found


def _sections(path) -> dict:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f'{path} can not be read as a parameters file: {error}') from None
    if not (isinstance(data, dict) and data):
        raise ValueError(
            f'{path} is no parameters file: expected `node: {{ros__parameters: ...}}`'
        )
    return data


def speaks_of(section: str, namespace: str, node: str) -> bool:
    """Say whether rcl applies a section to a node: ** stands for any number of names in its full name, * for one."""
    pattern = re.escape(f'/{str(section).strip("/")}')
    pattern = pattern.replace(r'/\*\*', '(/[^/]+)*').replace(r'\*', '[^/]+')
    full = f'{namespace.strip("/")}/{node}'.lstrip('/')
    return re.fullmatch(pattern, f'/{full}') is not None
