"""A short soak of the real graph: nothing grows, nothing is left; and what does grow is seen."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from mose_ros.nodes import soak


def test_a_slope_comes_with_its_interval():
    hours, random = np.linspace(0, 1, 600), np.random.default_rng(0)
    noise = random.normal(0, 1, 600)
    flat, steep = soak.slope(hours, 100 + noise), soak.slope(hours, 100 + 20 * hours + noise)
    assert flat['ci95'][0] < 0 < flat['ci95'][1] and abs(flat['per_hour']) < 1
    assert steep['ci95'][0] < 20 < steep['ci95'][1] and steep['ci95'][0] > 15
    assert steep['first'] == pytest.approx(101, abs=1) and steep['last'] > 118
    assert soak.slope(hours[:4], noise[:4])['ci95'] == [-math.inf, math.inf]  # too little to say


def test_growth_after_the_warm_up_is_told_and_growth_within_it_is_not():
    def samples(memory):
        for second in range(600):
            own = {'memory_mb': memory(second / 600), 'threads': 5, 'descriptors': 30}
            row = {'seconds': float(second), 'latency_ms': 40.0, 'plans_seen': second}
            yield {**row, **dict.fromkeys(soak.NODES, own)}

    loading = soak.fit(list(samples(lambda share: 100 + 50 * min(share, 0.15))))
    leaking = soak.fit(list(samples(lambda share: 100 + 50 * share)))
    assert loading['driver']['memory_mb']['per_hour'] == pytest.approx(0, abs=1e-6)
    assert leaking['driver']['memory_mb']['per_hour'] == pytest.approx(300, rel=0.01)
    assert leaking['driver']['memory_mb']['ci95'][0] > soak.ALLOWED['memory_mb']
    assert loading.keys() == {*soak.NODES, 'graph'}


def test_a_short_soak_of_the_real_graph(bundle, tmp_path):
    pytest.importorskip(
        'metadrive', reason='the simulator is not installed: pip install -e ".[sim]"'
    )
    out = tmp_path / 'soak.json'
    command = [sys.executable, '-m', 'mose_ros.nodes.soak', '--bundle', bundle, '--json', str(out)]
    command += ['--minutes', '0.1', '--episode', '3', '--starts', '1']
    own = {name: value for name, value in os.environ.items() if name != 'ROS_DOMAIN_ID'}
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600)
    assert out.exists(), done.stdout + done.stderr
    result = json.loads(out.read_text())
    drive, starts = result['drive'], result['starts']
    families = [one['family'] for one in drive['episodes']]
    assert len(families) >= 2 and len(set(families)) == len(families) and drive['plans'] >= 2
    assert drive['slopes']['driver']['memory_mb']['last'] > 20
    assert drive['slopes']['driver']['threads']['last'] >= 3
    assert starts['starts'] == 1 and not starts['left']


@pytest.mark.parametrize('arguments', [['--minutes', '-1'], ['--episode', '0'], ['--starts', 'x']])
def test_wrong_arguments_are_named(arguments, capsys):
    with pytest.raises(SystemExit, match='2'):
        soak.main(arguments)
    assert arguments[0] in capsys.readouterr().err
