import pytest

pytest.importorskip('metadrive', reason='the simulator is an extra: pip install mose_ros[sim]')

from mose_ros.nodes.simulator_node import outcome_to_msg
from mose_ros.sim.judge import Outcome


def told(**events):
    outcome = Outcome(status='running', route_completion=0.5, seconds=12.3, infractions=events)
    return {pair.key: pair.value for pair in outcome_to_msg(outcome, 'merging', 3, 2).values}


def test_the_outcome_tells_infractions_but_not_slowness():
    slow = told(min_speed_infractions=('Average speed is 60 % of the usual one',), red_light=())
    assert slow['infractions'] == '' and float(slow['driving_score']) == 50.0

    bad = told(min_speed_infractions=('60 %',), red_light=('one', 'two'))
    assert bad['infractions'] == 'red_light: one\nred_light: two'
    assert (bad['family'], bad['seed'], bad['late_frames']) == ('merging', '3', '2')
    assert float(bad['driving_score']) == 24.5
