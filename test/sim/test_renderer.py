"""What the simulator's cameras show: the right things at the right pixels; and what goes wrong is said."""

import numpy as np
import pytest

from mose_ros.core import rig
from mose_ros.core.types import EgoState
from mose_ros.sim.landscape import PAINT
from mose_ros.sim.looks import CLASSES
from mose_ros.sim.roads import Paint, RoadMap, Surface
from sim import scenes
from sim.pictures import EMPTY, ORIGIN, is_class, open_renderer, run_code


def test_each_camera_of_the_rig_gives_its_picture(renderer):
    renderer.load(scenes.town())
    for draw, shape in ((renderer.render, (144, 256, 3)), (renderer.semantics, (144, 256))):
        views = draw(scenes.EGO, scenes.everyone())
        assert tuple(views) == rig.CAMERAS
        for view in views.values():
            assert (view.shape, view.dtype) == (shape, np.uint8)
            assert view.flags.c_contiguous


@pytest.mark.parametrize('size', [(256, 128), (128, 72)])
def test_the_size_is_that_of_one_camera(size):
    small = open_renderer('tiny', size)
    small.load(scenes.town())
    views = small.render(scenes.EGO, scenes.everyone())
    assert {view.shape for view in views.values()} == {(size[1], size[0], 3)}
    small.close()


@pytest.mark.parametrize('camera', rig.RIG, ids=rig.CAMERAS)
@pytest.mark.parametrize('bearing_deg', [-25, 0, 20])  # from the camera's axis, to the left
def test_a_walker_stands_where_a_pinhole_camera_sees_it(renderer, camera, bearing_deg):
    ego = EgoState(x=30.0, y=-12.0, yaw=0.7, speed=0.0)
    distance, bearing = 10.0, np.deg2rad(bearing_deg)
    angle = ego.yaw + camera.yaw + bearing
    c, s = np.cos(ego.yaw), np.sin(ego.yaw)
    x = ego.x + c * camera.x - s * camera.y + distance * np.cos(angle)
    y = ego.y + s * camera.x + c * camera.y + distance * np.sin(angle)
    walker = scenes.actor('w', 'walker', 'walker.pedestrian', x, y, scenes.WALKER, yaw=angle)
    renderer.load(EMPTY)

    seen = is_class(renderer.semantics(ego, [walker])[camera.name], 'walker')

    rows, columns = np.nonzero(seen)
    focal, depth = camera.focal_px(256), distance * np.cos(bearing)
    assert columns.mean() + 0.5 == pytest.approx(128 - focal * np.tan(bearing), abs=1.5)
    assert rows.max() + 1 == pytest.approx(72 + focal * camera.z / depth, abs=1.5)
    assert rows.min() == pytest.approx(72 - focal * (1.75 - camera.z) / depth, abs=2.0)


def test_the_ground_shows_what_the_map_says(renderer):
    renderer.load(scenes.town(buildings=0))
    front = renderer.semantics(scenes.EGO, [])['front']
    picture = renderer.render(scenes.EGO, [])['front']
    focal, row = rig.RIG[0].focal_px(256), 130

    def column(y):  # of a point on the ground that far left of the camera, in that row
        return int(128 - y / rig.RIG[0].z * (row + 0.5 - 72))

    assert focal == pytest.approx(182.8, abs=0.1)
    assert is_class(front[row, column(0)], 'road')
    assert is_class(front[row, column(-1.65)], 'line')
    assert picture[row, column(-1.65)] == pytest.approx(255 * np.array(PAINT['white']), abs=30)
    assert is_class(front[85, :], 'sidewalk').any() and is_class(front[85, :], 'parking').any()
    assert is_class(front[:40], 'sky').mean() > 0.9 and is_class(front[90:], 'sky').sum() == 0


def test_broken_yellow_and_solid_white_lines_differ(renderer):
    def lines(**paint):
        road = Surface(left=scenes.along(-50, 60, 4), right=scenes.along(-50, 60, -4))
        line = Paint(points=scenes.along(-50, 60, 1.0), **paint)
        renderer.load(RoadMap(surfaces=[road], paint=[line], scenery=[]))
        return renderer.semantics(ORIGIN, [])['front'], renderer.render(ORIGIN, [])['front']

    solid, white = lines()
    broken, yellow = lines(broken=True, color='yellow')
    rows = slice(85, 140)
    assert is_class(solid[rows], 'line').any(1).all()
    assert 0.3 < is_class(broken[rows], 'line').any(1).mean() < 0.7
    paint = is_class(broken, 'line')
    blueness = [float(view[paint].astype(float)[:, 2].mean()) for view in (white, yellow)]
    assert blueness[0] > blueness[1] + 80


def test_every_class_of_the_scene_is_seen(renderer):
    renderer.load(scenes.town())
    views = renderer.semantics(scenes.EGO, scenes.everyone())
    seen = {CLASSES[i] for i in np.unique(np.concatenate([v.ravel() for v in views.values()]))}
    assert seen == set(CLASSES)
    renderer.load(EMPTY)
    views = renderer.semantics(scenes.EGO, [])
    assert set(np.unique(views['front'])) == {CLASSES.index('sky'), CLASSES.index('ground')}


def test_the_overview_shows_the_ego_vehicle_and_the_cameras_do_not(renderer):
    renderer.load(EMPTY)
    picture = renderer.overview(ORIGIN, [], size=(320, 180))
    r, g, b = picture.astype(int).transpose(2, 0, 1)
    assert picture.shape == (180, 320, 3)
    assert ((b > r + 60) & (g > r + 60) & (abs(g - b) < 40)).sum() > 500  # its teal paint
    assert renderer.overview(ORIGIN, [], size=(160, 90)).shape == (90, 160, 3)
    views = renderer.semantics(ORIGIN, [])
    assert not any(is_class(view, 'vehicle').any() for view in views.values())


def test_actors_that_leave_are_gone(renderer):
    renderer.load(scenes.town())
    alone = renderer.semantics(scenes.EGO, [])
    renderer.semantics(scenes.EGO, scenes.everyone())
    assert all(np.array_equal(a, b) for a, b in zip(alone.values(), renderer.semantics(scenes.EGO, []).values(), strict=True))  # fmt: skip


def test_auto_takes_egl_where_it_works_and_else_says_what_to_install():
    code = """
        from sim import scenes
        from mose_ros.sim.renderer import Renderer
        one = Renderer()
        one.load(scenes.town())
        print('took', one.backend, one.render(scenes.EGO, [])['front'].std() > 20)
    """
    report = run_code(code, __EGL_VENDOR_LIBRARY_FILENAMES='/nonexistent')
    assert 'took tiny True' in report and 'apt-get install libegl1' in report
    open_renderer('egl').close()  # or skip
    report = run_code(code)
    assert 'took egl True' in report and 'apt-get' not in report


def test_what_cannot_be_drawn_is_named(renderer):
    renderer.load(EMPTY)
    box = (1.0, 1.0, 1.0)
    for wrong, said in (
        (scenes.actor('a', 'static', 'static.piano', 5.0, 0.0, box), 'static.piano'),
        (scenes.actor('a', 'static', 'static.cone', 5.0, 0.0, (1.0, 0.0, 1.0)), 'above 0'),
        (scenes.light('blue', 9.0), "not 'blue'"),
    ):
        with pytest.raises(ValueError, match=said):
            renderer.render(ORIGIN, [wrong])
    uneven = Surface(left=scenes.along(0, 9, 1), right=scenes.along(0, 4, -1))
    with pytest.raises(ValueError, match='polylines'):
        renderer.load(RoadMap(surfaces=[uneven], paint=[], scenery=[]))
        renderer.render(ORIGIN, [])
    with pytest.raises(ValueError, match='vulkan'):
        open_renderer('vulkan')


def test_a_map_comes_first():
    one = open_renderer('tiny')
    with pytest.raises(RuntimeError, match='load'):
        one.render(ORIGIN, [])
    one.close()
