import pytest

from mose_ros.core import skills
from mose_ros.core.types import FAMILIES


@pytest.fixture(scope='module')
def taxonomy():
    return skills.Taxonomy.load(skills.default_path())


def test_the_skills_of_driving_have_three_levels_with_a_general_skill(taxonomy):
    assert tuple(taxonomy.levels) == skills.LEVELS
    for level in skills.LEVELS:
        assert skills.GENERAL in taxonomy.names(level)
        assert all(taxonomy.levels[level].values()), 'every skill has a definition'


def test_the_skills_of_robots_are_a_taxonomy_of_their_own(taxonomy):
    robot = skills.Taxonomy.load(skills.default_path('skills_robot.yaml'))
    assert tuple(robot.levels) == ('perception', 'interpretation_and_reasoning', 'planning')
    for level in robot.levels:
        assert robot.names(level)[0] == skills.GENERAL
        assert all(robot.levels[level].values()), 'every skill has a definition'
    assert robot.names('planning') != taxonomy.names('planning')
    with pytest.raises(FileNotFoundError, match='config/skills_boat.yaml'):
        skills.default_path('skills_boat.yaml')


def test_the_action_mixture_has_the_seven_driving_skills(taxonomy):
    assert skills.action_skills(taxonomy) == FAMILIES


def test_a_skill_is_known_by_its_place(taxonomy):
    for level in taxonomy.levels:
        names = taxonomy.names(level)
        assert [taxonomy.index(level, name) for name in names] == list(range(len(names)))
    with pytest.raises(ValueError, match="no skill 'cut_in' on level 'planning'; known: general"):
        taxonomy.index('planning', 'cut_in')


def test_a_level_without_a_general_skill_is_refused(tmp_path):
    path = tmp_path / 'skills.yaml'
    path.write_text('levels: {seeing: {cars: there are cars}}')
    with pytest.raises(ValueError, match="skills.yaml: level 'seeing'"):
        skills.Taxonomy.load(path)


@pytest.mark.parametrize('text', ['', '- a', 'levels: [a, b]', 'skills: {}', 'levels: {a: b}'])
def test_a_file_that_is_no_taxonomy_is_refused_by_name(tmp_path, text):
    path = tmp_path / 'skills.yaml'
    path.write_text(text)
    with pytest.raises(ValueError, match='skills.yaml'):
        skills.Taxonomy.load(path)


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / 'skills.yaml'
    path.write_text('levels: !!python/object/apply:os.getcwd []')
    with pytest.raises(ValueError, match='skills.yaml'):
        skills.Taxonomy.load(path)
