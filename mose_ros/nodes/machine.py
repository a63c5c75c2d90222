"""The machine under the graph, for `doctor`: shared memory, sockets, limits, disks, versions and what the environment sets.

Reads files and variables and changes nothing. Knows no node and needs no ROS.
"""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from mose_ros.core.bundle import Manifest
from mose_ros.nodes.diagnosis import Finding

PROFILES = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')  # 2.14 on, before
MIN_PYTHON = (3, 10)
MIN_FREE = 2 * 2**30  # bytes of a disk
MIN_FILES = 1024
MIN_SOCKET = 2**21  # bytes that a UDP socket may buffer: one frame of a camera at least
MOMENTS = 3  # that a segment holds: one written, one read, one in waiting
PIECE = 65500  # bytes of a message of Fast DDS; larger ones are cut
QUEUE = 512  # pieces that may wait, unless a profile says otherwise
PARTICIPANTS = 5  # processes of a drive
PACKAGES = {  # what: distributions that bring it, the first that is there counts
    'rclpy': ('ros-rclpy', 'rclpy'),
    'Fast DDS': ('ros-fastdds',),
    'numpy': ('numpy',),
    'OpenCV': ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python'),
    'tokenizers': ('tokenizers',),
    'ONNX Runtime': ('onnxruntime', 'onnxruntime-gpu'),
    'TensorRT': ('tensorrt', 'tensorrt-cu12', 'tensorrt-cu13'),
}
RUNTIMES = ('ONNX Runtime', 'TensorRT')
MODULES = {'OpenCV': 'cv2', 'TensorRT': 'tensorrt', 'rclpy': 'rclpy', 'numpy': 'numpy'}


def examine(
    *,
    root: Path = Path('/'),
    environment: Mapping[str, str] = os.environ,
    moment: int = 0,
    folders: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Return what is to be said of the machine; `moment`: bytes that all cameras publish at once, `folders`: for writing."""
    return [
        *_versions(),
        _jetpack(root),
        *_middleware(environment),
        *_profile(environment, moment),
        *_shared_memory(root, environment, moment),
        *_limits(root),
        *_disks(folders or {}),
    ]


def check_bundle(folder: str) -> Finding:
    """Return whether a bundle is whole and unchanged."""
    try:
        manifest = Manifest.load(folder)
    except (ValueError, OSError) as error:
        remedy = 'give the right folder, or copy the whole bundle again'
        return Finding(level='error', what='bundle', says=str(error), remedy=remedy)
    says = (
        f'{manifest.name}: {len(manifest.files)} files as the manifest says, {manifest.precision}'
    )
    return Finding(level='ok', what='bundle', says=says)


def versions() -> dict[str, str]:
    """Return the versions of what matters, as far as it is installed."""
    found = {'Python': platform.python_version()}
    for what, names in PACKAGES.items():
        version = next(filter(None, map(_distribution, names)), '')
        if not version and what in MODULES:  # from Debian's packages, as on a Jetson
            version = _module_version(MODULES[what])
        if version:
            found[what] = version
    return found


def _distribution(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ''


def _module_version(name: str) -> str:
    spec = importlib.util.find_spec(name)
    return 'present' if spec is not None else ''


def _versions() -> list[Finding]:
    found = versions()
    says = ', '.join(f'{name} {version}' for name, version in found.items())
    findings = [Finding(level='ok', what='versions', says=f'{says}; {platform.machine()}')]
    if sys.version_info < MIN_PYTHON:
        remedy = 'run the Python of the ROS installation (Humble: 3.10, Jazzy: 3.12)'
        findings.append(
            Finding(level='error', what='versions', says='Python is too old', remedy=remedy)
        )
    if not found.keys() & set(RUNTIMES):
        says = 'neither ONNX Runtime nor TensorRT is installed: no bundle can run'
        remedy = 'pip install onnxruntime, or on a Jetson apt install nvidia-jetpack'
        findings.append(Finding(level='error', what='versions', says=says, remedy=remedy))
    return findings


def _jetpack(root: Path) -> Finding:
    path = root / 'etc/nv_tegra_release'
    if not path.is_file():
        return Finding(level='ok', what='JetPack', says='this is no Jetson')
    line = path.read_text(encoding='utf-8', errors='replace').splitlines()[0]
    return Finding(level='ok', what='JetPack', says=line.lstrip('# ')[:80])


def _middleware(environment: Mapping[str, str]) -> list[Finding]:
    rmw = environment.get('RMW_IMPLEMENTATION', '')
    names = ('ROS_DISTRO', 'ROS_DOMAIN_ID', 'ROS_AUTOMATIC_DISCOVERY_RANGE', 'ROS_LOCALHOST_ONLY')
    says = ', '.join(f'{name} {environment.get(name, "not set")}' for name in names)
    says = f'{rmw or "RMW_IMPLEMENTATION not set: the default of the distribution"}; {says}'
    findings = [Finding(level='ok', what='middleware', says=says)]
    domain = environment.get('ROS_DOMAIN_ID', '0') or '0'
    if not (domain.isdecimal() and int(domain) <= 232):
        remedy = 'set a number in 0..101, the same on all machines of the vehicle'
        says = f'ROS_DOMAIN_ID {domain!r} is none'
        findings.append(Finding(level='error', what='middleware', says=says, remedy=remedy))
    elif int(domain) > 101:
        remedy = 'set a number in 0..101: the ports of higher ones lie among the ephemeral ones of Linux'
        says = f'ROS_DOMAIN_ID {domain} may find its ports taken'
        findings.append(Finding(level='warning', what='middleware', says=says, remedy=remedy))
    if rmw and not rmw.startswith('rmw_fastrtps'):
        says = f'{rmw}: the shared-memory profile of config/ is for Fast DDS'
        remedy = f'use the shared memory of {rmw} (Cyclone DDS: iceoryx), or rmw_fastrtps_cpp'
        findings.append(Finding(level='warning', what='middleware', says=says, remedy=remedy))
    return findings


def read_profile(path: str | Path) -> tuple[int, int]:
    """Return bytes of the shared-memory segment and pieces of the queue that a profile gives a process; ValueError if none."""
    try:
        tree = ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f'{path} can not be read as a profile: {error}') from None
    texts = {node.tag.rpartition('}')[2]: str(node.text).strip() for node in tree.iter()}
    segment, queue = texts.get('segment_size', ''), texts.get('port_queue_capacity', str(QUEUE))
    if not (segment.isdecimal() and queue.isdecimal()):
        raise ValueError(f'{path} sets no shared-memory segment')
    return int(segment), int(queue)


def _profile(environment: Mapping[str, str], moment: int) -> list[Finding]:
    what = 'profile'
    paths = {environment[name] for name in PROFILES if environment.get(name)}
    remedy = (
        f'set {" and ".join(PROFILES)} to config/fastdds_shm.xml of this package, and to '
        'fastdds_cameras.xml for whoever sends pictures'
    )
    if not paths:
        says = "no profile is set here: Fast DDS's segment of 512 KiB loses large pictures"
        return [Finding(level='warning', what=what, says=says, remedy=remedy)]
    if len(paths) > 1:
        says = f'{PROFILES[0]} and {PROFILES[1]} name different files'
        return [Finding(level='error', what=what, says=says, remedy=remedy)]
    path = paths.pop()
    try:
        segment, queue = read_profile(path)
    except ValueError as error:
        return [Finding(level='error', what=what, says=str(error), remedy=remedy)]
    pieces = moment // PIECE
    if queue < MOMENTS * pieces:
        says = f'{path}: {queue} pieces may wait, and a moment of all cameras is {pieces}'
        more = f'set port_queue_capacity to {MOMENTS * pieces} or more, here and for the cameras'
        return [Finding(level='error', what=what, says=says, remedy=more)]
    says = f'{path}: {segment / 2**20:.0f} MiB a process, {queue} pieces may wait'
    return [Finding(level='ok', what=what, says=says)]


def _shared_memory(root: Path, environment: Mapping[str, str], moment: int) -> list[Finding]:
    folder = root / 'dev/shm'
    if not folder.is_dir():
        remedy = 'mount a tmpfs there; in a container: --ipc=host'
        return [Finding(level='error', what='/dev/shm', says='it is missing', remedy=remedy)]
    size = shutil.disk_usage(folder)
    needed = 64 * 2**20
    for name in PROFILES:
        if environment.get(name):
            try:
                needed = PARTICIPANTS * read_profile(environment[name])[0]
            except ValueError:
                continue  # told of the profile itself
    needed += MOMENTS * moment  # of whoever sends the pictures
    says = f'{size.free / 2**20:.0f} of {size.total / 2**20:.0f} MiB are free'
    if size.free < needed:
        says += f', the processes may want {needed / 2**20:.0f}'
        remedy = (
            'docker run --ipc=host (or --shm-size 2g); on the host: mount -o remount,size=2G /dev/shm; '
            'leftovers of dead processes: fastdds shm clean'
        )
        return [Finding(level='error', what='/dev/shm', says=says, remedy=remedy)]
    return [Finding(level='ok', what='/dev/shm', says=says)]


def _limits(root: Path) -> list[Finding]:
    findings = []
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < MIN_FILES:
        says, remedy = (
            f'{files} files may be open',
            f'ulimit -n {MIN_FILES} (LimitNOFILE in systemd)',
        )
        findings.append(Finding(level='warning', what='limits', says=says, remedy=remedy))
    path = root / 'proc/sys/net/core/rmem_max'
    if path.is_file():
        size = int(path.read_text())
        if size < MIN_SOCKET:
            says = f'net.core.rmem_max is {size} bytes: pictures from other machines are lost'
            remedy = 'sysctl -w net.core.rmem_max=16777216, and the same in /etc/sysctl.d'
            findings.append(Finding(level='warning', what='limits', says=says, remedy=remedy))
    if not findings:
        findings.append(Finding(level='ok', what='limits', says=f'{files} open files; sockets'))
    return findings


def _disks(folders: Mapping[str, str]) -> list[Finding]:
    findings = []
    for what, folder in folders.items():
        there = Path(folder).expanduser()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        says = f'{free / 2**30:.1f} GiB are free for {what} in {folder}'
        if free < MIN_FREE:
            remedy = 'make room, or name a folder on another disk'
            findings.append(Finding(level='warning', what='disk', says=says, remedy=remedy))
        else:
            findings.append(Finding(level='ok', what='disk', says=says))
    return findings
