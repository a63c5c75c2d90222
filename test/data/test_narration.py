import pytest

from mose_ros.core import prompt
from mose_ros.core.prompt import Tokenizer, word_tokenizer
from mose_ros.data import narration
from mose_ros.data.rules import label
from test.data.moments import actor, plan, scene

WALKER = scene(actor('walker', 15, -4, velocity=(0, 1.5)))


def test_a_pedestrian_in_words():
    text = narration.tell(label(WALKER, plan(7.0, -4.0)))

    assert text == (
        'perception : a pedestrian ahead on the right , 15 m . '
        'prediction : the pedestrian crosses our way from the right . '
        'planning : brake hard for the pedestrian in our way .'
    )


def test_text_is_read_back():
    labels = label(WALKER, plan(7.0, -4.0))

    slots = narration.parse(narration.tell(labels))

    seen, next_, done = slots['perception'], slots['prediction'], slots['planning']
    assert (seen.object, seen.place, seen.distance) == ('pedestrian', 'ahead_right', 15)
    assert (next_.skill, next_.object, next_.side) == ('crossing', 'pedestrian', 'right')
    assert (done.action, done.object, done.skill) == (
        'brake_hard',
        'pedestrian',
        'emergency_brake',
    )
    assert {level: one.skill for level, one in slots.items()} == dict(labels.skills)


def test_the_empty_road_in_words_and_back():
    labels = label(scene(), plan(7.0))

    slots = narration.parse(narration.tell(labels))

    assert {level: one.skill for level, one in slots.items()} == dict(labels.skills)
    assert slots['perception'].object == '' and slots['planning'].action == 'keep_going'


@pytest.mark.parametrize('text', ['', 'perception', 'perception : a a a planning : brake', 'car'])
def test_garbled_text_has_few_slots(text):
    facts = [narration.facts(level, one) for level, one in narration.parse(text).items()]

    assert not any(facts)


def test_broken_off_text_keeps_what_was_said():
    slots = narration.parse('perception : a parked car ahead , 20 m . prediction : the parked')

    assert narration.facts('perception', slots['perception']) == {
        ('object', 'parked car'), ('skill', 'static_obstacle')
    }  # fmt: skip
    assert not narration.facts('prediction', slots['prediction'])


def test_every_sentence_has_words_and_the_right_length():
    tokenizer = Tokenizer(word_tokenizer(narration.all_words()))

    words = narration.all_words()
    lengths = {len(sentence.split()) for sentence in narration.all_sentences()}

    assert len(words) < 120
    assert min(lengths) >= 5 and max(lengths) <= 16
    unknown = tokenizer.encode('<|unknown|>')
    for sentence in narration.all_sentences():
        assert not set(tokenizer.encode(sentence)) & set(unknown)
    assert set(tokenizer.encode('a zebra crosses')) & set(unknown)


def test_every_planning_sentence_is_read_back():
    for action in narration.ACTIONS:
        for skill in narration.REASONS:
            for noun in narration.NOUNS:
                text = prompt.answer({'planning': narration._planning(skill, action, noun)})
                slots = narration.parse(text)['planning']
                assert (slots.action, slots.skill) == (action, skill), text
