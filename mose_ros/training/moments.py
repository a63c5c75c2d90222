"""Moments that a bundle and its network are compared on, and others that a bundle of integers takes its scales from."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mose_ros.core import vision
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


def spread(root: Path, counts: Sequence[int]) -> list[list[Path]]:
    """Return several sets of a folder's clips, each spread evenly over it and no clip in two; smaller where there are too few.

    ValueError when there are fewer clips than sets that want some.
    """
    folders = list(find_clips(root))
    if 0 < len(folders) < sum(count > 0 for count in counts):
        raise ValueError(f'{root} has {len(folders)} clips; record more, or name another folder')
    places = np.linspace(0, len(folders) - 1, min(sum(counts), len(folders))).round().astype(int)
    chosen = [folders[place] for place in places]
    found = []
    for index, count in enumerate(counts):
        share = round(len(chosen) * count / max(1, sum(counts[index:])))
        share = max(share, min(1, count)) if chosen else 0
        mine = set(np.linspace(0, len(chosen) - 1, share).round().astype(int).tolist())
        found.append([one for place, one in enumerate(chosen) if place in mine])
        chosen = [one for place, one in enumerate(chosen) if place not in mine]
    return found


def recorded_moments(
    folders: Sequence[Path],
    cameras: Sequence[str],
    gap: float,
    size: tuple[int, int] | None = None,
) -> list[Observation]:
    """Return two moments, `gap` seconds apart, from the middle of each clip; pictures have this (width, height), or that of the recording.

    Clips without all of the cameras and those that cannot be read are left out; none may be left.
    """
    moments = []
    for number, folder in enumerate(folders):
        try:
            clip = ClipReader(folder)
            now = len(clip) // 2
            for index in (max(0, now - round(gap / clip.frame_dt)), now):
                scene, images = clip.scene(index), clip.images(index)
                if set(cameras) <= set(images):
                    images = {name: images[name] for name in cameras}
                    if size:
                        images = {n: vision.resize(one, *size) for n, one in images.items()}
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
