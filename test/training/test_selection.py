import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from engine import bundles
from mose_ros.engine import session
from mose_ros.training import selection

SHIPPED = Path(__file__).parents[2] / 'models' / 'mose-tiny'


def test_all_ways_of_choosing_an_expert_answer_alike(tmp_path):
    paths = selection.write_ways(SHIPPED, tmp_path, 'decode')
    assert {path.stem for path in paths} == {'constant', 'if', 'inputs', 'gather', 'all'}
    graphs = {path.stem: session.open_session(path, threads=1) for path in paths}
    random = np.random.default_rng(0)
    past = random.standard_normal((6, 1, 2, 20, 32)).astype(np.float32)
    given = {'input_ids': np.array([[7]]), 'position_ids': np.full((3, 1, 1), 20)}
    given |= {'past_k': past, 'past_v': past[::-1].copy()}

    def logits(way, *skills):
        more = {
            name: random.standard_normal(port.shape).astype(np.float32)
            for name, port in graphs[way].inputs.items()
            if name.startswith('expert.')
        }
        return graphs[way].run({**given, 'skills': np.array(skills), **more})['logits']

    want = {skills: logits('if', *skills) for skills in ((0, 0, 0), (1, 2, 3))}
    for skills, expected in want.items():
        for way in ('gather', 'all'):
            np.testing.assert_allclose(logits(way, *skills), expected, atol=1e-4)
    np.testing.assert_allclose(logits('constant', 1, 2, 3), want[0, 0, 0], atol=1e-4)
    assert not np.allclose(*want.values(), atol=1e-2)
    assert logits('inputs', 0, 0, 0).shape == want[0, 0, 0].shape
    kinds = {path.stem: {n.op_type for n in onnx.load(path).graph.node} for path in paths}
    assert [way for way, found in kinds.items() if 'If' in found] == ['if']


def test_a_bundle_that_chooses_nothing_is_refused(tmp_path):
    folder = bundles.make_bundle(tmp_path / 'known')
    with pytest.raises(ValueError, match='decode.onnx chooses no expert'):
        selection.write_ways(folder, tmp_path / 'out', 'decode')
    with pytest.raises(ValueError, match="no graph 'vision' with experts"):
        selection.write_ways(folder, tmp_path / 'out', 'vision')
    shutil.rmtree(folder)
    assert selection.main([str(folder), str(tmp_path / 'out')]) == 1
