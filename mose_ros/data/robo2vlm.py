"""Robo2VLM's questions about robot trajectories as samples for skill labels.

    <root>/**/train-00000-of-00123.parquet   as on the hub: id, question, choices, correct_answer, image {bytes, path}
    <root>/**/train.jsonl                    the same columns, image being a path beside the file

Choices are a list or a text that holds one, the answer is a number from 0 or a letter: both were published. The rows don't tell
which prototype asked, so the question's own words do. Sources: card of keplerccc/Robo2VLM-1 (features) and KeplerC/robo2VLM,
generation/vqa.py (prototypes and their words) and scripts/create_huggingface_dataset.py (rows).
"""

import ast
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mose_ros.core.skills import Taxonomy
from mose_ros.data.pictures import Picture
from mose_ros.data.skill_samples import SkillSample, chain

LETTERS = 'ABCDEFGH'
_REASONING = 'interpretation_and_reasoning'
PROTOTYPES = {  # words of a question -> (prototype, level, skill)
    r'gripper open': ('robot_gripper_open', 'perception', 'robot_state'),
    r'obstacle blocking the robot': ('object_reachable', _REASONING, 'reachability'),
    r'relative to the robot.s end effector': (
        'relative_direction', 'perception', 'spatial_relation'
    ),
    r'point is (?:CLOSEST|FARTHEST)': ('relative_depth', 'perception', 'spatial_relation'),
    r'same 3D location': ('multi_view_correspondence', 'perception', 'several_views'),
    r'successfully completed the task': ('task_success_state', _REASONING, 'success'),
    r'grasp of .* stable': ('is_stable_grasp', _REASONING, 'grasp'),
    r'phase of the grasp action': ('action_understanding', _REASONING, 'task_state'),
    r'NEXT action phase': ('next_action', 'planning', 'next_action'),
    r'colored arrow .* move next': ('action_direction_selection', 'planning', 'direction'),
    r'correct sequence of action phases': ('temporal_sequence', 'planning', 'sequence'),
    r'task is the robot performing': ('temporal_sequence', 'planning', 'goal'),
    r'shows the goal state': ('goal_configuration', 'planning', 'goal'),
    r'instruction best describes': ('trajectory_understanding', 'planning', 'goal'),
}  # fmt: skip
_PATTERNS = {re.compile(words, re.IGNORECASE): found for words, found in PROTOTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A multiple-choice question and its answer."""

    name: str
    text: str
    choices: tuple[str, ...]
    correct: int  # index of the right choice

    @property
    def prototype(self) -> tuple[str, str, str]:
        """Return prototype, level and skill; '' of each where nobody knows the question's words."""
        found = (one for words, one in _PATTERNS.items() if words.search(self.text))
        return next(found, ('', '', ''))


class Robo2VlmSource:
    """The questions of one split; without a taxonomy the rules are not asked."""

    SKILLS = {
        level: tuple(skill for _, at, skill in PROTOTYPES.values() if at == level)
        for level in ('perception', _REASONING, 'planning')
    }

    def __init__(self, root: str | Path, taxonomy: Taxonomy | None, split: str = 'train'):
        self.taxonomy = taxonomy
        root = Path(root)
        paths = sorted(root.rglob(f'{split}-*.parquet'))
        tables = [_Parquet(path) for path in paths]
        tables += [_Lines(path) for path in sorted(root.rglob(f'{split}.jsonl'))]
        self._rows = [(table, row) for table in tables for row in range(len(table))]
        if not self._rows:
            raise ValueError(f'{root} holds neither {split}-*.parquet nor {split}.jsonl')

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> SkillSample:
        """Return a question; a question of no known prototype is `general` on every level."""
        table, row = self._rows[index]
        where = f'{table.path}, row {row}'
        question = parse(table.row(row), where)
        _, level, skill = question.prototype
        named = {level: skill} if level else {}
        listed = ' '.join(
            f'({letter}) {one}' for letter, one in zip(LETTERS, question.choices, strict=False)
        )
        right = f'({LETTERS[question.correct]}) {question.choices[question.correct]}'
        return SkillSample(
            name=question.name,
            facts={'question': question.text, 'choices': listed, 'right choice': right},
            rules=chain(self.taxonomy, **named) if self.taxonomy else {},
            pictures=lambda: {'robot': Picture(data=table.image(row))},
        )


def parse(row: Mapping[str, Any], where: str) -> Question:
    """Return the question of a row; ValueError says what is wrong with it and where."""
    try:
        choices = _choices(row['choices'])
        return Question(
            name=str(row['id']),
            text=str(row['question']),
            choices=choices,
            correct=_index(row['correct_answer'], choices),
        )
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f'{where} is no question of Robo2VLM ({type(error).__name__}: {error})'
        ) from None


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = ast.literal_eval(value)  # a printed list
    texts = tuple(str(one['text'] if isinstance(one, Mapping) else one) for one in value)
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f'{len(texts)} choices')
    return texts


def _index(answer: Any, choices: tuple[str, ...]) -> int:
    text = str(answer).strip()
    index = int(text) if text.isdigit() else LETTERS.find(text.upper()) if len(text) == 1 else -1
    if not 0 <= index < len(choices):
        raise ValueError(f'answer {answer!r} to {len(choices)} choices')
    return index


class _Parquet:
    """A parquet file of which single rows are read; pictures only when asked for."""

    def __init__(self, path: Path):
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise ValueError(
                f'{path}: parquet needs pyarrow; pip install mose_ros[train]'
            ) from None
        self.path = path
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, ArrowException) as error:
            raise ValueError(f'{path} cannot be read: {error}; fetch it again') from None
        self._error = (OSError, ArrowException)
        groups = range(self._file.metadata.num_row_groups)
        self._groups = [
            (group, row)
            for group in groups
            for row in range(self._file.metadata.row_group(group).num_rows)
        ]
        self._lock = threading.Lock()  # a ParquetFile is not for several threads
        self._table = lru_cache(maxsize=2)(self._read)

    def __len__(self) -> int:
        return len(self._groups)

    def row(self, index: int) -> dict[str, Any]:
        group, row = self._groups[index]
        names = tuple(
            name for name in self._file.schema_arrow.names if name not in ('image', 'images')
        )
        with self._lock:
            return self._table(group, names).slice(row, 1).to_pylist()[0]

    def image(self, index: int) -> bytes:
        group, row = self._groups[index]
        with self._lock:
            found = self._table(group, ('image',)).slice(row, 1).to_pylist()[0]['image']
        if not found or not found.get('bytes'):
            raise ValueError(f'{self.path}, row {index} has no picture')
        return found['bytes']

    def _read(self, group: int, names: tuple[str, ...]):
        try:
            return self._file.read_row_group(group, columns=list(names))
        except self._error as error:
            raise ValueError(f'{self.path} cannot be read: {error}; fetch it again') from None


class _Lines:
    """A JSON-lines file with pictures beside it."""

    def __init__(self, path: Path):
        self.path = path
        # at \n alone: JSON leaves U+2028 and its like as they are inside of a text
        self._lines = [line for line in path.read_bytes().split(b'\n') if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> dict[str, Any]:
        try:
            row = json.loads(self._lines[index])
        except ValueError as error:
            raise ValueError(f'{self.path}, row {index} is no JSON: {error}') from None
        if not isinstance(row, dict):
            raise ValueError(f'{self.path}, row {index} is no JSON object')
        return row

    def image(self, index: int) -> bytes:
        path = self.path.parent / str(self.row(index).get('image', ''))
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f'{path} cannot be read: {error.strerror}') from None
