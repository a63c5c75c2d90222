"""Moments that a bundle and its network are compared on."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mose_ros.core.types import Command, EgoState, Guidance, Observation
from mose_ros.data.clips import ClipReader, find_clips

_log = logging.getLogger(__name__)


def fake_moments(cameras: Sequence[str], count: int = 6, seed: int = 0) -> list[Observation]:
    """Return moments with pictures of coloured blotches, every state and command, a camera missing now and then."""
    random = np.random.default_rng(seed)
    moments = []
    for index in range(count):
        images = {
            name: np.kron(
                random.integers(0, 256, (6, 10, 3), dtype=np.uint8), np.ones((24, 32, 1), np.uint8)
            )
            for name in cameras
        }
        if index % 3 == 2:
            del images[cameras[-1]]
        ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=float(random.uniform(0, 14)))
        near, far = random.uniform([5, -3], [10, 3]), random.uniform([12, -9], [25, 9])
        command = list(Command)[index % len(Command)]
        guidance = Guidance(near=near, far=far, command=command)
        moments.append(Observation(time=0.1 * index, images=images, ego=ego, guidance=guidance))
    return moments


def recorded_moments(
    root: Path, cameras: Sequence[str], gap: float, clips: int = 7
) -> list[Observation]:
    """Return two moments, `gap` seconds apart, from the middle of each of some clips, spread evenly over a folder's.

    Clips without all of the cameras and those that cannot be read are left out; none may be left.
    """
    folders = list(find_clips(root))
    places = np.linspace(0, len(folders) - 1, clips).round().astype(int) if folders else []
    moments = []
    for number in dict.fromkeys(int(place) for place in places):
        try:
            clip = ClipReader(folders[number])
            now = len(clip) // 2
            for index in (max(0, now - round(gap / clip.frame_dt)), now):
                scene, images = clip.scene(index), clip.images(index)
                if set(cameras) <= set(images):
                    moments.append(
                        Observation(
                            time=1000.0 * number + scene.time,  # clips are far from one another
                            images=images,
                            ego=scene.ego,
                            guidance=scene.guidance,
                        )
                    )
        except ValueError as error:
            _log.warning('left out of the comparison: %s', error)
    return moments
