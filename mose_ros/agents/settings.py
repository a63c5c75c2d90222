"""Agents' YAML files: a file's settings become a dataclass, or an error that names the file and what is wrong in it."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml

Kind = TypeVar('Kind')


def load(kind: type[Kind], path: str | Path, paths: tuple[str, ...]) -> Kind:
    """Read a file of the fields of a dataclass; those of `paths` are seen from the file, and made absolute.

    ValueError names the file and what is wrong in it.
    """
    path = Path(path)
    data = _mapping(path)
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(data, dict):
        raise ValueError(f'{path} holds no settings; known: {", ".join(fields)}')
    for name, value in data.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f'did you mean {near[0]!r}?' if near else f'known: {", ".join(fields)}'
            raise ValueError(f'{path}: unknown setting {name!r}; {hint}')
        if fields[name] is float and type(value) is int:
            data[name] = value = float(value)
        if type(value) is not fields[name]:
            raise ValueError(f'{path}: {name} must be {fields[name].__name__}, not {value!r}')
    try:
        config = kind(**data)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    given = {name: getattr(config, name) for name in paths}
    return dataclasses.replace(
        config,
        **{name: str((path.parent / one).resolve()) for name, one in given.items() if one},
    )


def _mapping(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding='utf-8')) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f'{path} cannot be read as YAML: {error}') from None
