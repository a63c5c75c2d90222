"""The privileged expert: plans with the whole scene and the actors' own intentions. The ceiling of everything learned.

It samples ways across the road (sideways) times ways of driving along it (lengthwise), rolls all of them out, and takes the
cheapest. It keeps nothing from moment to moment: what it decides follows from the scene, so that a network which sees one
moment can learn it. Frenet sampling after Werling et al. 2010. `situation` says what is there, `ways` what could be done,
`rollout` what would come of it, and `cost` how good that is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mose_ros.core.types import Observation, Plan, Scene, Trajectory
from mose_ros.sim.cost import cost_of
from mose_ros.sim.frenet import PathTable
from mose_ros.sim.rollout import COMFORT_BRAKE, DRIVES, Rollouts, roll_out
from mose_ros.sim.situation import FINE, TIMES, Forecast, Situation
from mose_ros.sim.ways import Way, find_ways

_REACH = 110.0  # m of way that is tabulated


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Why the expert plans what it plans."""

    # free | lead | static_ahead | light | stop_sign | crossing | gap | emergency_vehicle
    cause: str
    actor_id: str | None = None
    lateral: str = 'route'  # the way across the road that was taken
    longitudinal: str = 'cruise'  # the way along it


class Expert:
    """A Policy that reads the scene. `forecast(horizon, dt)` tells where actors will be; without it they keep their speed."""

    def __init__(self, forecast: Forecast | None = None, horizon: int = 15, dt: float = 0.2):
        self._forecast = forecast
        self._horizon, self._dt = horizon, dt
        self.reason = Decision(cause='free')

    def reset(self) -> None:
        """Forget the last reason; there is nothing else to forget."""
        self.reason = Decision(cause='free')

    def plan(self, observation: Observation | None, scene: Scene) -> Plan:
        """Return the trajectory from here; the pictures are not looked at."""
        now = Situation(scene, self._forecast)
        ways = find_ways(now)
        knots = [way.knots for way in ways]
        paths = PathTable(now.road, (now.s, now.d), now.slope, knots, _REACH)
        roll = roll_out(now, paths)
        best = int(np.argmin(cost_of(now, paths, roll, ways)))
        self.reason = _explain(now, ways, roll, best)
        times = self._dt * np.arange(1, self._horizon + 1)
        xy = _points(now, paths, roll, best, times)
        return Plan(trajectory=Trajectory(time=scene.time, dt=self._dt, xy=xy))


def _explain(now: Situation, ways: Sequence[Way], roll: Rollouts, best: int) -> Decision:
    """Put the choice into words: the first of the usual reasons that holds."""
    way, drive = ways[roll.way[best]], DRIVES[best % len(DRIVES)][0]

    def say(cause, actor):
        return Decision(cause=cause, actor_id=actor, lateral=way.name, longitudinal=drive)

    actors = now.others.actors
    if now.siren is not None:
        return say('emergency_vehicle', actors[now.siren].id)
    if way.actor_id is not None:
        return say('static_ahead', way.actor_id)
    slowed = roll.arc[best, FINE] < 0.95 * now.speed * 3.2 or now.speed < 1.0
    if now.walls and slowed:
        wall = now.walls[0]
        if (
            wall.distance < now.speed**2 / (2 * COMFORT_BRAKE) + 4.0
            and roll.arc[best, -1] < wall.distance + 0.5
        ):
            return say(wall.cause, wall.actor_id)
    leads = roll.lead[best][: FINE // 2]
    lead = int(leads[leads >= 0][0]) if (leads >= 0).any() else -1
    if drive != 'cruise' and not (lead >= 0 and drive == 'slower'):
        entering = _nearest_entering(now, roll, roll.way[best])
        if entering is not None:
            walker = actors[entering].kind == 'walker'
            return say('crossing' if walker else 'gap', actors[entering].id)
    if lead >= 0:
        cause = 'static_ahead' if now.others.fixed[lead] else 'lead'
        if actors[lead].kind == 'walker':
            cause = 'crossing'
        return say(cause, actors[lead].id)
    return say('free', None)


def _nearest_entering(now: Situation, roll: Rollouts, way: int) -> int | None:
    others, on_way = now.others, roll.on_way[way]
    if not others.actors:
        return None
    entering = on_way.any(axis=0) & ~(on_way[0] & (others.along[0] > 0.7)) & ~others.fixed
    if not entering.any():
        return None
    when = np.where(entering, np.argmax(on_way, axis=0), len(on_way))
    return int(np.argmin(when))


def _points(
    now: Situation, paths: PathTable, roll: Rollouts, best: int, times: Float[np.ndarray, 'H']
) -> Float[np.ndarray, 'H 2']:
    """Return where the best rollout is at those times, in the ego frame."""
    arc = np.interp(times, np.concatenate([[0.0], TIMES]), np.concatenate([[0.0], roll.arc[best]]))
    state = paths.look_up(np.full(len(arc), roll.way[best]), arc)
    offset = state[:, :2] - (now.ego.x, now.ego.y)
    cos, sin = np.cos(now.ego.yaw), np.sin(now.ego.yaw)
    return offset @ np.array([[cos, -sin], [sin, cos]])
