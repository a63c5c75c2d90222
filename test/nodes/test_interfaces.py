"""docs/interfaces.md says of topics, services, parameters and launch arguments what the code says."""

import re
from pathlib import Path

import pytest

from mose_ros.nodes import drive, interfaces

ROOT = Path(__file__).parents[2]
PAGE, LAUNCH = ROOT / 'docs/interfaces.md', ROOT / 'launch/drive.launch.py'


@pytest.fixture
def nodes(context, bundle):
    """Return the vehicle's nodes, configured."""
    made = interfaces.configured(bundle, context=context)
    yield made
    for node in made.values():
        node.close()
        node.destroy_node()


def test_every_table_of_the_page_is_what_the_code_says(nodes):
    text = PAGE.read_text()
    made = interfaces.filled(text, nodes, LAUNCH)
    wrong = [line for line in made.splitlines() if line not in text.splitlines()]
    assert made == text, (
        f'run `python -m mose_ros.nodes.interfaces docs/interfaces.md`; it would write {wrong[:5]}'
    )


def test_the_page_has_a_table_of_everything():
    there = {found.groups()[1:3] for found in interfaces.MARKED.finditer(PAGE.read_text())}
    wanted = {('parameters', name) for name in (*interfaces.PARAMETERS, 'all')}
    wanted |= {('topics', name) for name in interfaces.NODES}
    assert there == wanted | {('arguments', 'drive'), ('services', 'driver')}


def test_a_table_that_has_drifted_is_found(nodes):
    drifted = PAGE.read_text().replace('`max_age_s` | `0.3`', '`max_age_s` | `0.4`', 1)
    made = interfaces.filled(drifted, nodes, LAUNCH)
    assert made != drifted and '`max_age_s` | `0.4`' not in made


def test_every_service_of_ours_is_explained_and_offered(nodes):
    text = PAGE.read_text()
    named = set(re.findall(r'`[<\w>]+/(set_enabled|reset|reload_bundle|explain)`', text))
    offered = {
        one.srv_name.rpartition('/')[2]
        for node in nodes.values()
        for one in node.services
        if one.srv_type.__module__.startswith('std_srvs')
    }
    assert named == offered == {'set_enabled', 'reset', 'reload_bundle', 'explain'}


def test_what_the_troubleshooting_quotes_is_said_by_the_code():
    page = (ROOT / 'docs/interfaces.md').read_text()
    table = page.split('## Troubleshooting')[1].split('\n## ')[0]
    quoted = re.findall(r'^\| `([^|]*)` \|', table, re.M)
    assert len(quoted) > 10
    sources = [*(ROOT / 'mose_ros').rglob('*.py'), ROOT / 'scripts/environment.sh']
    said = '\n'.join(path.read_text() for path in sources)
    said = said.replace('{START_LIMIT_S:.0f}', f'{drive.START_LIMIT_S:.0f}')
    for text in quoted:
        assert all(part.strip() in said for part in text.split('...')), text
