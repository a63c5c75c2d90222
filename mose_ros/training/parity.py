"""The proof of a bundle: its files, run by the engine, beside the network that they were made of."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mose_ros.core import action, prompt, vision
from mose_ros.core.bundle import Manifest
from mose_ros.core.types import Observation
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.driver import ACTION, Driver
from mose_ros.engine.view_router import ViewRouter
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training.graphs import Decode, Prefill
from mose_ros.training.moments import fake_moments

LIMITS = {  # by precision; against PyTorch in float32
    'float32': {'logits_max_abs': 1e-3, 'trajectory_max_m': 1e-3},
    'float16': {'logits_max_abs': 0.1, 'trajectory_max_m': 0.02},
    'int8': {'trajectory_mean_m': 0.1},
    'int4': {'trajectory_mean_m': 0.1},
}
# At how many of the moments views and skills must be equal; with integers, where a word may tip, texts are only counted.
SHARES = {'int8': 0.99, 'int4': 0.98}
# How far one moment may be apart with a forced expert: no mean evens that out.
DRIVEN = {'int8': {'trajectory_mean_m': 0.5}, 'int4': {'trajectory_mean_m': 0.5}}
GAPS = ('logits_max_abs', 'trajectory_max_m', 'trajectory_mean_m')
EQUALS = ('text', 'views', 'skills')
_log = logging.getLogger(__name__)


class ParityError(ValueError):
    """A bundle that does not do what its network does; `found` is the report, the message names what is apart."""

    def __init__(self, message: str, found: Mapping[str, Any]):
        super().__init__(message)
        self.found = found


def parity(
    driver: MoseDriver, bundle: Bundle, moments: Sequence[Observation] | None = None
) -> dict[str, Any]:
    """Run a bundle through the engine beside a network in float32, and return how far they are apart.

    Every expert is driven too: `experts_reached` counts those where the engine, told to use it, answers as PyTorch does
    with it, and not as PyTorch does with another. Moments are noise pictures where none are given. None is a number that
    is not finite, as where float16 was too narrow; nothing is equal then.
    """
    moments = moments or fake_moments(bundle.manifest.cameras)
    try:
        found = _compare(driver, bundle, moments)
    except FloatingPointError as error:  # of the engine
        _log.warning('%s', error)
        found = {**dict.fromkeys(GAPS), **_agreement(dict.fromkeys(EQUALS, [False]))}
        found |= {'experts_reached': 0, 'experts_total': _count_experts(driver, bundle.manifest)}
    return {**found, 'moments': len(moments)}


def _compare(driver, bundle, moments) -> dict[str, Any]:
    engine, router = Driver(bundle), ViewRouter(bundle)
    m = bundle.manifest
    reference = Reference(driver, m, bundle.tokenizer())
    rows, equal = [], {name: [] for name in EQUALS}
    for moment in moments:
        views = router.select(moment.time, moment.images, moment.ego, moment.guidance)
        plan = engine.plan(views, moment.ego, moment.guidance)
        text = (list(engine.reason()) or [''])[-1]
        want = reference.plan(views, moment, m.max_new_tokens)
        rows.append(_gaps(m, engine, plan, want))
        equal['text'].append(text == reference.text(want.answer))
        equal['views'].append(views.names == reference.views(moment, views))
        equal['skills'].append(_chain(plan, m) == (*want.skills, want.action_skill))
    over = {name: np.mean if 'mean' in name else np.max for name in GAPS}
    gaps = {name: float(over[name]([row[name] for row in rows])) for name in GAPS}
    driven = _drive_skills(m, engine, reference, views, moment)
    if driver.config.mose.routing == 'token':
        driven += _drive_tokens(driver, bundle, reference.inputs(views, moment))
    return {
        **{name: gap if np.isfinite(gap) else None for name, gap in gaps.items()},
        **_agreement(equal),
        'experts_reached': sum(driven),
        'experts_total': _count_experts(driver, m),
    }


def _agreement(equal: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    shares = {name: sum(found) / len(found) for name, found in equal.items()}
    return {
        **{f'{name}_equal': all(found) for name, found in equal.items()},
        **{f'{name}_share': share for name, share in shares.items()},
    }


def _count_experts(driver: MoseDriver, m: Manifest) -> int:
    mose, levels = driver.config.mose, len(m.levels)
    tokens = levels * mose.token_experts if mose.routing == 'token' else 0
    return sum(map(len, m.levels.values())) + len(m.action_skills) + tokens


def judge(found: Mapping[str, Any], precision: str) -> None:
    """Raise ParityError, naming what is apart, unless the bundle does what PyTorch does."""
    wrong = [
        f'{name} not finite' if found[name] is None else f'{name} {found[name]:.2g} > {limit}'
        for name, limit in LIMITS[precision].items()
        if found[name] is None or found[name] > limit
    ]
    if precision in SHARES:
        wrong += [
            f'{name} equal at {found[f"{name}_share"]:.1%} < {SHARES[precision]:.0%} of the moments'
            for name in ('views', 'skills')
            if found[f'{name}_share'] < SHARES[precision]
        ]
    else:
        wrong += [f'{name} not equal' for name in EQUALS if not found[f'{name}_equal']]
    if found['experts_reached'] != found['experts_total']:
        wrong.append(f'{found["experts_reached"]} of {found["experts_total"]} experts reached')
    if wrong:
        raise ParityError(
            f'the exported bundle differs from PyTorch, so it is not kept: {", ".join(wrong)}',
            found,
        )


class Reference:
    """The network asked as the engine is, by way of core alone."""

    def __init__(self, driver: MoseDriver, m: Manifest, tokenizer: prompt.Tokenizer):
        self._driver, self._m, self._tokenizer = driver, m, tokenizer

    def plan(self, views, moment, max_new_tokens=0, **override):
        m = self._m
        patches, ids, positions = self.inputs(views, moment)
        return self._driver.plan(
            patches,
            ids,
            positions,
            torch.from_numpy(self._proprio(moment)),
            torch.tensor(m.noise, dtype=torch.float32),
            num_steps=m.num_steps,
            max_new_tokens=max_new_tokens,
            end_id=self._tokenizer.end_id,
            **override,
        )

    def inputs(self, views, moment) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the patches (V, N, D), the prompt (T) and its positions (3, T)."""
        m = self._m
        frames = vision.split_views(views.image, len(views.names), m.view_frames)
        normal = vision.normalize(frames, m.mean, m.std)
        patches = np.stack([vision.patchify(view, m.patch, m.merge) for view in normal])
        text = prompt.question(views.names, moment.ego, moment.guidance)
        ids = self._tokenizer.encode_prompt(text, m.tokens_per_view)
        positions = prompt.rope_positions(ids, self._tokenizer.image_id, m.grid)
        return tuple(torch.from_numpy(one) for one in (patches, ids, positions))

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
    apart = np.hypot(*(plan.trajectory.xy - there).T)
    return {
        'logits_max_abs': float(np.abs(logits).max()),
        'trajectory_max_m': float(apart.max()),
        'trajectory_mean_m': float(apart.mean()),
    }


def _chain(plan, m) -> tuple[int, ...]:
    levels = [list(m.levels[level]).index(plan.skills[level]) for level in m.levels]
    return (*levels, list(m.action_skills).index(plan.action_skill))


# ---- every expert ----


def _drive_skills(m, engine, reference, views, moment) -> list[bool]:
    """Force each skill on its level, and return which of their experts answered as PyTorch's do.

    With expert groups the prompt's images and words drive both experts of a skill.
    """
    ladders = {**m.levels, ACTION: m.action_skills}
    reached = []
    for place, (level, skills) in enumerate(ladders.items()):
        said, wanted, fits = [], [], []
        for index, skill in enumerate(skills):
            chain = [-1] * len(ladders)
            chain[place] = index
            want = reference.plan(
                views, moment, skill_override=chain[:-1], action_override=chain[-1]
            )
            force = {level: skill}
            if m.precision in SHARES:  # another router that tips over is no matter of this expert
                whole = (*want.skills, want.action_skill)
                force = {
                    one: names[own]
                    for (one, names), own in zip(ladders.items(), whole, strict=True)
                }
            plan = engine.plan(views, moment.ego, moment.guidance, force=force)
            gaps = _gaps(m, engine, plan, want)
            same = _chain(plan, m) == (*want.skills, want.action_skill)
            fits.append(same and _within(m, gaps))
            if level == ACTION:
                said.append(plan.trajectory.xy)
                wanted.append(
                    action.to_trajectory(want.action.numpy(), m.action_normalizer(), 0.0, m.dt).xy
                )
            else:
                said.append(engine.thought.logits[0])
                wanted.append(want.logits.numpy())
        reached += [fit and own for fit, own in zip(fits, _own(said, wanted), strict=True)]
    return reached


@torch.no_grad()
def _drive_tokens(driver, bundle, inputs) -> list[bool]:
    """Send all tokens to each expert of each level's token mixtures, at prefill and at decode; return as above."""
    m, (patches, ids, positions) = bundle.manifest, inputs
    graphs = {name: bundle.session(name) for name in ('prefill', 'decode')}
    torches = {'prefill': Prefill(driver).eval(), 'decode': Decode(driver).eval()}
    embeds = driver.vlm.see(patches)[1]
    levels, reached = len(m.levels), []

    def both(name, given):
        """Return what the graph and the network say to the same inputs, its as the graph's types."""
        ports = graphs[name].inputs
        own = {key: value.numpy().astype(ports[key].dtype) for key, value in given.items()}
        got = list(graphs[name].run(own).values())[:3]
        return got, [one.numpy() for one in torches[name](*given.values())[:3]]

    for level in range(levels):
        said, wanted, fits = [], [], []
        for expert in range(driver.config.mose.token_experts):
            wish = torch.full((levels,), -1)
            wish[level] = expert + 1
            given = {'input_ids': ids[None], 'embeds': embeds, 'position_ids': positions[:, None]}
            got, want = both('prefill', given | {'skill_override': wish})
            place = torch.full((3, 1, 1), int(positions.max()) + 1)
            given = {'input_ids': ids[None, -1:], 'position_ids': place}
            given |= {
                name: torch.from_numpy(past)
                for name, past in zip(('past_k', 'past_v'), want[1:], strict=True)
            }
            next_got, next_want = both('decode', given | {'skills': wish.clamp(min=0)})
            said.append(np.concatenate([got[0][0], next_got[0][0]]))
            wanted.append(np.concatenate([want[0][0], next_want[0][0]]))
            fits.append(_within(m, {'logits_max_abs': float(np.abs(said[-1] - wanted[-1]).max())}))
        reached += [fit and own for fit, own in zip(fits, _own(said, wanted), strict=True)]
    return reached


def _within(m, gaps: Mapping[str, float]) -> bool:
    limits = DRIVEN.get(m.precision, LIMITS[m.precision])
    return all(gaps[name] <= limit for name, limit in limits.items() if name in gaps)


def _own(said: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> list[bool]:
    """Return which answers are not nearer to that of another expert, where the two can be told apart."""
    own = []
    for mine, (here, want) in enumerate(zip(said, wanted, strict=True)):
        apart = np.abs(here - want).max()
        others = [
            (np.abs(here - other).max(), np.abs(want - other).max())
            for place, other in enumerate(wanted)
            if place != mine
        ]
        own.append(not any(near < apart and 2 * near < between for near, between in others))
    return own
