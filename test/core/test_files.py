"""A file or folder is whole, old or new, at whatever moment somebody is killed."""

import json
import math
import os

import pytest

from mose_ros.core import files


def write(folder, text):
    with files.folder_beside(folder) as partial:
        (partial / 'text').write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / 'deep/one.json'
    files.write_json(path, {'said': 'grüß'})
    with pytest.raises(OSError, match='cable'), files.file_beside(path) as partial:
        partial.write_text('half')
        assert names(path.parent) == ['one.json', 'one.json.partial']
        raise OSError('the cable is out')
    with pytest.raises(ValueError, match='JSON'):
        files.write_json(path, {'score': math.nan})
    assert json.loads(path.read_text()) == {'said': 'grüß'} and names(path.parent) == ['one.json']
    files.write_text(path, 'new')
    assert path.read_bytes() == b'new' and names(path.parent) == ['one.json']


def test_what_must_last_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, 'fsync', lambda number: seen.append(names(tmp_path)))
    files.write_bytes(tmp_path / 'engine', memoryview(b'new'), lasting=True)
    assert seen == [['engine.partial']] and names(tmp_path) == ['engine']
    files.write_bytes(tmp_path / 'page', b'new')  # what can be made again is not waited for
    assert len(seen) == 1


@pytest.mark.parametrize('exchanges', [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, '_exchange', lambda *_: False)
    write(tmp_path / 'one', 'old')
    with pytest.raises(OSError, match='cable'), files.folder_beside(tmp_path / 'one') as partial:
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
    with pytest.raises(OSError, match='cable'), files.folder_beside(tmp_path / 'one'):
        raise OSError('the cable is out')
    assert (tmp_path / 'one/text').read_text() == 'new' and names(tmp_path) == ['one']
