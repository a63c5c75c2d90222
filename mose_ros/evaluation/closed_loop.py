"""Let policies drive in lock-step, without ROS: the world waits for each plan, so only the driving is judged, not the machine.

Seeds that the expert cannot solve are excluded by rule, for all policies alike, and counted: so the expert drives first.
One World per process; routes fan out over processes, and a run that was cut off goes on where it was.
"""

import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mose_ros.core.bundle import Manifest
from mose_ros.core.control import TrajectoryTracker
from mose_ros.core.files import write_json
from mose_ros.core.types import FAMILIES, EgoState, Observation, Plan, Policy, Scene, Trajectory
from mose_ros.evaluation import report
from mose_ros.evaluation.provenance import Store, identity, provenance
from mose_ros.sim.expert import Expert
from mose_ros.sim.world import World

POLICIES = ('bundle', 'expert', 'constant_velocity')
CRUISE = 6.0  # m/s of the constant-velocity driver


@dataclass(frozen=True, kw_only=True)
class Job:
    """One route for one policy."""

    policy: str
    family: str
    seed: int

    @property
    def key(self) -> str:
        """Return a name that no other job has."""
        return f'{self.policy}/{self.family}/{self.seed}'


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is to be driven."""

    bundle: str
    families: tuple[str, ...] = FAMILIES
    seeds: tuple[int, ...] = tuple(range(20000, 20020))
    policies: tuple[str, ...] = POLICIES
    processes: int = 1
    renderer: str = 'auto'

    def check(self) -> None:
        """Raise ValueError for a family, seed, policy or bundle that does not exist."""
        _check_names('family', self.families, FAMILIES)
        _check_names('policy', self.policies, POLICIES)
        if not self.seeds or not all(0 <= seed < 2**31 for seed in self.seeds):
            raise ValueError(f'seeds {self.seeds[:3]}... : give one or more in 0..2**31-1')
        if self.processes < 1:
            raise ValueError(f'{self.processes} processes cannot drive; use 1 or more')
        if 'bundle' in self.policies:
            Manifest.load(self.bundle)


def _check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wrong = ', '.join(map(repr, unknown)) or 'no name'
        raise ValueError(f'unknown {what} {wrong}; choose of {", ".join(known)}')


class ConstantVelocity:
    """Follow the navigation's two points at one speed, whatever is on the road: the floor that looking must beat."""

    def reset(self) -> None:
        """Forget nothing: there is no memory."""

    def plan(self, observation: Observation, scene: Scene) -> Plan:
        """Return the parabola through the ego, the near and the far point, driven at CRUISE."""
        points = np.vstack([[0.0, 0.0], observation.guidance.near, observation.guidance.far])
        along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
        along = np.maximum.accumulate(along + [0.0, 1e-3, 2e-3])  # at the goal points coincide
        fine = np.linspace(0.0, along[-1], 60)
        curve = np.stack([_lagrange(along, points[:, axis], fine) for axis in (0, 1)], axis=1)
        arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(curve, axis=0).T))])
        reached = CRUISE * 0.2 * np.arange(1, 16)
        xy = np.stack([np.interp(reached, arc, curve[:, axis]) for axis in (0, 1)], axis=1)
        return Plan(trajectory=Trajectory(time=observation.time, dt=0.2, xy=xy))


def _lagrange(at: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    total = np.zeros_like(wanted)
    for index, value in enumerate(values):
        others = np.delete(at, index)
        total += value * np.prod([(wanted - other) / (at[index] - other) for other in others], 0)
    return total


def drive(
    world: World, policy: Policy, family: str, seed: int, sees: bool = True
) -> dict[str, Any]:
    """Drive one route to its end and return what became of it; `sees`: whether the policy is given pictures."""
    started = time.monotonic()
    scene, tracker = world.reset(family, seed), TrajectoryTracker()
    policy.reset()
    steps, took = [_metric_step(scene.ego)], []
    while not world.outcome.done:
        observation = world.observation() if sees else _blind(scene)
        before = time.perf_counter()
        plan = policy.plan(observation, scene)
        took.append(1e3 * (time.perf_counter() - before))
        scene = world.step(tracker.command(plan.trajectory, scene.ego.speed))
        steps.append(_metric_step(scene.ego))
    outcome = world.outcome
    return {
        'family': family,
        'seed': seed,
        'status': outcome.status,
        'success': outcome.success,
        'driving_score': round(outcome.score, 4),
        'route_completion': round(outcome.route_completion, 5),
        'infractions': {
            name: list(events) for name, events in outcome.infractions.items() if events
        },
        'seconds': round(outcome.seconds, 2),
        'wall_seconds': round(time.monotonic() - started, 2),
        'plan_ms': {
            'p50': round(_percentile(took, 50), 2),
            'p99': round(_percentile(took, 99), 2),
        },
        'comfort': round(report.comfort(steps, 0.1, corrected=True), 4),
        'steps': steps,
    }


def _blind(scene: Scene) -> Observation:
    return Observation(time=scene.time, images={}, ego=scene.ego, guidance=scene.guidance)


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else 0.0


def _metric_step(ego: EgoState) -> dict[str, list[float]]:
    """Return a step of Bench2Drive's metric_info.json: CARLA's left-handed world, degrees and deg/s."""
    cos, sin = float(np.cos(ego.yaw)), float(np.sin(ego.yaw))
    across = ego.speed * ego.yaw_rate  # to the left
    acceleration = (ego.acceleration * cos - across * sin, ego.acceleration * sin + across * cos)
    values = {
        'acceleration': (acceleration[0], -acceleration[1], 0.0),
        'angular_velocity': (0.0, 0.0, -float(np.degrees(ego.yaw_rate))),
        'forward_vector': (cos, -sin, 0.0),
        'right_vector': (sin, cos, 0.0),
        'location': (ego.x, -ego.y, 0.0),
        'rotation': (0.0, -float(np.degrees(ego.yaw)), 0.0),
    }
    return {name: [round(float(value), 4) for value in three] for name, three in values.items()}


# ---- many routes ----


class _Driver:
    """One process's world and policy; made again only when the policy changes."""

    def __init__(self, policy: str, bundle: str, renderer: str):
        self._sees = policy == 'bundle'
        self.world = World(renderer=renderer if self._sees else None)
        if policy == 'bundle':
            from mose_ros.engine.policy import Policy as BundlePolicy  # opens inference sessions

            self._policy = BundlePolicy.load(bundle, threads=1)
        else:
            self._policy = (
                Expert(self.world.forecast) if policy == 'expert' else ConstantVelocity()
            )

    def __call__(self, job: Job) -> dict[str, Any]:
        try:
            return drive(self.world, self._policy, job.family, job.seed, self._sees)
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(f'{job.key}: {error}') from error


_driver: _Driver | None = None  # of a worker process


def _open_driver(policy: str, bundle: str, renderer: str) -> None:
    global _driver
    _driver = _Driver(policy, bundle, renderer)


def _drive_job(job: Job) -> dict[str, Any]:
    return _driver(job)


def _drive_all(policy: str, jobs: Sequence[Job], config: Config) -> Iterator[tuple[Job, dict]]:
    """Yield the routes of one policy as they finish."""
    arguments = (policy, config.bundle, config.renderer)
    if config.processes == 1 or len(jobs) == 1:
        driver = _Driver(*arguments)
        try:
            for job in jobs:
                yield job, driver(job)
        finally:
            driver.world.close()
        return
    context = multiprocessing.get_context('spawn')
    count = min(config.processes, len(jobs))
    with ProcessPoolExecutor(count, context, initializer=_open_driver, initargs=arguments) as pool:
        waiting = {pool.submit(_drive_job, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run(config: Config, store: Path | None = None, bar: bool = True) -> dict[str, Any]:
    """Drive everything and return the whole result; finished routes are kept in `store` until all is done."""
    config.check()
    bundle = config.bundle if 'bundle' in config.policies else None
    kept = Store(store, identity(bundle, config.renderer))
    every = [(family, seed) for family in config.families for seed in config.seeds]
    others = [policy for policy in POLICIES if policy in config.policies and policy != 'expert']
    with tqdm(
        total=len(every) * (1 + len(others)), desc='drive', unit='route', disable=not bar
    ) as progress:

        def drive_policy(policy: str, routes: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
            jobs = [Job(policy=policy, family=family, seed=seed) for family, seed in routes]
            progress.set_postfix_str(policy)
            progress.update(sum(job.key in kept.results for job in jobs))
            for job, result in _drive_all_missing(policy, jobs, config, kept):
                kept.add(job.key, result)
                progress.update()
            return [kept.results[job.key] for job in jobs]

        expert = drive_policy('expert', every)
        excluded = [route for route in expert if not route['success']]
        left_out = {(route['family'], route['seed']) for route in excluded}
        solvable = [pair for pair in every if pair not in left_out]
        progress.total -= len(left_out) * len(others)
        routes = {policy: drive_policy(policy, solvable) for policy in others}
    if 'expert' in config.policies:
        routes['expert'] = [route for route in expert if route['success']]
    result = {
        'config': asdict(config),
        **provenance(bundle),
        'excluded': [
            {key: route[key] for key in ('family', 'seed', 'status', 'infractions')}
            | {'reason': 'the expert does not solve it'}
            for route in excluded
        ],
        'expert_solves': {
            family: sum(r['success'] for r in expert if r['family'] == family) / len(config.seeds)
            for family in config.families
        },
        'policies': {
            policy: summarise(routes[policy]) for policy in config.policies if policy in routes
        },
    }
    kept.remove()
    return result


def _drive_all_missing(policy, jobs, config, kept):
    missing = [job for job in jobs if job.key not in kept.results]
    return _drive_all(policy, missing, config) if missing else ()


def summarise(routes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one policy over its routes, and by family."""
    families = defaultdict(list)
    for route in routes:
        families[route['family']].append(route)
    scored = report.score(
        [report.make_record(index, route) for index, route in enumerate(routes)],
        max(len(routes), 1),
    )
    return {
        **_rates(routes),
        'efficiency': scored['efficiency'],
        'comfort': report.mean_or_none([route['comfort'] for route in routes]),
        'abilities': scored['abilities'],
        'plan_ms': {
            'p50': _percentile([route['plan_ms']['p50'] for route in routes], 50),
            'p99': max((route['plan_ms']['p99'] for route in routes), default=0.0),
        },
        'families': {family: _rates(found) for family, found in families.items()},
        'routes': list(routes),
    }


def _rates(routes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = len(routes)
    return {
        'success_rate': sum(route['success'] for route in routes) / count if count else None,
        'driving_score': sum(route['driving_score'] for route in routes) / count
        if count
        else None,
        'count': count,
    }


def write_leaderboard(folder: Path, result: Mapping[str, Any]) -> None:
    """Write each policy's routes as <folder>/<policy>/results.json with metric_info.json of each route beside."""
    for policy, figures in result['policies'].items():
        for route in figures['routes']:
            name = f'{route["family"]}_{route["seed"]}'
            steps = {str(index): step for index, step in enumerate(route['steps'])}
            write_json(folder / policy / name / 'metric_info.json', steps)
        report.write_leaderboard(folder / policy / 'results.json', figures['routes'])


def without_steps(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result without the step-by-step records."""
    policies = {
        policy: {
            **figures,
            'routes': [
                {key: value for key, value in route.items() if key != 'steps'}
                for route in figures['routes']
            ],
        }
        for policy, figures in result['policies'].items()
    }
    return {**result, 'policies': policies}
