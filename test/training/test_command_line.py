"""What can be typed: each verb takes the options that it uses, and every command in the documentation is one of them."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.training.command_line import HELP, parser  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
TYPED = re.compile(r'python -m mose_ros\.training ((?:[^`#\n\\]|\\\n)+)')


def documented():
    """Yield each command of the documentation, as words; `a|b` stands for two."""
    for page in PAGES:
        for found in TYPED.findall(page.read_text(encoding='utf-8')):
            text = found.replace('\\\n', ' ').split('&&')[0]
            if text[0].islower() and '[' not in text and '...' not in text:
                verb, *words = shlex.split(text)
                for one in verb.split('|'):
                    for way in words[0].split('|') if words else [None]:
                        yield page.name, [one, *([way, *words[1:]] if words else [])]


COMMANDS = list(documented())


@pytest.mark.parametrize(
    ('page', 'words'), COMMANDS, ids=[' '.join(words) for _, words in COMMANDS]
)
def test_a_documented_command_can_be_typed(page, words):
    assert parser('').parse_args(words).verb == words[0]


def test_the_documentation_shows_nearly_every_verb():
    alone = {'collect', 'router', 'sft'}  # are typed by those who do `all` in steps
    assert set(HELP) - {words[0] for _, words in COMMANDS} <= alone


@pytest.mark.parametrize(
    ('words', 'foreign'),
    [
        ('router', '--table language'),
        ('collect', '--precision fp16'),
        ('sft', '--labels FILE'),
        ('export', '--seeds 0-3'),
        ('ablate --table language', '--cache DIR'),
        ('convert HF_DIR', '--work DIR'),
    ],
)
def test_an_option_of_another_verb_is_refused_and_named(words, foreign, capsys):
    assert parser('').parse_args(words.split()).verb
    with pytest.raises(SystemExit) as end:
        parser('').parse_args([*words.split(), *foreign.split()])
    assert end.value.code == 2
    assert f'unrecognized arguments: {foreign}' in capsys.readouterr().err


@pytest.mark.parametrize('verb', HELP)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as end:
        parser('').parse_args([verb, '--help'])
    assert end.value.code == 0
    assert HELP[verb].split()[1] in capsys.readouterr().out
