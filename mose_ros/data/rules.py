"""Labels from rules: the skill of each level, the camera worth a look, and what the words are made of.

Pure functions of one moment and the plan from there, so that what a network sees decides, not what happened before.
The one thing that most constrains the plan is the `target`; all levels speak about it. Candidates are tried in this order, and
the first that holds decides (sources: DriveMoE's scenario table and camera rules; MoSE's levels):

| planning        | holds when                                                                                       |
|-----------------|--------------------------------------------------------------------------------------------------|
| emergency_brake | a walker is on or about to step into our way within 40 m, we would meet, and the plan slows or crawls; or the plan slows (not for a red light or stop sign) since a vehicle cuts in, or brakes or stands ahead away from junctions, or with 3 m/s^2 or more for any vehicle ahead |
| give_way        | a siren behind up to 40 m (and until it is 6 m ahead); or a vehicle that crosses or comes towards makes the plan slow or stand, and no red light does |
| traffic_sign    | a red light or a stop sign governs our way within 40 m; a yellow light, if the plan slows for it |
| parking_exit    | the route asks for the way out of a parking place                                                |
| overtaking      | something that stands or crawls is in our lane within 30 m and the plan goes around it or waits to; until it lies 4 m behind |
| merging         | the route asks for a lane change that is not done yet                                            |
| normal          | nothing of that; the target is then who cuts in or drives ahead (nearer than 6 m + 2.5 s), an obstacle or a light within 40 m |

`general` of planning is for moments without a plan. Camera: the one that faces a siren; the one that sees best who comes
from behind in the lane that is to be joined, else its rear side, or the rear where a parking place is left and nobody comes; of a
lane that an obstacle is passed on, the rear side or, where it comes towards us, its front side; the front side from
which somebody crosses to whom we give way; the one that sees somebody who steps or cuts in best, if it isn't the front; in a turn the front side towards the exit; else `back`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mose_ros.core.skills import GENERAL
from mose_ros.core.types import Scene, Trajectory
from mose_ros.data.moment import HARD, Moment, stands
from mose_ros.data.sight import Sighting

CAMERAS = ('front_left', 'front_right', 'back', 'back_left', 'back_right')  # the candidates
DEFAULT_CAMERA = 'back'
PASS_FROM = 30.0  # m before an obstacle from which passing it is the plan
PARKING = ('parking_exit', 'ParkingExit', 'ParkingExits')


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the rules say about one moment."""

    skills: Mapping[str, str]  # level -> skill, in order of depth
    camera: str  # one of CAMERAS
    target: Sighting | None  # what the three levels speak about
    motion: str  # what the target does, a key of narration.MOTIONS
    side: str  # 'left' | 'right' | '': from where the target comes
    action: str  # what the plan does, a key of narration.ACTIONS


def label(
    scene: Scene, expert: Trajectory | None = None, decision: Mapping[str, Any] | None = None
) -> Labels:
    """Return the labels of a moment.

    `expert` is the plan from here (or what was driven, where nobody planned); without it the ego is taken to keep its
    acceleration and planning is `general`. `decision` is sim.expert.Decision as a mapping: it helps to tell whom the expert meant.
    """
    plan = expert if expert is not None else _go_on(scene)
    moment = Moment(scene, plan, decision or {})
    planning, target = _planning(moment)
    perception = _perception(target)
    motion, prediction, side = _prediction(moment, planning, target)
    skills = {
        'perception': perception,
        'prediction': prediction,
        'planning': planning if expert is not None else GENERAL,
    }
    return Labels(
        skills=skills,
        camera=_camera(moment, planning, target, motion, side),
        target=target,
        motion=motion,
        side=side,
        action=_action(moment, planning, target),
    )


def _go_on(scene: Scene) -> Trajectory:
    times = 0.2 * np.arange(1, 16)
    speed, acceleration = max(scene.ego.speed, 0.0), scene.ego.acceleration
    if acceleration < 0:
        times = np.minimum(times, speed / -acceleration)
    x = speed * times + 0.5 * acceleration * times**2
    return Trajectory(time=scene.time, dt=0.2, xy=np.stack([x, 0 * x], axis=1))


def _planning(moment: Moment) -> tuple[str, Sighting | None]:
    """Return the planning skill and what it is about; see the module's table."""
    course, red = moment.course, False
    control = moment.control
    if control is not None:
        red = control.actor.state == 'red' or control.actor.kind == 'traffic_sign'
        red |= control.actor.state == 'yellow' and course.slows
    if moment.walker is not None and (course.slows or course.crawls):
        return 'emergency_brake', moment.walker
    waits = red and control.actor.stop_distance > 2.5
    if moment.danger is not None and not waits:
        return 'emergency_brake', moment.danger
    if moment.siren is not None:
        return 'give_way', moment.siren
    changing = bool(moment.change)
    holds = course.slows or (moment.cause == 'gap' and course.crawls)
    if moment.crosser is not None and holds and not changing and not waits:
        return 'give_way', moment.crosser
    if red:
        return 'traffic_sign', control
    if changing:
        exits = moment.scene.family in PARKING
        return ('parking_exit' if exits else 'merging'), moment.joining
    obstacle = moment.obstacle
    if obstacle is not None and obstacle.gap < PASS_FROM:
        return 'overtaking', obstacle
    near = [one for one in (moment.cutter, moment.lead) if one is not None]
    return 'normal', min(near, key=lambda one: one.s, default=obstacle or control)


def _perception(target: Sighting | None) -> str:
    if target is None:
        return GENERAL
    if target.actor.kind == 'walker' or target.actor.type_id == 'vehicle.bicycle':
        return 'vulnerable_road_user'
    if stands(target):
        return 'static_obstacle'
    return 'vehicle' if target.actor.kind == 'vehicle' else 'traffic_control'


def _prediction(moment: Moment, planning: str, target: Sighting | None) -> tuple[str, str, str]:
    """Return what the target does, the prediction skill, and from which side it comes."""
    if target is None:
        return 'nothing', GENERAL, ''
    side = 'left' if target.y > 0 else 'right'
    if target.actor.kind in ('traffic_light', 'traffic_sign'):
        return 'governs', GENERAL, ''
    if stands(target):
        return 'stays', GENERAL, ''
    if target.actor.kind == 'walker':
        coming = 'right' if target.v_d > 0 else 'left'
        return 'crosses', 'crossing', coming if abs(target.v_d) > 0.4 else side
    if target is moment.siren or (planning in ('merging', 'parking_exit') and target.s < 3.0):
        return 'from_behind', 'approaching', ''
    if target is moment.cutter:
        return 'cuts_in', 'cut_in', side
    if target is moment.crosser and planning == 'give_way':
        if target.parallel < -0.7:
            return 'towards', 'approaching', ''
        across = side if abs(target.v_d) < 0.5 else 'right' if target.v_d > 0 else 'left'
        return 'crosses', 'crossing', across
    if target.actor.state == 'braking':
        return 'slows', 'slowing', ''
    if target.v_s < 0.7:
        return 'stands', 'slowing', ''
    if moment.course.now - target.v_s > 1.5:
        return 'slows', 'slowing', ''
    return 'goes_on', GENERAL, ''


def _camera(moment: Moment, planning: str, target: Sighting | None, motion: str, side: str) -> str:
    if target is not None and target is moment.siren:
        return _best(target)
    if planning in ('parking_exit', 'merging'):
        return _joining_camera(moment, planning, target)
    if planning == 'overtaking':
        return _overtaking_camera(moment, target)
    if planning == 'give_way' and motion == 'crosses':
        return f'front_{side}'
    if motion in ('crosses', 'cuts_in') and 'front' not in target.cameras:
        return _best(target)
    if moment.turn:
        return f'front_{moment.turn}'
    return DEFAULT_CAMERA


def _best(target: Sighting) -> str:
    seen = [name for name in target.cameras if name in CAMERAS]
    return seen[0] if target.cameras[:1] != ('front',) and seen else DEFAULT_CAMERA


def _joining_camera(moment: Moment, planning: str, target: Sighting | None) -> str:
    """Return who shows the lane that is to be joined.

    The published rule is the rear side alone. On the published rig that sees 5 m back and no further: whoever comes from
    behind is seen by the rear camera first, and who leaves a parking place at rest has to know that nobody does.
    """
    if target is not None and target.x < 0:
        return _best(target)
    if planning == 'parking_exit' and target is None:
        return 'back'
    return f'back_{moment.change}'


def _overtaking_camera(moment: Moment, target: Sighting) -> str:
    if _passes_on(moment, target) == 'right':
        return 'back_right'
    beside = moment.road.at(
        moment.scene.progress + max(target.s, 0.0), moment.scene.corridor.own_left
    )
    return 'back_left' if beside > 1.2 * moment.width else 'front_left'


def _passes_on(moment: Moment, target: Sighting) -> str:
    """Return the side on which the obstacle is passed: the planned one, else the one with more room."""
    side = moment.course.offset(target.s) - target.d
    reaches = float(moment.course.s.max()) > target.gap - 6.0
    if reaches and abs(side) > 0.5:
        return 'left' if side > 0 else 'right'
    corridor, place = moment.scene.corridor, moment.scene.progress + max(target.s, 0.0)
    room_left = moment.road.at(place, corridor.left) - target.d
    room_right = moment.road.at(place, corridor.right) + target.d
    return 'left' if room_left >= room_right else 'right'


def _action(moment: Moment, planning: str, target: Sighting | None) -> str:
    """Return what the plan does; it follows from the plan's own speeds and offsets."""
    course = moment.course
    if course.stands:
        return 'wait'
    if course.braking >= HARD and course.now > 1.5 and target is not None:
        return 'brake_hard'
    if course.stops:
        return 'stop'
    if target is not None and target is moment.siren and course.d[-1] < moment.offset - 0.3:
        return 'pull_over'
    if planning == 'parking_exit':
        return 'pull_out'
    if planning == 'merging' and moment.changes:
        return f'change_{moment.change}'
    if planning == 'overtaking':
        side = _passes_on(moment, target)
        moves = np.abs(course.d).max() > 0.5 or target.s < 0
        if moves:
            return f'pass_{side}'
    reacts = planning in ('give_way', 'emergency_brake') and target is not moment.siren
    if course.now - course.last > (0.5 if reacts else 1.5):
        return 'slow_down'
    if course.now < 1.0:
        return 'start'
    if moment.turn:
        return f'turn_{moment.turn}'
    return 'keep_going'
