"""A trivial driver for the tests of the world."""

import numpy as np

from mose_ros.core.types import VehicleCommand


def keep_lane(scene, speed=7.0):
    """A trivial driver: pure pursuit of the route, speed by a proportional rule, blind to everything else."""
    ego, corridor = scene.ego, scene.corridor
    ahead = min(int(scene.progress) + 6, len(corridor.xy) - 1)
    dx, dy = corridor.xy[ahead] - (ego.x, ego.y)
    x, y = dx * np.cos(ego.yaw) + dy * np.sin(ego.yaw), dy * np.cos(ego.yaw) - dx * np.sin(ego.yaw)
    steer = np.arctan(2 * 2.47 * y / (x * x + y * y)) / np.deg2rad(40)
    push = speed - ego.speed
    return VehicleCommand(
        steer=float(np.clip(steer, -1, 1)),
        throttle=float(np.clip(push / 2, 0, 1)),
        brake=float(np.clip(-push / 10, 0, 1)),
    )
