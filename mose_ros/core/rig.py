"""The camera rig: six cameras with Bench2Drive's positions, yaws and fields of view."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera on the ego vehicle; ego frame, yaw positive to the left, no roll."""

    name: str
    x: float
    y: float
    yaw: float  # rad
    fov: float  # horizontal, rad
    z: float = 1.6
    pitch: float = 0.0  # rad, positive = down (REP-103: about +y)

    def focal_px(self, width: int) -> float:
        """Return the focal length in pixels for an image of that width."""
        return width / (2 * np.tan(self.fov / 2))


def _camera(name, x, y, yaw_deg, fov_deg):
    return Camera(name=name, x=x, y=y, yaw=np.deg2rad(yaw_deg), fov=np.deg2rad(fov_deg))


# The order is the order everywhere: bundle, messages, clips. Values: Bench2Drive's sensors, y and yaw to the left.
RIG = (
    _camera('front', 0.80, 0.0, 0, 70),
    _camera('front_left', 0.27, 0.55, 55, 70),
    _camera('front_right', 0.27, -0.55, -55, 70),
    _camera('back', -2.0, 0.0, 180, 110),
    _camera('back_left', -0.32, 0.55, 110, 70),
    _camera('back_right', -0.32, -0.55, -110, 70),
)
CAMERAS = tuple(camera.name for camera in RIG)


def camera(name: str) -> Camera:
    """Return the camera of that name; ValueError with the known names otherwise."""
    for one in RIG:
        if one.name == name:
            return one
    raise ValueError(f'no camera {name!r}; the rig has {", ".join(CAMERAS)}')
