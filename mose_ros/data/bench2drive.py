"""Recorded drives as samples for skill labels: our clips and Bench2Drive's, which share a layout but not all of the truth.

Genuine clips know no expert's plan, so what was driven stands for it, and their way ahead is the driven one, so nothing can
stand in it. What geometry cannot see there the scenario's name says, as in DriveMoE's table: where the rules find `normal` and the
ego does what the scenario is about, the scenario's skill is taken, and told where that is true of what can be seen. Oddities of
the annotation are put right here that concern labels only. Sources: Bench2Drive's docs/anno.md and tools/data_collect.py (which lists cones, warnings and debris among
the traffic signs, and lets speed limits "affect" the ego), docs/bench2drive_base_1000.json for the names;
DriveMoE (arXiv 2505.16278) for scenarios and skills.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from mose_ros.core.prompt import COMMAND_WORDS
from mose_ros.core.skills import Taxonomy
from mose_ros.core.types import Actor, Command, Scene, Trajectory
from mose_ros.data import narration, rules, storage
from mose_ros.data.clips import ClipReader, count_frames, find_clips, scenario_of
from mose_ros.data.moment import shift
from mose_ros.data.pictures import Picture
from mose_ros.data.rules import Labels
from mose_ros.data.skill_samples import SkillSample, check
from mose_ros.data.storage import Anywhere

HORIZON, DT = 15, 0.2  # of what was driven, where it stands for a plan
CAMERAS = ('front', 'front_left', 'front_right', 'back')  # shown to an annotator
SHIFT = 1.5  # m across, from which a path changes the lane
BEFORE = 2.0  # s of the past that tell what the ego is doing
TURN = 0.35  # rad, from which a path turns
_JUNCTIONS = ('LeftTurn', 'RightTurn', 'LeftTurnEnterFlow')
_OBSTACLES = ('Accident', 'ConstructionObstacle', 'HazardAtSideLane', 'ParkedObstacle')
_BY_SKILL = {
    'merging': (
        'LaneChange',
        'SequentialLaneChange',
        'HighwayExit',
        'InterurbanActorFlow',
        'MergerIntoSlowTraffic',
        'MergerIntoSlowTrafficV2',
        'CrossingBicycleFlow',
        'EnterActorFlow',
        *(f'NonSignalizedJunction{form}' for form in _JUNCTIONS),
        *(f'SignalizedJunction{form}' for form in _JUNCTIONS),
    ),
    'parking_exit': ('ParkingExit',),
    'overtaking': (
        *_OBSTACLES,
        *(f'{name}TwoWays' for name in _OBSTACLES),
        'VehicleOpensDoor',
        'VehicleOpensDoorTwoWays',
    ),
    'emergency_brake': (
        'BlockedIntersection',
        'DynamicObjectCrossing',
        'PedestrianCrossing',
        'ParkingCrossingPedestrian',
        'VehicleTurningRoute',
        'VehicleTurningRoutePedestrian',
        'OppositeVehicleTakingPriority',
        'OppositeVehicleRunningRedLight',
        'HardBreakRoute',
        'ParkingCutIn',
        'StaticCutIn',
        'ControlLoss',
    ),
    'give_way': (
        'InvadingTurn',
        'YieldToEmergencyVehicle',
        'HighwayCutIn',
        'InterurbanAdvancedActorFlow',
    ),
}
_REACTIONS = ('emergency_brake', 'give_way')
_ABOUT = {  # skill of planning -> what its sentence names, by skill of perception; what passes by or leads is none to overtake
    'overtaking': ('static_obstacle', 'vulnerable_road_user'),
    'emergency_brake': ('static_obstacle', 'vulnerable_road_user', 'vehicle'),
    'give_way': ('vulnerable_road_user', 'vehicle'),
}
SKILLS = {
    'perception': tuple(dict.fromkeys(narration.NOUNS.values())),
    'prediction': ('slowing', 'cut_in', 'crossing', 'approaching'),
    'planning': ('normal', 'traffic_sign', *_BY_SKILL),
}
SCENARIOS = {name: skill for skill, names in _BY_SKILL.items() for name in names}


def mend(scene: Scene) -> Scene:
    """Return a genuine scene in which only stop signs are signs to obey, and what stands on the road is an obstacle."""
    mended = [_mended(actor) for actor in scene.actors]
    return replace(scene, actors=tuple(actor for actor in mended if actor is not None))


def _mended(actor: Actor) -> Actor | None:
    if actor.kind != 'traffic_sign' or actor.type_id == 'traffic.stop':
        return actor
    if 'dirtdebris' in actor.type_id:
        return None  # it lies flat; one drives over it
    if actor.type_id.startswith('static.'):
        kind = 'static.cone' if 'cone' in actor.type_id else 'static.barrier'
        return replace(actor, kind='static', type_id=kind, affects_ego=False)
    return replace(actor, affects_ego=False)  # speed limits, and signs to yield


def skills(clip: ClipReader, index: int) -> dict[str, str]:
    """Return the skill of each level at a frame, by the rules; planning is `general` where the clip ends too soon after it."""
    if clip.metadata['ours']:
        found = rules.label(clip.scene(index), clip.expert_trajectory(index), clip.decision(index))
    else:
        scene, driven = mend(clip.scene(index)), clip.future_trajectory(index, HORIZON, DT)
        found, _ = label(clip, index, scene, driven)
    return dict(found.skills)


def label(
    clip: ClipReader, index: int, scene: Scene, driven: Trajectory | None
) -> tuple[Labels, str]:
    """Return the labels of a genuine frame and its text: those of the rules, and the scenario's skill where they find `normal`.

    `scene` is the frame's, mended; `driven` what was driven from there.
    """
    found = rules.label(scene, driven)
    named = SCENARIOS.get(scenario_of(clip.folder))
    if found.skills['planning'] != 'normal' or named is None:
        return found, narration.tell(found)
    if not _does(named, clip, index, scene, driven):
        return found, narration.tell(found)
    taken = replace(found, skills={**found.skills, 'planning': named})
    return taken, narration.tell(taken if _can_be_told(taken) else found)


def _can_be_told(labels: Labels) -> bool:
    """Say whether the sentence of a scenario's skill is true of what is seen; else that of the rules, `normal`, is."""
    planning = labels.skills['planning']
    if planning in _REACTIONS and labels.action not in ('slow_down', 'brake_hard', 'stop', 'wait'):
        return False  # it did so before, or will later
    return planning not in _ABOUT or labels.skills['perception'] in _ABOUT[planning]


def _does(skill: str, clip: ClipReader, index: int, scene: Scene, driven: Trajectory) -> bool:
    """Say whether the ego does what a scenario's skill is about, going by how it drives."""
    speeds = driven.speeds()
    slows = scene.ego.speed - speeds.min() > 1.5
    waits = max(scene.ego.speed, speeds.max()) < 1.0
    if skill in _REACTIONS:
        return bool(slows or waits)
    first = max(index - round(BEFORE / clip.frame_dt), 0)
    before = int((index - first) * clip.frame_dt / driven.dt + 1e-6)
    path = clip.future_trajectory(first, before + len(driven.xy), driven.dt)  # ends with `driven`
    shifts = abs(shift(path)) > SHIFT
    if skill == 'merging':
        turns = scene.guidance.command in (Command.LEFT, Command.RIGHT)
        return shifts or (turns and abs(turn(driven)) > TURN)
    return bool(shifts or waits)


def turn(path: Trajectory) -> float:
    """Return by how much a path turns, in rad, + = left; 0 where it hardly moves."""
    steps = np.diff(path.xy, axis=0)
    moving = steps[np.hypot(*steps.T) > 0.05]
    return float(np.arctan2(moving[-1, 1], moving[-1, 0])) if len(moving) else 0.0


class ClipSource:
    """The frames of all clips under a folder, ours or Bench2Drive's; without a taxonomy the rules are not asked."""

    SKILLS = SKILLS

    def __init__(
        self, root: str | Anywhere, taxonomy: Taxonomy | None, cameras: Sequence[str] = CAMERAS
    ):
        self.taxonomy, self.cameras = taxonomy, tuple(cameras)
        self._root = storage.place(root)
        self._frames = [
            (folder, index)
            for folder in find_clips(self._root)
            for index in range(count_frames(folder))
        ]
        if not self._frames:
            raise ValueError(f'{root} holds no clip; record some or fetch Bench2Drive there')
        self._clip = lru_cache(maxsize=4)(ClipReader)

    def __len__(self) -> int:
        return len(self._frames)

    def sample(self, index: int) -> SkillSample:
        """Return a frame; its facts are the ego's state, the command, and the expert's plan or what was driven."""
        folder, frame = self._frames[index]
        clip = self._clip(folder)
        plan = clip.expert_trajectory(frame) or clip.future_trajectory(frame, HORIZON, DT)
        return SkillSample(
            name=f'{folder.relative_to(self._root).as_posix()}:{frame:05d}',
            facts=facts(clip.scene(frame), plan),
            rules=check(self.taxonomy, skills(clip, frame)) if self.taxonomy else {},
            pictures=lambda: self._pictures(folder, frame),
        )

    def _pictures(self, folder: Anywhere, frame: int) -> dict[str, Picture]:
        found = {}
        for name in self.cameras:
            path = folder / 'camera' / f'rgb_{name}' / f'{frame:05d}.jpg'
            try:
                found[name.replace('_', ' ')] = Picture(data=path.read_bytes())
            except OSError as error:
                raise ValueError(f'{path} cannot be read: {error.strerror}') from None
        return found


def facts(scene: Scene, plan: Trajectory | None) -> Mapping[str, str]:
    """Return in words what is known of a moment without looking."""
    ego = scene.ego
    state = (
        f'speed {ego.speed:.1f} m/s, acceleration {ego.acceleration:.1f} m/s^2, '
        f'yaw rate {ego.yaw_rate:.2f} rad/s; the route asks to {COMMAND_WORDS[scene.guidance.command]}'
    )
    if plan is None:
        return {'ego vehicle': state, 'trajectory': 'not known, the recording ends here'}
    every = max(round(0.6 / plan.dt), 1)
    points = [
        f'{time:.1f} s: {x:.1f} m ahead, {abs(y):.1f} m {"left" if y >= 0 else "right"}, {speed:.1f} m/s'
        for time, (x, y), speed in zip(plan.times(), plan.xy, plan.speeds(), strict=True)
    ][every - 1 :: every]
    return {'ego vehicle': state, 'trajectory': '; '.join(points)}
