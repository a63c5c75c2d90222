"""Pictures that don't show the world are found out by their pixels, and those that do are left alone."""

import time

import numpy as np
import pytest

from mose_ros.core.pictures import PictureCheck

HERE = (0.0, 0.0)


class Camera:
    """A camera's check, with a new stamp for each picture."""

    def __init__(self):
        self.check_at, self.stamp = PictureCheck().check, 0.0

    def check(self, picture, place):
        self.stamp += 0.1
        return self.check_at(self.stamp, picture, place)


def scene(seed=0, shape=(144, 256)):
    """Return something with the smoothness of the world: sky, road, and a few sharp things in between."""
    random, (height, width) = np.random.default_rng(seed), shape
    picture = np.repeat(np.linspace(200, 60, height)[:, None, None], width, 1) * np.ones(3)
    for _ in range(20):
        y, x = random.integers(0, height), random.integers(0, width)
        picture[y : y + height // 6, x : x + width // 10] = random.integers(0, 255, 3)
    return (picture + random.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)


def test_a_drive_through_the_world_is_left_alone():
    check = Camera()
    assert [check.check(scene(k), (0.8 * k, 0.0)) for k in range(20)] == [''] * 20
    for brightness in (0, 90, 255):  # neither what is uniform: nobody can tell
        assert check.check(np.full((144, 256, 3), brightness, np.uint8), HERE) == ''


@pytest.mark.parametrize('shape', [(144, 256), (900, 1600)])
def test_noise_is_no_picture(shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    check = Camera()
    check.check(scene(shape=shape), HERE)
    with pytest.raises(ValueError, match='noise'):
        check.check(noise, HERE)
    assert check.check(scene(1, shape), HERE) == ''  # and it recovers


def test_the_same_picture_is_frozen_only_where_the_car_moves():
    check, picture = Camera(), scene()
    for _ in range(30):
        assert check.check(picture, HERE) == ''  # at a red light nothing need move
    with pytest.raises(ValueError, match='frozen'):
        check.check(picture, (1.2, 0.0))
    assert check.check(scene(1), (1.2, 0.0)) == ''
    assert check.check(scene(1), (3.2, 0.0)) == ''  # one that comes twice


def test_a_picture_that_is_looked_at_again_because_no_newer_one_came_is_not_frozen():
    check, picture = PictureCheck(), scene()
    for k in range(10):  # a slow camera beside a fast one, on a fast car
        assert check.check(0.0, picture, (1.0 * k, 0.0)) == ''
    noise = np.random.default_rng(0).integers(0, 256, (144, 256, 3), np.uint8)
    for _ in range(2):
        with pytest.raises(ValueError, match='noise'):
            check.check(0.1, noise, HERE)


def test_a_small_coarse_picture_that_moves_by_a_pixel_is_not_frozen():
    blocks = np.kron(np.random.default_rng(0).integers(40, 140, (9, 16, 3)), np.ones((4, 4, 1)))
    check = Camera()
    for k in range(20):
        moved = np.roll(blocks, k, axis=1).astype(np.uint8)
        assert check.check(moved, (0.8 * k, 0.0)) == ''


def test_another_size_is_told_and_another_part_of_the_world_refused():
    check = Camera()
    check.check(scene(), HERE)
    assert check.check(scene(1)[::2, ::2], HERE) == 'its size changed from 256x144 to 128x72'
    with pytest.raises(ValueError, match='another part of the world'):
        check.check(scene(1)[:, 64:192], HERE)
    assert check.check(scene(2), HERE) == ''


def test_looking_costs_little():
    check, pictures = Camera(), [scene(k, (900, 1600)) for k in range(2)]
    took = []
    for k in range(20):
        started = time.thread_time()
        check.check(pictures[k % 2], (float(k), 0.0))
        took.append(time.thread_time() - started)
    assert np.median(took) < 0.01  # of processor time; 0.4 ms
