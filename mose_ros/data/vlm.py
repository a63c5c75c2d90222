"""Skill labels by a vision-language model: what it is shown and told, and what counts as an answer.

It gets the pictures, the facts of the sample (ego state, trajectory, question), the definition of every skill and a list of
rules (MoSE, "Skill Data Annotation"), and answers one JSON object. An answer that is not a label of the taxonomy
goes back to it with what is wrong, a few times.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mose_ros.core.skills import GENERAL, Taxonomy
from mose_ros.data.chat import Client, Rejected
from mose_ros.data.skill_samples import SkillSample, check

REASON = 'reason'
LABELLED, MALFORMED, REFUSED, REJECTED = 'labelled', 'malformed', 'refused', 'rejected'
RULES = (
    'Give exactly one skill for each level, by its name as listed.',
    'Label what the ego vehicle or the robot has to deal with here, not everything that can be seen.',
    'When several skills of a level hold, take the one that matters most for safety.',
    f'When a level has nothing to do in this sample, its skill is {GENERAL}.',
    f'When the sample is incomplete or ambiguous for a level, its skill is {GENERAL}.',
    'When a question is about a marked region, label perception by what is in that region alone.',
    'The trajectory and the answers given are the truth; when the picture seems to say otherwise, follow them.',
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of one sample."""

    status: str  # LABELLED, MALFORMED, REFUSED (by the model), REJECTED (by the server)
    skills: Mapping[str, str] = field(default_factory=dict)  # where labelled
    reason: str = ''  # of the model for its label, or why there is none
    repairs: int = 0  # how often it had to be asked again


class VlmAnnotator:
    """Labels samples through a chat API."""

    def __init__(self, client: Client, taxonomy: Taxonomy, *, repairs: int = 2):
        self.client, self.taxonomy, self.repairs = client, taxonomy, repairs
        self._system = instructions(taxonomy)
        self._schema = schema(taxonomy)

    def annotate(self, sample: SkillSample) -> Verdict:
        """Return the model's label of a sample; ValueError where its pictures are missing or nobody can be asked."""
        messages: list[dict[str, Any]] = [
            {'role': 'system', 'content': self._system},
            {'role': 'user', 'content': self._shown(sample)},
        ]
        wrong = ''
        for repair in range(self.repairs + 1):
            try:
                answer = self.client.ask(messages, self._schema)
            except Rejected as error:
                return Verdict(status=REJECTED, reason=str(error), repairs=repair)
            if answer.refusal or answer.finish == 'content_filter':
                why = answer.refusal or 'filtered by the server'
                return Verdict(status=REFUSED, reason=why, repairs=repair)
            try:
                skills, reason = read(answer.text, self.taxonomy)
                return Verdict(status=LABELLED, skills=skills, reason=reason, repairs=repair)
            except ValueError as error:
                wrong = 'it is cut off' if answer.finish == 'length' else str(error)
            messages += [
                {'role': 'assistant', 'content': answer.text},
                {'role': 'user', 'content': f'This is no valid answer: {wrong}. Answer again.'},
            ]
        return Verdict(status=MALFORMED, reason=wrong, repairs=self.repairs)

    def _shown(self, sample: SkillSample) -> list[Any]:
        shown: list[Any] = []
        for caption, picture in sample.pictures().items():
            shown += [f'Camera: {caption}', picture]
        facts = [f'{title}: {text}' for title, text in sample.facts.items()]
        return [*shown, '\n'.join([*facts, 'Which skill does each level need?'])]


def instructions(taxonomy: Taxonomy) -> str:
    """Return what the model is told once: levels, skills with their definitions, rules, and the form of the answer."""
    lines = [
        'You label samples of driving or robot manipulation with the skills they need.',
        'A skill chain has one skill for each level, from seeing to acting.',
    ]
    for level, skills in taxonomy.levels.items():
        lines.append(f'Level {level}:')
        lines += [f'- {name}: {definition}' for name, definition in skills.items()]
    lines.append('Rules:')
    lines += [f'{number}. {rule}' for number, rule in enumerate(RULES, start=1)]
    form = {**dict.fromkeys(taxonomy.levels, '<skill>'), REASON: '<one short sentence>'}
    lines.append(f'Answer with one JSON object and nothing else: {json.dumps(form)}')
    return '\n'.join(lines)


def schema(taxonomy: Taxonomy) -> dict[str, Any]:
    """Return the JSON schema of an answer, for servers that can hold a model to one."""
    properties: dict[str, Any] = {
        level: {'type': 'string', 'enum': list(taxonomy.names(level))} for level in taxonomy.levels
    }
    properties[REASON] = {'type': 'string'}
    return {
        'type': 'object',
        'properties': properties,
        'required': list(properties),
        'additionalProperties': False,
    }


def read(text: str, taxonomy: Taxonomy) -> tuple[dict[str, str], str]:
    """Return label and reason of an answer, also of one with a fence or talk around it; ValueError says what is wrong."""
    text = re.sub(r'<think>.*?</think>', '', text, flags=re.DOTALL)  # where a server leaves it in
    match = re.search(r'\{.*\}', text, re.DOTALL)
    if match is None:
        raise ValueError('there is no JSON object in it')
    try:
        data = json.loads(match[0])
    except ValueError as error:
        raise ValueError(f'it is no valid JSON ({error})') from None
    reason = data.pop(REASON, '')
    return check(taxonomy, data), reason if isinstance(reason, str) else ''
