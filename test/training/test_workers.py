"""The same work gives the same results in this process, in processes of its own, and on a Ray cluster."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from mose_ros.training import __main__ as command
from mose_ros.training import annotate
from mose_ros.training.config import Data
from mose_ros.training.workers import fan_out
from test.data.test_skill_sources import STOPPING, STRAIGHT, TIMES, write_official
from training.calls import divide

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def cluster():
    """Return the address of a Ray cluster of one machine, this one."""
    pytest.importorskip('ray', reason='a cluster is an extra: pip install mose_ros[cluster]')
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:  # its machines have the package, and these tests
        patch.setenv('PYTHONPATH', f'{ROOT}{os.pathsep}{ROOT / "test"}')
        started = Cluster(initialize_head=True, head_node_args={'num_cpus': 2})
    yield started.address
    started.shutdown()


@pytest.mark.parametrize('place', ['here', 'processes', 'cluster'])
def test_results_are_the_same_and_errors_arrive(place, request):
    address = request.getfixturevalue('cluster') if place == 'cluster' else ''
    processes = 0 if place == 'here' else 2
    found = sorted(fan_out(divide, [(6, 2), (7, 2), (9, 3)], processes, address))
    assert [one[:2] for one in found] == [(6, 3), (7, 3), (9, 3)]
    used = {pid for *_, pid in found}
    assert used == {os.getpid()} if place == 'here' else len(used) == 3 and os.getpid() not in used
    with pytest.raises(ZeroDivisionError):
        list(fan_out(divide, [(1, 0)], processes, address))
    assert list(fan_out(divide, [], processes, address)) == []


def test_a_cluster_labels_as_one_process_does(cluster, tmp_path):
    write_official(tmp_path / 'here' / 'Vanilla_Town03_1', STOPPING, 0 * TIMES)
    write_official(tmp_path / 'here' / 'Vanilla_Town03_2', STRAIGHT, 0 * TIMES)
    shutil.copytree(tmp_path / 'here', tmp_path / 'cluster')
    target = annotate.Target(horizon=10, dt=0.2, data=Data(future='driven'))
    here = annotate.annotate(tmp_path / 'here', target, processes=0, bar=False)
    there = annotate.annotate(tmp_path / 'cluster', target, address=cluster, bar=False)
    assert there == here and here['frames'] > 100
    for name in ('Vanilla_Town03_1', 'Vanilla_Town03_2'):
        labels = [(tmp_path / root / name / annotate.LABELS) for root in ('here', 'cluster')]
        assert labels[0].read_bytes() == labels[1].read_bytes()
    assert json.loads((tmp_path / 'cluster' / annotate.DATASET).read_text()) == there


def test_without_ray_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    write_official(tmp_path / 'data' / 'Vanilla_Town03_1', STRAIGHT, 0 * TIMES)
    monkeypatch.setitem(sys.modules, 'ray', None)
    ask = ['--preset', 'nano', '--work', str(tmp_path), '--quiet', '--address', 'auto']
    assert command.main(['annotate', *ask]) == 1
    assert 'pip install mose_ros[cluster]' in capsys.readouterr().err
    labels = ['--source', 'clips']
    assert command.main(['annotate', *ask, *labels]) == 1
    assert '--address is for annotate without --source' in capsys.readouterr().err
