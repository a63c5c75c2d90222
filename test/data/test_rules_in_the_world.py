"""The rules over whole drives of the simulator: every moment gets labels that hold together, and they don't flicker."""

import dataclasses

import pytest

from mose_ros.core.control import TrajectoryTracker
from mose_ros.core.types import FAMILIES
from mose_ros.data import narration
from mose_ros.data.rules import label
from mose_ros.sim.expert import Expert
from mose_ros.sim.world import World


@pytest.fixture(scope='module')
def world():
    world = World(renderer=None)
    yield world
    world.close()


@pytest.mark.parametrize('family', FAMILIES)
def test_an_episode_has_stable_labels_in_words(world, family):
    scene, expert, tracker = world.reset(family, 3), Expert(world.forecast), TrajectoryTracker()
    drive = []
    while not world.outcome.done and scene.time < 22:
        plan = expert.plan(None, scene).trajectory
        drive.append(label(scene, plan, dataclasses.asdict(expert.reason)))
        scene = world.step(tracker.command(plan, scene.ego.speed))

    for labels in drive:
        slots = narration.parse(narration.tell(labels))
        assert {level: one.skill for level, one in slots.items()} == dict(labels.skills)
        assert slots['planning'].action == labels.action
    chains = [tuple(labels.skills.values()) for labels in drive]
    blinks = sum(a == c != b for a, b, c in zip(chains, chains[1:], chains[2:], strict=False))
    assert blinks <= 0.02 * len(chains)
    planning = {labels.skills['planning'] for labels in drive}
    if family in ('overtaking', 'parking_exit', 'traffic_sign'):
        assert family in planning
