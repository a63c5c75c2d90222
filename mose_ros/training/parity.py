"""The proof of a bundle: its files, run by the engine, beside the network that they were made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mose_ros.core import action, prompt, vision
from mose_ros.core.bundle import TOKENIZER, Manifest
from mose_ros.core.types import Command, EgoState, Guidance, Observation
from mose_ros.engine.driver import ACTION, Driver
from mose_ros.engine.view_router import ViewRouter
from mose_ros.modeling.driver import MoseDriver

LIMITS = {
    'logits_max_abs': 1e-3,
    'trajectory_max_m': 1e-3,
}  # against PyTorch with the same weights


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


def parity(
    driver: MoseDriver, folder: str | Path, moments: Sequence[Observation] | None = None
) -> dict[str, Any]:
    """Run a bundle through the engine beside the network it was made of, and return how far they are apart.

    The network must hold the bundle's weights (see `rounded`). Every expert is also forced and compared:
    `experts_reached` counts those where the engine, told to use it, answers as PyTorch does with it.
    """
    engine, router = Driver(folder), ViewRouter(folder)
    m = engine.manifest
    moments = fake_moments(m.cameras) if moments is None else moments
    reference = _Reference(driver, m, Path(folder) / TOKENIZER)
    worst = {'logits_max_abs': 0.0, 'trajectory_max_m': 0.0}
    equal = {'text_equal': True, 'views_equal': True, 'skills_equal': True}
    looked = []
    for moment in moments:
        views = router.select(moment.time, moment.images, moment.ego, moment.guidance)
        plan = engine.plan(views, moment.ego, moment.guidance)
        text = (list(engine.reason()) or [''])[-1]
        want = reference.plan(views, moment, m.max_new_tokens)
        looked.append((views, moment, want))
        gaps = _gaps(m, engine, plan, want)
        worst = {name: max(worst[name], gap) for name, gap in gaps.items()}
        equal['text_equal'] &= text == reference.text(want.answer)
        equal['views_equal'] &= views.names == reference.views(moment, views)
        equal['skills_equal'] &= _chain(plan, m) == (*want.skills, want.action_skill)
    reached = _reach_experts(m, engine, reference, *looked[0])
    total = sum(map(len, m.levels.values())) + len(m.action_skills)
    return {
        **worst,
        **equal,
        'experts_reached': len(reached),
        'experts_total': total,
        'moments': len(moments),
        'against': f'PyTorch float32, weights rounded to {m.storage}',
    }


class _Reference:
    """The network asked as the engine is, by way of core alone."""

    def __init__(self, driver: MoseDriver, m: Manifest, tokenizer: Path):
        self._driver, self._m = driver, m
        self._tokenizer = prompt.Tokenizer.load(tokenizer)

    def plan(self, views, moment, max_new_tokens=0, **override):
        m = self._m
        frames = vision.split_views(views.image, len(views.names), m.view_frames)
        normal = vision.normalize(frames, m.mean, m.std)
        patches = np.stack([vision.patchify(view, m.patch, m.merge) for view in normal])
        text = prompt.question(views.names, moment.ego, moment.guidance)
        ids = self._tokenizer.encode_prompt(text, m.tokens_per_view)
        positions = prompt.rope_positions(ids, self._tokenizer.image_id, m.grid)
        return self._driver.plan(
            torch.from_numpy(patches),
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            torch.from_numpy(self._proprio(moment)),
            torch.tensor(m.noise, dtype=torch.float32),
            num_steps=m.num_steps,
            max_new_tokens=max_new_tokens,
            end_id=self._tokenizer.end_id,
            **override,
        )

    def text(self, answer) -> str:
        return self._tokenizer.decode(answer)

    def views(self, moment, views) -> tuple[str, ...]:
        """Return the views that the network's own scores choose."""
        m = self._m
        small = {
            name: vision.resize(image, m.view_width, m.view_height)
            for name, image in moment.images.items()
        }
        size = (m.thumbnail_width, m.thumbnail_height)
        thumbnails, present = vision.glance(small, m.cameras, *size, m.mean, m.std)
        inputs = (thumbnails, present, self._proprio(moment))
        scores = self._driver.view_router(*(torch.from_numpy(one)[None] for one in inputs))[0]
        by_name = dict(zip(m.cameras, scores.tolist(), strict=True))
        fixed = [name for name in m.fixed_views if name in small]
        rest = [name for name in m.cameras if name in small and name not in m.fixed_views]
        return (*fixed, *sorted(rest, key=lambda name: -by_name[name])[: m.top_k])

    def _proprio(self, moment):
        return self._m.proprio_normalizer().encode(action.proprio(moment.ego, moment.guidance))


def _gaps(m, engine, plan, want) -> dict[str, float]:
    logits = engine.thought.logits[0] - want.logits.numpy()
    there = action.to_trajectory(want.action.numpy(), m.action_normalizer(), 0.0, m.dt).xy
    return {
        'logits_max_abs': float(np.abs(logits).max()),
        'trajectory_max_m': float(np.hypot(*(plan.trajectory.xy - there).T).max()),
    }


def _chain(plan, m) -> tuple[int, ...]:
    levels = [list(m.levels[level]).index(plan.skills[level]) for level in m.levels]
    return (*levels, list(m.action_skills).index(plan.action_skill))


def _reach_experts(m, engine, reference, views, moment, want) -> list[tuple[str, str]]:
    reached = []
    ladders = {**m.levels, ACTION: m.action_skills}
    for place, (level, skills) in enumerate(ladders.items()):
        for index, skill in enumerate(skills):
            plan = engine.plan(views, moment.ego, moment.guidance, force={level: skill})
            chain = [-1] * len(ladders)
            chain[place] = index
            forced = reference.plan(
                views, moment, skill_override=chain[:-1], action_override=chain[-1]
            )
            gaps = _gaps(m, engine, plan, forced)
            same = _chain(plan, m) == (*forced.skills, forced.action_skill)
            if same and all(gaps[name] <= limit for name, limit in LIMITS.items()):
                reached.append((level, skill))
    return reached


def judge(found: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what is apart, unless the bundle does what PyTorch does."""
    wrong = [
        f'{name} {found[name]:.2g} > {limit}'
        for name, limit in LIMITS.items()
        if not found[name] <= limit
    ]
    wrong += [name for name in ('text_equal', 'views_equal', 'skills_equal') if not found[name]]
    if found['experts_reached'] != found['experts_total']:
        wrong.append(f'{found["experts_reached"]} of {found["experts_total"]} experts reached')
    if wrong:
        raise ValueError(f'the exported bundle differs from PyTorch: {", ".join(wrong)}')
