"""What is given a skill on each level, whatever data it comes from, and how a label is checked against the taxonomy.

A source has samples by index, so that a subset can be drawn without reading all. A sample says in words what is known of it
(ego state, driven trajectory, question and answer: MoSE, "Skill Data Annotation"), shows its pictures when asked, and carries
what the rules say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mose_ros.core.skills import GENERAL, Taxonomy
from mose_ros.data.pictures import Picture


@dataclass(frozen=True, kw_only=True)
class SkillSample:
    """One sample to be labelled, and all that an annotator may know of it."""

    name: str  # unique in its source
    facts: Mapping[str, str]  # what is known, in words: title -> text
    rules: Mapping[str, str]  # level -> skill, as the rules say; empty where nobody asked them
    pictures: Callable[[], Mapping[str, Picture]]  # by caption; ValueError names a bad file


class Source(Protocol):
    """Data that can be labelled."""

    SKILLS: Mapping[
        str, tuple[str, ...]
    ]  # what its rules can say: level -> skills, beside `general`

    def __len__(self) -> int: ...

    def sample(self, index: int) -> SkillSample:
        """Return a sample; ValueError names the file that is missing or malformed."""


def check(taxonomy: Taxonomy, skills: Mapping[str, str]) -> dict[str, str]:
    """Return a label in the order of the levels; ValueError where a level or a skill is missing or not known."""
    if not isinstance(skills, Mapping):
        raise ValueError(f'expected a skill for each level, got {skills!r}')
    unknown = [level for level in skills if level not in taxonomy.levels]
    if unknown:
        raise ValueError(f'no level {unknown[0]!r}; known: {", ".join(taxonomy.levels)}')
    for level in taxonomy.levels:
        if level not in skills:
            raise ValueError(f'no skill for level {level!r}')
        if not isinstance(skills[level], str):
            raise ValueError(f'level {level!r}: expected one skill, got {skills[level]!r}')
        taxonomy.index(level, skills[level])
    return {level: skills[level] for level in taxonomy.levels}


def missing(taxonomy: Taxonomy, said: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the `level: skill` that rules can say and a taxonomy does not have."""
    known = taxonomy.levels
    return [
        f'{level}: {skill}'
        for level, names in said.items()
        for skill in names
        if skill not in known.get(level, ())
    ]


def chain(taxonomy: Taxonomy, **named: str) -> dict[str, str]:
    """Return a label with the named skills, and `general` on the levels that are not used (MoSE, "Skill Definition")."""
    return check(taxonomy, {**dict.fromkeys(taxonomy.levels, GENERAL), **named})


def most_pressing(found: Sequence[str], order: Sequence[str]) -> str:
    """Return the skill of `found` that comes first in `order`, `general` where there is none.

    One label per moment; on overlap the most safety-critical one wins (DriveMoE).
    """
    return next((skill for skill in order if skill in found), GENERAL)
