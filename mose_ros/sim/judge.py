"""What went wrong and how it ended, in the words of the CARLA leaderboard.

Collisions are judged by oriented boxes, lights and signs at their lines; the leaderboard's own code judges alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mose_ros.core.infractions import INFRACTIONS, SLOWNESS, faults, penalty
from mose_ros.core.types import EgoState
from mose_ros.sim.scenarios import Episode
from mose_ros.sim.traffic import DT, Body, Moment, corners, overlap

BLOCKED_S = 30.0
QUEUE_M = 30.0  # before the line of a light, within which one who stands waits for it
STOP_SPEED, STOP_ZONE_M = 0.3, 4.0
OFF_ROAD_M = 0.3  # the ego's centre may be this far beyond the edge
DEVIATION_M = 15.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the episode stands; done ends it."""

    done: bool = False
    status: str = 'running'  # 'running' | 'Completed' | 'Failed - ...'
    route_completion: float = 0.0  # 0..1
    infractions: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: dict.fromkeys(INFRACTIONS, ())
    )
    seconds: float = 0.0
    outside_share: float = 0.0  # of the route driven outside of its lanes

    @property
    def score(self) -> float:
        """Return the driving score, 0..100."""
        left = 100.0 * self.route_completion * penalty(self.infractions)
        return left * (1 - self.outside_share)

    @property
    def success(self) -> bool:
        """Say whether the route was completed without any infraction but slowness."""
        return self.status == 'Completed' and not faults(self.infractions)


class Judge:
    """Watches one episode."""

    def __init__(self, episode: Episode):
        self._episode = episode
        self._events: dict[str, list[str]] = {name: [] for name in INFRACTIONS}
        self._best = episode.start_s
        self._standing = 0.0
        self._held_up = 0.0
        self._slowest: dict[str, float] = {}  # light id -> slowest speed in front of its line
        self._outside_m, self._speed_sum, self._speed_count = 0.0, 0.0, 0
        self._next_quarter = 1

    def judge(self, moment: Moment, bodies: list[Body]) -> Outcome:
        """Look at one moment and say how the episode stands."""
        ego = moment.ego
        where = f'at (x={ego.x:.2f}, y={ego.y:.2f}, t={moment.time:.1f})'
        status = self._collisions(moment, bodies, where)
        self._lights(moment, where)
        self._emergency(moment, where)
        status = self._lanes(moment, where) or status
        self._best = max(self._best, min(moment.ego_s, self._episode.goal_s))
        completion = (self._best - self._episode.start_s) / (
            self._episode.goal_s - self._episode.start_s
        )
        self._pace(ego, completion)
        if not status and moment.ego_s >= self._episode.goal_s:
            status = 'Completed'
        status = status or self._patience(moment, where)
        return Outcome(
            done=bool(status),
            status=status or 'running',
            route_completion=float(np.clip(completion, 0, 1)),
            infractions={name: tuple(events) for name, events in self._events.items()},
            seconds=moment.time,
            outside_share=min(
                1.0, self._outside_m / (self._episode.goal_s - self._episode.start_s)
            ),
        )

    def _collisions(self, moment: Moment, bodies: list[Body], where: str) -> str:
        ego = moment.ego
        box = corners(ego.x, ego.y, ego.yaw, ego.size)
        for body in bodies:
            reach = (body.size[0] + body.size[1] + ego.size[0] + ego.size[1]) / 2
            if abs(body.x - ego.x) > reach or abs(body.y - ego.y) > reach:
                continue
            if overlap(box, corners(body.x, body.y, body.yaw, body.size)):
                key = {'vehicle': 'collisions_vehicle', 'walker': 'collisions_pedestrian'}
                name = key.get(body.kind, 'collisions_layout')
                self._events[name].append(
                    f'Agent collided against {body.type_id} id={body.id} {where}'
                )
                return 'Failed - Agent collided'
        return ''

    def _lights(self, moment: Moment, where: str) -> None:
        for light in self._episode.lights:
            if not light.for_ego or light.passed:
                continue
            distance = light.line - moment.ego_front
            if 0 <= distance < STOP_ZONE_M:
                slowest = self._slowest.get(light.id, np.inf)
                self._slowest[light.id] = min(slowest, abs(moment.ego.speed))
            if distance < 0:
                light.passed = True
                if light.type_id == 'traffic.stop':
                    if self._slowest.get(light.id, np.inf) > STOP_SPEED:
                        self._events['stop_infraction'].append(
                            f'Agent ran a stop with id={light.id} {where}'
                        )
                elif light.state == 'red':
                    self._events['red_light'].append(
                        f'Agent ran a red light id={light.id} {where}'
                    )

    def _emergency(self, moment: Moment, where: str) -> None:
        siren = self._episode.siren
        if siren is None or self._events['yield_emergency_vehicle_infractions']:
            return
        behind = moment.ego_s - siren.s
        stuck = 0 < behind < 30 and siren.v < 0.75 * siren.cruise
        gave_way = moment.ego.speed < 4.0 or moment.ego_d < self._episode.start_d - 0.4
        self._held_up = (
            self._held_up + DT if stuck and not gave_way else max(0.0, self._held_up - DT / 4)
        )
        if self._held_up > 6.0:
            self._events['yield_emergency_vehicle_infractions'].append(
                f'Agent failed to yield to an emergency vehicle id={siren.id} {where}'
            )

    def _lanes(self, moment: Moment, where: str) -> str:
        route = self._episode.route
        index = min(max(int(moment.ego_s / route.step + 0.5), 0), len(route.xy) - 1)
        near = slice(max(0, index - 2), index + 3)
        d, own_left = moment.ego_d, route.own_left[near].max()
        left, right = route.left[near].max(), route.right[near].max()
        due = self._episode.lane_change_by
        missed = due is not None and moment.ego_s > due and abs(d) > 0.6 * route.width[index]
        if abs(d) > DEVIATION_M or missed:
            self._events['route_dev'].append(f'Agent deviated from the route {where}')
            return 'Failed - Agent deviated from the route'
        if d > left + OFF_ROAD_M or d < -right - OFF_ROAD_M:
            self._events['outside_route_lanes'].append(f'Agent left the road {where}')
            self._outside_m += 1.0
            return 'Failed - Agent deviated from the route'
        if d > own_left + 0.5 and not self._episode.may_use_opposing and not route.junction[index]:
            self._outside_m += max(0.0, moment.ego.speed) * DT
            if self._outside_m > 10 and not self._events['outside_route_lanes']:
                self._events['outside_route_lanes'].append(
                    f'Agent drove in the opposing lane {where}'
                )
        return ''

    def _pace(self, ego: EgoState, completion: float) -> None:
        self._speed_sum += abs(ego.speed)
        self._speed_count += 1
        if completion >= self._next_quarter / 4:
            usual = 0.8 * self._episode.route.speed_limit
            share = 100 * self._speed_sum / self._speed_count / usual
            self._events[SLOWNESS].append(f'Average speed is {share:.2f}% of the usual one')
            self._speed_sum, self._speed_count = 0.0, 0
            self._next_quarter += 1

    def _patience(self, moment: Moment, where: str) -> str:
        waits = any(
            light.state in ('red', 'yellow') and 0 <= light.line - moment.ego_front < QUEUE_M
            for light in self._episode.lights
            if light.for_ego and not light.passed
        )
        standing = abs(moment.ego.speed) < 0.1 and not waits
        self._standing = self._standing + DT if standing else 0.0
        if self._standing > BLOCKED_S:
            self._events['vehicle_blocked'].append(f'Agent got blocked {where}')
            return 'Failed - Agent got blocked'
        if moment.time > self._episode.time_limit:
            self._events['route_timeout'].append('Route timeout.')
            return 'Failed - Agent timed out'
        return ''
