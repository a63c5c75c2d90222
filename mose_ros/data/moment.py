"""Who on the road matters at one moment, and what the plan does: the questions that the rules ask of a scene.

Everything is judged from what can be seen (`sight`) and from the plan; the expert's own reason only helps to tell whom it meant.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from mose_ros.core.types import Command, Scene, Trajectory
from mose_ros.data.sight import Road, Sighting, look

NEAR_ENOUGH = 40.0  # m ahead for walkers, lights, signs and standing things, behind for sirens
CRAWLING = 2.6  # m/s
HARD = 3.0  # m/s^2 of a plan that brakes hard
HALF_WIDTH = 0.95  # m of the ego
FRONT = 2.3  # m from the ego's centre to its bumper
ON_WAY = 0.5  # m beside the way, up to which it is the one that is driven
PARALLEL = 0.12  # rad, up to which two headings are the same
LOOK_TIMES = np.arange(0.25, 5.01, 0.25)  # s ahead for which others are extrapolated
YIELDING = ('yield', 'brake', 'brake_hard', 'brake_full')  # of the expert's ways along the road


class Course:
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


class Moment:
    """All that the rules look at, worked out once."""

    def __init__(self, scene: Scene, plan: Trajectory, decision: Mapping[str, Any]):
        self.scene, self.plan = scene, plan
        self.road = Road(scene.corridor)
        self.course = Course(scene, plan, self.road)
        self.offset = float(self.course.d[0])
        self.seen = look(scene, self.road)
        self.cause = decision.get('cause', '')
        self.reason = decision.get('actor_id')
        self.yields = decision.get('longitudinal', '') in YIELDING
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
            if one.actor.kind != 'vehicle' or one.aligned < 0.7 or one.s <= 0 or stands(one):
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
    def danger(self) -> Sighting | None:
        """Return the vehicle ahead for which the plan brakes although nothing on the road asked for that."""
        course, lead = self.course, self.lead
        if self.cutter is not None and course.last < course.now - 0.5 and self.cutter.s > 0:
            return self.cutter
        if lead is None or not course.slows or course.now < 0.6:
            return None
        stalls = lead.v_s < 0.7 and not self.at_junction(lead)
        hard = lead.actor.state == 'braking' or course.braking >= HARD
        return lead if hard or stalls else None

    def at_junction(self, one: Sighting) -> bool:
        """Say whether somebody is at a junction or less than 25 m before it, where everybody is slow."""
        place = self.scene.progress + max(one.s, 0.0)
        near = (self.road.s > place - 5.0) & (self.road.s < place + 25.0)
        return bool(np.asarray(self.scene.corridor.junction)[near].any())

    @cached_property
    def queueing(self) -> bool:
        """Say whether a light or sign ahead makes everybody slow."""
        return any(actor.affects_ego for actor in self.scene.actors)

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
                meets = 0.0
            elif self.cause and not self.course.stops and not self.course.stands:
                continue  # an expert slows for something else, as for the turn itself
            if meets < math.inf:
                found.append(one)
        named = [one for one in found if self.is_reason(one, 'gap')]
        return min(named or found, key=lambda one: one.distance, default=None)

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
            passed = beside and self.course.s.max() > one.s and one.v_s < 0.7 * self.limit
            crawls = 0.7 < one.v_s < CRAWLING and not one.actor.state and not self.queueing
            crawls |= passed or self.is_reason(one, 'static_ahead')
            crawls &= one.aligned > 0.7 and not self.at_junction(one)
            blocks = abs(one.d) - one.half_d < HALF_WIDTH + 0.3
            if blocks and one.gap < NEAR_ENOUGH and (stands(one) or crawls):
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
    def change(self) -> str:
        """Return 'left' or 'right' where the route asks for the next lane, else ''."""
        return {Command.LANE_LEFT: 'left', Command.LANE_RIGHT: 'right'}.get(self.command, '')

    @property
    def changes(self) -> bool:
        """Say whether the plan goes over to the lane that is to be joined."""
        if abs(self.offset) >= ON_WAY:
            return abs(self.course.d[-1]) < abs(self.offset) - 0.5
        aside = shift(self.plan)  # the way is the plan's own
        return aside > 0.5 if self.change == 'left' else aside < -0.5

    @cached_property
    def joining(self) -> Sighting | None:
        """Return the vehicle nearest to us in the lane that is to be joined.

        That is the way's own, unless the ego is on the way already, as on one made of what was driven: then the next one.
        """
        beside = self.width if self.change == 'left' else -self.width
        lane = beside if abs(self.offset) < ON_WAY else 0.0
        found = [
            one
            for one in self.seen
            if one.actor.kind == 'vehicle' and one.aligned > 0.7 and not stands(one)
            if abs(one.d - lane) < self.width / 2 and -30.0 < one.s < 15.0
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


def stands(one: Sighting) -> bool:
    """Say whether it is something that never moves."""
    return one.actor.kind == 'static' or one.actor.type_id == 'vehicle.parked'


def shift(path: Trajectory) -> float:
    """Return how far a path changes over to a parallel one, in m, + = left: 0 where its heading never comes back.

    Between two points of equal heading it is what the later one lies beside the line through the earlier one; the mean
    of both headings takes the rest of a bend out of it (the chord of an arc has the mean of its ends' headings).
    """
    points = np.vstack([[0.0, 0.0], path.xy])
    moves = np.concatenate([[True], np.hypot(*np.diff(points, axis=0).T) > 0.05])
    points = points[moves]
    headings = np.unwrap(np.arctan2(*np.diff(points, axis=0).T[::-1]))
    found = 0.0
    for first in range(len(headings)):
        last = np.arange(first + 1, len(headings))
        chord = points[last + 1] - points[first]
        mean = (headings[last] + headings[first]) / 2
        beside = chord[:, 1] * np.cos(mean) - chord[:, 0] * np.sin(mean)
        beside[np.abs(headings[last] - headings[first]) > PARALLEL] = 0.0
        found = max([found, *beside.tolist()], key=abs)
    return found
