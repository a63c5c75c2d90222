"""CODA-LM's questions about corner cases as samples for skill labels.

    <root>/CODA-LM/Train/val_0001.json ...   one file for each picture; the split's name is not the picture folder's
    <root>/val/images/0001.jpg ...           of CODA2022, fetched separately

A file holds `general_perception` (lists of objects by kind), `region_perception` (boxes by number) and `driving_suggestion`
(text). Keys come with spaces or with underscores. Source: DLUT-LYZ/CODA-LM, README.md "Data Format" and convert2vqa.py for the
layout, evaluation/stage3_eval_batch.py for the seven kinds of region.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mose_ros.core.skills import GENERAL, Taxonomy
from mose_ros.data.pictures import Picture
from mose_ros.data.skill_samples import SkillSample, chain, most_pressing

FOLDER = 'CODA-LM'
SPLITS = ('Train', 'Val', 'Test', 'Mini')
TASKS = {  # what is asked, in our words
    'general_perception': 'Which objects in the picture matter to the ego vehicle, and why?',
    'region_perception': 'What is inside the red frame, and why does it matter to the ego vehicle?',
    'driving_suggestion': 'What should the ego vehicle do here?',
}
KINDS = {  # lists of general_perception -> skill of perception; the more pressing first
    'vulnerable_road_users': 'vulnerable_road_user',
    'vehicles': 'vehicle',
    'traffic_cones': 'static_obstacle',
    'barriers': 'static_obstacle',
    'other_objects': 'static_obstacle',
    'traffic_lights': 'traffic_control',
    'traffic_signs': 'traffic_control',
}
_PRESSING = tuple(dict.fromkeys(KINDS.values()))
_CATEGORIES = {  # skill of perception -> categories of regions; all others lie on the road
    'vehicle': 'car truck tram tricycle bus trailer construction_vehicle recreational_vehicle',
    'vulnerable_road_user': (
        'pedestrian cyclist bicycle moped motorcycle stroller wheelchair cart dog cat'
    ),
    'traffic_control': 'warning_sign traffic_sign traffic_light',
}
CATEGORIES = {name: skill for skill, names in _CATEGORIES.items() for name in names.split()}
_WORDS = {  # skill of planning -> what a suggestion says; the more pressing first
    'emergency_brake': (
        r'brak\w* (?:hard|immediately|sharply)|emergency (?:brak|stop)\w*|immediate(?:ly)? (?:brak|stop)\w*'
        r'|(?:brake|stop) immediately|hard brak\w*'
    ),
    'give_way': r'yield\w*|giv\w+ way|let\b[^.]{0,40}\b(?:pass|cross|go)\b|wait\w* for\b',
    'traffic_sign': (
        r'(?:red|yellow|green|traffic) (?:light|signal)s?|stop sign|stop line|(?:traffic|road) signs?'
    ),
    'parking_exit': r'pull\w* out|leav\w+ the parking',
    'overtaking': (
        r'overtak\w*|bypass\w*|detour\w*|(?:go|going|steer\w*|driv\w+|mov\w+) around|pass\w* (?:it|them|by)'
    ),
    'merging': (
        r'chang\w+ (?:to )?(?:the )?(?:left |right |another |adjacent )?lanes?|lane chang\w*|merg\w+'
        r'|switch\w* (?:to )?(?:the )?(?:left |right )?lanes?'
    ),
}
_PLANNING = {
    skill: re.compile(rf'\b(?:{words})', re.IGNORECASE) for skill, words in _WORDS.items()
}
_DENIED = re.compile(
    r"(?:\b(?:not|never|no|without|avoid|refrain from)|n't)\s+(?:\w+\s+){0,2}$", re.IGNORECASE
)


class CodaLmSource:
    """The questions of one split; without a taxonomy the rules are not asked."""

    SKILLS = {'perception': _PRESSING, 'planning': (*_WORDS, 'normal')}

    def __init__(self, root: str | Path, taxonomy: Taxonomy | None, split: str = 'Train'):
        self.root, self.taxonomy = Path(root), taxonomy
        split = split.capitalize()
        if split not in SPLITS:
            raise ValueError(f'CODA-LM has no split {split!r}; known: {", ".join(SPLITS)}')
        folder = self.root / FOLDER / split
        paths = sorted(folder.glob('*_*.json'))
        if not paths:
            raise ValueError(
                f'{folder} holds no annotation as val_0001.json; fetch CODA-LM to there'
            )
        self._questions = [(path, task, key) for path in paths for task, key in _questions(path)]

    def __len__(self) -> int:
        return len(self._questions)

    def sample(self, index: int) -> SkillSample:
        """Return a question with the annotators' answer."""
        path, task, key = self._questions[index]
        data = read(path)
        folder, _, number = path.stem.partition('_')
        picture = self.root / folder / 'images' / f'{number}.jpg'
        region = data['region_perception'][key] if key else {}
        if task == 'general_perception':
            answer = data['general_perception'].get('description_and_explanation', '')
            skills = {'perception': _whole(data)}
        elif task == 'region_perception':
            answer = region.get('description_and_explanation', '')
            skills = {'perception': CATEGORIES.get(region['category_name'], 'static_obstacle')}
        else:
            answer = data['driving_suggestion']
            skills = {'perception': _whole(data), 'planning': planning(answer)}
        answers = {'answer of people who know': answer} if answer else {}
        return SkillSample(
            name=f'{path.parent.name}/{path.stem}:{task}{f":{key}" if key else ""}',
            facts={'question': TASKS[task], **answers},
            rules=chain(self.taxonomy, **skills) if self.taxonomy else {},
            pictures=lambda: {'front': _picture(picture, region.get('box'))},
        )


def _questions(path: Path) -> list[tuple[str, str]]:
    """Return task and region of each question about a picture; a file that can't be read keeps one, which tells why when asked."""
    try:
        regions = list(read(path)['region_perception'])
    except ValueError:
        return [('general_perception', '')]
    return [
        ('general_perception', ''),
        *(('region_perception', key) for key in regions),
        ('driving_suggestion', ''),
    ]


def read(path: Path) -> dict[str, Any]:
    """Return an annotation with underscores for the spaces in its keys; ValueError where it is none."""
    try:
        data = _underscored(json.loads(path.read_text(encoding='utf-8')))
        general, regions = data['general_perception'], data['region_perception']
        if not isinstance(general, dict) or not isinstance(data['driving_suggestion'], str):
            raise TypeError('general_perception is no mapping or driving_suggestion no text')
        for key, region in regions.items():
            if len(region['box']) != 4 or not isinstance(region['category_name'], str):
                raise TypeError(f'region {key} has no box of four and category_name')
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is no annotation of CODA-LM ({type(error).__name__}: {error}); fetch it again'
        ) from None
    return data


def _underscored(data: Any) -> Any:
    if isinstance(data, dict):
        return {key.replace(' ', '_'): _underscored(value) for key, value in data.items()}
    return [_underscored(one) for one in data] if isinstance(data, list) else data


def _whole(data: Mapping[str, Any]) -> str:
    """Return the skill of perception of a whole picture: of the most pressing kind that is in it."""
    listed = [skill for kind, skill in KINDS.items() if data['general_perception'].get(kind)]
    return most_pressing(listed, _PRESSING)


def planning(suggestion: str) -> str:
    """Return the skill of planning of a suggestion: the most pressing one it names without denying it, else `normal`."""
    if not suggestion.strip():
        return GENERAL  # an incomplete sample
    for skill, pattern in _PLANNING.items():
        for match in pattern.finditer(suggestion):
            if not _DENIED.search(suggestion[: match.start()]):
                return skill
    return 'normal'


def _picture(path: Path, box) -> Picture:
    try:
        return Picture(data=path.read_bytes(), box=tuple(map(float, box)) if box else None)
    except OSError as error:
        raise ValueError(f'{path} cannot be read: {error.strerror}; fetch CODA2022') from None
