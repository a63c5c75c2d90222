"""carla_msgs and ackermann_msgs, which have no wheels: built here by the rosidl generators that come with rclpy's wheels.

The texts below are the packages' public interface definitions, as far as our nodes use them. What comes out are true message
classes: they travel over DDS between nodes under the true type names. Needs a C++ compiler and Python's headers.
"""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = {
    'carla_msgs': {
        'CarlaEgoVehicleControl': """
            std_msgs/Header header
            float32 throttle
            float32 steer
            float32 brake
            bool hand_brake
            bool reverse
            int32 gear
            bool manual_gear_shift""",
        'CarlaRoute': """
            std_msgs/Header header
            uint8[] road_options
            geometry_msgs/Pose[] poses""",
    },
    'ackermann_msgs': {
        'AckermannDrive': """
            float32 steering_angle
            float32 steering_angle_velocity
            float32 speed
            float32 acceleration
            float32 jerk""",
        'AckermannDriveStamped': """
            std_msgs/Header header
            AckermannDrive drive""",
    },
}
LIBRARIES = ('rosidl_generator_c', 'rosidl_generator_py', 'rosidl_typesupport_fastrtps_c')
NEEDED = ('std_msgs', 'geometry_msgs', 'builtin_interfaces')
ROSIDL = (
    'rosidl_runtime_c rosidl_typesupport_c rosidl_typesupport_fastrtps_c rosidl_typesupport_fastrtps_cpp '
    'rosidl_dynamic_typesupport rcutils fastcdr rmw'
)


class NotBuildable(RuntimeError):
    """What is missing to build messages here."""


def build(folder: Path) -> Path:
    """Build all packages that are not installed into a folder for sys.path; NotBuildable says what is missing."""
    if not (shutil.which('g++') and shutil.which('gcc')):
        raise NotBuildable('no gcc and g++')
    if not Path(sysconfig.get_paths()['include'], 'Python.h').is_file():
        raise NotBuildable("no Python.h: install Python's headers")
    root = _ros_root()
    for package, messages in PACKAGES.items():
        try:
            importlib.import_module(f'{package}.msg')
        except ImportError:
            _generate(package, messages, folder, root)
            _compile(package, list(messages), folder, root)
    return folder


def _ros_root() -> Path:
    import std_msgs

    for parent in Path(std_msgs.__file__).parents:
        if (parent / 'include/std_msgs').is_dir() and (
            parent / 'share/rosidl_generator_c'
        ).is_dir():
            return parent
    raise NotBuildable('no headers and generators beside std_msgs')


def _generate(package: str, messages: dict[str, str], folder: Path, root: Path) -> None:
    """Write the C and Python sources; the command `rosidl generate` does the same, but trips over doubled entry points."""
    os.environ.setdefault('AMENT_PREFIX_PATH', str(root))
    from rosidl_adapter.msg import convert_msg_to_idl
    from rosidl_cli.command.helpers import (
        build_type_description_tuples,
        generate_visibility_control_file,
        generator_arguments_file,
        legacy_generator_arguments,
        ros_interface_file_from_idl,
    )
    from rosidl_generator_c import generate_c
    from rosidl_generator_py.cli import GeneratePython
    from rosidl_generator_type_description.cli import HashTypeDescription
    from rosidl_typesupport_c.cli import GenerateCTypesupport
    from rosidl_typesupport_fastrtps_c.cli import GenerateFastRTPSCTypesupport

    out = folder / package
    for name, text in messages.items():
        source = out / 'msg' / f'{name}.msg'
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text('\n'.join(line.strip() for line in text.strip().splitlines()) + '\n')
        convert_msg_to_idl(out, package, Path('msg') / f'{name}.msg', out / 'msg')
    files = [f'{out}:msg/{name}.idl' for name in messages]
    include = [str(root / 'share' / one) for one in (*NEEDED, 'service_msgs')]
    hashes = HashTypeDescription('hash').generate_type_hashes(package, files, include, out)
    templates = root / 'share/rosidl_generator_c/resource'
    generate_visibility_control_file(
        package_name=package,
        template_path=templates / 'rosidl_generator_c__visibility_control.h.in',
        output_path=out / 'msg/rosidl_generator_c__visibility_control.h',
    )
    arguments = legacy_generator_arguments(
        package_name=package,
        interface_files=files,
        include_paths=include,
        templates_path=templates,
        output_path=out,
    )
    described = build_type_description_tuples(files, hashes)
    own = [str(ros_interface_file_from_idl(one)) for one in files]
    with generator_arguments_file(
        **arguments, type_description_tuples=described, ros_interface_files=own
    ) as path:
        generate_c(path)
    GenerateFastRTPSCTypesupport('fastrtps_c').generate(package, files, include, out)
    one_support = ['rosidl_typesupport_fastrtps_c']  # one alone needs no look-up at run time
    GenerateCTypesupport('c', typesupport_implementations=one_support).generate(
        package, files, include, out
    )
    GeneratePython('py', typesupport_implementations=['rosidl_typesupport_c']).generate(
        package, files, include, out
    )


def _compile(package: str, messages: list[str], folder: Path, root: Path) -> None:
    """Compile all sources of a package into the one extension module that its Python classes import."""
    out, lib = folder / package, root / 'lib'
    import numpy

    include = [folder, root / 'include']
    include += sorted(path for path in (root / 'include').iterdir() if path.is_dir())
    include += [Path(sysconfig.get_paths()['include']), Path(numpy.get_include())]
    flags = ['-O0', '-fPIC', '-w', *(f'-I{path}' for path in include)]
    together = out / 'together.cpp'  # most of the time goes into reading headers
    sources = sorted(path for path in out.rglob('*.cpp') if path != together)
    together.write_text(''.join(f'#include "{path}"\n' for path in sources))
    made = out / 'objects'
    made.mkdir(exist_ok=True)
    _run(['gcc', *flags, '-c', *map(str, sorted(out.rglob('*.c')))], made)
    _run(['g++', *flags, '-c', str(together)], made)
    objects = sorted(map(str, made.glob('*.o')))
    suffix = sysconfig.get_config_var('EXT_SUFFIX')
    module = out / f'{package}_s__rosidl_typesupport_c{suffix}'
    names = [f'{one}__{library}' for one in NEEDED for library in LIBRARIES]
    names += [*ROSIDL.split()]
    found = [f'-l{name}' for name in names if (lib / f'lib{name}.so').exists()]
    _run(['g++', '-shared', '-o', str(module), *objects, f'-L{lib}', *found, f'-Wl,-rpath,{lib}'])
    (out / '__init__.py').touch()


def _run(command: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise NotBuildable(f'{command[0]} failed: {done.stderr[-2000:]}')


if __name__ == '__main__':
    print(build(Path(sys.argv[1])))
