"""Whether a camera's picture shows the world: what a sensor that is broken, disturbed or stuck gives away by its pixels.

Cheap, half a millisecond for 1600x900: it looks at some of the rows. Knows no message and no time. A camera that
stamps late pictures as new ones can not be found out here.
"""

import math
import zlib

import numpy as np
from jaxtyping import UInt8

ROWS = 48  # about so many are looked at
NOISE = 0.6  # neighbours' difference over all pixels' deviation: 1.13 of white noise, below 0.1 of 2000 pictures of ours
CONTRAST = 10.0  # of 255: with less, nothing can be told from the neighbours
TEXTURE = 1.0  # of 255: with less, two pictures are the same whatever the car does
FROZEN_M, FROZEN_TIMES = 1.0, 2  # the same picture so often again, while the car moves so far


class PictureCheck:
    """Looks at each picture of one camera."""

    def __init__(self):
        self._shape: tuple[int, int] | None = None
        self._digest, self._times = 0, 0
        self._place = (0.0, 0.0)  # where the car was when this picture was first seen
        self._stamp = math.nan
        self._verdict: str | ValueError = ''  # of the last picture

    def check(
        self, stamp: float, picture: UInt8[np.ndarray, 'H W 3'], place: tuple[float, float]
    ) -> str:
        """Return what is unusual about a picture that serves, or nothing; ValueError says why one doesn't.

        A picture may be shown again, with its stamp: it is judged once. `place`: x, y of the car in the world.
        """
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._verdict = self._judge(picture, place)
            except ValueError as error:
                self._verdict = error
        if isinstance(self._verdict, ValueError):
            raise self._verdict
        return self._verdict

    def _judge(self, picture, place) -> str:
        note = self._check_size(picture.shape[:2])
        rows = picture[:: max(1, len(picture) // ROWS)]
        green = rows[:, :, 1].astype(np.int16)
        spread = float(green.std())
        if spread > CONTRAST and np.abs(np.diff(green, axis=1)).mean() > NOISE * spread:
            raise ValueError('noise: nothing can be seen')
        self._check_change(rows, place, spread)
        return note

    def _check_size(self, shape: tuple[int, int]) -> str:
        self._shape = self._shape or shape
        if shape == self._shape:
            return ''
        (height, width), (was_high, was_wide) = shape, self._shape
        change = f'its size changed from {was_wide}x{was_high} to {width}x{height}'
        if abs(width * was_high - height * was_wide) > 0.01 * height * was_wide:
            raise ValueError(f'{change}: it shows another part of the world')
        return change

    def _check_change(self, rows, place, spread) -> None:
        digest = zlib.crc32(np.ascontiguousarray(rows))
        if digest != self._digest or spread < TEXTURE:
            self._digest, self._times, self._place = digest, 0, place
            return
        self._times += 1
        moved = math.dist(place, self._place)
        if self._times >= FROZEN_TIMES and moved > FROZEN_M:
            raise ValueError('frozen: the same picture though the car moves')
