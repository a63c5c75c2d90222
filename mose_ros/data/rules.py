"""Labels from rules: the skill of each level, the camera worth a look, and what the words are made of.

Pure functions of one moment and the plan from there, so that what a network sees decides, not what happened before.
The one thing that most constrains the plan is the `target`; all levels speak about it. Candidates are tried in this order, and
the first that holds decides (sources: DriveMoE's scenario table and camera rules; MoSE's levels):

| planning        | holds when                                                                                       |
|-----------------|--------------------------------------------------------------------------------------------------|
| emergency_brake | a walker is on or about to step into our way within 40 m, we would meet, and the plan slows or crawls; or a vehicle ahead or cutting in makes the plan brake with 3 m/s^2 or more |
| give_way        | a siren behind up to 40 m (and until it is 6 m ahead); or a vehicle that crosses, comes towards or cuts in makes the plan slow or stand, and no red light does |
| traffic_sign    | a red light or a stop sign governs our way within 40 m; a yellow light, if the plan slows for it |
| parking_exit    | the route asks for the way out of a parking place                                                |
| overtaking      | something that stands or crawls is in our lane within 30 m and the plan goes around it or waits to; until it lies 4 m behind |
| merging         | the route asks for a lane change that is not done yet                                            |
| normal          | nothing of that; the target is then who cuts in or drives ahead (nearer than 6 m + 2.5 s), an obstacle or a light within 40 m |

`general` of planning is for moments without a plan. Camera: the one that faces a siren; the rear side of the lane that is to be
joined or, where that lane comes towards us, its front side; the front side from
which somebody crosses to whom we give way; the one that sees somebody who steps or cuts in best, if it isn't the front; in a turn the front side towards the exit; else `back`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mose_ros.core.skills import GENERAL
from mose_ros.core.types import Command, Scene, Trajectory
from mose_ros.data.sight import Road, Sighting, look

CAMERAS = ('front_left', 'front_right', 'back', 'back_left', 'back_right')  # the candidates
DEFAULT_CAMERA = 'back'
NEAR_ENOUGH = 40.0  # m ahead for walkers, lights, signs and standing things, behind for sirens
HARD = 3.0  # m/s^2 of a plan that brakes hard
HALF_WIDTH = 0.95  # m of the ego
FRONT = 2.3  # m from the ego's centre to its bumper
PASS_FROM = 30.0  # m before an obstacle from which passing it is the plan
LOOK_TIMES = np.arange(0.25, 5.01, 0.25)  # s ahead for which others are extrapolated
PARKING = ('parking_exit', 'ParkingExit', 'ParkingExits')
LANE_CHANGE = (Command.LANE_LEFT, Command.LANE_RIGHT)


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the rules say about one moment."""

    skills: Mapping[str, str]  # level -> skill, in order of depth
    camera: str  # one of CAMERAS
    target: Sighting | None  # what the three levels speak about
    motion: str  # what the target does, a key of narration.MOTIONS
    side: str  # 'left' | 'right' | '': from where the target comes
    action: str  # what the plan does, a key of narration.ACTIONS


class _Course:
    """What the plan does, in the few numbers that the rules ask for."""

    def __init__(self, scene: Scene, plan: Trajectory, road: Road):
        self.now = max(scene.ego.speed, 0.0)
        speeds, times = plan.speeds(), plan.times()
        self.last = float(speeds[-3:].mean())
        self.slowest = float(speeds.min())
        self.distance = float(np.hypot(*plan.xy[-1]))
        early = times >= min(0.6, times[-1])
        self.braking = float(((self.now - speeds) / times)[early].max())
        self.stands = self.now < 0.6 and self.distance < 1.5
        self.stops = self.last < 0.5
        self.slows = self.now - self.slowest > 1.5 or self.stops or self.stands
        self.crawls = self.last < min(self.now + 0.5, 4.0)
        cos, sin = math.cos(scene.ego.yaw), math.sin(scene.ego.yaw)
        turn = np.array([[cos, sin], [-sin, cos]])
        world = np.vstack([[0.0, 0.0], plan.xy]) @ turn + (scene.ego.x, scene.ego.y)
        s, self.d = road.project(world)
        self.s = s - scene.progress

    def offset(self, s: float) -> float:
        """Return where across the way the ego will be when it is s metres on; behind the plan's end as at its end."""
        order = np.maximum.accumulate(self.s)
        return float(np.interp(s, order, self.d))


class _Moment:
    """All that the rules look at, worked out once."""

    def __init__(self, scene: Scene, plan: Trajectory, decision: Mapping[str, Any]):
        self.scene = scene
        self.road = Road(scene.corridor)
        self.course = _Course(scene, plan, self.road)
        self.offset = float(self.course.d[0])
        self.seen = look(scene, self.road)
        self.cause = decision.get('cause', '')
        self.reason = decision.get('actor_id')
        self.yields = decision.get('longitudinal', 'cruise') != 'cruise'
        self.command = scene.guidance.command
        self.width = self.road.at(scene.progress, scene.corridor.lane_width)
        self.limit = self.road.at(scene.progress, scene.corridor.speed_limit)

    def is_reason(self, one: Sighting, *causes: str) -> bool:
        """Say whether the expert named this actor as its reason."""
        return one.actor.id == self.reason and self.cause in causes

    @cached_property
    def walker(self) -> Sighting | None:
        """Return the walker that is in our way or about to be."""
        found = [
            one
            for one in self.seen
            if one.actor.kind == 'walker' and one.distance < NEAR_ENOUGH and one.s > 0
            if self._steps_in(one) or (self.yields and self.is_reason(one, 'crossing'))
        ]
        return min(found, key=lambda one: one.s, default=None)

    def _steps_in(self, one: Sighting) -> bool:
        reach = HALF_WIDTH + 0.7
        side = one.d - self.course.offset(one.s)
        if abs(side) < reach:
            return True
        toward = -one.v_d if side > 0 else one.v_d
        if toward < 0.4:
            return False
        enters = (abs(side) - reach) / toward
        leaves = (abs(side) + reach) / toward
        arrives = max(one.s - FRONT, 0.0) / max(self.course.now, 3.0)
        return enters < 4.0 and enters - 3.0 < arrives < leaves + 1.0

    @cached_property
    def lead(self) -> Sighting | None:
        """Return the vehicle that we follow, if it is near enough to matter."""
        found = []
        for one in self.seen:
            if one.actor.kind != 'vehicle' or one.aligned < 0.7 or one.s <= 0 or _stands(one):
                continue
            side = abs(one.d - self.course.offset(one.s)) - one.half_d
            if side < HALF_WIDTH:
                gap = one.gap - FRONT
                closing = self.course.now - one.v_s
                soon = closing > 0.5 and gap / closing < 5.0
                if gap < 6.0 + 2.5 * self.course.now or soon:
                    found.append(one)
        return min(found, key=lambda one: one.s, default=None)

    @cached_property
    def cutter(self) -> Sighting | None:
        """Return the vehicle that comes into our lane from the side."""
        found = [
            one
            for one in self.seen
            if one.actor.kind == 'vehicle' and one.aligned > 0.7 and self._cuts_in(one)
            if one.parallel > 0.7
        ]
        return min(found, key=lambda one: one.s, default=None)

    def _cuts_in(self, one: Sighting) -> bool:
        side = one.d - self.course.offset(one.s)
        toward = -one.v_d if side > 0 else one.v_d
        inside = abs(side) - one.half_d - HALF_WIDTH
        return -1.0 < one.s < 30.0 and toward > 0.5 and abs(side) > 0.6 and inside / toward < 2.0

    @cached_property
    def siren(self) -> Sighting | None:
        """Return the emergency vehicle that comes from behind."""
        found = [
            one
            for one in self.seen
            if one.actor.state == 'siren' and one.aligned > 0.5 and abs(one.d) < 8.0
            if -NEAR_ENOUGH < one.s < 6.0
        ]
        return max(found, key=lambda one: one.s, default=None)

    @cached_property
    def crosser(self) -> Sighting | None:
        """Return the vehicle whose way crosses ours before or about when we are there."""
        found = []
        for one in self.seen:
            if one.actor.kind != 'vehicle' or one.actor.type_id == 'vehicle.parked':
                continue
            if one is self.lead or one is self.cutter or one is self.siren:
                continue
            if one.aligned > 0.7 and _along_road(one):
                continue  # it drives with us
            meets = self._meets(one)
            if self.is_reason(one, 'gap'):
                meets = min(meets, 1.0)
            elif self.cause and not self.course.stops and not self.course.stands:
                continue  # an expert slows for something else, as for the turn itself
            if meets < math.inf:
                found.append((meets, one))
        return min(found, key=lambda pair: pair[0], default=(0, None))[1]

    def _meets(self, one: Sighting) -> float:
        """Return where on our way a vehicle gets into it, going straight on or along the road; infinity if never."""
        speed = math.hypot(one.v_s, one.v_d)
        if speed < 0.7:
            return math.inf
        if _along_road(one):
            s, d = one.s + one.v_s * LOOK_TIMES, np.full(len(LOOK_TIMES), one.d)
        else:
            vx, vy = one.actor.velocity
            points = np.array([one.actor.x, one.actor.y]) + np.outer(LOOK_TIMES, (vx, vy))
            s, d = self.road.project(points)
            s = s - self.scene.progress
        ours = np.array([self.course.offset(place) for place in s])
        inside = (np.abs(d - ours) < one.half_d + HALF_WIDTH + 0.4) & (s > 1.0) & (s < 45.0)
        if not inside.any():
            return math.inf
        first, last = LOOK_TIMES[inside][0], LOOK_TIMES[inside][-1]
        place = float(s[inside].min() - one.half_s)
        arrives = max(place - FRONT, 0.0) / max(self.course.now, 5.0)
        return place if first - 3.0 < arrives < last + 1.5 else math.inf

    @cached_property
    def obstacle(self) -> Sighting | None:
        """Return what stands or crawls in our lane and is to be passed, until it lies behind."""
        found = []
        for one in self.seen:
            if one.actor.kind not in ('vehicle', 'static') or one.s + one.half_s < -4.0:
                continue
            beside = abs(self.course.offset(one.s) - one.d) > one.half_d + HALF_WIDTH
            crawls = one.aligned > 0.7 and one.v_s < 0.7 * self.limit
            crawls &= (beside and self.course.s.max() > one.s) or self.is_reason(
                one, 'static_ahead'
            )
            blocks = abs(one.d) - one.half_d < HALF_WIDTH + 0.3
            if blocks and one.gap < NEAR_ENOUGH and (_stands(one) or crawls):
                found.append(one)
        return min(found, key=lambda one: one.s, default=None)

    @cached_property
    def control(self) -> Sighting | None:
        """Return the light or sign that governs our way."""
        found = [
            one
            for one in self.seen
            if one.actor.kind in ('traffic_light', 'traffic_sign') and one.actor.affects_ego
            if -0.5 < one.actor.stop_distance < NEAR_ENOUGH
        ]
        return min(found, key=lambda one: one.actor.stop_distance, default=None)

    @cached_property
    def joining(self) -> Sighting | None:
        """Return the vehicle nearest to us in the lane that is to be joined."""
        found = [
            one
            for one in self.seen
            if one.actor.kind == 'vehicle' and one.aligned > 0.7 and not _stands(one)
            if abs(one.d) < self.width / 2 and -30.0 < one.s < 15.0
        ]
        behind = [one for one in found if one.s < 3.0 and one.v_s > self.course.now - 2.0]
        return max(behind, key=lambda one: one.s, default=None)

    @cached_property
    def turn(self) -> str:
        """Return 'left' or 'right' while a commanded turn is going on or less than 12 m away, else ''."""
        side = {Command.LEFT: 'left', Command.RIGHT: 'right'}.get(self.command)
        if side is None:
            return ''
        progress = self.scene.progress
        here, ahead = self.road.heading(progress - 1.0), self.road.heading(progress + 14.0)
        angle = float(ahead - here) * (1 if side == 'left' else -1)
        return side if angle > 0.3 else ''


def _along_road(one: Sighting) -> bool:
    return abs(one.aligned) > 0.94 and abs(one.v_d) < 0.4 and abs(one.d) < 9.0


def _stands(one: Sighting) -> bool:
    return one.actor.kind == 'static' or one.actor.type_id == 'vehicle.parked'


def label(
    scene: Scene, expert: Trajectory | None = None, decision: Mapping[str, Any] | None = None
) -> Labels:
    """Return the labels of a moment.

    `expert` is the plan from here (or what was driven, where nobody planned); without it the ego is taken to keep its
    acceleration and planning is `general`. `decision` is sim.expert.Decision as a mapping: it helps to tell whom the expert meant.
    """
    plan = expert if expert is not None else _go_on(scene)
    moment = _Moment(scene, plan, decision or {})
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


def _planning(moment: _Moment) -> tuple[str, Sighting | None]:
    """Return the planning skill and what it is about; see the module's table."""
    course, red = moment.course, False
    control = moment.control
    if control is not None:
        red = control.actor.state == 'red' or control.actor.kind == 'traffic_sign'
        red |= control.actor.state == 'yellow' and course.slows
    if moment.walker is not None and (course.slows or course.crawls):
        return 'emergency_brake', moment.walker
    for vehicle in (moment.cutter, moment.lead):
        if vehicle is not None and course.braking >= HARD and vehicle.s > 0:
            return 'emergency_brake', vehicle
    if moment.siren is not None:
        return 'give_way', moment.siren
    changing = moment.command in LANE_CHANGE
    waits = red and control.actor.stop_distance > 2.5
    if not changing and not waits:
        if moment.crosser is not None and course.slows:
            return 'give_way', moment.crosser
        if moment.cutter is not None and course.last < course.now - 0.5:
            return 'give_way', moment.cutter
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
    if _stands(target):
        return 'static_obstacle'
    return 'vehicle' if target.actor.kind == 'vehicle' else 'traffic_control'


def _prediction(moment: _Moment, planning: str, target: Sighting | None) -> tuple[str, str, str]:
    """Return what the target does, the prediction skill, and from which side it comes."""
    if target is None:
        return 'nothing', GENERAL, ''
    side = 'left' if target.y > 0 else 'right'
    if target.actor.kind in ('traffic_light', 'traffic_sign'):
        return 'governs', GENERAL, ''
    if _stands(target):
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


def _camera(
    moment: _Moment, planning: str, target: Sighting | None, motion: str, side: str
) -> str:
    if target is not None and target is moment.siren:
        return _best(target)
    if planning == 'parking_exit':
        return 'back_left' if moment.offset < 0 else 'back_right'
    if planning == 'merging':
        return 'back_left' if moment.offset < 0 else 'back_right'
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


def _overtaking_camera(moment: _Moment, target: Sighting) -> str:
    if _passes_on(moment, target) == 'right':
        return 'back_right'
    beside = moment.road.at(
        moment.scene.progress + max(target.s, 0.0), moment.scene.corridor.own_left
    )
    return 'back_left' if beside > 1.2 * moment.width else 'front_left'


def _passes_on(moment: _Moment, target: Sighting) -> str:
    """Return the side on which the obstacle is passed: the planned one, else the one with more room."""
    side = moment.course.offset(target.s) - target.d
    reaches = float(moment.course.s.max()) > target.gap - 6.0
    if reaches and abs(side) > 0.5:
        return 'left' if side > 0 else 'right'
    corridor, place = moment.scene.corridor, moment.scene.progress + max(target.s, 0.0)
    room_left = moment.road.at(place, corridor.left) - target.d
    room_right = moment.road.at(place, corridor.right) + target.d
    return 'left' if room_left >= room_right else 'right'


def _action(moment: _Moment, planning: str, target: Sighting | None) -> str:
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
    if planning == 'merging':
        done = abs(course.d[-1]) < abs(moment.offset) - 0.5
        if done:
            return 'change_left' if moment.offset < 0 else 'change_right'
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
