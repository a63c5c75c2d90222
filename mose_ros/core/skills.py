"""The skill taxonomy: levels of skills, in the order of the experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

GENERAL = 'general'  # every level has it (MoSE, "Skill Definition")
LEVELS = ('perception', 'prediction', 'planning')


@dataclass(frozen=True)
class Taxonomy:
    """Named levels, in order of depth, of named and defined skills, in order of expert."""

    levels: Mapping[str, Mapping[str, str]]  # level -> skill -> definition

    def __post_init__(self):
        for level, skills in self.levels.items():
            if not isinstance(skills, Mapping) or GENERAL not in skills:
                raise ValueError(f'level {level!r} of the taxonomy needs a {GENERAL!r} skill')

    @classmethod
    def load(cls, path: str | Path) -> 'Taxonomy':
        """Read a taxonomy from YAML; ValueError names the file when it is not one."""
        try:
            data = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
        except yaml.YAMLError as error:
            raise ValueError(f'{path} is not plain YAML: {error}') from None
        if not isinstance(data, dict) or not _is_taxonomy(data.get('levels')):
            raise ValueError(
                f'{path}: expected a mapping `levels: {{level: {{skill: definition}}}}`'
            )
        try:
            return cls(data['levels'])
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None

    def names(self, level: str) -> tuple[str, ...]:
        """Return the skills of a level in the order of its experts."""
        return tuple(self.levels[level])

    def index(self, level: str, skill: str) -> int:
        """Return the expert of a skill; ValueError with the known ones otherwise."""
        if skill not in self.levels[level]:
            raise ValueError(
                f'no skill {skill!r} on level {level!r}; known: {", ".join(self.levels[level])}'
            )
        return self.names(level).index(skill)


def _is_taxonomy(levels) -> bool:
    return isinstance(levels, dict) and all(
        isinstance(skills, dict) and all(isinstance(text, str) for text in skills.values())
        for skills in levels.values()
    )


def action_skills(taxonomy: Taxonomy) -> tuple[str, ...]:
    """Return the experts of the action mixture: the last level without `general` (DriveMoE 1.3)."""
    last = list(taxonomy.levels)[-1]
    return tuple(skill for skill in taxonomy.names(last) if skill != GENERAL)


def default_path(name: str = 'skills.yaml') -> Path:
    """Return config/NAME of this installation: beside the package, or in the ament share folder."""
    here = Path(__file__).resolve()
    candidates = [here.parents[2] / 'config' / name]
    candidates += [parent / 'share/mose_ros/config' / name for parent in here.parents]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f'config/{name} was not found near {here}; reinstall mose_ros')
