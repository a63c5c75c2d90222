"""From driving to standing and back, by faults alone."""

import numpy as np
import pytest

from mose_ros.core.types import Trajectory
from mose_ros.nodes.supervisor import Stage, Supervisor, check_trajectory


def supervisor():
    return Supervisor(hard_after_s=1.0, recover_after_s=0.2)


def test_it_waits_for_the_first_plan_without_calling_it_an_emergency():
    watch = supervisor()
    assert watch.update(0.0, ['no odometry'], 0.0, is_planned=False) is Stage.WAITING
    assert not watch.is_emergency and watch.reason == 'no odometry'
    assert watch.update(0.1, [], 0.0, is_planned=True) is Stage.NORMAL


def test_a_fault_is_braked_for_comfortably_then_hard_then_held():
    watch = supervisor()
    watch.update(0.0, [], 8.0)
    stages = [watch.update(1.0 + 0.5 * k, ['the driver is gone'], 8.0 - 2 * k) for k in range(5)]
    comfortable, hard = Stage.COMFORTABLE_STOP, Stage.EMERGENCY_STOP
    assert stages == [comfortable, comfortable, hard, hard, Stage.STOPPED]
    assert watch.is_emergency and watch.reason == 'the driver is gone'


def test_it_recovers_only_after_a_while_without_faults():
    watch = supervisor()
    watch.update(0.0, [], 8.0)
    watch.update(1.0, ['late'], 8.0)
    assert watch.update(1.05, [], 8.0) is Stage.COMFORTABLE_STOP
    assert watch.update(1.10, ['late'], 8.0) is Stage.COMFORTABLE_STOP
    assert watch.update(1.15, [], 8.0) is Stage.COMFORTABLE_STOP
    assert watch.update(1.40, [], 8.0) is Stage.NORMAL


def way(step, dt=0.2):
    return Trajectory(time=0.0, dt=dt, xy=np.array([[step * (k + 1), 0.0] for k in range(5)]))


def test_trajectories_that_no_car_drives_are_refused():
    check_trajectory(way(2.0), speed=10.0, max_speed=30.0)
    with pytest.raises(ValueError, match='50.0 m/s'):
        check_trajectory(way(10.0), speed=49.0, max_speed=30.0)
    with pytest.raises(ValueError, match='begins 5.0 m away'):
        check_trajectory(way(5.0), speed=3.0, max_speed=30.0)
