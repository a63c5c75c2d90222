"""Think: the chosen views in; the trajectory and the skills at once, then the text about them, from the same cache.

Knows neither cameras' clocks nor how views were chosen. A thought that was handed out never changes, so a second thread
may put it into words while the next plan is made.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from jaxtyping import Float32, Int64

from mose_ros.core import action, prompt, vision
from mose_ros.core.types import EgoState, Guidance, Plan, Views
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.session import Resident
from mose_ros.engine.team import Team

CACHE = ('past_k', 'past_v')  # stay on the runtime's device, as far as there is one
ACTION = 'action'  # beside the levels' names: whom `force` may name
NARROW = 512  # decoder width below which threads share whole views, not products: waking one for each costs more than it does


@dataclass(frozen=True, kw_only=True, eq=False)
class Thought:
    """What the text of a plan is decoded from; read-only."""

    time: float  # of the plan
    logits: Float32[np.ndarray, '1 vocab']  # of the first token of the answer
    past_k: np.ndarray | Resident  # (L, 1, G, T, d)
    past_v: np.ndarray | Resident
    skills: Int64[np.ndarray, 'S']
    position: int  # of the first token of the answer


class Driver:
    """Plan and reason with a bundle's vision, prefill, action and decode graphs."""

    def __init__(self, bundle: Bundle | str | Path, *, backend: str = 'auto', threads: int = 2):
        """Open the graphs of a bundle; backend and threads as in `Bundle.open`, an opened one brings its own."""
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, backend=backend, threads=threads)
        self.manifest = m = bundle.manifest
        self._tokenizer = bundle.tokenizer()
        is_narrow = m.width < NARROW
        self._vision = bundle.session('vision')
        self._prefill = bundle.session('prefill')
        # A step of the flow is a dozen tokens.
        self._action = bundle.session('action', threads=1 if is_narrow else None)
        self._decode = bundle.session('decode', threads=1)  # the slower lane keeps off the cores
        self._team = self._eye = None  # what looks at single views, each on one thread
        if is_narrow and bundle.threads > 1 and self._vision.provider == 'CPU':
            self._team = Team(bundle.threads, 'look')
            self._eye = bundle.session('vision', threads=1)
        self._noise = np.asarray(m.noise, np.float32)[None]
        self._action_normalizer = m.action_normalizer()
        self._proprio_normalizer = m.proprio_normalizer()
        self._newest: Thought | None = None
        self._seen: tuple[bytes, np.ndarray | Resident | None] = (
            b'',
            None,
        )  # pixels, their features

    @property
    def provider(self) -> str:
        """Return what computes the graphs: each is opened for itself, so there may be two, as 'CPU, CUDA'."""
        graphs = (self._vision, self._prefill, self._action, self._decode)
        return ', '.join(sorted({one.provider for one in graphs}))

    @property
    def thought(self) -> Thought:
        """Return what the newest plan was made from; RuntimeError before the first plan."""
        if self._newest is None:
            raise RuntimeError('there is nothing to reason about before the first plan')
        return self._newest

    def reset(self) -> None:
        """Forget the newest plan and what it has seen."""
        self._newest, self._seen = None, (b'', None)

    def plan(
        self,
        views: Views,
        ego: EgoState,
        guidance: Guidance,
        *,
        force: Mapping[str, str] | None = None,
    ) -> Plan:
        """Answer what is seen with a trajectory and the chain of skills.

        Views that are the last plan's, pixel for pixel, are not looked at again: their features are at hand.

        Args:
            force: level (or 'action') -> skill, instead of what the router would choose.

        Raises:
            ValueError: views, state or guidance are not what the bundle takes; the message names the value.
            FloatingPointError: the network's answer is not finite.
        """
        m, clock = self.manifest, _Stopwatch()
        self._check(views)
        overrides, action_override = self._overrides(force or {})
        code = self._proprio_normalizer.encode(action.proprio(ego, guidance))[None]
        ids, positions = self._prompt(views, ego, guidance)
        pixels = views.image.tobytes()
        pictures = vision.split_views(views.image, len(views.names), m.view_frames)
        clock.lap('preprocess')

        embeds = self._look(pictures, pixels)
        clock.lap('vision')

        answer = self._prefill.run(
            {
                'input_ids': ids[None],
                'embeds': embeds,
                'position_ids': positions[:, None],
                'skill_override': overrides,
            },
            keep=CACHE,
        )
        clock.lap('prefill')

        flowed, action_skill = self._flow(code, answer, action_override)
        if not (np.isfinite(flowed).all() and np.isfinite(answer['logits']).all()):
            raise FloatingPointError(f'{m.name} answered with numbers that are not finite')
        trajectory = action.to_trajectory(flowed, self._action_normalizer, views.time, m.dt)
        clock.lap('flow')

        for value in answer.values():
            if isinstance(value, np.ndarray):  # what stays on a device cannot be written to
                value.flags.writeable = False
        self._newest = Thought(
            time=views.time,
            logits=answer['logits'],
            past_k=answer['past_k'],
            past_v=answer['past_v'],
            skills=answer['skills'],
            position=int(positions.max()) + 1,
        )
        chain = zip(m.levels.items(), answer['skills'].tolist(), strict=True)
        return Plan(
            trajectory=trajectory,
            skills={level: skills[index] for (level, skills), index in chain},
            action_skill=m.action_skills[action_skill],
            views=views.names,
            timings_ms=clock.laps(),
        )

    def _look(self, pictures, pixels: bytes) -> np.ndarray | Resident:
        """Return the features of the views: the last ones where the pixels are the same."""
        seen, embeds = self._seen
        if pixels != seen:
            embeds = self._features(pictures)
            self._seen = pixels, embeds
        return embeds

    def _features(self, pictures) -> np.ndarray | Resident:
        if self._team is None or len(pictures) == 1:
            return self._vision.run({'views': pictures}, keep=('embeds',))['embeds']
        views = [pictures[place : place + 1] for place in range(len(pictures))]
        return np.concatenate(
            self._team.map(lambda view: self._eye.run({'views': view})['embeds'], views)
        )

    def _flow(self, code, answer, override) -> tuple[Float32[np.ndarray, 'T 2'], int]:
        """Return the normalised trajectory that noise flows to, and the number of the action's skill."""
        inputs = {
            'proprio': code,
            'past_k': answer['past_k'],
            'past_v': answer['past_v'],
            'skill_override': override,
        }
        acted = {}

        def velocity(noisy, t):
            acted.update(self._action.run({**inputs, 'noisy': noisy, 't': np.float32([t])}))
            return acted['velocity']

        with np.errstate(all='ignore'):  # what is not finite is refused by whoever asked
            flowed = action.flow(velocity, self._noise, self.manifest.num_steps)[0]
        return flowed, int(acted['skill'][0])

    def reason(
        self, thought: Thought | None = None, *, cancel: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """Yield the growing text about a plan, the newest by default; may run in another thread than `plan`.

        Ends at the end of the answer, after the manifest's `max_new_tokens`, or, unfinished, as soon as `cancel()`,
        which is asked before each token, is true.
        """
        return self._words(thought or self.thought, cancel)  # chosen now, not at the first next()

    def _words(self, thought, cancel):
        m = self.manifest
        past_k, past_v = thought.past_k, thought.past_v
        logits, ids = thought.logits, []
        while not cancel():
            if not np.isfinite(logits).all():
                raise FloatingPointError(f'{m.name}: logits that are not finite')
            ids.append(int(logits[0].argmax()))
            if ids[-1] == self._tokenizer.end_id:
                return
            text = self._tokenizer.decode(ids)
            if not text.endswith(
                '\N{REPLACEMENT CHARACTER}'
            ):  # half a character: wait for its rest
                yield text
            if len(ids) == m.max_new_tokens or cancel():
                return
            position = thought.position + len(ids) - 1
            answer = self._decode.run(
                {
                    'input_ids': np.array([[ids[-1]]]),
                    'position_ids': np.full((3, 1, 1), position),
                    'past_k': past_k,
                    'past_v': past_v,
                    'skills': thought.skills,
                },
                keep=('new_k', 'new_v'),
            )
            past_k = self._decode.hold('past_k', past_k, answer['new_k'])
            past_v = self._decode.hold('past_v', past_v, answer['new_v'])
            logits = answer['logits']

    def _check(self, views):
        m = self.manifest
        unknown = [name for name in views.names if name not in m.cameras]
        if unknown:
            known = ', '.join(m.cameras)
            raise ValueError(f'views: {m.name} does not know {", ".join(unknown)}, only {known}')
        if len(set(views.names)) != len(views.names):
            raise ValueError(f'views: {", ".join(views.names)} name a camera twice')
        if m.anchor not in views.names:
            raise ValueError(f'views: the anchor {m.anchor} is not among {views.names}')
        vision.check_image(views.image, 'views')
        expected = (len(views.names) * m.view_frames * m.view_height, m.view_width)
        if views.image.shape[:2] != expected:
            raise ValueError(
                f'views: the image is {views.image.shape[:2]}, but {len(views.names)} views of '
                f'{m.view_frames} frames of {m.view_width}x{m.view_height} are {expected}'
            )
        if not np.isfinite(views.time):
            raise ValueError(f'views: time is {views.time}')

    def _overrides(self, force):
        m = self.manifest
        ladders = {**m.levels, ACTION: m.action_skills}
        codes = dict.fromkeys(ladders, -1)
        for level, skill in force.items():
            if level not in ladders:
                raise ValueError(f'force: no level {level!r}; known: {", ".join(ladders)}')
            if skill not in ladders[level]:
                known = ', '.join(ladders[level])
                raise ValueError(f'force: no skill {skill!r} on level {level}; known: {known}')
            codes[level] = list(ladders[level]).index(skill)
        return (
            np.array([codes[level] for level in m.levels], np.int64),
            np.array([codes[ACTION]], np.int64),
        )

    def _prompt(self, views, ego, guidance):
        m = self.manifest
        text = prompt.question(views.names, ego, guidance)
        ids = self._tokenizer.encode_prompt(text, m.tokens_per_view)
        if len(ids) > m.max_prompt_tokens:
            raise ValueError(
                f'views: {len(views.names)} of them make {len(ids)} tokens, {m.name} takes '
                f'{m.max_prompt_tokens}; choose fewer'
            )
        return ids, prompt.rope_positions(ids, self._tokenizer.image_id, m.grid)


class _Stopwatch:
    def __init__(self):
        self._times, self._names = [perf_counter()], []

    def lap(self, name):
        self._names.append(name)
        self._times.append(perf_counter())

    def laps(self) -> dict[str, float]:
        """Return the milliseconds of each lap and their `total`."""
        steps = np.diff(self._times) * 1e3
        laps = dict(zip(self._names, steps.tolist(), strict=True))
        return {**laps, 'total': (perf_counter() - self._times[0]) * 1e3}
