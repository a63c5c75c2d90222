"""From camera pictures to what the networks take: the only resize, normalise and patchify of the project.

Equal to Hugging Face's Qwen2-VL image processor: normalise and patchify to float rounding; resizing by OpenCV's area
average instead of Pillow's bicubic, which differs by a few grey levels at edges (test/core/test_vision.py states and
holds the tolerance) and is many times as fast on a camera's picture.
"""

from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

HISTORIES = ('all', 'fixed', 'none')  # views that show their past


def shows_past(name: str, history: str, fixed_views: Sequence[str]) -> bool:
    """Return whether a view shows its past, or, as Qwen2-VL does with a picture, the newest frame in all its slots."""
    return history == 'all' or (history == 'fixed' and name in fixed_views)


def check_image(image: np.ndarray, what: str = 'image') -> None:
    """Raise ValueError unless the image is (H, W, 3) uint8 and not empty."""
    if (
        not isinstance(image, np.ndarray)
        or image.ndim != 3
        or image.shape[2] != 3
        or image.size == 0
    ):
        raise ValueError(
            f'{what}: expected (H, W, 3) RGB, got shape {getattr(image, "shape", type(image))}'
        )
    if image.dtype != np.uint8:
        raise ValueError(f'{what}: expected uint8, got {image.dtype}')


def resize(
    image: UInt8[np.ndarray, 'H W 3'], width: int, height: int
) -> UInt8[np.ndarray, 'h w 3']:
    """Return the image at that size; itself where it has it already."""
    check_image(image)
    if image.shape[:2] == (height, width):
        return image
    rows, columns = image.shape[:2]
    if rows % height or columns % width:
        # OpenCV takes long for factors that are not whole, so most of a large picture is halved away first.
        while rows >= 2 * height and columns >= 2 * width and not (rows % 2 or columns % 2):
            rows, columns = rows // 2, columns // 2
            image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA)
    return _resize(image, width, height)


def _resize(image, width, height):
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    )


def normalize(
    image: UInt8[np.ndarray, '*B H W 3'],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Float32[np.ndarray, '*B H W 3']:
    """Return (image / 255 - mean) / std, channels last."""
    scale, offset = _scale_and_offset(mean, std)
    values = image * scale
    values -= offset
    return values


def _scale_and_offset(mean, std):
    std = np.asarray(std, np.float32)
    return 1 / (255 * std), np.asarray(mean, np.float32) / std


def patchify(
    frames: Float[np.ndarray, 'F H W 3'], patch: int, merge: int = 2
) -> Float32[np.ndarray, 'N D']:
    """Cut normalised frames into Qwen2-VL's patches.

    The F frames are the temporal slots of each patch. Patches come in groups of merge * merge, as the merger joins
    them; within a patch the order is channel, frame, row, column.
    """
    num_frames, height, width, channels = frames.shape
    unit = patch * merge
    if height % unit or width % unit:
        raise ValueError(f'a view of {width}x{height} is no multiple of patch * merge = {unit}')
    rows, columns = height // unit, width // unit
    grid = frames.reshape(num_frames, rows, merge, patch, columns, merge, patch, channels)
    patches = grid.transpose(
        1, 4, 2, 5, 7, 0, 3, 6
    )  # rows, columns, merge, merge, channel, frame, y, x
    flat = patches.reshape(rows * columns * merge**2, channels * num_frames * patch**2)
    return np.ascontiguousarray(flat, np.float32)


def stack_views(
    views: Sequence[UInt8[np.ndarray, 'F H W 3'] | Sequence[UInt8[np.ndarray, 'H W 3']]],
) -> UInt8[np.ndarray, 'VFH W 3']:
    """Stack views of equal size vertically, each as its frames from the oldest to the newest (see `types.Views`)."""
    return np.concatenate([frame for view in views for frame in view])


def split_views(
    image: UInt8[np.ndarray, 'VFH W 3'], num_views: int, num_frames: int
) -> UInt8[np.ndarray, 'V F H W 3']:
    """Undo `stack_views`; ValueError when the height is no such multiple."""
    check_image(image, 'views')
    if num_views <= 0 or image.shape[0] % (num_views * num_frames):
        raise ValueError(
            f'views: {image.shape[0]} rows are not {num_views} views of {num_frames} frames'
        )
    return image.reshape(num_views, num_frames, -1, *image.shape[1:])


def glance(
    images: Mapping[str, UInt8[np.ndarray, 'H W 3']],
    cameras: Sequence[str],
    width: int,
    height: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    each: Callable = map,
) -> tuple[Float32[np.ndarray, 'C 3 h w'], Float32[np.ndarray, 'C']]:
    """Return normalised thumbnails in camera order, channels first, and which are present (1) or missing (0, zeros).

    each: calls a function with each of several numbers, in any order or at once, as `map` does.
    """
    thumbnails = np.zeros((len(cameras), 3, height, width), np.float32)
    present = np.zeros(len(cameras), np.float32)

    def shrink(index):
        image = images[cameras[index]]
        check_image(image)
        # Not halved before: the shipped view router was trained on thumbnails of views that are not.
        thumbnails[index] = _resize(image, width, height).transpose(2, 0, 1)
        present[index] = 1

    list(each(shrink, [index for index, name in enumerate(cameras) if name in images]))
    # The same numbers as `normalize` gives, bit for bit; along whole planes it is eight times as fast.
    scale, offset = _scale_and_offset(mean, std)
    thumbnails *= scale[:, None, None]
    thumbnails -= offset[:, None, None]
    thumbnails[present == 0] = 0
    return thumbnails, present
