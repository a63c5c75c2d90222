import re
from pathlib import Path

import numpy as np
import pytest

from mose_ros.core import rig


def test_cameras_look_where_their_names_say():
    for camera in rig.RIG:
        ahead = np.cos(camera.yaw)
        assert ahead > 0.5 if camera.name.startswith('front') else ahead < 0
        left = np.sin(camera.yaw)
        side = 1 if 'left' in camera.name else -1 if 'right' in camera.name else 0
        assert left * side > 0.5 or (side == 0 and abs(left) < 1e-9)
        assert np.sign(camera.y) == side


def test_left_and_right_mirror_each_other():
    for place in ('front', 'back'):
        left, right = rig.camera(f'{place}_left'), rig.camera(f'{place}_right')
        assert (left.x, left.y, left.yaw) == (right.x, -right.y, -right.yaw)


def test_together_they_see_all_around():
    for angle in np.deg2rad(np.arange(0, 360, 1)):
        apart = [abs((angle - one.yaw + np.pi) % (2 * np.pi) - np.pi) for one in rig.RIG]
        assert any(a <= one.fov / 2 for a, one in zip(apart, rig.RIG, strict=True)), angle


def test_the_focal_length_fills_the_field_of_view():
    for camera in rig.RIG:
        half = np.arctan((640 / 2) / camera.focal_px(640))
        assert 2 * half == pytest.approx(camera.fov)
    assert rig.camera('back').focal_px(640) < rig.camera('front').focal_px(640)


def test_an_unknown_camera_is_named_with_those_that_are_there():
    assert rig.camera('front').name == 'front'
    with pytest.raises(ValueError, match="no camera 'roof'; the rig has front, front_left"):
        rig.camera('roof')


def test_the_vehicles_page_says_where_cameras_are_mounted():
    page = (Path(__file__).parents[2] / 'docs/vehicle.md').read_text()
    found = re.findall(r'^\| `(\w+)`((?: \| -?[\d.]+){5}) \|$', page, re.M)
    told = {name: [float(one) for one in numbers.split(' | ')[1:]] for name, numbers in found}
    assert told == {
        one.name: pytest.approx([one.x, one.y, one.z, *np.rad2deg([one.yaw, one.fov])])
        for one in rig.RIG
    }
