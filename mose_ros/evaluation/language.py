"""Is the text about the scene, and do the routers choose as the rules would? On frames that no training saw.

A frame is two moments, `frame_gap` apart, as the policy would see them while driving; the truth comes from the label rules
over the annotation and the expert's plan. F1 is over facts: the objects, skills and actions that a sentence names.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from mose_ros.core.control import TrajectoryTracker
from mose_ros.core.types import FAMILIES, Observation, Plan, Scene, Trajectory
from mose_ros.data import narration, rules
from mose_ros.data.clips import ClipReader, find_clips
from mose_ros.data.storage import Anywhere

EXAMPLES = 12  # pairs of texts that go into the result, to be read by people


class ReasoningPolicy(Protocol):
    """What is judged here: a Policy that is also a Reasoner."""

    def reset(self) -> None: ...
    def plan(self, observation: Observation, scene: Scene | None = None) -> Plan: ...
    def reason(self) -> Iterator[str]: ...


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A moment with what was seen a little earlier, and its truth."""

    name: str
    observations: Sequence[Observation]  # the earlier one, if there is any, then the moment itself
    truth: rules.Labels
    trajectory: Trajectory  # of the expert


def frames_of_clips(
    root: str | Anywhere,
    count: int,
    gap: float,
    families: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[Frame]:
    """Yield frames drawn from recorded clips of ours, evenly over the families (all there are by default); ValueError if too few."""
    by_family = defaultdict(list)
    for folder in find_clips(root):
        clip = ClipReader(folder)
        family = clip.metadata['family']
        if clip.expert_trajectory(0) is not None and (families is None or family in families):
            by_family[family].append(clip)
    if not by_family:
        raise ValueError(f'{root} holds no such clip with plans of an expert; record some first')
    random = np.random.default_rng(seed)
    for family, number in _shares(sorted(by_family), count).items():
        pairs = [(clip, index) for clip in by_family[family] for index in range(len(clip))]
        if len(pairs) < number:
            raise ValueError(f'{root} has {len(pairs)} frames of {family}, {number} are needed')
        for choice in sorted(random.choice(len(pairs), number, replace=False)):
            yield _frame_of_clip(*pairs[choice], gap)


def _frame_of_clip(clip: ClipReader, index: int, gap: float) -> Frame:
    before = index - round(gap / clip.frame_dt)
    scene, plan = clip.scene(index), clip.expert_trajectory(index)
    return Frame(
        name=f'{clip.folder.name}:{index}',
        observations=[
            _observation(clip.scene(at), clip.images(at)) for at in (before, index) if at >= 0
        ],
        truth=rules.label(scene, plan, clip.decision(index)),
        trajectory=plan,
    )


def _observation(scene: Scene, images: Mapping[str, np.ndarray]) -> Observation:
    return Observation(time=scene.time, images=images, ego=scene.ego, guidance=scene.guidance)


def frames_of_world(
    seeds: Sequence[int],
    count: int,
    gap: float,
    families: Sequence[str] = FAMILIES,
    seed: int = 0,
    renderer: str = 'auto',
) -> Iterator[Frame]:
    """Yield frames of episodes that the expert drives, evenly over the families and their episodes."""
    from mose_ros.sim.world import World

    random = np.random.default_rng(seed)
    world = World(renderer=renderer)
    try:
        for family, number in _shares(families, count).items():
            for episode, share in _shares(list(seeds), number).items():
                if share:
                    yield from _frames_of_episode(world, family, episode, share, gap, random)
    finally:
        world.close()


def _frames_of_episode(world, family, seed, count, gap, random) -> Iterator[Frame]:
    """Drive once without looking to learn the length, then again and look at the chosen moments."""
    length = sum(1 for _ in _expert_drive(world, family, seed))
    moments = set(random.choice(length, min(count, length), replace=False).tolist())
    steps = round(gap / 0.1)
    earlier: dict[int, Observation] = {}
    for index, (scene, plan, decision) in enumerate(_expert_drive(world, family, seed)):
        if index + steps in moments or index in moments:
            earlier[index] = world.observation()
        if index in moments:
            seen = [earlier[at] for at in (index - steps, index) if at in earlier]
            truth = rules.label(scene, plan, decision)
            name = f'{family}_{seed}:{index}'
            yield Frame(name=name, observations=seen, truth=truth, trajectory=plan)


def _expert_drive(world, family: str, seed: int):
    from mose_ros.sim.expert import Expert

    scene, tracker, expert = world.reset(family, seed), TrajectoryTracker(), Expert(world.forecast)
    while not world.outcome.done:
        plan = expert.plan(None, scene).trajectory
        yield scene, plan, dataclasses.asdict(expert.reason)
        scene = world.step(tracker.command(plan, scene.ego.speed))


def _shares(names: Sequence, count: int) -> dict[Any, int]:
    """Spread a count evenly."""
    return {name: len(range(index, count, len(names))) for index, name in enumerate(names)}


class Judge:
    """Counts agreement, frame by frame."""

    def __init__(self, fixed_views: Sequence[str]):
        self._fixed = tuple(fixed_views)
        self._facts = defaultdict(Counter)  # level -> right, said, true
        self._slots = defaultdict(Counter)  # (level, slot) -> the same
        self._places = Counter()
        self._routers = defaultdict(Counter)  # router -> (true, chosen) -> count
        self._errors: list[float] = []
        self._examples: list[dict[str, str]] = []
        self._broken = 0

    def add(self, frame: Frame, plan: Plan, text: str) -> None:
        """Compare one answer with the truth."""
        true_text = narration.tell(frame.truth)
        self._compare_text(text, true_text)
        for level, skill in frame.truth.skills.items():
            self._routers[level][skill, plan.skills.get(level, '')] += 1
        planning = list(frame.truth.skills.values())[-1]
        self._routers['action'][planning, plan.action_skill] += 1
        chosen = [name for name in plan.views if name not in self._fixed]
        camera = frame.truth.camera
        looked = camera if camera in chosen else (chosen[0] if chosen else '')
        self._routers['view'][camera, looked] += 1
        self._errors.append(_distance(plan.trajectory, frame.trajectory))
        if len(self._examples) < EXAMPLES:
            self._examples.append({'frame': frame.name, 'generated': text, 'true': true_text})

    def _compare_text(self, text: str, true_text: str) -> None:
        said, true = narration.parse(text), narration.parse(true_text)
        self._broken += set(said) != set(true)
        for level, slots in true.items():
            mine = narration.facts(level, said.get(level, narration.Slots()))
            right = narration.facts(level, slots)
            self._facts[level].update(right=len(mine & right), said=len(mine), true=len(right))
            for name in {name for name, _ in mine | right}:
                a, b = ({fact for fact in one if fact[0] == name} for one in (mine, right))
                self._slots[level, name].update(right=len(a & b), said=len(a), true=len(b))
        a, b = said.get('perception', narration.Slots()), true['perception']
        if b.object and a.object == b.object:
            near = narration.is_near(a.distance, b.distance)
            self._places.update(both=1, place=a.place == b.place, distance=near)

    def result(self) -> dict[str, Any]:
        """Return F1 per level and slot, router accuracies with confusions, and the trajectory's error."""
        places = self._places
        return {
            'frames': len(self._errors),
            'f1': {level: _f1(count) for level, count in self._facts.items()},
            'f1_slots': {
                f'{level}.{name}': _f1(one) for (level, name), one in self._slots.items()
            },
            'place_accuracy': places['place'] / places['both'] if places['both'] else None,
            'distance_accuracy': places['distance'] / places['both'] if places['both'] else None,
            'incomplete_texts': self._broken,
            'view_router': _router(self._routers['view']),
            'skill_routers': {
                name: _router(counts)
                for name, counts in self._routers.items()
                if name not in ('view', 'action')
            },
            'action_router': _router(self._routers['action']),
            'trajectory_l2_m': float(np.mean(self._errors)) if self._errors else None,
            'examples': self._examples,
        }


def _f1(count: Mapping[str, int]) -> float:
    total = count['said'] + count['true']
    return 2 * count['right'] / total if total else 1.0


def _router(counts: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    confusion: dict[str, dict[str, int]] = {}
    for (true, chosen), number in sorted(counts.items()):
        confusion.setdefault(true, {})[chosen or 'none'] = number
    total = sum(counts.values())
    right = sum(number for (true, chosen), number in counts.items() if true == chosen)
    return {'accuracy': right / total if total else None, 'confusion': confusion}


def _distance(one: Trajectory, other: Trajectory) -> float:
    """Return the mean distance over the times of the shorter trajectory."""
    end = min(one.times()[-1], other.times()[-1])
    times = other.times()[other.times() <= end + 1e-9]
    points = [
        np.stack(
            [
                np.interp(times, np.append(0.0, way.times()), np.append(0.0, way.xy[:, axis]))
                for axis in (0, 1)
            ]
        )
        for way in (one, other)
    ]
    return float(np.hypot(*(points[0] - points[1])).mean())


def judge(
    policy: ReasoningPolicy,
    frames: Iterable[Frame],
    fixed_views: Sequence[str],
    total: int,
    bar: bool = True,
) -> dict[str, Any]:
    """Ask the policy about every frame and return what `Judge` makes of its answers; ValueError without frames."""
    judge, count = Judge(fixed_views), 0
    for frame in tqdm(frames, desc='language', unit='frame', total=total, disable=not bar):
        policy.reset()
        for observation in frame.observations:
            plan = policy.plan(observation)
        text = ''
        for text in policy.reason():  # noqa: B007 - the last is the whole text
            pass
        judge.add(frame, plan, text)
        count += 1
    if count == 0:
        raise ValueError('there is no frame to judge')
    return judge.result()
