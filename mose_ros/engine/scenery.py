"""What is shown to a bundle that is measured: observations by number, the same in every process that asks for them.

Noise, or the pictures of a recorded clip in Bench2Drive's layout. Knows nothing of labels and of where clips come from.
"""

from pathlib import Path

import cv2
import numpy as np

from mose_ros.core.bundle import Manifest
from mose_ros.core.types import FAR_M, NEAR_M, Command, EgoState, Guidance, Observation

POOL = 8  # moments of noise; no two plans in a row see the same pictures
MOST = 40  # moments of a clip
PERIOD = 0.1  # s between observations


class Scenery:
    """Observations at 10 Hz, of a car that follows the road at 5 m/s."""

    def __init__(self, manifest: Manifest, *, clip: str | Path = '', seed: int = 0):
        """Read the clip, or draw noise at twice the size of a view; ValueError for a clip without the cameras."""
        self._moments = _recorded(manifest, Path(clip)) if clip else _noise(manifest, seed)

    def __len__(self) -> int:
        return len(self._moments)

    def __call__(self, index: int) -> Observation:
        """Return the observation of this number; behind the last moment the first comes again."""
        return _observation(PERIOD * index, self._moments[index % len(self._moments)])

    def first(self, count: int) -> list[Observation]:
        """Return the first observations."""
        return [self(index) for index in range(count)]


def grey(manifest: Manifest, time: float = 0.0) -> Observation:
    """Return an observation with a grey picture from each of the bundle's cameras."""
    picture = np.full((2 * manifest.view_height, 2 * manifest.view_width, 3), 128, np.uint8)
    return _observation(time, dict.fromkeys(manifest.cameras, picture))


def _noise(m: Manifest, seed: int):
    random = np.random.default_rng(seed)
    shape = (2 * m.view_height, 2 * m.view_width, 3)
    return [
        {name: random.integers(0, 256, shape, np.uint8) for name in m.cameras} for _ in range(POOL)
    ]


def _recorded(m: Manifest, clip: Path):
    moments = []
    for first in sorted((clip / 'camera' / f'rgb_{m.anchor}').glob('*'))[:MOST]:
        paths = {name: clip / 'camera' / f'rgb_{name}' / first.name for name in m.cameras}
        pictures = {name: cv2.imread(str(path)) for name, path in paths.items()}
        lost = [str(paths[name]) for name, picture in pictures.items() if picture is None]
        if lost:
            raise ValueError(f'{lost[0]} cannot be read as a picture; take a clip of all cameras')
        moments.append(
            {name: cv2.cvtColor(one, cv2.COLOR_BGR2RGB) for name, one in pictures.items()}
        )
    if len(moments) < 2:  # what has just been seen is not looked at again
        raise ValueError(f'{clip} is no clip: it has no two pictures camera/rgb_{m.anchor}/*.jpg')
    return moments


def _observation(time, images):
    ahead = {'near': np.array([NEAR_M, 0.0]), 'far': np.array([FAR_M, 0.0])}
    guidance = Guidance(**ahead, command=Command.FOLLOW)
    ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=5.0)
    return Observation(time=time, images=images, ego=ego, guidance=guidance)
