"""The place of built engines: what is taken from it, what is not and why, and what becomes of it when things go wrong."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from mose_ros.engine import engine_cache
from mose_ros.engine.engine_cache import Slot, Stale
from mose_ros.engine.session import BackendError

RECIPE = {'TensorRT': '10.3.0', 'GPU architecture': '8.7', 'precision': 'float16'}


@pytest.fixture
def slot(tmp_path):
    return Slot(tmp_path / 'engines', 'mose-tiny/vision')


def test_what_is_kept_comes_back(slot):
    slot.store(RECIPE, memoryview(b'engine'), {'seconds': 2.0})
    stored = slot.load(RECIPE)
    assert (bytes(stored.engine), stored.notes) == (b'engine', {'seconds': 2.0})


def test_an_empty_slot_is_a_reason_to_build(slot):
    with pytest.raises(Stale, match='there is none yet'):
        slot.load(RECIPE)


def test_each_difference_of_the_recipe_is_named(slot):
    slot.store(RECIPE, memoryview(b'engine'), {})
    changed = {**RECIPE, 'TensorRT': '10.16.1.11', 'GPU': 'Thor'}
    with pytest.raises(Stale) as stale:
        slot.load(changed)
    assert str(stale.value) == 'GPU was not set, is Thor; TensorRT was 10.3.0, is 10.16.1.11'


def damage_truncate(slot):
    slot.engine.write_bytes(slot.engine.read_bytes()[:-1])


def damage_empty(slot):
    slot.engine.write_bytes(b'')


def damage_foreign(slot):
    slot.engine.write_bytes(b'ENGINE')  # as long as the right one


def damage_remove(slot):
    slot.engine.unlink()


def damage_edit_header(slot):
    slot.header.write_text(slot.header.read_text().replace('10.3.0', '10.3.1'))


def damage_cut_header(slot):
    slot.header.write_text(slot.header.read_text()[:40])


@pytest.mark.parametrize(
    ('damage', 'reason'),
    [
        (damage_truncate, 'vision.engine has 5 of 6 bytes'),
        (damage_empty, 'vision.engine has 0 of 6 bytes'),
        (damage_foreign, 'vision.engine is not the engine of its header: sha256 differs'),
        (damage_remove, 'vision.engine cannot be read'),
        (damage_edit_header, 'vision.json is damaged'),
        (damage_cut_header, 'vision.json cannot be read'),
    ],
)
def test_damage_is_noticed(slot, damage, reason):
    slot.store(RECIPE, memoryview(b'engine'), {})
    damage(slot)
    with pytest.raises(Stale, match=reason):
        slot.load(RECIPE)


def test_a_header_of_another_format_is_not_read(slot, monkeypatch):
    monkeypatch.setattr(engine_cache, 'FORMAT', 99)
    slot.store(RECIPE, memoryview(b'engine'), {})
    monkeypatch.undo()
    with pytest.raises(Stale, match='format 99, not 1'):
        slot.load(RECIPE)


def test_a_full_disk_leaves_the_old_engine_whole(tmp_path):
    """A limit on the size of files (as `ulimit -f`) makes the system refuse the write in its midst."""
    slot = Slot(tmp_path, 'b/vision')
    slot.store(RECIPE, memoryview(b'old'), {})
    code = f"""
        import resource
        from pathlib import Path
        from mose_ros.engine.engine_cache import Slot
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        Slot(Path({str(tmp_path)!r}), 'b/vision').store({{}}, memoryview(bytes(200_000)), {{}})
    """
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert 'BackendError' in done.stderr
    assert 'vision.engine cannot be kept' in done.stderr
    assert '0.2 MB to keep' in done.stderr
    assert '--engines or MOSE_ROS_ENGINES' in done.stderr
    assert bytes(slot.load(RECIPE).engine) == b'old'
    assert not list(tmp_path.rglob('*.partial'))


def test_room_is_asked_for_before_the_build(slot):
    slot.require_room(1)
    with pytest.raises(BackendError, match='too little room.*make room, or name another folder'):
        slot.require_room(1 << 62)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(BackendError, match='cannot be kept: Not a directory'):
        Slot(tmp_path / 'file', 'b/vision')


def test_one_holds_the_lock_and_the_other_waits(slot, caplog):
    caplog.set_level('INFO')
    order = []

    def second():
        with Slot(slot.folder, 'mose-tiny/vision').locked():
            order.append('second')

    thread = threading.Thread(target=second)
    with slot.locked():
        thread.start()
        time.sleep(0.3)
        order.append('first')
    thread.join()
    assert order == ['first', 'second']
    assert f'process {os.getpid()} builds vision.engine; waiting for it' in caplog.text


def test_processes_that_want_the_same_engine_build_it_once(slot):
    code = f"""
        import time
        from pathlib import Path
        from mose_ros.engine.engine_cache import Slot, Stale
        slot = Slot(Path({str(slot.folder)!r}), 'mose-tiny/vision')
        with slot.locked():
            try:
                slot.load({RECIPE})
                print('loaded')
            except Stale:
                time.sleep(0.5)
                slot.store({RECIPE}, memoryview(b'engine'), {{}})
                print('built')
    """
    command = [sys.executable, '-c', textwrap.dedent(code)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in running)
    assert said == ['built', 'loaded', 'loaded']


def test_patience_ends(slot):
    with slot.locked():
        waiting = Slot(slot.folder, 'mose-tiny/vision').locked(patience=0.05)
        with pytest.raises(BackendError, match=f'process {os.getpid()} has held .*vision.lock'):
            waiting.__enter__()


def test_a_lock_left_by_a_dead_process_holds_nobody_up(slot):
    code = f"""
        import os
        from pathlib import Path
        from mose_ros.engine.engine_cache import Slot
        lock = Slot(Path({str(slot.folder)!r}), 'mose-tiny/vision').locked()
        lock.__enter__()
        os.kill(os.getpid(), 9)
    """
    killed = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], timeout=60)
    assert killed.returncode == -9
    assert slot.lock_file.read_text().isdigit()  # it wrote its name and never left
    with slot.locked(patience=0.5):
        pass


def test_the_folder_is_named_or_that_of_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv('MOSE_ROS_ENGINES', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert engine_cache.default_folder() == tmp_path / 'mose_ros' / 'engines'
    monkeypatch.setenv('XDG_CACHE_HOME', 'relative')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert engine_cache.default_folder() == tmp_path / 'home' / '.cache' / 'mose_ros' / 'engines'
    monkeypatch.setenv('MOSE_ROS_ENGINES', str(tmp_path / 'mine'))
    assert engine_cache.default_folder() == tmp_path / 'mine'


def test_a_header_can_be_read_by_a_person(slot):
    slot.store(RECIPE, memoryview(b'engine'), {'seconds': 2.0})
    assert json.loads(slot.header.read_text())['recipe'] == RECIPE
