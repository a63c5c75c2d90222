import pytest

from mose_ros.core.infractions import INFRACTIONS, PENALTIES, SLOWNESS, faults, penalty


def test_each_event_costs_its_share():
    assert penalty({'red_light': ['one', 'two'], 'stop_infraction': ['three']}) == pytest.approx(
        0.7 * 0.7 * 0.8
    )
    assert penalty(dict.fromkeys(INFRACTIONS, ())) == penalty({SLOWNESS: ['80 %']}) == 1.0
    assert set(PENALTIES) < set(INFRACTIONS)


def test_slowness_is_no_fault():
    events = {**dict.fromkeys(INFRACTIONS, ()), SLOWNESS: ('50 %',), 'route_dev': ('left',)}

    assert faults(events) == {'route_dev': ('left',)}
    assert faults({SLOWNESS: ('50 %',)}) == {}
