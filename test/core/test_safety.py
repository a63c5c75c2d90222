"""The last line's decisions: which plans and odometry are believed, and from driving to standing and back by faults alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mose_ros.core import safety
from mose_ros.core.safety import Fault, SafetyMachine, Severity, State, TrajectoryLimits
from mose_ros.core.types import EgoState, Trajectory

LIMITS = TrajectoryLimits()
TICK = 0.05
DEGRADE = Fault(severity=Severity.DEGRADE, reason='camera back: masked')
STOP = Fault(severity=Severity.STOP, reason='no heartbeat of driver for 0.22 s')
EMERGENCY = Fault(severity=Severity.EMERGENCY, reason='there is no way left')


# ---- the state machine ----


def machine(is_driving=True):
    times = {'hard_after_s': 1.0, 'recover_after_s': 0.3, 'restart_after_s': 1.0}
    made = SafetyMachine(**times, relapse_s=15.0)
    if is_driving:
        assert made.update(0.0, [], 0.0, True) is State.NORMAL
    return made


def states(made, start, faults, speeds):
    """Return the states of consecutive ticks from `start` on, with the same faults, at these speeds."""
    return [made.update(start + TICK * k, faults, v, True) for k, v in enumerate(speeds)]


def test_it_waits_at_rest_for_the_first_plan_without_calling_it_an_emergency():
    made = machine(is_driving=False)
    assert made.update(0.0, [STOP], 0.0, False) is State.STOPPED
    assert not made.is_emergency and made.reason == STOP.reason
    assert made.update(0.1, [], 0.0, True) is State.NORMAL


def test_a_fault_is_braked_for_gently_then_hard_then_held():
    made = machine()
    way = states(made, 1.0, [STOP], [8.0] * 21) + states(made, 2.1, [STOP], [5.0, 0.1])
    assert way[0] is State.COMFORTABLE_STOP and way[-2] is State.EMERGENCY_STOP
    assert way[-1] is State.STOPPED and made.is_emergency and made.reason == STOP.reason


def test_what_is_not_needed_only_degrades_and_is_told():
    made = machine()
    assert made.update(1.0, [DEGRADE], 8.0, True) is State.DEGRADED
    assert made.reason == DEGRADE.reason and not made.is_emergency
    assert made.update(60.0, [DEGRADE], 8.0, True) is State.DEGRADED  # for ever, if need be


def test_it_recovers_only_after_a_while_without_faults():
    made = machine()
    assert made.update(1.0, [STOP], 8.0, True) is State.COMFORTABLE_STOP
    assert set(states(made, 1.05, [], [8.0] * 5)) == {State.COMFORTABLE_STOP}
    made.update(1.30, [STOP], 8.0, True)  # a flicker begins the wait anew
    assert set(states(made, 1.35, [], [8.0] * 5)) == {State.COMFORTABLE_STOP}
    assert made.update(1.61, [], 8.0, True) is State.NORMAL


def test_a_loose_contact_does_not_make_the_car_creep():
    """A fault of 0.1 s every 1.2 s: the waits of a stopped car grow beyond the pauses, so that it stays where it is."""
    made, moved = machine(), []
    for k in range(1200):
        now = 1.0 + TICK * k
        faults = [STOP] if now % 1.2 < 0.1 else []
        made.update(now, faults, 0.0, True)
        moved.append(made.state in safety.DRIVING)
    assert any(moved[:100]) and not any(moved[100:])


def test_a_car_that_rolls_away_is_no_longer_at_rest():
    made = machine()
    made.update(1.0, [STOP], 0.0, True)
    assert made.update(1.1, [STOP], 0.3, True) is State.STOPPED  # noise of the speed
    assert made.update(1.2, [STOP], 0.6, True) is State.COMFORTABLE_STOP


def test_a_clock_that_goes_back_neither_frees_nor_freezes():
    made = machine()
    made.update(100.0, [STOP], 8.0, True)
    assert made.update(2.0, [], 8.0, True) is State.COMFORTABLE_STOP
    assert made.update(2.31, [], 8.0, True) is State.NORMAL


moments = st.lists(
    st.tuples(
        st.sampled_from([[], [], [DEGRADE], [STOP], [EMERGENCY], [DEGRADE, STOP]]),
        st.floats(-1.0, 30.0),
        st.booleans(),
        st.sampled_from([0.02, 0.05, 0.1, 0.5, -3.0]),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(moments)
def test_whatever_comes_a_fault_is_never_driven_through_and_every_state_has_a_reason(moments):
    made, now, healthy = machine(is_driving=False), 10.0, 0.0
    for faults, speed, is_planned, dt in moments:
        now += dt
        before, was_driving = made.state, made.has_driven
        state = made.update(now, faults, speed, is_planned)
        worst = max((fault.severity for fault in faults), default=Severity.NONE)
        bad = worst >= Severity.STOP or not is_planned
        healthy = 0.0 if bad else healthy + max(dt, 0.0)
        assert made.reason
        if bad:
            assert state not in safety.DRIVING
        elif state is State.NORMAL:
            assert worst is Severity.NONE
        if before in safety.DRIVING and not bad:
            assert state in safety.DRIVING  # no stop without a cause
        if was_driving and before is State.STOPPED and state in safety.DRIVING:
            assert healthy >= 1.0 - 1e-6  # never off from rest because of a flicker
        if worst is Severity.EMERGENCY and made.has_driven:
            assert state in (State.EMERGENCY_STOP, State.STOPPED)


@given(st.floats(0.0, 5.0), st.floats(0.05, 2.0), st.floats(0.0, 1.0))
def test_silence_degrades_first_and_stops_next(silent, limit, grace):
    fault = safety.silence('odometry', silent, limit, grace)
    if fault is None:
        assert silent <= limit
    else:
        assert silent > limit and f'{limit:.2f}' in fault.reason
        assert (fault.severity is Severity.STOP) == (silent > limit + grace)


def test_cameras_that_are_well_are_no_faults():
    health = {'front': (Severity.NONE, 'arrives'), 'left': (Severity.DEGRADE, 'masked: black')}
    [fault] = safety.camera_faults(health)
    assert fault.reason == 'camera left: masked: black' and fault.severity is Severity.DEGRADE


# ---- plans ----


def plan(xy, dt=0.2, time=0.0):
    return Trajectory(time=time, dt=dt, xy=np.asarray(xy, float))


def arc(speed, acceleration=0.0, curvature=0.0, noise=0.0, seed=0, dt=0.2):
    """Return 3 s of driving at a constant acceleration until standstill, on a circle."""
    t = dt * np.arange(1, round(3.0 / dt) + 1)
    stop = speed / -acceleration if acceleration < 0 else math.inf
    t = np.minimum(t, stop)
    s = speed * t + 0.5 * acceleration * t**2
    k = curvature if abs(curvature) > 1e-9 else 1e-9
    xy = np.stack([np.sin(k * s) / k, (1 - np.cos(k * s)) / k], 1)
    return plan(xy + np.random.default_rng(seed).normal(0, noise, xy.shape), dt)


@settings(max_examples=200, deadline=None)
@given(
    speed=st.floats(0.0, 20.0),
    acceleration=st.floats(-8.0, 3.0),
    lateral=st.floats(-3.0, 3.0),
    dt=st.sampled_from([0.1, 0.2, 0.5]),
    seed=st.integers(0, 9),
)
def test_plans_that_a_car_can_drive_are_believed(speed, acceleration, lateral, dt, seed):
    curvature = float(np.clip(lateral / max(speed, 1.0) ** 2, -0.3, 0.3))
    if acceleration > 0:
        curvature *= (speed / (speed + 3.0 * acceleration)) ** 2 if speed else 0.0
    noise = 0.03 if dt >= 0.2 else 0.0
    driven = arc(speed, acceleration, curvature, noise, seed, dt)
    safety.check_trajectory(driven, speed, LIMITS)


@pytest.mark.parametrize(
    ('bad', 'speed', 'words'),
    [
        (arc(40.0), 40.0, 'a speed of 40.00 m/s, over 30'),
        (arc(9.0), 2.0, 'begins 1.4 m away'),
        (arc(5.0, curvature=0.8), 5.0, 'a curvature of'),
        (arc(12.0, curvature=0.08), 12.0, 'a lateral acceleration of'),
        (arc(3.0, acceleration=7.0), 3.0, 'an? acceleration of'),
        (arc(20.0, acceleration=-14.0), 20.0, 'a deceleration of'),
        (plan([[1.0 * k, 2.0 * (k == 8)] for k in range(1, 16)]), 5.0, 'over'),
        (plan([[-2.0 * k, 0.0] for k in range(1, 16)]), 0.0, 'begins 2.0 m away'),
        (plan([[math.nan, 0.0]] * 15), 0.0, 'not finite'),
        (plan([[1.0, math.inf]] * 15), 5.0, 'not finite'),
        (plan(np.zeros((15, 2)), dt=0.0), 0.0, 'do not grow'),
        (plan(np.zeros((15, 2)), dt=-0.2), 0.0, 'do not grow'),
        (plan(np.zeros((15, 2)), time=math.nan), 0.0, 'begins at nan'),
    ],
)
def test_plans_that_no_car_drives_are_refused_with_the_number(bad, speed, words):
    with pytest.raises(ValueError, match=words):
        safety.check_trajectory(bad, speed, LIMITS)


numbers = st.one_of(st.floats(-20.0, 20.0), st.sampled_from([math.nan, math.inf, 1e300]))


@settings(max_examples=200, deadline=None)
@given(
    xy=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20),
    dt=st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.0, -1.0, math.nan, 1e-300])),
    speed=st.one_of(st.floats(-5.0, 40.0), st.just(math.nan)),
)
def test_whatever_is_believed_is_finite_starts_at_the_car_and_keeps_to_the_limits(xy, dt, speed):
    given_plan = plan(xy, dt)
    try:
        safety.check_trajectory(given_plan, speed, LIMITS)
    except ValueError:
        return
    assert np.isfinite(given_plan.xy).all() and dt > 0 and math.isfinite(speed)
    assert given_plan.speeds().max() <= LIMITS.speed
    assert np.hypot(*(given_plan.xy[0] - (speed * dt, 0.0))) <= LIMITS.start_offset + 5.0 * dt**2
    assert safety.motion_of(given_plan).jerk.max() <= LIMITS.jerk


def test_motion_is_that_of_the_plan():
    found = safety.motion_of(arc(6.0, acceleration=1.0, curvature=0.02))
    assert found.acceleration == pytest.approx(1.0, abs=0.05)
    assert found.curvature == pytest.approx(0.02, abs=0.002)
    middle = len(found.acceleration) // 2
    speed = 6.0 + 1.0 * 1.5
    assert found.lateral_acceleration[middle] == pytest.approx(0.02 * speed**2, rel=0.1)
    assert found.jerk.max() < 0.7  # 3 k v a + k^2 v^3: of the turn alone
    assert safety.motion_of(arc(6.0, 1.0, -0.02)).curvature == pytest.approx(-0.02, abs=0.002)


@pytest.mark.parametrize(
    ('age', 'words'), [(0.6, '0.60 s old'), (-0.2, '0.20 s ahead'), (math.nan, 'nan s old')]
)
def test_plans_from_another_time_are_refused(age, words):
    for fine in (0.0, 0.34, -0.04):
        safety.check_age('plan', fine, 0.35, 0.05)
    with pytest.raises(ValueError, match=words):
        safety.check_age('plan', age, 0.35, 0.05)


# ---- odometry ----


def driving(speed=8.0, yaw_rate=0.2, dt=0.1, count=20, start=0.0):
    """Return stamps and states of a car on a circle."""
    found, x, y, yaw = [], 0.0, 0.0, 0.0
    for k in range(count):
        found.append((start + k * dt, EgoState(x=x, y=y, yaw=yaw, speed=speed)))
        middle = yaw + 0.5 * yaw_rate * dt
        x, y = x + speed * dt * math.cos(middle), y + speed * dt * math.sin(middle)
        yaw = math.remainder(yaw + yaw_rate * dt, 2 * math.pi)
    return found


def checked(states, **options):
    check = safety.OdometryCheck(max_jump_m=1.0, **options)
    complaints = []
    for stamp, ego in states:
        try:
            check.check(stamp, ego)
        except ValueError as error:
            complaints.append(str(error))
    return complaints


@settings(max_examples=100, deadline=None)
@given(st.floats(-5.0, 40.0), st.floats(-0.8, 0.8), st.sampled_from([0.02, 0.05, 0.1, 0.3]))
def test_a_car_that_drives_is_believed(speed, yaw_rate, dt):
    assert checked(driving(speed, yaw_rate, dt)) == []


def test_a_jump_is_complained_of_once_and_then_driven_on_from():
    states = driving()
    moved = [(t, EgoState(x=e.x + 5.0, y=e.y, yaw=e.yaw, speed=e.speed)) for t, e in states]
    assert checked([*states[:10], *moved[10:]]) == ['the odometry jumps by 5.0 m']
    turned = [(t, EgoState(x=e.x, y=e.y, yaw=e.yaw + 1.5, speed=e.speed)) for t, e in states]
    assert 'jumps' in checked([*states[:10], turned[10], *states[11:]])[0]
    faster = [(t, EgoState(x=e.x, y=e.y, yaw=e.yaw, speed=20.0)) for t, e in states]
    assert 'speed jumps from 8.0 to 20.0' in checked([*states[:10], faster[10]])[0]


def test_frozen_odometry_is_noticed_by_its_stamp_and_by_its_pose():
    states = driving()
    same_stamp = [*states[:5], (states[4][0], states[5][1])]
    assert checked(same_stamp) == ['the same stamp twice: the odometry is frozen']
    same_pose = [*states[:5], *((t, states[4][1]) for t, _ in states[5:10])]
    assert 'the pose stands still at 8.0 m/s' in checked(same_pose)[0]
    assert checked([(0.1 * k, EgoState(x=1.0, y=0.0, yaw=0.0, speed=0.0)) for k in range(9)]) == []


@pytest.mark.parametrize('said', [0.0, 5.0, 12.0])
def test_a_speed_that_the_poses_contradict_is_noticed_within_a_second_and_until_it_is_right(said):
    states = driving(speed=8.0, dt=0.05, count=60)
    wrong = [(t, replace(e, speed=said)) for t, e in states]
    complaints = checked(wrong)
    assert len(complaints) > 30 and all('one of them is wrong' in one for one in complaints)
    near = [(t, replace(e, speed=7.0)) for t, e in states]  # a tyre that is worn
    assert checked(near) == []
    assert checked([*wrong[:30], *((t, e) for t, e in states[30:])])[-1] != complaints[-1]


def test_time_that_was_set_is_no_jump():
    before, later, earlier = driving(), driving(start=50.0), driving(start=-10.0)
    assert checked([*before, *later, *earlier]) == []
