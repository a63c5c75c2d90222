"""Files that come with the package, and parameters files as rcl reads them."""

from pathlib import Path

import pytest
import rclpy

from mose_ros.nodes.files import NODES, OTHERS, check_params_file, parameters_of, shared
from nodes.test_config import KINDS

ROOT = Path(__file__).parents[2]
SHIPPED = [path for path in (ROOT / 'config').glob('*.yaml') if not path.name.startswith('skills')]


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('driver: [', 'can not be read'),
        ('', 'no parameters file'),
        ('/**/diver:\n  ros__parameters: {a: 1}\n', "no node '/[*][*]/diver'"),
        ('/**/driver:\n  a: 1\n', 'needs `ros__parameters:`'),
        ('driver:\n  ros__parameters: {a: 1}\n', "write '/[*][*]/driver'"),
    ],
)
def test_parameter_files_that_are_none_are_refused(tmp_path, text, words):
    file = tmp_path / 'p.yaml'
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        check_params_file(file)


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.name)
def test_the_files_that_we_ship_are_known(path):
    check_params_file(path)
    assert {*KINDS} == {*NODES, *OTHERS}


@pytest.mark.parametrize(
    'section',
    ['/**', '**', '/*/driver', '/**/driver', '/mose/driver', 'mose/driver', '/mose/*', '/*/*']
    + ['driver', '/driver', '/*', '/other/driver', '/mose/deep/driver'],
)
def test_sections_hold_for_the_nodes_for_which_they_hold_in_ros(context, tmp_path, section):
    file = tmp_path / 'p.yaml'
    file.write_text(f"'{section}':\n  ros__parameters: {{value: 2}}\n")
    node = rclpy.create_node(
        'driver',
        namespace='/mose',
        context=context,
        cli_args=['--ros-args', '--params-file', str(file)],
        automatically_declare_parameters_from_overrides=True,
    )
    holds = node.has_parameter('value')
    node.destroy_node()
    try:
        assert bool(parameters_of([file], 'driver')) == holds
    except ValueError:  # refused, since it would hold for none of ours
        assert not holds


def test_what_comes_with_the_package_is_found_and_nothing_else():
    assert (shared('models/mose-tiny') / 'manifest.json').is_file()
    with pytest.raises(ValueError, match='config/nothing was not found'):
        shared('config/nothing')
