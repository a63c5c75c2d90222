"""Large pictures arrive with the profiles that are shipped; the command that shows it is the one that the docs name."""

import json
from pathlib import Path

import pytest

from mose_ros.nodes import delivery, machine

ROOT = Path(__file__).parents[2]
MOMENT = 6 * 1600 * 900 * 4


def test_all_pictures_arrive_by_shared_memory_whatever_the_qos(tmp_path, capsys):
    """Smaller pictures than in docs/vehicle.md, so that a busy machine can keep up with them."""
    out = tmp_path / 'out.json'
    arguments = ['--transports', 'shm', '--size', '640x360', '--seconds', '1.5', '--rate', '5']
    assert delivery.main([*arguments, '--json', str(out)]) == 0, capsys.readouterr()
    rows = json.loads(out.read_text())['rows']
    assert [row['reliability'] for row in rows] == ['best_effort', 'reliable']
    assert all(row['arrived'] == row['published'] == 48 for row in rows), rows
    assert capsys.readouterr().out.count('100.0 %') == 2


def test_less_than_asked_for_is_a_failure(tmp_path, capsys, monkeypatch):
    row = {'transport': 'x.xml', 'delivered': 0.98}
    monkeypatch.setattr(delivery, 'measure', lambda *_: row)
    assert delivery.main(['--transports', 'x.xml']) == 1
    assert delivery.main(['--transports', 'x.xml', '--least', '0.9']) == 0


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--size', '10'], 'no WIDTHxHEIGHT'),
        (['--rate', '0'], 'are positive'),
        (['--transports', 'nowhere.xml'], 'neither default, shm nor'),
    ],
)
def test_wrong_arguments_are_named(arguments, words, capsys):
    try:
        status = delivery.main(arguments)
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and words in capsys.readouterr().err


def test_the_profiles_have_room_for_six_large_cameras():
    segment, queue = machine.read_profile(ROOT / 'config/fastdds_cameras.xml')
    assert segment >= 3.5 * MOMENT and queue >= 3 * MOMENT / machine.PIECE
    assert machine.read_profile(ROOT / 'config/fastdds_shm.xml')[1] == queue
    small, short = machine.read_profile(ROOT / 'config/fastdds_local.xml')
    assert small < MOMENT and short < queue  # only for the simulator's small pictures
