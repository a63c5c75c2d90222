"""Faults of each kind, injected for real into one running graph: noticed, answered as they must be, nothing unsafe leaves, and
the car drives again. All of them, with their times: `make faults`.
"""

import pytest

from nodes.bench import Bench, Sample, complaint, measure
from nodes.faults import all_faults

SHORT = (
    'kill -9 driver',
    'front camera: black',
    'front camera: frozen, same stamp',
    'other camera: noise',
    'odometry: not finite',
    'odometry: jumping by 20 m',
    'odometry: speed of 0, though it moves',
    'route: 100 km away',
    'bundle swapped',
    'disk full',
)


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp('faults'), patience=4.0, relapse_s=0.0)
    yield made
    made.close()


@pytest.mark.parametrize('name', SHORT)
def test_a_fault_is_noticed_answered_and_recovered_from(bench, name):
    fault = next(one for one in all_faults() if one.name == name)
    sample = measure(bench, fault)
    assert not complaint(fault, sample), sample
    assert sample.beside_m < 1.0  # it kept to the road


def test_what_became_of_a_fault_is_held_against_what_must():
    """A graph that drives on in spite of a fault is complained of."""
    fault = next(one for one in all_faults() if one.name == 'front camera: black')
    good = {'states': ('COMFORTABLE_STOP', 'STOPPED'), 'reason': '', 'unsafe': (), 'speed': 5.0}
    good |= {'detected_s': 0.1, 'stop_m': 4.0, 'beside_m': 0.1, 'recovered_s': 1.0}
    assert complaint(fault, Sample(**good)) == ''
    for changes, words in (
        ({'detected_s': None}, 'nobody noticed'),
        ({'stop_m': None}, 'did not come to rest'),
        ({'unsafe': ('drives on 2.00 s after the fault',)}, 'drives on 2.00 s'),
        ({'recovered_s': None}, 'did not drive again'),
    ):
        assert words in complaint(fault, Sample(**(good | changes)))
    swapped = next(one for one in all_faults() if one.name == 'bundle swapped')
    assert 'need not stop' in complaint(swapped, Sample(**good))
