"""What is wrong with a graph, told from what was seen of it: the rules behind `doctor`. Knows neither node nor network.

The rules of who hears whom are DDS's (OMG DDS 1.4, table 2.2.3: offered against requested).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LEVELS = ('ok', 'warning', 'error')
RATE_SHARE = 0.8  # of the expected rate, below which it is wrong
LOST_SHARE = 0.01  # of pictures
FUTURE_S, FUTURE_SIMULATED_S, OLD_S = 0.05, 0.11, 0.5  # /clock may come after the pictures
FOREVER_S = 1e9  # DDS writes infinity as a number of seconds that is as good as it


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at; whoever finds something wrong says what helps."""

    level: str
    what: str
    says: str
    remedy: str = ''

    def __post_init__(self):
        assert self.level in LEVELS and bool(self.remedy) == (self.level != 'ok')


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A publisher or subscription, and what it offers or asks for; durations in seconds."""

    node: str
    kind: str  # sensor_msgs/msg/Image
    reliability: str  # reliable | best_effort
    durability: str  # transient_local | volatile
    deadline_s: float = math.inf
    liveliness: str = 'automatic'  # automatic | manual_by_topic
    lease_s: float = math.inf
    depth: int = 0  # 0: not told

    def __str__(self):
        return f'{self.node} ({self.reliability}, {self.durability})'


@dataclass(kw_only=True)
class Heard:
    """What was heard of one topic: when (s of the node's clock), with which stamp, how many bytes."""

    arrived: list[float] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)
    size: int = 0


# ---- who hears whom ----


def refusals(offered: Endpoint, asked: Endpoint) -> list[tuple[str, str]]:
    """Return why this subscription does not hear this publisher: pairs of rule and remedy; nothing where it does."""
    found = []
    if offered.kind != asked.kind:
        found.append(
            (
                f'type: {offered.kind} is offered, {asked.kind} asked for',
                'give one of the two topics another name, or set `transport` raw or compressed',
            )
        )
    if (offered.reliability, asked.reliability) == ('best_effort', 'reliable'):
        found.append(
            (
                'reliability: best effort is offered, reliable asked for',
                f'let {asked.node} ask for best effort (SensorDataQoS), or {offered.node} be reliable',
            )
        )
    if (offered.durability, asked.durability) == ('volatile', 'transient_local'):
        found.append(
            (
                'durability: volatile is offered, transient local (latched) asked for',
                f'let {offered.node} be transient_local; for a bag: ros2 bag play '
                '--qos-profile-overrides-path with durability: transient_local',
            )
        )
    if offered.deadline_s > asked.deadline_s:
        found.append(
            (
                f'deadline: {_seconds(offered.deadline_s)} is offered, {_seconds(asked.deadline_s)} '
                'asked for',
                f'let {offered.node} promise a deadline of {_seconds(asked.deadline_s)} or less',
            )
        )
    if (offered.liveliness, asked.liveliness) == ('automatic', 'manual_by_topic'):
        found.append(
            (
                'liveliness: automatic is offered, manual by topic asked for',
                f'let {asked.node} ask for automatic liveliness',
            )
        )
    if offered.lease_s > asked.lease_s:
        found.append(
            (
                f'lease: {_seconds(offered.lease_s)} is offered, {_seconds(asked.lease_s)} asked for',
                f'let {offered.node} promise a lease of {_seconds(asked.lease_s)} or less',
            )
        )
    return found


def judge_topic(
    topic: str, publishers: Sequence[Endpoint], subscriptions: Sequence[Endpoint]
) -> list[Finding]:
    """Return what is wrong between those who offer a topic and those who ask for it.

    A node that asks twice, latched and volatile, is content when one of the two is answered.
    """
    findings = []
    for offered in publishers:
        for node in sorted({one.node for one in subscriptions}):
            asked = [one for one in subscriptions if one.node == node]
            wrong = [refusals(offered, one) for one in asked]
            if not all(wrong):
                continue
            for rule, remedy in wrong[0]:
                says = f'{offered} and {asked[0]} do not meet; {rule}'
                findings.append(Finding(level='error', what=topic, says=says, remedy=remedy))
    return findings


def judge_inputs(
    node: str, topic: str, publishers: Sequence[Endpoint], is_needed: bool = True
) -> list[Finding]:
    """Return whether somebody publishes what a node of ours hears."""
    if publishers:
        return []
    remedy = (
        f'start what publishes it, or give {node} the right name: compare `ros2 topic list`, the '
        'parameters camera_topic(s) and the remappings; on another machine compare ROS_DOMAIN_ID'
    )
    level = 'error' if is_needed else 'warning'
    return [Finding(level=level, what=topic, says=f'{node} hears nobody', remedy=remedy)]


# ---- what came ----


def judge_stream(
    topic: str, heard: Heard, seconds: float, rate: float, *, is_simulated: bool = False
) -> list[Finding]:
    """Return what rate, gaps and stamps of a topic tell; `rate` in Hz is what it should have, 0: any."""
    count = len(heard.arrived)
    if count == 0:
        remedy = 'see whether its publisher is alive and active, and for QoS above'
        says = f'nothing within {seconds:.0f} s'
        return [Finding(level='error', what=topic, says=says, remedy=remedy)]
    found, lost, ages = [], lost_share(heard.stamps), np.subtract(heard.arrived, heard.stamps)
    actual = (count - 1) / max(heard.arrived[-1] - heard.arrived[0], 1e-3) if count > 1 else 0.0
    if rate and not is_simulated and actual < RATE_SHARE * rate:
        remedy = (
            'set the camera or simulator to that rate; see docs/vehicle.md on CPU and transport'
        )
        says = f'{actual:.1f} Hz, {rate:g} are expected'
        found.append(Finding(level='warning', what=topic, says=says, remedy=remedy))
    if lost > LOST_SHARE:
        remedy = (
            'start its publisher with config/fastdds_cameras.xml, or send compressed '
            'pictures (docs/vehicle.md, "Large pictures")'
        )
        says = f'{100 * lost:.0f} % of its stamps are missing'
        found.append(Finding(level='warning', what=topic, says=says, remedy=remedy))
    found += _judge_stamps(
        topic, heard.stamps, ages, FUTURE_SIMULATED_S if is_simulated else FUTURE_S
    )
    if not found:
        size = f', {heard.size / 1e6:.1f} MB' if heard.size > 1e5 else ''
        age = 1e3 * float(np.median(ages))
        says = f'{actual:.1f} Hz{size}, {age:.0f} ms old'
        found.append(Finding(level='ok', what=topic, says=says))
    return found


def _judge_stamps(
    topic: str, stamps: Sequence[float], ages: np.ndarray, early: float
) -> list[Finding]:
    age, steps = float(np.median(ages)), np.diff(stamps)
    if not all(stamps):
        remedy = 'let its driver fill header.stamp with the time of exposure'
        return [Finding(level='error', what=topic, says='its stamps are 0', remedy=remedy)]
    if len(steps) and (steps == 0).all():
        remedy = 'the source is frozen: restart it'
        return [Finding(level='error', what=topic, says='the same stamp again', remedy=remedy)]
    if len(steps) and (steps < 0).any():
        remedy = 'two sources publish it, or a bag loops: leave one of them'
        return [Finding(level='error', what=topic, says='its stamps go back', remedy=remedy)]
    if age < -early:
        says = f'its stamps are {-age:.2f} s in the future'
        remedy = (
            'one clock for all machines (chrony or PTP); or use_sim_time true for all, or none'
        )
        return [Finding(level='error', what=topic, says=says, remedy=remedy)]
    if age > OLD_S:
        says = f'its stamps are {age:.2f} s old'
        if age > 1e6:
            remedy = 'they are of another clock: set use_sim_time as its publisher has it'
        else:
            remedy = 'shorten the way of the pictures, or set the clocks (chrony or PTP)'
        return [Finding(level='error', what=topic, says=says, remedy=remedy)]
    return []


def lost_share(stamps: Sequence[float]) -> float:
    """Return the share of messages missing between the first and the last, if they were made in equal steps."""
    steps = np.diff(np.unique(stamps))
    if len(steps) < 2:
        return 0.0
    made = np.round(steps / np.percentile(steps, 25)).sum()
    return float(1.0 - len(steps) / made) if made else 0.0


def judge_pictures(
    topic: str, size: tuple[int, int], encoding: str, view: tuple[int, int], known: Sequence[str]
) -> list[Finding]:
    """Return whether pictures serve the bundle: an encoding that we read, and not smaller than its views."""
    found = []
    if encoding not in known:
        says = f'encoding {encoding!r}'
        remedy = f'set the camera driver to one of {", ".join(known)}'
        found.append(Finding(level='error', what=topic, says=says, remedy=remedy))
    if size[0] < view[0] or size[1] < view[1]:
        says = f'{size[0]}x{size[1]}, smaller than the {view[0]}x{view[1]} of the bundle'
        remedy = 'raise the resolution of the camera: nothing is gained by enlarging'
        found.append(Finding(level='warning', what=topic, says=says, remedy=remedy))
    return found


def judge_clock(
    simulated: dict[str, bool], clocks: Sequence[Endpoint], is_ticking: bool
) -> list[Finding]:
    """Return what is wrong with time: nodes by name with their use_sim_time, and who publishes /clock."""
    found, names = [], sorted(name for name, value in simulated.items() if value)
    if names and not clocks:
        says = (
            f'{", ".join(names)} wait for /clock, which nobody publishes: their time stands at 0'
        )
        remedy = 'start the simulator, play the bag with --clock, or set use_sim_time:=false'
        found.append(Finding(level='error', what='/clock', says=says, remedy=remedy))
    elif names and not is_ticking:
        remedy = 'let the simulator run (no pause), or see who must tick it'
        found.append(
            Finding(level='warning', what='/clock', says='it stands still', remedy=remedy)
        )
    if names and len(names) < len(simulated):
        others = ', '.join(sorted(simulated.keys() - set(names)))
        says = f'{", ".join(names)} have use_sim_time, {others} have not'
        remedy = 'give all nodes the same: use_sim_time:=true or false'
        found.append(Finding(level='error', what='use_sim_time', says=says, remedy=remedy))
    if len(clocks) > 1:
        says = f'{len(clocks)} publishers: {", ".join(one.node for one in clocks)}'
        remedy = 'leave one; two clients that tick CARLA drive its time twice'
        found.append(Finding(level='error', what='/clock', says=says, remedy=remedy))
    return found


def _seconds(value: float) -> str:
    return f'{value:g} s' if value < FOREVER_S else 'none'
