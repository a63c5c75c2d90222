"""Closed loop on the simulator with camera faults: does a fault cause a collision that the same seed without it does not have?

    PYTHONPATH=.:test python -m nodes.faulty_drive models/mose-tiny --families merging,normal --seeds 20000-20001

In lock-step, so that a busy machine changes nothing: the parts are those of the nodes (the checks of pictures, the bundle, the
states of the last line and its braking), only the messages between them are left out. Adds `camera_faults` to the file of
`make faults`; each fault lasts from FROM_S to TO_S of an episode that is judged until END_S.
"""

import argparse
import contextlib
import itertools
import json
import sys
from dataclasses import replace

import numpy as np

from mose_ros.core.control import METADRIVE
from mose_ros.core.controller import Caution, Controller
from mose_ros.core.files import write_json
from mose_ros.core.pictures import PictureCheck
from mose_ros.core.rig import CAMERAS
from mose_ros.core.safety import Fault, Severity, State
from mose_ros.core.types import FAMILIES
from mose_ros.engine.policy import Policy
from mose_ros.engine.view_router import MissingAnchor
from mose_ros.evaluation.__main__ import parse_seeds
from mose_ros.nodes.camera_health import CameraHealth
from mose_ros.sim.world import World
from nodes.measure_faults import JSON

FROM_S, TO_S, END_S = 3.0, 6.0, 12.0
ANCHOR, SIDE = CAMERAS[0], CAMERAS[1]
TIMEOUT_S = 0.25  # the view router's default
KINDS = ('lost', 'frozen', 'delayed', 'black', 'noise', 'half')
_random = np.random.default_rng(0)


class Cameras:
    """What arrives of one camera's pictures, with the stamps that they carry; kind and camera of the fault, or ''."""

    def __init__(self, kind: str, camera: str):
        self._kind, self._camera, self._past = kind, camera, []
        self._checks = {name: (PictureCheck(), CameraHealth()) for name in CAMERAS}

    def seen(self, time: float, images, place):
        """Return the pictures that serve, and what is said of the others, as the view router does."""
        self._past.append((time, images.get(self._camera)))
        arrived = {name: (time, picture) for name, picture in images.items()}
        if self._kind and FROM_S <= time < TO_S:
            arrived |= {self._camera: self._broken(time, images[self._camera])}
        good, said = {}, {}
        for name, came in arrived.items():
            try:
                if came is None or time - came[0] > TIMEOUT_S:
                    raise ValueError('no new picture')
                check, health = self._checks[name]
                health.seen(came[1])
                said[name] = check.check(came[0], came[1], place)
                good[name] = came[1]
            except ValueError as error:
                said[name] = f'masked: {error}'
        return good, {name: text for name, text in said.items() if text}

    def _broken(self, time, picture):
        first = next(one for when, one in self._past if when >= FROM_S - 1e-6)
        return {
            'lost': None,
            'frozen': (time, first),
            'delayed': self._past[max(0, len(self._past) - 6)],
            'black': (time, np.zeros_like(picture)),
            'noise': (time, _random.integers(0, 256, picture.shape, np.uint8)),
            'half': (time, np.ascontiguousarray(picture[::2, ::2])),
        }[self._kind]


def faults_of(said) -> list[Fault]:
    """Return what is said of the cameras as the controller node hears it."""
    found = []
    for name, text in said.items():
        stops = name == ANCHOR and text.startswith('masked')
        severity = Severity.STOP if stops else Severity.DEGRADE
        found.append(Fault(severity=severity, reason=f'{name}: {text}'))
    return found


def drive(world: World, policy: Policy, family: str, seed: int, kind: str, camera: str) -> dict:
    """Drive until END_S and return what was hit by then."""
    scene, cameras = world.reset(family, seed), Cameras(kind, camera)
    controller, worst = Controller(METADRIVE, 0.1, Caution()), State.NORMAL
    policy.reset()
    while not world.outcome.done and scene.time < END_S:
        observation = world.observation()
        place = (scene.ego.x, scene.ego.y)
        images, said = cameras.seen(scene.time, observation.images, place)
        with contextlib.suppress(
            ValueError
        ):  # a crash is a jump of the speed: a fault of the controller's
            controller.hear_odometry(scene.time, scene.ego, 0.0, scene.time)
        with contextlib.suppress(MissingAnchor):
            plan = policy.plan(replace(observation, images=images)).trajectory
            with contextlib.suppress(ValueError):  # refused: a fault of the controller's too
                controller.hear_plan(plan, 0.0, scene.time)
        scene = world.step(controller.command(scene.time, faults_of(said)))
        if controller.has_driven:
            worst = max(worst, controller.state, key=list(State).index)
    hit = {n: list(e) for n, e in world.outcome.infractions.items() if e and 'collision' in n}
    return {'hit': hit, 'state': worst.value, 'speed': round(scene.ego.speed, 2)}


def main() -> None:
    """Drive each family and seed without and with each fault; exit with 1 where a fault alone hits something."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('bundle')
    parser.add_argument('--families', default=','.join(FAMILIES))
    parser.add_argument('--seeds', default='20000')
    parser.add_argument('--kinds', default=','.join(KINDS))
    options = parser.parse_args()
    world, policy = World(), Policy.load(options.bundle, threads=1)
    cases = itertools.product(options.families.split(','), parse_seeds(options.seeds))
    caused = 0
    for family, seed in cases:
        clean = drive(world, policy, family, seed, '', ANCHOR)
        for kind, camera in itertools.product(options.kinds.split(','), (ANCHOR, SIDE)):
            faulty = drive(world, policy, family, seed, kind, camera)
            is_caused = bool(faulty['hit'].keys() - clean['hit'].keys())
            run = {'family': family, 'seed': seed, 'camera': camera, 'fault': kind}
            run |= {**faulty, 'hit_without': clean['hit'], 'caused': is_caused}
            caused += is_caused
            print(run, flush=True)
            _keep(options.bundle, run)
    print(f'{caused} collisions that a fault caused')
    sys.exit(1 if caused else 0)


def _keep(bundle: str, run: dict) -> None:
    """Put a pair of episodes in place of the one of the same case."""
    kept = json.loads(JSON.read_text()) if JSON.exists() else {}
    case = ('family', 'seed', 'camera', 'fault')
    runs = kept.get('camera_faults', {}).get('runs', [])
    runs = [one for one in runs if any(one[name] != run[name] for name in case)] + [run]
    kept['camera_faults'] = {'bundle': bundle, 'runs': runs}
    write_json(JSON, kept)


if __name__ == '__main__':
    main()
