"""Look: a glance at all cameras chooses the views that are worth a full look.

The views that are not chosen cost a resize here and nothing later. Knows nothing of the driver.
"""

import logging
import os
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mose_ros.core import action, vision
from mose_ros.core.types import EgoState, Guidance, Views
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.team import Team

MODES = ('learned', 'fixed', 'all')
LARGE = 1 << 18  # pixels of a picture for which all cores are woken, whatever the bundle's threads
GAP_TOLERANCE = 0.25  # of frame_gap: how far a stored frame may be from the age that is wanted
_log = logging.getLogger(__name__)


class MissingAnchor(ValueError):
    """The camera without which there is no plan has no picture."""


class ViewRouter:
    """Choose views with a bundle's view router; remembers each camera's last frames."""

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        mode: str = 'learned',
        force_view: str = '',
        backend: str = 'auto',
        threads: int = 2,
    ):
        """Open the view router of a bundle; ValueError for an unknown mode or view.

        Args:
            mode: 'learned': the fixed views and the candidates with the highest scores; 'fixed': the fixed views
                only; 'all': every camera that is there.
            force_view: a candidate that is looked at whatever its score, as long as its camera is there; also where the
                bundle looks at its fixed views only.
            backend, threads: as in `Bundle.open`; an opened bundle brings its own.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, backend=backend, threads=threads)
        self.manifest = bundle.manifest
        self.aim(mode, force_view)
        self._proprio = self.manifest.proprio_normalizer()
        self._session = bundle.session('view_router', threads=1)  # too small for two
        self._history: dict[str, deque] = {name: deque() for name in self.manifest.cameras}
        self._team = Team(min(os.cpu_count() or 1, len(self._history)), 'shrink')
        self._threads = bundle.threads

    def aim(self, mode: str, force_view: str) -> None:
        """Choose views in this way from now on; ValueError for an unknown mode or view, which changes nothing."""
        if mode not in MODES:
            raise ValueError(f'no mode {mode!r} of the view router; known: {", ".join(MODES)}')
        if force_view and force_view not in self.manifest.cameras:
            known = ', '.join(self.manifest.cameras)
            raise ValueError(f'no view {force_view!r} in {self.manifest.name}; it has {known}')
        if force_view and mode != 'learned':
            _log.warning('force_view %s is ignored in mode %s', force_view, mode)
        self._mode, self._force_view = mode, force_view

    def reset(self) -> None:
        """Forget all frames."""
        for frames in self._history.values():
            frames.clear()

    def select(
        self,
        time: float,
        images: Mapping[str, UInt8[np.ndarray, 'H W 3']],
        ego: EgoState,
        guidance: Guidance,
    ) -> Views:
        """Return the chosen views: fixed ones first, then candidates from the highest score down.

        Cameras that the bundle does not know are not looked at. A missing camera is never chosen and its frames are
        forgotten. `weights` are the softmax of the scores over the cameras that are there, as in training; in the
        other modes 1 where chosen. Time that goes back clears all frames.

        Raises:
            MissingAnchor: the anchor camera is absent.
            ValueError: a picture, the time, the state or the guidance is malformed; the message names it.
        """
        m = self.manifest
        if not np.isfinite(time):
            raise ValueError(f'time is {time}')
        code = self._proprio.encode(action.proprio(ego, guidance))
        for name in m.cameras:
            if name in images:
                vision.check_image(images[name], f'camera {name}')
        if m.anchor not in images:
            raise MissingAnchor(f'camera {m.anchor} has no picture; without it there is no plan')

        newest = self._remember(time, images)
        if self._mode == 'learned':
            names, weights = self._choose(newest, code)
        else:
            names = [name for name in m.fixed_views if name in newest]
            if self._mode == 'all':
                names += [name for name in newest if name not in names]
            weights = {name: float(name in names) for name in m.cameras}
        views = [self._frames(name, time) for name in names]
        return Views(
            time=time, names=tuple(names), image=vision.stack_views(views), weights=weights
        )

    def _remember(self, time, images):
        """Store each camera's picture at view size and return the newest ones, in camera order."""
        m = self.manifest
        if any(frames and time < frames[-1][0] for frames in self._history.values()):
            _log.info('time went back to %.3f: the frames so far are forgotten', time)
            self.reset()
        oldest = time - (m.view_frames - 1 + GAP_TOLERANCE) * m.frame_gap - 1e-6
        newest = self._shrink(images)
        for name, frames in self._history.items():
            if name not in images:
                frames.clear()
                continue
            if frames and frames[-1][0] == time:  # the same moment, asked again
                frames.pop()
            while frames and frames[0][0] < oldest:
                frames.popleft()
            frames.append((time, newest[name]))
        return newest

    def _shrink(self, images):
        """Return the pictures of the cameras at view size, in camera order."""
        m = self.manifest

        def shrink(name):
            small = vision.resize(images[name], m.view_width, m.view_height)
            return small.copy() if small is images[name] else small  # the caller's to reuse

        names = [name for name in m.cameras if name in images]
        are_large = max(images[name][..., 0].size for name in names) > LARGE
        done = self._team.map(shrink, names, None if are_large else self._threads)
        return dict(zip(names, done, strict=True))

    def _frames(self, name, time):
        """Return a camera's frames from the oldest to the newest, `frame_gap` apart; the newest for one never seen."""
        m, frames = self.manifest, self._history[name]
        if not vision.shows_past(name, m.history, m.fixed_views):
            return [frames[-1][1]] * m.view_frames
        chosen = []
        for slot in reversed(range(m.view_frames)):
            age = slot * m.frame_gap
            when, frame = min(frames, key=lambda stored: abs(time - stored[0] - age))
            is_near = abs(time - when - age) <= GAP_TOLERANCE * m.frame_gap + 1e-6
            chosen.append(frame if is_near else frames[-1][1])
        return chosen

    def _choose(self, newest, code):
        m = self.manifest
        size = m.thumbnail_width, m.thumbnail_height
        each = partial(self._team.map, threads=self._threads)
        thumbnails, present = vision.glance(newest, m.cameras, *size, m.mean, m.std, each)
        inputs = {'thumbnails': thumbnails, 'present': present, 'proprio': code[None]}
        scores = self._session.run(inputs)['scores']
        if not np.isfinite(scores).all():
            raise FloatingPointError(f'{m.name}: the view router answered with {scores}')
        by_name = dict(zip(m.cameras, scores.tolist(), strict=True))
        fixed = [name for name in m.fixed_views if name in newest]
        # sorted() keeps camera order among equals, so that the same scores choose the same views
        rest = sorted((n for n in newest if n not in m.fixed_views), key=lambda n: -by_name[n])
        count = m.top_k
        if self._force_view in rest:
            rest = [self._force_view, *(name for name in rest if name != self._force_view)]
            count = max(count, 1)
        shares = np.exp(scores.astype(np.float64) - scores[present > 0].max()) * present
        weights = dict(zip(m.cameras, (shares / shares.sum()).tolist(), strict=True))
        return fixed + rest[:count], weights
