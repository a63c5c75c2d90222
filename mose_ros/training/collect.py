"""Record the expert's driving, or a learner's driving with the expert's labels (DAgger), as clips.

The car is pushed off its plan now and then; what is stored as the label of a frame is the expert's plan from where the car is,
never what was driven. One World and one back end for each process; episodes are jobs, for this machine or for a cluster.
"""

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mose_ros.core import control
from mose_ros.core.files import write_json
from mose_ros.core.types import FAMILIES, Observation, Policy, Scene, VehicleCommand
from mose_ros.data import storage
from mose_ros.data.clips import ClipWriter
from mose_ros.sim.expert import Expert
from mose_ros.sim.world import World
from mose_ros.training.config import Collect, seeds_of
from mose_ros.training.workers import fan_out

_LOG = logging.getLogger(__name__)
STEP = 0.1  # s of a step of the world
REPORT = 'collected.json'
ERROR = 'error'
BEFORE_CRASH = 1.0  # s before an episode failed in which frames are not kept: nobody could have helped any more
STUCK_SECONDS = (
    5.0  # a learner that stands so long where the expert would go hands over to the expert
)
SEGMENT_SECONDS = 5.0  # on average, between draws of who drives
_CHUNK = 12  # episodes a process drives before a fresh one takes over


@dataclass(frozen=True, kw_only=True)
class Job:
    """One episode to record."""

    family: str
    seed: int
    backend: str
    round: int

    @property
    def name(self) -> str:
        """Return the clip's folder name."""
        suffix = f'_r{self.round}' if self.round else ''
        return f'{self.family}_{self.seed:05d}{suffix}'

    def generator(self, purpose: int) -> np.random.Generator:
        """Return the job's own random numbers, independent of all other jobs."""
        return np.random.default_rng([purpose, self.round, self.seed, FAMILIES.index(self.family)])


def round_of(clip: str) -> int:
    """Return the DAgger round of a clip by its name; 0 for the expert's own and for foreign clips."""
    tail = clip.rpartition('_r')[2]
    return int(tail) if '_r' in clip and tail.isdigit() else 0


def jobs(config: Collect) -> list[Job]:
    """Return all episodes of a config; ValueError for an unknown family or a seed kept for evaluation."""
    unknown = sorted(set(config.families) - set(FAMILIES))
    if unknown:
        raise ValueError(f'no family {", ".join(unknown)}; known: {", ".join(FAMILIES)}')
    found = []
    for family in config.families:
        for seed in seeds_of(config.seeds, family):
            job = Job(family=family, seed=seed, backend='egl', round=config.round)
            if job.generator(0).random() < config.software_share:
                job = replace(job, backend='tiny')
            found.append(job)
    return sorted(found, key=lambda job: job.seed)


def collect(
    config: Collect,
    out: str | Path,
    *,
    camera_size=(256, 144),
    address: str = '',
    bar: bool = True,
) -> dict:
    """Record every episode that is not there yet; return the counts, which are also in collected.json.

    Episodes that the undisturbed expert fails are dropped and counted, by rule. address: see `workers.fan_out`.
    """
    out, wanted = storage.writable(out, 'collect').absolute(), jobs(config)
    if config.policy:  # a cluster's processes have another working folder
        config = replace(config, policy=str(Path(config.policy).absolute()))
    out.mkdir(parents=True, exist_ok=True)
    report = _read_report(out)
    todo = [job for job in wanted if job.name not in report]
    _LOG.info('%d episodes recorded before, %d to go', len(report), len(todo))
    chunks = []
    for backend in ('egl', 'tiny'):
        same = [job for job in todo if job.backend == backend]
        chunks += [same[i : i + _CHUNK] for i in range(0, len(same), _CHUNK)]
    chunks.sort(key=lambda chunk: chunk[0].seed)  # so that a stopped collection is balanced
    started, frames, finished = time.monotonic(), 0, Counter()
    with tqdm(total=len(todo), desc='collect', unit='episode', disable=not bar) as progress:
        arguments = [(chunk, config, str(out), camera_size) for chunk in chunks]
        for results in fan_out(_record_chunk, arguments, config.processes, address):
            for result in results:
                finished[result['status'].split(' ')[0]] += 1
                if result['status'] == ERROR:  # not in the report: the next run tries it again
                    _LOG.warning('%s: %s', result['name'], result['error'])
                    continue
                report[result['name']] = result
                frames += result['frames']
            _write_report(out, report)
            rate = frames / (time.monotonic() - started)
            progress.update(len(results))
            progress.set_postfix(frames=frames, fps=f'{rate:.1f}', **finished)
    return summary(report)


def summary(report: dict[str, dict]) -> dict:
    """Return counts per family: clips kept, frames, and episodes dropped by rule."""
    families: dict[str, Counter] = {}
    for one in report.values():
        count = families.setdefault(one['family'], Counter())
        count['episodes'] += 1
        count['kept'] += one['kept']
        count['frames'] += one['frames']
        count['expert_failed'] += not one['kept'] and one['disturbed'] is False
    return {family: dict(count) for family, count in families.items()}


def _record_chunk(chunk: Sequence[Job], config: Collect, out: str, camera_size) -> list[dict]:
    world = World(renderer=chunk[0].backend, camera_size=camera_size)
    learner = _load_policy(config.policy) if config.policy else None
    try:
        return [_record_or_say(world, job, config, Path(out), learner) for job in chunk]
    finally:
        world.close()


def _record_or_say(world: World, job: Job, config: Collect, out: Path, learner) -> dict:
    """Record an episode; one that is there already or that raises does not stop the others."""
    folder = out / job.name
    if folder.is_dir():  # of a run that was stopped before it could report
        frames = sum(1 for _ in (folder / 'anno').iterdir())
        return _line(job, frames=frames, status='recorded before')
    try:
        return _record(world, job, config, out, learner)
    except Exception as error:  # whatever the simulator or a learner fails with, by name
        _LOG.debug('%s', job.name, exc_info=True)
        return {'name': job.name, 'status': ERROR, 'error': f'{type(error).__name__}: {error}'}


def _line(job: Job, *, frames: int, status: str, **more) -> dict:
    """Return an episode's line of the report."""
    line = {'name': job.name, 'family': job.family, 'seed': job.seed, 'backend': job.backend}
    line |= {'round': job.round, 'kept': frames > 0, 'frames': frames, 'status': status}
    return line | {'disturbed': None} | more


def _load_policy(bundle: str) -> Policy:
    from mose_ros.engine.policy import Policy as BundlePolicy  # onnxruntime only where one drives

    return BundlePolicy.load(bundle, threads=1)


class Disturbance:
    """Bursts of acceleration, across and along, that the driver did not ask for."""

    def __init__(self, config: Collect, generator: np.random.Generator):
        self._config, self._random = config, generator
        self._left, self._push = 0.0, (0.0, 0.0)

    def apply(self, command: VehicleCommand, speed: float) -> VehicleCommand:
        """Return the command with the burst of this step, if there is one."""
        config, model = self._config, control.METADRIVE
        if self._left <= 0:
            if self._random.random() < STEP / config.disturb_every:
                self._left = config.disturb_seconds * self._random.uniform(0.4, 1.6)
                self._push = (
                    self._random.normal(0, config.disturb_lateral),
                    self._random.normal(0, config.disturb_lengthwise),
                )
            return command
        self._left -= STEP
        across, along = self._push
        curvature = np.clip(across / max(speed, 4.0) ** 2, -0.12, 0.12)
        steer = command.steer + np.arctan(curvature * model.wheelbase) / model.max_steer
        wanted = along + command.throttle * model.throttle_gain - command.brake * model.brake_gain
        return VehicleCommand(
            steer=float(np.clip(steer, -1, 1)),
            throttle=float(np.clip(wanted / model.throttle_gain, 0, 1)),
            brake=float(np.clip(-wanted / model.brake_gain, 0, 1)),
        )


class Drivers:
    """Who drives: the expert, or by turns the expert and a learner."""

    def __init__(self, learner: Policy | None, share: float, generator: np.random.Generator):
        self._learner, self._share, self._random = learner, share, generator
        self._expert_drives, self._stuck = True, 0.0
        if learner is not None:
            learner.reset()

    def choose(self, expert_plan, observation: Observation, scene: Scene, seconds: float):
        """Return the trajectory that is driven until the next frame, `seconds` later."""
        if self._learner is None:
            return expert_plan
        plan = self._learner.plan(observation, scene).trajectory
        goes = np.hypot(*expert_plan.xy[-1]) > 2.0
        self._stuck = self._stuck + seconds if scene.ego.speed < 0.2 and goes else 0.0
        if self._random.random() < seconds / SEGMENT_SECONDS:
            self._expert_drives = self._random.random() < self._share
        if self._stuck > STUCK_SECONDS:
            self._expert_drives = True
        return expert_plan if self._expert_drives else plan


def _record(world: World, job: Job, config: Collect, out: Path, learner: Policy | None) -> dict:
    """Drive and record one episode; return its line of the report."""
    disturbed = job.generator(1).random() < config.disturbed_share
    disturbance = Disturbance(config, job.generator(2)) if disturbed else None
    drivers = Drivers(learner, config.expert_share, job.generator(3))
    expert = Expert(world.forecast)
    tracker = control.TrajectoryTracker()
    scene = world.reset(job.family, job.seed)
    stride = config.stride * STEP
    behind = deque()  # frames that are written once it is known that no crash follows
    writer = ClipWriter(
        out / job.name, seed=job.seed, frame_dt=stride, quality=config.jpeg_quality
    )
    started, written = time.monotonic(), 0
    try:
        while not world.outcome.done and scene.time < config.max_seconds:
            ideal = expert.plan(None, scene).trajectory
            observation = world.observation()
            draws = (
                config.semantics_every and (written + len(behind)) % config.semantics_every == 0
            )
            semantics = world.semantics() if draws else None
            driven = drivers.choose(ideal, observation, scene, stride)
            frame = {'expert': ideal, 'decision': asdict(expert.reason), 'semantics': semantics}
            behind.append((scene, observation.images, frame))
            if len(behind) > BEFORE_CRASH / stride:
                written += _write(writer, *behind.popleft())
            for step in range(config.stride):
                command = tracker.command(driven, scene.ego.speed, age=step * STEP)
                if disturbance is not None:
                    command = disturbance.apply(command, scene.ego.speed)
                scene = world.step(command)
                if world.outcome.done:
                    break
        outcome = world.outcome
        if not outcome.status.startswith('Failed'):
            while behind:
                written += _write(writer, *behind.popleft())
        pushed = disturbed or learner is not None
        kept = written > 0 and (pushed or outcome.success or not outcome.done)
        if kept:
            writer.close()
    finally:
        writer.discard()
    return _line(
        job,
        frames=written if kept else 0,
        status=outcome.status,
        disturbed=pushed,
        infractions={name: len(found) for name, found in outcome.infractions.items() if found},
        seconds=round(scene.time, 1),
        wall_seconds=round(time.monotonic() - started, 2),
    )


def _write(writer: ClipWriter, scene, images, frame) -> int:
    writer.write(scene, images, **frame)
    return 1


def _read_report(out: Path) -> dict[str, dict]:
    path = out / REPORT
    if not path.is_file():
        return {}
    return {one['name']: one for one in json.loads(path.read_text(encoding='utf-8'))}


def _write_report(out: Path, report: dict[str, dict]) -> None:
    write_json(out / REPORT, sorted(report.values(), key=lambda one: one['name']))
