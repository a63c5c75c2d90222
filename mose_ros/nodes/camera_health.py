"""What can be told of a camera from its messages alone: rate, age, what was lost, how bright. Knows no node and no topic."""

import threading

import numpy as np
from jaxtyping import UInt8

SMOOTHING = 0.1  # share of the newest interval in the mean one
MISSED = 1.5  # mean intervals; a longer one has lost pictures
BLACK = 8  # of 255: nothing in the picture is brighter, so nothing can be seen
CLIPPED = 250
STRIDE = 8  # pixels between those that exposure looks at


class CameraHealth:
    """Counts the pictures of one camera; heard by one thread, asked by another."""

    def __init__(self):
        self._lock = threading.Lock()
        self._heard = self._dropped = self._frozen = 0
        self._last: float | None = None
        self._is_stuck = False
        self._interval = self._delay = 0.0
        self._picture: dict[str, float | str] = {}

    @property
    def is_stuck(self) -> bool:
        """Say whether the newest picture has the stamp of the one before."""
        return self._is_stuck

    def heard(self, stamp: float, now: float) -> None:
        """Count a picture with this stamp that came at this time, both in s of the node's clock."""
        with self._lock:
            self._heard += 1
            self._delay = now - stamp
            last, self._last = self._last, stamp
            step = 0.0 if last is None else stamp - last
            self._is_stuck = last is not None and step == 0
            self._frozen += self._is_stuck
            if step < 0:  # time went back
                self._interval = 0.0
            if step <= 0:
                return
            if self._interval and step > MISSED * self._interval:
                self._dropped += round(step / self._interval) - 1
            elif self._interval:
                self._interval += SMOOTHING * (step - self._interval)
            else:
                self._interval = step

    def seen(self, picture: UInt8[np.ndarray, 'H W 3']) -> None:
        """Take a picture's size and exposure; ValueError when it is black, for then there is nothing to see in it."""
        thumbnail = picture[::STRIDE, ::STRIDE]
        found = {
            'size': f'{picture.shape[1]}x{picture.shape[0]}',
            'brightness': round(float(thumbnail.mean()), 1),
            'clipped': round(float((thumbnail >= CLIPPED).all(axis=2).mean()), 3),
        }
        with self._lock:
            self._picture = found
        if thumbnail.max() <= BLACK:
            raise ValueError('black: nothing can be seen')

    def values(self, moment: float) -> dict[str, float | str]:
        """Return what a diagnostic says of the camera at a moment of the anchor's stamps."""
        with self._lock:
            known: dict[str, float | str] = {'received': self._heard, 'dropped': self._dropped}
            known['same_stamp'] = self._frozen
            if self._interval:
                known['rate_hz'] = round(1.0 / self._interval, 2)
            if self._last is not None:
                known['age_ms'] = round(1e3 * (moment - self._last), 1)
                known['delay_ms'] = round(1e3 * self._delay, 1)
            return known | self._picture
