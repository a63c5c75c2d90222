"""The film of a drive: six views with the chosen ones framed, the trajectory on the road, the skill chain and the text.

`draw` is pure; `Film` writes an mp4. Knows pictures and core types, no message and no topic.
"""

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from mose_ros.core import prompt, rig, vision
from mose_ros.core.types import Trajectory

WIDTH, HEIGHT, FPS = 1280, 720, 10
_MARGIN = 16
_FRONT = (_MARGIN, 56, 768, 432)  # x, y, width, height of the front view
_SMALL = (224, 126)
_GRID = {  # of the other views: column, row
    'front_left': (0, 0),
    'front_right': (1, 0),
    'back_left': (0, 1),
    'back_right': (1, 1),
    'back': (0, 2),
}
_INK, _GREY, _DIM = (236, 240, 244), (150, 160, 172), (74, 84, 98)
_PAPER, _PANEL, _CYAN, _AMBER, _RED = (
    (18, 22, 30),
    (28, 34, 45),
    (64, 208, 255),
    (255, 190, 70),
    (255, 92, 92),
)
_LEVEL_COLORS = ((96, 190, 255), (190, 150, 255), (120, 225, 150))
_HALF_WIDTH = 0.9  # m, of the band that shows the trajectory


@dataclass(frozen=True, kw_only=True)
class Shot:
    """All that one frame of the film shows."""

    pictures: Mapping[str, UInt8[np.ndarray, 'H W 3']]
    views: tuple[str, ...] = ()
    trajectory: Trajectory | None = None
    skills: str = ''
    text: str = ''
    title: str = ''
    seconds: float = 0.0
    speed: float = 0.0
    latency_ms: float | None = None
    is_emergency: bool = False


def draw(shot: Shot) -> UInt8[np.ndarray, '720 1280 3']:
    """Return one frame of the film, RGB."""
    canvas = np.full((HEIGHT, WIDTH, 3), _PAPER, np.uint8)
    _header(canvas, shot)
    x, y, width, height = _FRONT
    front = _fit(shot.pictures.get('front'), width, height)
    if shot.trajectory is not None and 'front' in shot.pictures:
        _project_band(front, shot.trajectory)
    canvas[y : y + height, x : x + width] = front
    _frame(canvas, 'front', _FRONT, 'front' in shot.views, 'front' in shot.pictures)
    for name, (column, row) in _GRID.items():
        box = _small_box(column, row)
        small = _fit(shot.pictures.get(name), *_SMALL)
        if name not in shot.views:
            small = (small * 0.62).astype(np.uint8)
        canvas[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = small
        _frame(canvas, name, box, name in shot.views, name in shot.pictures)
    _gauge(canvas, shot)
    _thoughts(canvas, shot)
    return canvas


def project(points: np.ndarray, width: int, height: int, name: str = 'front') -> np.ndarray:
    """Return the pixels of points on the ground (ego frame, metres); NaN behind or too near to the camera."""
    camera = rig.camera(name)
    cos, sin = np.cos(camera.yaw), np.sin(camera.yaw)
    offset = np.asarray(points, float) - (camera.x, camera.y)
    ahead, left = (offset @ np.array([[cos, -sin], [sin, cos]])).T
    ahead = np.where(ahead > 0.5, ahead, np.nan)
    focal = camera.focal_px(width)
    return np.stack(
        [width / 2 - focal * left / ahead, height / 2 + focal * camera.z / ahead], axis=1
    )


class Film:
    """An mp4 that grows shot by shot; it appears under its name when it is closed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix.lower() != '.mp4':
            raise ValueError(f'a film is an .mp4 file, not {self.path.name!r}')
        if not hasattr(cv2, 'FontFace'):
            raise ValueError(f'films need OpenCV 5, this is {cv2.__version__}: leave out --video')
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(f'{self.path.stem}.partial.mp4')
        code = cv2.VideoWriter_fourcc(*'mp4v')
        self._writer = cv2.VideoWriter(str(self._partial), code, FPS, (WIDTH, HEIGHT))
        if not self._writer.isOpened():
            raise ValueError(f'{self.path} can not be written; choose another file for --video')
        self.count = 0

    def add(self, shot: Shot) -> None:
        """Draw and append one frame."""
        self._writer.write(cv2.cvtColor(draw(shot), cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self) -> None:
        """Finish the file."""
        self._writer.release()
        if self.count:
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)


# ---- the parts of a frame ----


def _write(canvas, text, x, y, size, color=_INK, weight=400) -> int:
    """Write text with its base line at y; return where it ends."""
    face = cv2.FontFace('sans')
    end, _ = cv2.putText(canvas, text, (int(x), int(y)), color, face, size, weight)
    return end[0]


def _width(text, size, weight=400) -> int:
    box = cv2.getTextSize((0, 0), text, (0, 0), cv2.FontFace('sans'), size, weight)
    return box[2]


def _fit(picture, width, height):
    if picture is None:
        blank = np.full((height, width, 3), _PANEL, np.uint8)
        label = 'no picture'
        _write(blank, label, (width - _width(label, 18)) // 2, height // 2 + 6, 18, _GREY)
        return blank
    shape = picture.shape
    scale = min(width / shape[1], height / shape[0])
    fitted = vision.resize(picture, round(shape[1] * scale), round(shape[0] * scale)).copy()
    if fitted.shape[:2] == (height, width):
        return fitted
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - fitted.shape[0]) // 2, (width - fitted.shape[1]) // 2
    canvas[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted
    return canvas


def _small_box(column: int, row: int):
    x = _FRONT[0] + _FRONT[2] + _MARGIN + column * (_SMALL[0] + _MARGIN)
    return x, _FRONT[1] + row * (_SMALL[1] + 27), *_SMALL


def _frame(canvas, name, box, is_chosen, is_there):
    x, y, width, height = box
    color = _CYAN if is_chosen else _DIM if is_there else _RED
    cv2.rectangle(canvas, (x, y), (x + width - 1, y + height - 1), color, 4 if is_chosen else 1)
    label = name.replace('_', ' ')
    cv2.rectangle(canvas, (x, y), (x + _width(label, 15, 600) + 16, y + 23), color, -1)
    _write(canvas, label, x + 8, y + 17, 15, _PAPER if is_chosen else _INK, 600)


def _project_band(front, trajectory):
    """Paint the way to be driven onto the road, from green where it goes on to amber where it slows."""
    path = np.vstack([[[0.0, 0.0]], trajectory.xy])
    path = path[np.concatenate([[True], np.hypot(*np.diff(path, axis=0).T) > 0.02])]
    if len(path) < 2:
        return
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    stations = np.arange(2.4, along[-1], 0.4)
    if len(stations) < 2:
        return
    middle = np.stack([np.interp(stations, along, path[:, axis]) for axis in (0, 1)], 1)
    heading = np.gradient(middle, axis=0)
    heading /= np.maximum(np.hypot(*heading.T)[:, None], 1e-6)
    side = _HALF_WIDTH * np.stack([-heading[:, 1], heading[:, 0]], 1)
    height, width = front.shape[:2]
    left, right = (project(middle + sign * side, width, height) for sign in (1, -1))
    layer = front.copy()
    speeds = trajectory.speeds()
    slows = np.clip(1 - speeds[-1] / max(speeds[0], 1.0), 0, 1)
    color = tuple(int((1 - slows) * a + slows * b) for a, b in zip(_CYAN, _AMBER, strict=True))
    for index in range(len(stations) - 1):
        quad = np.array([left[index], left[index + 1], right[index + 1], right[index]])
        if np.isfinite(quad).all() and np.abs(quad).max() < 1e4:
            cv2.fillConvexPoly(layer, (quad * 16).astype(np.int32), color, cv2.LINE_AA, 4)
    cv2.addWeighted(layer, 0.5, front, 0.5, 0, front)


def _header(canvas, shot):
    end = _write(canvas, 'mose_ros', _MARGIN, 38, 26, _INK, 700)
    _write(canvas, shot.title, end + 18, 38, 20, _GREY)
    right = f'{shot.seconds:6.1f} s'
    if shot.latency_ms is not None:
        right = f'plan in {shot.latency_ms:.0f} ms      {right}'
    _write(canvas, right, WIDTH - _MARGIN - _width(right, 20), 38, 20, _GREY)


def _gauge(canvas, shot):
    x, y, width, height = _small_box(1, 2)
    cv2.rectangle(canvas, (x, y), (x + width - 1, y + height - 1), _PANEL, -1)
    speed = f'{3.6 * shot.speed:.0f}'
    end = _write(canvas, speed, x + 20, y + 82, 62, _INK, 700)
    _write(canvas, 'km/h', end + 10, y + 82, 22, _GREY)
    share = min(1.0, abs(shot.speed) / 15.0)
    cv2.rectangle(canvas, (x + 20, y + 104), (x + width - 20, y + 110), _DIM, -1)
    if share > 0.01:
        last = x + 20 + int(share * (width - 40))
        cv2.rectangle(canvas, (x + 20, y + 104), (last, y + 110), _CYAN, -1)
    if shot.is_emergency:
        _write(canvas, 'STOPPING', x + width - 92, y + 28, 17, _RED, 700)


def _thoughts(canvas, shot):
    top = _FRONT[1] + _FRONT[3] + _MARGIN
    cv2.rectangle(canvas, (_MARGIN, top), (WIDTH - _MARGIN, HEIGHT - _MARGIN), _PANEL, -1)
    levels = ['perception', 'prediction', 'planning']
    skills = [skill for skill in shot.skills.split(' > ') if skill]
    x, y = _MARGIN + 18, top + 40
    for index, skill in enumerate(skills):
        color = _LEVEL_COLORS[min(index, 2)]
        label = skill.replace('_', ' ')
        width = _width(label, 22, 600)
        cv2.rectangle(canvas, (x, y - 25), (x + width + 24, y + 10), color, -1)
        _write(canvas, label, x + 12, y, 22, _PAPER, 600)
        x += width + 24
        if index + 1 < len(skills):
            x = _write(canvas, '>', x + 12, y, 22, _GREY, 600) + 12
    said = prompt.parse_answer(shot.text, levels)
    y = top + 84
    for index, level in enumerate(levels):
        _write(canvas, level, _MARGIN + 18, y, 19, _LEVEL_COLORS[index], 600)
        for line in textwrap.wrap(said.get(level, ''), 112)[:2] or ['']:
            _write(canvas, line.replace(' ,', ',').replace(' .', '.'), 160, y, 19, _INK)
            y += 24
        y += 8
