"""Clips: recorded drives in Bench2Drive's layout, ours and theirs read by the same reader.

    <clip>/camera/rgb_front/00000.jpg ...       six cameras
    <clip>/camera/semantic_front/00000.png ...  ours only, where recorded: a picture of class indices
    <clip>/anno/00000.json.gz ...               one annotation a frame, at 10 Hz

A frame exists when its annotation does: that is written last, beside, and renamed. A clip is called `<clip>.partial`
until it is closed. What is in an annotation, `annotation` and `annotating` know.
"""

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from mose_ros.core.files import PARTIAL, write_bytes
from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import COMMANDS, Command, Scene, Trajectory, VehicleCommand
from mose_ros.core.vision import check_image
from mose_ros.data import annotating, annotation, driven_path, storage
from mose_ros.data.storage import Anywhere

FRAME_DT = 0.1  # s between the frames of a clip unless ours says otherwise


class ClipWriter:
    """Writes one clip; as a context manager it keeps the clip when all went well and discards it otherwise."""

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int | None = None,
        frame_dt: float = FRAME_DT,
        quality: int = 90,
    ):
        self.folder = Path(folder)
        if self.folder.exists():
            raise ValueError(f'{self.folder} exists already; a clip is written once')
        self._fixed: dict[str, Any] = {'frame_dt': frame_dt}
        if seed is not None:
            self._fixed['seed'] = seed
        self._jpeg = [cv2.IMWRITE_JPEG_QUALITY, quality]
        self._partial = self.folder.with_name(self.folder.name + PARTIAL)
        self._count = 0
        shutil.rmtree(self._partial, ignore_errors=True)  # of a run that was cut off
        (self._partial / 'anno').mkdir(parents=True)

    def write(
        self,
        scene: Scene,
        images: Mapping[str, UInt8[np.ndarray, 'H W 3']],
        semantics: Mapping[str, UInt8[np.ndarray, 'H W']] | None = None,
        expert: Trajectory | None = None,
        decision: Mapping[str, Any] | None = None,
        control: VehicleCommand | None = None,
    ) -> int:
        """Write one frame and return its index; nothing of it stays when an image is bad (ValueError).

        `expert` is the plan from here, `decision` why; `control` is what the actuators got.
        """
        for name, image in images.items():
            if name not in CAMERAS:
                raise ValueError(f'no camera {name!r}; the rig has {", ".join(CAMERAS)}')
            check_image(image, f'camera {name}')
        sizes = {name: image.shape[1::-1] for name, image in images.items()}
        extra = self._fixed | ({'decision': dict(decision)} if decision else {})
        data = annotating.from_scene(scene, sizes, control=control, expert=expert, extra=extra)
        text = json.dumps(data, separators=(',', ':'), allow_nan=False)  # ValueError on NaN
        for name, image in images.items():
            self._write_image(f'rgb_{name}', '.jpg', image[:, :, ::-1], self._jpeg)
        for name, image in (semantics or {}).items():
            self._write_image(f'semantic_{name}', '.png', image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        path = self._partial / 'anno' / f'{self._count:05d}.json.gz'
        write_bytes(path, gzip.compress(text.encode(), compresslevel=1, mtime=0))
        self._count += 1
        return self._count - 1

    def close(self) -> Path:
        """Make the clip visible under its own name."""
        if self._count == 0:
            self.discard()
            raise ValueError(f'{self.folder}: a clip without frames is not kept')
        os.replace(self._partial, self.folder)
        return self.folder

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> 'ClipWriter':
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _write_image(self, stream: str, suffix: str, image: np.ndarray, options: list[int]):
        folder = self._partial / 'camera' / stream
        if self._count == 0:
            folder.mkdir(parents=True)
        done, code = cv2.imencode(suffix, image, options)
        if not done:
            raise ValueError(f'{stream}: an image of shape {image.shape} cannot be encoded')
        (folder / f'{self._count:05d}{suffix}').write_bytes(code.tobytes())


class ClipReader:
    """Reads one clip; frames count from 0. ValueError names the file that is missing, truncated or malformed."""

    def __init__(self, folder: str | Anywhere):
        self.folder = storage.place(folder)
        names = _annotations(self.folder)
        expected = [f'{index:05d}.json.gz' for index in range(len(names))]
        if not names:
            raise ValueError(f'{self.folder} is no clip: it has no anno/00000.json.gz')
        if names != expected:
            wrong = next(one for one, name in zip(expected, names, strict=True) if one != name)
            raise ValueError(
                f'{self.folder}/anno/{wrong} is missing; fetch or record the clip again'
            )
        self._count = len(names)
        self._annotation = lru_cache(maxsize=8)(self._read)
        self._track: np.ndarray | None = None  # x, y, yaw, speed, command of all frames, once read

    def __len__(self) -> int:
        return self._count

    @property
    def metadata(self) -> dict[str, Any]:
        """Return what holds for the whole clip: name, family, seed, frame_dt, weather, and whether it is ours."""
        data = self._annotation(0)
        extra = data.get(annotation.MOSE, {})
        return {
            'name': self.folder.name,
            'family': extra.get('family', scenario_of(self.folder)),
            'seed': extra.get('seed'),
            'frame_dt': extra.get('frame_dt', FRAME_DT),
            'weather': data.get('weather'),
            'ours': annotation.MOSE in data,
        }

    def annotation(self, index: int) -> dict[str, Any]:
        """Return a frame's annotation as it was recorded."""
        return self._annotation(self._check(index))

    def decision(self, index: int) -> dict[str, Any]:
        """Return why the expert planned what it planned, or {} where that was not recorded."""
        return self.annotation(index).get(annotation.MOSE, {}).get('decision', {})

    @cached_property
    def frame_dt(self) -> float:
        """Return the seconds between frames."""
        return float(self.metadata['frame_dt'])

    def scene(self, index: int) -> Scene:
        """Return a frame's scene in our conventions."""
        data = self.annotation(index)
        try:
            if annotation.MOSE in data:
                return annotation.to_scene(data)
            return self._foreign_scene(index, data)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f'{self._path(index)} is malformed ({type(error).__name__}: {error}); '
                'fetch or record the clip again'
            ) from None

    def image(self, index: int, camera: str) -> UInt8[np.ndarray, 'H W 3']:
        """Return a camera's picture, RGB."""
        return self._picture(index, f'rgb_{camera}', 'jpg', cv2.IMREAD_COLOR)[:, :, ::-1]

    def images(self, index: int) -> dict[str, UInt8[np.ndarray, 'H W 3']]:
        """Return the pictures of all recorded cameras of the rig."""
        known = [name for name in CAMERAS if (self.folder / 'camera' / f'rgb_{name}').is_dir()]
        return {name: self.image(index, name) for name in known}

    def semantic(self, index: int, camera: str) -> UInt8[np.ndarray, 'H W']:
        """Return a camera's picture of class indices; of ours only, where recorded."""
        return self._picture(index, f'semantic_{camera}', 'png', cv2.IMREAD_GRAYSCALE)

    def has_semantics(self) -> bool:
        """Return whether class pictures were recorded."""
        return (self.folder / 'camera' / 'semantic_front').is_dir()

    def expert_trajectory(self, index: int) -> Trajectory | None:
        """Return the expert's plan from this frame, or None where none was recorded."""
        return annotation.expert_trajectory(self.annotation(index))

    def future_trajectory(self, index: int, horizon: int, dt: float) -> Trajectory | None:
        """Return where the vehicle was driven, as `horizon` points dt apart; None where the clip ends before."""
        track = self._read_track()
        times = self.frame_dt * self._check(index) + dt * np.arange(1, horizon + 1)
        if times[-1] > self.frame_dt * (len(self) - 1) + 1e-9:
            return None
        frames = self.frame_dt * np.arange(len(self))
        xy = np.stack([np.interp(times, frames, track[:, axis]) for axis in (0, 1)], axis=1)
        x, y, yaw = track[index, :3]
        cos, sin = np.cos(yaw), np.sin(yaw)
        turn = np.array([[cos, -sin], [sin, cos]])
        return Trajectory(time=self.frame_dt * index, dt=dt, xy=(xy - (x, y)) @ turn)

    def _foreign_scene(self, index: int, data: Mapping[str, Any]) -> Scene:
        """Fill in what Bench2Drive does not record: the way ahead, the time, the last stop, the walkers' speed."""
        track = self._read_track()
        commands = [
            COMMANDS[int(one) - 1] if 1 <= one <= 6 else Command.FOLLOW for one in track[:, 4]
        ]
        corridor, progress = driven_path.driven_corridor(track[:, :2], commands, index)
        scene = annotation.to_scene(data, corridor, progress)
        steps = np.hypot(*np.diff(track[:, :2], axis=0).T)
        stops = np.flatnonzero(track[: index + 1, 3] < 0.1)
        since = float(steps[stops[-1] : index].sum()) if len(stops) else 100.0
        return replace(
            scene,
            time=self.frame_dt * index,
            ego=replace(scene.ego, since_stop=since),
            actors=tuple(self._walking(index, actor) for actor in scene.actors),
            route_completion=float(steps[:index].sum() / max(steps.sum(), 1e-6)),
            family=self.metadata['family'],
        )

    def _walking(self, index: int, actor):
        """Return a walker with the speed of its steps: Bench2Drive's is always 0."""
        if actor.kind != 'walker':
            return actor
        first, last = max(0, index - 1), min(len(self) - 1, index + 1)
        places = []
        for frame in (first, last):
            for box in self._annotation(frame)['bounding_boxes'][1:]:
                if str(box['id']) == actor.id:
                    places.append((float(box['center'][0]), -float(box['center'][1])))
        if len(places) < 2 or first == last:
            return actor
        (x0, y0), (x1, y1) = places
        span = self.frame_dt * (last - first)
        return replace(actor, velocity=((x1 - x0) / span, (y1 - y0) / span))

    def _read_track(self) -> np.ndarray:
        if self._track is None:
            rows = []
            for index in range(len(self)):
                data = self._annotation(index)
                try:
                    ego = annotation.ego_state(data)
                    rows.append([ego.x, ego.y, ego.yaw, ego.speed, data['command_near']])
                except (KeyError, TypeError, IndexError, ValueError) as error:
                    raise ValueError(
                        f'{self._path(index)} is malformed ({type(error).__name__}: {error}); '
                        'fetch or record the clip again'
                    ) from None
            self._track = np.asarray(rows, float)
        return self._track

    def _check(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise ValueError(f'{self.folder} has frames 0 to {len(self) - 1}, no {index}')
        return index

    def _path(self, index: int) -> Anywhere:
        return self.folder / 'anno' / f'{index:05d}.json.gz'

    def _read(self, index: int) -> dict[str, Any]:
        path = self._path(index)
        try:
            data = json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise ValueError(f'{path} cannot be read: {error}; fetch or record it again') from None
        if not isinstance(data, dict) or not data.get('bounding_boxes'):
            raise ValueError(f'{path} is no annotation: it has no bounding_boxes')
        return data

    def _picture(self, index: int, stream: str, suffix: str, mode: int) -> np.ndarray:
        path = self.folder / 'camera' / stream / f'{self._check(index):05d}.{suffix}'
        try:
            code = path.read_bytes()
        except OSError as error:
            raise ValueError(f'{path} cannot be read: {error.strerror}') from None
        end = {'jpg': b'\xff\xd9', 'png': b'IEND\xaeB`\x82'}[suffix]  # else OpenCV fills in grey
        whole = end in code[-16:]
        image = cv2.imdecode(np.frombuffer(code, np.uint8), mode) if whole else None
        if image is None:
            raise ValueError(f'{path} is truncated or no {suffix}; fetch or record it again')
        return image


def _annotations(folder: Anywhere) -> list[str]:
    return [name for name in storage.names(folder / 'anno') if name.endswith('.json.gz')]


def count_frames(folder: Anywhere) -> int:
    """Return how many frames of a clip are annotated, whether or not some are missing between them."""
    return len(_annotations(folder))


def scenario_of(folder: str | Anywhere) -> str:
    """Return the scenario that a clip's folder names, packed flat (`Accident_Town03_Route156_Weather0`) or nested (`Accident/Town03_...`)."""
    folder = storage.place(folder)
    name = folder.parent.name if folder.name.startswith('Town') else folder.name
    return name.split('_')[0]


def find_clips(root: str | Anywhere) -> Iterator[Anywhere]:
    """Yield the folders of all finished clips under a folder, sorted; ValueError where there is no such folder."""
    root = storage.place(root)
    if not root.is_dir():
        raise ValueError(f'{root} is no folder; record clips or fetch Bench2Drive there')
    found = storage.find(root, 'anno/00000.json.gz')
    yield from sorted(
        (path for path in found if not path.name.endswith(PARTIAL)), key=lambda path: path.parts
    )
