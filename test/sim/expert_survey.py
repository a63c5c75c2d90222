"""Count what the expert solves: python test/sim/expert_survey.py [--families normal,merging] [--seeds 0-39] [-v]

A script to measure and to debug with, not a test: success per family, how smooth the driving is, time per plan.
"""

import argparse
import collections
import time

import numpy as np

from mose_ros.core.control import TrajectoryTracker
from mose_ros.core.infractions import faults
from mose_ros.core.types import FAMILIES
from mose_ros.sim.expert import Expert
from mose_ros.sim.world import World


def drive(world, family, seed, limit_s=150.0, trace=None, noise=0.0, disturb=0.0):
    """Drive one episode; return the outcome and its traces."""
    scene = world.reset(family, seed)
    expert, tracker = Expert(world.forecast), TrajectoryTracker()
    random, push = np.random.default_rng(seed), (0.0, 0.0)
    speeds, yaw_rates, milliseconds, causes = [], [], [], collections.Counter()
    jumps, last = [], None
    while not world.outcome.done and scene.time < limit_s:
        start = time.perf_counter()
        plan = expert.plan(None, scene)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        causes[expert.reason.cause] += 1
        ego = scene.ego
        cos, sin = np.cos(ego.yaw), np.sin(ego.yaw)
        ahead = plan.trajectory.xy @ np.array([[cos, sin], [-sin, cos]]) + (ego.x, ego.y)
        if last is not None:  # the same instant, 2 s ahead, as planned now and a tick ago
            jumps.append(np.hypot(*((ahead[8] + ahead[9]) / 2 - last)))
        last = ahead[9]
        if trace:
            trace(world, scene, plan, expert)
        trajectory = plan.trajectory
        if noise:
            shaken = trajectory.xy + random.normal(0, noise, trajectory.xy.shape)
            trajectory = type(trajectory)(time=trajectory.time, dt=trajectory.dt, xy=shaken)
        command = tracker.command(trajectory, scene.ego.speed)
        if disturb and scene.time % 4.0 > 3.2:  # a burst of wrong steering and speed
            if scene.time % 4.0 < 3.35:
                push = random.uniform(-disturb, disturb), random.uniform(-0.3, 0.6)
            command = type(command)(
                steer=command.steer + push[0],
                throttle=command.throttle + max(push[1], 0),
                brake=command.brake,
            )
        scene = world.step(command)
        speeds.append(scene.ego.speed)
        yaw_rates.append(scene.ego.yaw_rate)
    speeds, yaw_rates = np.array(speeds), np.array(yaw_rates)
    # a window of 0.5 s, as comfort metrics take
    acceleration = np.convolve(np.diff(speeds) / 0.1, np.ones(5) / 5, 'valid')
    return {
        'outcome': world.outcome,
        'milliseconds': milliseconds,
        'jumps': np.array(jumps),
        'causes': causes,
        'acceleration': acceleration,
        'jerk': np.convolve(np.diff(acceleration) / 0.1, np.ones(3) / 3, 'valid'),
        'lateral': speeds * yaw_rates,
    }


def show(world, scene, plan, expert):
    """Print one moment."""
    reason, ego = expert.reason, scene.ego
    print(
        f't {scene.time:5.1f} v {ego.speed:5.2f} a {ego.acceleration:5.2f} '
        f'{reason.cause:12s} {reason.actor_id!s:8s} {reason.lateral:12s} {reason.longitudinal:10s} '
        f'1s {plan.trajectory.xy[4].round(1)} 3s {plan.trajectory.xy[-1].round(1)} s {scene.progress:.1f}'
    )


def main():
    """Run the survey."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--families', default=','.join(FAMILIES))
    parser.add_argument('--seeds', default='0-19')
    parser.add_argument('--noise', type=float, default=0.0, help='sigma of a point in m')
    parser.add_argument('--disturb', type=float, default=0.0, help='bursts of steering')
    parser.add_argument('-v', '--verbose', action='store_true')
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition('-')
    world = World(renderer=None)
    for family in arguments.families.split(','):
        seeds = range(int(first), int(last or first) + 1)
        runs = []
        for seed in seeds:
            try:
                run = drive(
                    world,
                    family,
                    seed,
                    trace=show if arguments.verbose else None,
                    noise=arguments.noise,
                    disturb=arguments.disturb,
                )
            except KeyError:
                break
            runs.append(run)
            outcome = run['outcome']
            if not outcome.success or arguments.verbose:
                events = [e for found in faults(outcome.infractions).values() for e in found]
                print(
                    f'  {family} {seed}: {outcome.status} {outcome.route_completion:.2f} {outcome.seconds:.1f} s {events} {dict(run["causes"])}',
                    flush=True,
                )
        if not runs:
            print(f'{family}: not there')
            continue
        good = sum(run['outcome'].success for run in runs)
        join = lambda key: np.concatenate([run[key] for run in runs])  # noqa: E731, B023
        times, accel = join('milliseconds'), join('acceleration')
        print(
            f'{family}: {good} of {len(runs)} solved; ms per plan p50 {np.median(times):.1f} '
            f'p99 {np.percentile(times, 99):.1f}; acceleration {accel.min():.1f}..{accel.max():.1f}, '
            f'jerk p99 {np.percentile(np.abs(join("jerk")), 99):.1f}, '
            f'plan jump p50 {np.median(join("jumps")):.2f} p99 {np.percentile(join("jumps"), 99):.2f} '
            f'above 0.5 m {100 * np.mean(join("jumps") > 0.5):.1f} %; '
            f'lateral max {np.abs(join("lateral")).max():.1f}; '
            f'seconds {np.mean([run["outcome"].seconds for run in runs]):.0f}',
            flush=True,
        )
    world.close()


if __name__ == '__main__':
    main()
