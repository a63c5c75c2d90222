"""The reasoning text of a moment: three sentences, one per level, about the one thing that matters; and back from text to slots.

A small closed language, so that a tiny vocabulary covers it and a judge needs no other model:

    perception : a pedestrian ahead on the right , 15 m . prediction : the pedestrian crosses our way from the right .
    planning : brake hard for the pedestrian in our way .

`tell` writes it from labels, `parse` reads it, also where it is broken; `all_sentences` lists every sentence there is.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mose_ros.core import prompt
from mose_ros.core.skills import GENERAL, LEVELS
from mose_ros.data.rules import Labels
from mose_ros.data.sight import Sighting

NOUNS = {  # what can be the target -> skill of perception
    'pedestrian': 'vulnerable_road_user',
    'cyclist': 'vulnerable_road_user',
    'car': 'vehicle',
    'truck': 'vehicle',
    'emergency vehicle': 'vehicle',
    'parked car': 'static_obstacle',
    'roadworks': 'static_obstacle',
    'red light': 'traffic_control',
    'yellow light': 'traffic_control',
    'green light': 'traffic_control',
    'stop sign': 'traffic_control',
}
_BY_TYPE = {
    'walker.pedestrian': 'pedestrian',
    'vehicle.bicycle': 'cyclist',
    'vehicle.truck': 'truck',
    'vehicle.emergency': 'emergency vehicle',
    'vehicle.parked': 'parked car',
    'traffic.stop': 'stop sign',
}
_BY_KIND = {
    'walker': 'pedestrian', 'vehicle': 'car', 'traffic_sign': 'stop sign', 'static': 'roadworks'
}  # fmt: skip
PLACES = {
    'ahead': 'ahead',
    'ahead_left': 'ahead on the left',
    'ahead_right': 'ahead on the right',
    'beside_left': 'beside us on the left',
    'beside_right': 'beside us on the right',
    'behind': 'behind us',
    'behind_left': 'behind us on the left',
    'behind_right': 'behind us on the right',
}
MOTIONS = {  # what the target does -> (sentence, skill of prediction)
    'nothing': ('the road ahead stays free .', GENERAL),
    'governs': ('the {noun} applies to us .', GENERAL),
    'stays': ('the {noun} will not move .', GENERAL),
    'goes_on': ('the {noun} goes on at its speed .', GENERAL),
    'slows': ('the {noun} slows down ahead of us .', 'slowing'),
    'stands': ('the {noun} stands still ahead of us .', 'slowing'),
    'cuts_in': ('the {noun} comes into our lane from the {side} .', 'cut_in'),
    'crosses': ('the {noun} crosses our way from the {side} .', 'crossing'),
    'towards': ('the {noun} comes towards us .', 'approaching'),
    'from_behind': ('the {noun} comes near from behind .', 'approaching'),
}
ACTIONS = {
    'keep_going': 'keep going',
    'start': 'start driving',
    'slow_down': 'slow down',
    'stop': 'come to a stop',
    'wait': 'wait at rest',
    'brake_hard': 'brake hard',
    'pull_over': 'move to the right',
    'pull_out': 'pull out',
    'change_left': 'change to the left lane',
    'change_right': 'change to the right lane',
    'pass_left': 'pass on the left',
    'pass_right': 'pass on the right',
    'turn_left': 'turn left',
    'turn_right': 'turn right',
}
REASONS = {  # skill of planning -> why; `normal` has three forms
    'emergency_brake': 'for the {noun} in our way .',
    'give_way': 'and let the {noun} go first .',
    'traffic_sign': 'and obey the {noun} .',
    'parking_exit': 'and leave the parking place .',
    'overtaking': 'to get past the {noun} .',
    'merging': 'to join the next lane .',
    'normal': 'and follow the road .',
    GENERAL: 'since the plan is not known .',
}
_NORMAL = {  # of `normal`, where there is a target: by its skill of perception
    'vehicle': 'and keep the distance to the {noun} .',
    'static_obstacle': 'and watch the {noun} .',
    'traffic_control': 'and watch the {noun} .',
    'vulnerable_road_user': 'and watch the {noun} .',
}
STEP_M, FARTHEST_M = 5, 60


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What one level's sentence says; empty where it says nothing of the kind."""

    skill: str = ''
    object: str = ''
    place: str = ''
    distance: int | None = None
    side: str = ''
    action: str = ''


def tell(labels: Labels) -> str:
    """Return the whole answer for a moment, as `core.prompt.answer` joins it."""
    return prompt.answer(sentences(labels))


def sentences(labels: Labels) -> dict[str, str]:
    """Return the sentence of each level."""
    target = labels.target
    noun = noun_of(target) if target is not None else ''
    return {
        'perception': _perception(noun, place_of(target), distance_of(target))
        if target is not None
        else 'nothing on the road concerns us .',
        'prediction': MOTIONS[labels.motion][0].format(noun=noun, side=labels.side),
        'planning': _planning(labels.skills['planning'], labels.action, noun),
    }


def noun_of(target: Sighting) -> str:
    """Return the word for an actor."""
    actor = target.actor
    if actor.kind == 'traffic_light':
        return f'{actor.state} light'
    return _BY_TYPE.get(actor.type_id) or _BY_KIND[actor.kind]


def place_of(target: Sighting) -> str:
    """Return where an actor is, a key of PLACES: by the ego's own axes, `ahead` being a lane that widens with distance."""
    side = 'left' if target.y > 0 else 'right'
    if abs(target.x) < 4.0 and abs(target.y) > 1.0:
        return f'beside_{side}'
    direction = 'ahead' if target.x > 0 else 'behind'
    if abs(target.y) < 1.8 + 0.06 * abs(target.x):
        return direction
    return f'{direction}_{side}'


def distance_of(target: Sighting) -> int:
    """Return the distance in m, rounded to 5."""
    return int(min(max(STEP_M * round(target.distance / STEP_M), STEP_M), FARTHEST_M))


def _perception(noun: str, place: str, distance: int) -> str:
    article = {'emergency vehicle': 'an ', 'roadworks': ''}.get(noun, 'a ')
    return f'{article}{noun} {PLACES[place]} , {distance} m .'


def _planning(skill: str, action: str, noun: str) -> str:
    reason = REASONS[skill]
    if '{noun}' in reason and not noun:
        raise ValueError(f'planning {skill!r} needs something that it is about')
    if skill == 'normal' and noun:
        reason = _NORMAL[NOUNS[noun]]
    return f'{ACTIONS[action]} {reason.format(noun=noun)}'


def all_sentences() -> Iterator[str]:
    """Yield every sentence that `sentences` can say, and some that it never will."""
    yield 'nothing on the road concerns us .'
    for noun in NOUNS:
        for place in PLACES:
            for distance in range(STEP_M, FARTHEST_M + 1, STEP_M):
                yield _perception(noun, place, distance)
    for template, _ in MOTIONS.values():
        for noun in NOUNS:
            for side in ('left', 'right'):
                yield template.format(noun=noun, side=side)
    for action in ACTIONS:
        for skill in REASONS:
            for noun in NOUNS:
                yield _planning(skill, action, noun)
        yield _planning('normal', action, '')


def all_words() -> list[str]:
    """Return all words of the language but plain numbers, sorted; those of `prompt.answer` included."""
    words = {
        word
        for text in (*all_sentences(), prompt.answer(dict.fromkeys(LEVELS, '')))
        for word in text.split()
    }
    return sorted(word for word in words if not word.isdigit())


# ---- from text to slots ----


def _pattern(template: str) -> re.Pattern:
    text = re.escape(template.removesuffix(' .'))
    nouns, sides = '|'.join(sorted(NOUNS, key=len, reverse=True)), 'left|right'
    text = text.replace(re.escape('{noun}'), f'(?P<noun>{nouns})')
    return re.compile(text.replace(re.escape('{side}'), f'(?P<side>{sides})') + r'\b')


_MOTION_PATTERNS = [(_pattern(text), skill) for text, skill in MOTIONS.values()]
_REASON_PATTERNS = [(_pattern(text), skill) for skill, text in REASONS.items()]
_REASON_PATTERNS += [(_pattern(text), 'normal') for text in dict.fromkeys(_NORMAL.values())]
_ACTION_PATTERNS = [(re.compile(rf'\b{text}\b'), action) for action, text in ACTIONS.items()]
_PERCEPTION = re.compile(
    r'\b(?P<noun>' + '|'.join(sorted(NOUNS, key=len, reverse=True)) + r')\b'
    r'(?: (?P<place>' + '|'.join(sorted(PLACES.values(), key=len, reverse=True)) + r'))?'
    r'(?: , (?P<distance>\d+) m)?'
)  # fmt: skip
_PLACE_KEYS = {text: key for key, text in PLACES.items()}


def parse(text: str) -> dict[str, Slots]:
    """Return the slots of each level that the text has; what it does not say, or garbles, stays empty."""
    found = prompt.parse_answer(text, LEVELS)
    readers = {
        'perception': _read_perception,
        'prediction': _read_prediction,
        'planning': _read_planning,
    }
    return {level: readers[level](sentence) for level, sentence in found.items()}


def _read_perception(sentence: str) -> Slots:
    match = _PERCEPTION.search(sentence)
    if match is None:
        return Slots(skill=GENERAL if 'nothing' in sentence.split() else '')
    distance = match['distance']
    return Slots(
        skill=NOUNS[match['noun']],
        object=match['noun'],
        place=_PLACE_KEYS.get(match['place'], ''),
        distance=int(distance) if distance else None,
    )


def _read_prediction(sentence: str) -> Slots:
    for pattern, skill in _MOTION_PATTERNS:
        if match := pattern.search(sentence):
            groups = match.groupdict()
            return Slots(skill=skill, object=groups.get('noun', ''), side=groups.get('side', ''))
    return Slots()


def _read_planning(sentence: str) -> Slots:
    action = next((one for pattern, one in _ACTION_PATTERNS if pattern.match(sentence)), '')
    for pattern, skill in _REASON_PATTERNS:
        if match := pattern.search(sentence):
            return Slots(skill=skill, object=match.groupdict().get('noun', ''), action=action)
    return Slots(action=action)


def facts(level: str, slots: Slots) -> frozenset[tuple[str, str]]:
    """Return what of a level is compared for F1: object and skill, and of planning the action."""
    pairs: Mapping[str, str] = {'object': slots.object, 'skill': slots.skill}
    if level == 'planning':
        pairs = {**pairs, 'action': slots.action}
    return frozenset((name, value) for name, value in pairs.items() if value)


def is_near(one: int | None, other: int | None) -> bool:
    """Say whether two distances agree within a quarter and one step."""
    if one is None or other is None:
        return one is other
    return math.fabs(one - other) <= STEP_M + 0.25 * max(one, other)
