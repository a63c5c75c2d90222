"""What load is held is measured on the real graph; a load that nobody could hold is not."""

import json
import os
import subprocess
import sys

import pytest

from mose_ros.nodes import load


def run(*arguments):
    """Run the command as a user does: it takes a ROS domain of its own."""
    environment = {k: v for k, v in os.environ.items() if k != 'ROS_DOMAIN_ID'}
    command = [sys.executable, '-m', 'mose_ros.nodes.load', *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_rate_is_raised_until_a_deadline_is_missed(tmp_path, bundle):
    out = tmp_path / 'out.json'
    arguments = ['--cameras', '1', '--sizes', '64x36', '--rates', '5,1000,2000', '--seconds', '2']
    done = run(*arguments, '--bundle', bundle, '--json', out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())['rows']
    last = rows[-1]
    assert last['rate_hz'] in (5, 1000) and not last['held']  # 2000 Hz is not tried any more
    assert last['missed'] > 0 or last['reached_hz'] < 0.98 * last['rate_hz']
    assert all(row['held'] and row['missed'] == 0 for row in rows[:-1])
    assert rows[0]['frames'] == pytest.approx(10, abs=2) and rows[0]['mb_s'] == 0.0
    assert done.stdout.count(' Hz ') == len(rows)


def test_a_graph_that_does_not_come_alive_is_told(tmp_path):
    done = run('--cameras', '1', '--bundle', tmp_path / 'none')
    assert done.returncode == 2 and 'error: ' in done.stderr
    assert 'manifest.json' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--cameras', '7'], 'there are 6 cameras'),
        (['--sizes', '640'], 'give sizes as'),
        (['--rates', '0'], 'each is 1 at least'),
        (['--seconds', '0'], 'is positive'),
    ],
)
def test_wrong_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        load.main(arguments)
    assert words in capsys.readouterr().err
