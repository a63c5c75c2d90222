"""A folder is whole, old or new, at whatever moment somebody is killed."""

import pytest

from mose_ros.modeling import beside


def write(folder, text):
    with beside.written_beside(folder) as partial:
        (partial / 'text').write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('exchanges', [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(beside, '_exchange', lambda *_: False)
    write(tmp_path / 'one', 'old')
    with pytest.raises(OSError, match='cable'), beside.written_beside(tmp_path / 'one') as partial:
        (partial / 'text').write_text('half')
        raise OSError('the cable is out')
    assert (tmp_path / 'one/text').read_text() == 'old' and names(tmp_path) == ['one']
    write(tmp_path / 'one', 'new')
    assert (tmp_path / 'one/text').read_text() == 'new' and names(tmp_path) == ['one']


def test_what_a_kill_left_is_cleared_away(tmp_path):
    (tmp_path / 'one.partial').mkdir()
    (tmp_path / 'one.partial/rest').write_text('half')
    write(tmp_path / 'one', 'new')
    assert names(tmp_path) == ['one'] and names(tmp_path / 'one') == ['text']
    (tmp_path / 'one').rename(tmp_path / 'one.former')  # killed between two renames
    with pytest.raises(OSError, match='cable'), beside.written_beside(tmp_path / 'one'):
        raise OSError('the cable is out')
    assert (tmp_path / 'one/text').read_text() == 'new' and names(tmp_path) == ['one']
