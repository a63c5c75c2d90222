"""Write objects.json for carla_spawn_objects: our rig on a vehicle. The file in config/carla is what this prints by default."""

import argparse
import json
import sys

from mose_ros.core.carla import EGO_VEHICLE, objects


def text(role: str, width: int, height: int, vehicle: str) -> str:
    """Return the file's content."""
    return json.dumps(objects(role, width, height, vehicle), indent=2) + '\n'


def main(arguments: list[str] | None = None) -> int:
    """Print the file for the role, size and vehicle of the command line."""
    parser = argparse.ArgumentParser(prog='carla_objects', description=__doc__)
    parser.add_argument('--role', default='ego_vehicle', help='role_name of the vehicle')
    parser.add_argument('--width', type=int, default=1600, help='pixels of each camera')
    parser.add_argument('--height', type=int, default=900, help='pixels of each camera')
    parser.add_argument('--vehicle', default=EGO_VEHICLE, help='blueprint of the vehicle')
    options = parser.parse_args(arguments)
    try:
        print(text(options.role, options.width, options.height, options.vehicle), end='')
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
