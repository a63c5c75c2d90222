"""Where a figure comes from: the machine, the versions of what it ran on, and the commit of the code."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import mose_ros

PACKAGES = (  # those of them that are installed are named
    'mose_ros',
    'numpy',
    'onnxruntime',
    'onnxruntime-gpu',
    'tensorrt',
    'opencv-python',
    'opencv-python-headless',
    'ros-rclpy',
    'metadrive-simulator',
    'panda3d',
    'torch',
    'transformers',
)


def machine() -> dict[str, Any]:
    """Return what the machine is."""
    return {
        'processor': _processor(),
        'cores': len(os.sched_getaffinity(0)),
        'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
        'system': platform.platform(),
        'python': platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what is installed, of the packages that figures depend on."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """Return the code's commit, with `+` where files differ from it; '' outside of a repository."""
    root = Path(mose_ros.__file__).parent.parent
    git = ['git', '-C', str(root)]
    try:
        head, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            for words in (('rev-parse', 'HEAD'), ('status', '--porcelain', '-uno', 'mose_ros'))
        )
    except (OSError, subprocess.SubprocessError):
        return ''
    return head.strip() + ('+' if changes.strip() else '')


def _processor() -> str:
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            names = [
                line.split(':', 1)[1].strip() for line in file if line.startswith('model name')
            ]
    except OSError:
        names = []
    return f'{len(names)} x {names[0]}' if names else platform.processor() or platform.machine()
