"""What a camera's messages tell of it."""

import pytest

from mose_ros.nodes.camera_health import CameraHealth


def test_a_stamp_that_comes_twice_is_told_until_another_comes():
    health = CameraHealth()
    told = []
    for stamp in (1.0, 1.1, 1.1, 1.1, 1.2):
        health.heard(stamp, stamp + 0.02)
        told.append(health.is_stuck)
    assert told == [False, False, True, True, False]
    assert health.values(1.2)['same_stamp'] == 2


def test_rate_age_and_what_was_lost():
    health = CameraHealth()
    for stamp in (1.0, 1.1, 1.2, 1.5, 1.6):
        health.heard(stamp, stamp + 0.03)
    found = health.values(1.65)
    assert found['rate_hz'] == pytest.approx(10.0) and found['dropped'] == 2
    assert found['age_ms'] == pytest.approx(50.0) and found['delay_ms'] == pytest.approx(30.0)
    health.heard(0.5, 0.5)  # time went back: what was counted stays, the rate begins anew
    assert 'rate_hz' not in health.values(0.5) and not health.is_stuck
