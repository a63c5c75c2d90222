"""Parameters are declared once, read back typed, and wrong ones are named."""

from dataclasses import dataclass

import pytest
import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter

from mose_ros.nodes.lifecycle import ManagedNode, NodeParameters
from mose_ros.nodes.parameters import declare, parameter
from nodes.graph import overrides


@dataclass(frozen=True, kw_only=True)
class Example:
    size: float = parameter(1.0, 'metres', minimum=0.0, maximum=2.0)
    mode: str = parameter('a', 'how', choices=('a', 'b'))
    count: int = parameter(3, 'of them', minimum=1, maximum=9)
    names: tuple[str, ...] = parameter((), 'of all')


def declared(context, **values):
    node = Node('example', context=context, parameter_overrides=overrides(**values))
    try:
        return declare(node, Example), node.describe_parameter('size')
    finally:
        node.destroy_node()


def test_defaults_and_overrides_come_back_typed(context):
    assert declared(context)[0] == Example()
    given, _ = declared(
        context, size=2, names=['x', 'y'], mode='b'
    )  # a whole number is a float too
    assert given == Example(size=2.0, names=('x', 'y'), mode='b') and isinstance(given.size, float)
    assert declared(context, size=0.5)[0] != Example()
    assert declared(context, names=[])[0] == Example()  # ROS takes it for bytes


def test_descriptors_say_what_a_parameter_is(context):
    _, described = declared(context)
    assert described.description == 'metres' and described.read_only
    assert described.floating_point_range[0].to_value == 2.0


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        ({'sice': 1.0}, "unknown parameter 'sice'; did you mean 'size'"),
        ({'size': 3.0}, "'size' can not be 3.0: expected float in 0.0..2.0"),
        ({'size': 'big'}, "'size' can not be 'big'"),
        ({'size': float('nan')}, "'size' can not be nan"),
        ({'count': 0}, "'count' can not be 0"),
        ({'mode': 'c'}, 'choose one of a, b'),
    ],
)
def test_wrong_parameters_are_named(context, values, words):
    with pytest.raises(ValueError, match='example: ') as error:
        declared(context, **values)
    assert words in str(error.value)


def test_a_parameter_file_of_ros_is_read(tmp_path):
    file = tmp_path / 'file.yaml'
    file.write_text('/**/example:\n  ros__parameters:\n    size: 2\n    mode: b\n')
    context = rclpy.Context()
    rclpy.init(args=['--ros-args', '--params-file', str(file)], context=context)
    node = Node('example', context=context, namespace='/mose')
    assert declare(node, Example) == Example(size=2.0, mode='b')
    node.destroy_node()
    rclpy.try_shutdown(context=context)


def test_live_parameters_change_and_the_others_do_not(context):
    node = ManagedNode('live', NodeParameters, context=context)
    period, autostart = Parameter('log_period_s', value=0.5), Parameter('autostart', value=False)
    assert node.set_parameters([period])[0].successful and node.parameters.log_period_s == 0.5
    assert not node.set_parameters([autostart])[0].successful and node.parameters.autostart
    assert not node.set_parameters([Parameter('log_period_s', value=-1.0)])[0].successful
    assert node.parameters.log_period_s == 0.5
    node.destroy_node()


def test_a_refusal_names_the_range_and_the_remedy(context):
    node = ManagedNode('live', NodeParameters, context=context)
    [fixed, low, kind] = node.set_parameters(overrides(autostart=False, log_period_s=-1.0)) + [
        node.set_parameters_atomically(overrides(log_period_s='long'))
    ]
    assert "'autostart' is read when the node starts: give it in the params_file" in fixed.reason
    assert "'log_period_s' can not be -1.0: expected float in 0.0..None" in low.reason
    assert "can not be 'long': expected float" in kind.reason
    assert not (fixed.successful or low.successful or kind.successful)
    node.destroy_node()
