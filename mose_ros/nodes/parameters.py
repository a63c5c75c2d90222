"""A node's parameters, each declared once: as a field of a frozen dataclass, with its description and range.

`declare` tells ROS about them and reads them back typed. Knows no node. YAML files only override; a name in them that
the node does not have is an error, since a misspelt parameter that is ignored is worse than one that stops the start.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.node import Node
from rclpy.parameter import Parameter

P = TypeVar('P')
_KINDS = {
    bool: Parameter.Type.BOOL,
    int: Parameter.Type.INTEGER,
    float: Parameter.Type.DOUBLE,
    str: Parameter.Type.STRING,
}
_FOREIGN = ('use_sim_time', 'qos_overrides.', 'start_type_description_service')  # ROS's own


def parameter(
    default: bool | int | float | str | tuple,
    description: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    """Return a dataclass field that is a ROS parameter; `live` ones may be changed while the node runs."""
    rules = {
        'description': description,
        'minimum': minimum,
        'maximum': maximum,
        'choices': choices,
        'live': live,
    }
    return dataclasses.field(default=default, metadata=rules)


def descriptor(field: dataclasses.Field) -> ParameterDescriptor:
    """Return what ROS tools show of a parameter."""
    rules = field.metadata
    text = rules['description']
    if rules['choices']:
        text += f' (one of: {", ".join(rules["choices"])})'
    found = ParameterDescriptor(description=text, read_only=not rules['live'])
    if rules['minimum'] is not None or rules['maximum'] is not None:
        low, high = rules['minimum'], rules['maximum']
        if isinstance(field.default, float):
            low, high = (-1e308 if low is None else low), (1e308 if high is None else high)
            found.floating_point_range = [
                FloatingPointRange(from_value=float(low), to_value=float(high))
            ]
        else:
            low, high = (-(2**62) if low is None else low), (2**62 if high is None else high)
            found.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
    return found


def declare(node: Node, kind: type[P]) -> P:
    """Declare all parameters of the dataclass `kind` on the node and return them; ValueError names what is wrong."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _check_names(node, list(fields))
    values = {name: _declare_one(node, field) for name, field in fields.items()}
    return kind(**values)


def changed(parameters: P, changes: Mapping[str, Any]) -> P:
    """Return the parameters with live changes; ValueError where a value is not allowed."""
    fields = {field.name: field for field in dataclasses.fields(parameters)}
    known = {name: value for name, value in changes.items() if name in fields}
    for name, value in known.items():
        _check_choice(fields[name], value)
    return dataclasses.replace(parameters, **known)


def refusal(parameters: Any, name: str, value: Any) -> str:
    """Return why a running node does not take this value and what to do; nothing where all seems well."""
    fields = {field.name: field for field in dataclasses.fields(parameters)}
    if name not in fields:  # ROS's own
        return ''
    field = fields[name]
    if not field.metadata['live']:
        return f'{name!r} is read when the node starts: give it in the params_file and start again'
    try:
        _check_choice(field, value)
    except ValueError as error:
        return str(error)
    low, high = field.metadata['minimum'], field.metadata['maximum']
    is_kind = type(value) is type(field.default) or isinstance(field.default, tuple)
    if is_kind and (low is None or low <= value) and (high is None or value <= high):
        return ''  # the node has a reason of its own
    return f'{name!r} can not be {value!r}: expected {_expected(field)}'


def _expected(field: dataclasses.Field) -> str:
    low, high = field.metadata['minimum'], field.metadata['maximum']
    limits = '' if low is None and high is None else f' in {low}..{high}'
    return f'{type(field.default).__name__}{limits} ({field.metadata["description"]})'


def _overrides(node: Node) -> dict[str, Parameter]:
    # rclpy has no public way to see overrides of parameters that were not declared
    return node._parameter_overrides


def _check_names(node: Node, known: list[str]) -> None:
    for name in _overrides(node):
        if name in known or name.startswith(_FOREIGN):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean {near[0]!r}?' if near else f'known: {", ".join(known)}'
        raise ValueError(f'{node.get_name()}: unknown parameter {name!r}; {hint}')


def _declare_one(node: Node, field: dataclasses.Field) -> Any:
    name, default = field.name, field.default
    override = _overrides(node).get(name)
    is_whole = override is not None and override.type_ is Parameter.Type.INTEGER
    if is_whole and isinstance(default, float):  # `5` in YAML where 5.0 is meant
        _overrides(node)[name] = Parameter(name, value=float(override.value))
    is_list = isinstance(default, tuple)
    is_emptied = is_list and override is not None and not override.value
    if is_emptied:  # rclpy can't tell the type of [] and takes it for bytes; not set is as good
        del _overrides(node)[name]
    empty = is_list and (is_emptied or not default)
    start = Parameter.Type.STRING_ARRAY if empty else default
    try:
        value = node.declare_parameter(name, start, descriptor(field)).value
    except (InvalidParameterTypeException, InvalidParameterValueException) as error:
        given = override.value if override is not None else default
        raise ValueError(
            f'{node.get_name()}: parameter {name!r} can not be {given!r}: expected {_expected(field)}'
        ) from error
    if isinstance(default, tuple):
        value = tuple(value or ())
    try:
        _check_choice(field, value)
    except ValueError as error:
        raise ValueError(f'{node.get_name()}: {error}') from None
    return value


def _check_choice(field: dataclasses.Field, value: Any) -> None:
    choices = field.metadata['choices']
    if isinstance(value, float) and not math.isfinite(value):  # no range of ROS keeps NaN out
        raise ValueError(f'parameter {field.name!r} can not be {value}')
    if choices and value not in choices:
        raise ValueError(
            f'parameter {field.name!r} can not be {value!r}; choose one of {", ".join(choices)}'
        )
