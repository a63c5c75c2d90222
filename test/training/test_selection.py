"""Every way of choosing an expert gives the same answer; only their cost differs."""

import numpy as np
import pytest

pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.engine import counting  # noqa: E402
from mose_ros.engine.session import open_session  # noqa: E402
from mose_ros.training import selection  # noqa: E402

WIDTH, FFN, EXPERTS, TOKENS = 8, 12, 5, 6


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp('ways')
    mixture = selection.Mixture(WIDTH, FFN, EXPERTS)
    selection.write(mixture, out)
    return mixture, out


def inputs_of(way, mixture, expert, x):
    if way == 'inputs':
        return {'x': x, **mixture.experts[expert]}
    return {'x': x, 'chosen': np.array([expert])} if way != 'constant' else {'x': x}


def test_all_ways_answer_alike(written):
    mixture, out = written
    x = np.random.default_rng(1).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)

    def ffn(weights):
        gate, up = x @ weights['gate'], x @ weights['up']
        return gate / (1 + np.exp(-gate)) * up @ weights['down']

    for way in selection.WAYS:
        session = open_session(out / f'{way}.onnx', backend='onnxruntime', provider='CPU')
        for expert in range(1 if way == 'constant' else EXPERTS):
            y = np.array(session.run(inputs_of(way, mixture, expert, x))['y'])
            want = (ffn(mixture.shared) + ffn(mixture.experts[expert])) / 2
            np.testing.assert_allclose(y, want, atol=1e-5)
            other = mixture.experts[(expert + 1) % EXPERTS]
            assert np.abs(y - (ffn(mixture.shared) + ffn(other)) / 2).max() > 1e-2


def test_only_all_of_them_computes_more(written):
    mixture, out = written
    x = np.zeros((1, TOKENS, WIDTH), np.float32)
    flops = {
        way: counting.cost(out / f'{way}.onnx', inputs_of(way, mixture, 1, x)).flops
        for way in selection.WAYS
    }
    one = 3 * 2 * TOKENS * WIDTH * FFN
    assert flops.pop('all') == (1 + EXPERTS) * one
    assert set(flops.values()) == {2 * one}
