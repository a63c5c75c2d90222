"""A managed node's life: what it opens it closes, what fails is said and leaves nothing, and 500 lives leave no more than one."""

import os
import time

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.lifecycle import TransitionCallbackReturn
from std_msgs.msg import String

from mose_ros.nodes import cycles
from mose_ros.nodes.lifecycle import ERROR, ManagedNode, NodeParameters
from nodes.graph import Ear, overrides

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class Fragile(ManagedNode):
    """Opens one of each and fails where it is told to."""

    def __init__(self, **options):
        super().__init__('fragile', NodeParameters, **options)
        self.breaks, self.closed = '', 0

    def _maybe(self, step):
        if self.breaks == step:
            raise ValueError(f'{step} is broken; mend it')

    def configure(self):
        self.said = self.create_lifecycle_publisher(String, 'said', 1)
        self.create_subscription(String, 'heard', lambda msg: None, 1)
        self.create_timer(0.05, lambda: self.is_active and self.debug(processing_time_ms=1.0))
        self._maybe('configure')

    def activate(self):
        self._maybe('activate')

    def deactivate(self):
        self._maybe('deactivate')

    def cleanup(self):
        self.closed += 1
        self._maybe('cleanup')


@pytest.fixture
def fragile(graph):
    node = graph.start(Fragile, autostart=False)
    node.ear = graph.spin(Ear(graph.context, diagnostics=DiagnosticArray))
    return node


def says(node, words):
    """Wait until the node's diagnostics say so, in error."""
    node.ear.wait(
        'diagnostics',
        lambda msg: any(words in one.message and one.level == ERROR for one in msg.status),
    )


def test_what_configure_opens_cleanup_closes(fragile):
    unconfigured = cycles.entities(fragile)
    assert fragile.trigger_configure() == SUCCESS and fragile.trigger_activate() == SUCCESS
    time.sleep(0.3)  # it opens a debug topic by itself
    opened = cycles.entities(fragile)
    assert opened['publishers'] == unconfigured['publishers'] + 2
    assert opened['subscriptions'] == unconfigured['subscriptions'] + 1
    assert fragile.trigger_deactivate() == SUCCESS and fragile.trigger_cleanup() == SUCCESS
    assert cycles.entities(fragile) == unconfigured and fragile.state == 'unconfigured'


def test_a_failed_configure_leaves_it_unconfigured_with_the_reason(fragile):
    unconfigured = cycles.entities(fragile)
    fragile.breaks = 'configure'
    assert fragile.trigger_configure() == FAILURE
    assert fragile.state == 'unconfigured' and cycles.entities(fragile) == unconfigured
    says(fragile, 'configure failed: configure is broken; mend it')
    fragile.breaks = ''
    assert fragile.trigger_configure() == SUCCESS and fragile.state == 'inactive'


@pytest.mark.parametrize('step', ['activate', 'deactivate', 'cleanup'])
def test_any_other_failure_frees_all_and_can_be_begun_anew(fragile, step):
    unconfigured = cycles.entities(fragile)
    fragile.breaks = step
    fragile.trigger_configure()
    for one in ('activate', 'deactivate', 'cleanup'):
        getattr(fragile, f'trigger_{one}')()
        if one == step:
            break
    assert fragile.state == 'unconfigured' and fragile.closed
    assert cycles.entities(fragile) == unconfigured
    says(fragile, f'{step} failed')
    fragile.breaks = ''
    assert fragile.trigger_configure() == SUCCESS and fragile.trigger_activate() == SUCCESS
    assert fragile.is_active


@pytest.mark.parametrize('step', ['configure', 'activate'])
def test_autostart_that_fails_is_not_tried_again_and_again(graph, step):
    class Doomed(Fragile):
        tries = 0

        def configure(self):
            self.breaks = step
            self.tries += 1
            super().configure()

    node = graph.start(Doomed)
    time.sleep(0.8)
    assert node.tries == 1 and node.state == 'unconfigured'


def test_a_lifecycle_manager_takes_it_through_by_service(graph, fragile):
    client = fragile.ear.create_client(ChangeState, 'fragile/change_state')
    assert client.wait_for_service(5.0)
    for transition, state in (
        (Transition.TRANSITION_CONFIGURE, 'inactive'),
        (Transition.TRANSITION_ACTIVATE, 'active'),
        (Transition.TRANSITION_DEACTIVATE, 'inactive'),
        (Transition.TRANSITION_CLEANUP, 'unconfigured'),
    ):
        answer = client.call_async(ChangeState.Request(transition=Transition(id=transition)))
        deadline = time.monotonic() + 5
        while not answer.done() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert answer.result().success and fragile.state == state


def test_lives_leave_no_more_behind_than_one(context, bundle):
    nodes = cycles.make_nodes(bundle, context=context)
    try:
        found = cycles.run(nodes, 40)
    finally:
        for node in nodes:
            node.close()
            node.destroy_node()
    assert found['threads_grown'] <= 0 and found['descriptors_grown'] <= 0
    # allocators still settle; a driver that is kept is 1200
    assert found['memory_kb_per_cycle'] < 300


def test_a_node_that_leaks_is_told_from_one_that_does_not(context):
    class Leaky(Fragile):
        def cleanup(self):
            one = os.open('/dev/null', os.O_RDONLY)
            self.kept = [*getattr(self, 'kept', []), (one, bytearray(1 << 20))]

    options = {'context': context, 'parameter_overrides': overrides(autostart=False)}
    node = Leaky(**options)
    try:
        found = cycles.run([node], 8)
        assert found['descriptors_grown'] == 7 and found['memory_kb_per_cycle'] > 500
    finally:
        node.destroy_node()
        for one, _ in node.kept:
            os.close(one)
