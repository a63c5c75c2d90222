"""Our preprocessing against the Qwen2-VL processors of Hugging Face, and what it refuses."""

import cv2
import numpy as np
import pytest

from mose_ros.core import vision

# Grey levels of 255 by which our resizing (area average) may differ from Hugging Face's (bicubic): on average over a
# picture, and at its worst pixel, for what a camera sees: smooth surfaces and edges.
MEAN_LEVELS, WORST_LEVELS = 0.5, 30.0


def picture(height, width, seed=0):
    """Return a scene of soft gradients and hard edges."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 64
    image = np.stack([128 + 80 * np.sin(x + k) * np.cos(y - k) for k in range(3)], -1)
    for _ in range(12):
        top, left = random.integers(0, (height * 3 // 4, width * 3 // 4))
        rows, columns = random.integers(8, (height // 4, width // 4))
        image[top : top + rows, left : left + columns] = random.integers(0, 256, 3)
    return image.clip(0, 255).astype(np.uint8)


def their_patches(image, **options):
    """Return what Hugging Face makes of a still, as (patches, channels, slots, pixels), and its grid."""
    module = pytest.importorskip('transformers.models.qwen2_vl.image_processing_pil_qwen2_vl')
    answer = module.Qwen2VLImageProcessorPil(**options)(image, return_tensors='np')
    patches = answer['pixel_values']
    return patches.reshape(len(patches), 3, 2, 14**2), answer['image_grid_thw'].tolist()


def our_patches(*frames):
    """Return ours, in the same shape."""
    patches = vision.patchify(vision.normalize(np.stack(frames)), 14)
    return patches.reshape(len(patches), 3, len(frames), 14**2)


def test_a_still_is_a_frame_twice_as_in_hugging_face():
    image = picture(112, 224)
    theirs, grid = their_patches(image, do_resize=False)
    assert grid == [[1, 8, 16]]
    np.testing.assert_allclose(our_patches(image, image), theirs, atol=2e-6)


def test_each_frame_has_its_slot_of_the_patches_of_hugging_face():
    before, now = picture(56, 84, seed=1), picture(56, 84, seed=2)
    ours = our_patches(before, now)
    for slot, frame in enumerate((before, now)):
        theirs, _ = their_patches(frame, do_resize=False)
        np.testing.assert_allclose(ours[:, :, slot], theirs[:, :, slot], atol=2e-6)
    assert np.abs(ours[:, :, 0] - ours[:, :, 1]).max() > 0.1


def test_resizing_is_near_that_of_hugging_face():
    large, area = picture(450, 900), 112 * 224
    theirs, grid = their_patches(large, size={'shortest_edge': area, 'longest_edge': area})
    assert grid == [[1, 8, 16]]

    def levels(small):
        return np.abs(our_patches(small, small) - theirs) * 255 * np.mean(vision.CLIP_STD)

    ours = levels(vision.resize(large, 224, 112))
    assert ours.mean() < MEAN_LEVELS
    assert ours.max() < WORST_LEVELS
    skipped = levels(np.ascontiguousarray(large[::4, ::4][:112, :224]))
    assert skipped.mean() > MEAN_LEVELS


def test_a_large_picture_is_averaged_as_a_small_one():
    large = picture(900, 1600)
    area = cv2.resize(large, (256, 128), interpolation=cv2.INTER_AREA).astype(int)
    halved = np.abs(vision.resize(large, 256, 128) - area)
    assert 0 < halved.mean() < 1
    skipped = np.abs(large[::7, ::6][:128, :256] - area)
    assert skipped.mean() > 3 * halved.mean()
    whole = picture(512, 1024)  # no factor of these pictures needs to be halved
    expected = cv2.resize(whole, (256, 128), interpolation=cv2.INTER_AREA)
    assert np.array_equal(vision.resize(whole, 256, 128), expected)


def test_resize_keeps_what_has_the_size_and_a_flat_picture_flat():
    image = picture(112, 224)
    assert vision.resize(image, 224, 112) is image
    for size in [(56, 28), (300, 200), (100, 400)]:
        flat = vision.resize(np.full((112, 224, 3), (10, 20, 30), np.uint8), *size)
        assert flat.shape == (size[1], size[0], 3)
        assert (flat == (10, 20, 30)).all()


def test_patches_stand_in_groups_of_the_merger():
    image = np.zeros((1, 56, 56, 3), np.float32)
    image[0, ::14, ::14, 0] = np.arange(16).reshape(4, 4)  # each patch's first pixel is its number
    numbers = vision.patchify(image, 14)[:, 0].tolist()
    assert numbers == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_patchify_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match='56x42 is no multiple of patch .* = 28'):
        vision.patchify(np.zeros((2, 42, 56, 3), np.float32), 14)


def test_stacked_views_are_split_again():
    random = np.random.default_rng(0)
    views = [random.integers(0, 256, (2, 4, 6, 3), np.uint8) for _ in range(3)]
    image = vision.stack_views(views)
    assert image.shape == (3 * 2 * 4, 6, 3)
    assert np.array_equal(vision.split_views(image, 3, 2), np.stack(views))
    assert np.array_equal(image[(1 * 2 + 1) * 4 : (1 * 2 + 2) * 4], views[1][1])


@pytest.mark.parametrize(('views', 'frames'), [(5, 2), (0, 2), (7, 1)])
def test_a_height_that_is_no_such_multiple_is_refused(views, frames):
    with pytest.raises(ValueError, match=f'24 rows are not {views} views of {frames} frames'):
        vision.split_views(np.zeros((24, 6, 3), np.uint8), views, frames)


def test_a_glance_is_the_normalised_thumbnails_bit_for_bit():
    random = np.random.default_rng(0)
    images = {name: random.integers(0, 256, (48, 96, 3), np.uint8) for name in ('front', 'back')}
    thumbnails, _ = vision.glance(images, ('front', 'left', 'back'), 24, 12)
    for index, name in ((0, 'front'), (2, 'back')):
        expected = vision.normalize(vision.resize(images[name], 24, 12)).transpose(2, 0, 1)
        assert thumbnails[index].tobytes() == expected.tobytes()
    assert thumbnails[1].tobytes() != thumbnails[0].tobytes()
    assert (thumbnails[1] == 0).all()


def test_a_thumbnail_of_a_view_is_not_halved_before():
    view = picture(128, 256)
    thumbnails, _ = vision.glance({'front': view}, ('front',), 96, 48)
    averaged = cv2.resize(view, (96, 48), interpolation=cv2.INTER_AREA)
    assert np.array_equal(thumbnails[0], vision.normalize(averaged).transpose(2, 0, 1))
    halved = vision.normalize(vision.resize(view, 96, 48)).transpose(2, 0, 1)
    assert not np.array_equal(thumbnails[0], halved)


def test_a_glance_shows_who_is_there():
    white, black = np.full((20, 40, 3), 255, np.uint8), np.zeros((20, 40, 3), np.uint8)
    cameras = ('front', 'left', 'back')
    thumbnails, present = vision.glance({'back': white, 'front': black}, cameras, 8, 4)
    assert thumbnails.shape == (3, 3, 4, 8)
    assert present.tolist() == [1, 0, 1]
    assert (thumbnails[1] == 0).all()
    low, high = -np.array(vision.CLIP_MEAN), 1 - np.array(vision.CLIP_MEAN)
    np.testing.assert_allclose(thumbnails[0, :, 0, 0], low / vision.CLIP_STD, rtol=1e-5)
    np.testing.assert_allclose(thumbnails[2, :, 3, 7], high / vision.CLIP_STD, rtol=1e-5)


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (np.zeros((4, 6), np.uint8), r'shape \(4, 6\)'),
        (np.zeros((4, 6, 4), np.uint8), r'shape \(4, 6, 4\)'),
        (np.zeros((0, 6, 3), np.uint8), r'shape \(0, 6, 3\)'),
        (np.zeros((4, 6, 3)), 'expected uint8, got float64'),
    ],
)
def test_what_is_no_picture_is_refused_by_name(image, message):
    with pytest.raises(ValueError, match=f'left: .*{message}'):
        vision.check_image(image, 'left')
