"""A bundle does what its network does, whole, with every expert, and says so in its manifest."""

import hashlib
from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from mose_ros.core import prompt
from mose_ros.core import vision as core_vision
from mose_ros.core.action import PROPRIO, Normalizer
from mose_ros.core.bundle import GRAPHS, Manifest
from mose_ros.core.skills import Taxonomy
from mose_ros.engine import session
from mose_ros.engine.bundle import Bundle
from mose_ros.modeling.config import MoseConfig, preset
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import export, graphs, parity, weights
from training.nano import LEVELS, make_tokenizer


def test_the_manifest_tells_what_was_found(exported):
    driver, folder, _ = exported
    manifest = Manifest.load(folder)
    found = manifest.parity
    assert found['logits_max_abs'] < 1e-4 and found['trajectory_max_m'] < 1e-4
    assert found['text_equal'] and found['views_equal'] and found['skills_equal']
    assert found['experts_reached'] == found['experts_total'] == 3 + 3 + 2
    assert manifest.levels == {level: list(skills) for level, skills in LEVELS.items()}
    assert manifest.data == {'clips': 3} and manifest.storage == 'float16'
    assert list(folder.parent.glob('*.partial')) == []


def test_another_network_is_told_from_this_one(exported):
    driver, folder, _ = exported
    changed = weights.rounded(driver).eval()
    bundle = Bundle.open(folder, threads=1)
    assert parity.parity(changed, bundle)['logits_max_abs'] < 1e-4
    with torch.no_grad():
        changed.vlm.model.language_model.layers[3].mlp.experts[2].down_proj.weight.mul_(2)
    found = parity.parity(changed, bundle)
    assert found['experts_reached'] < found['experts_total']
    with pytest.raises(parity.ParityError, match='of 8 experts reached'):
        parity.judge(found, 'float32')


def test_each_weight_lies_once_and_in_half(exported):
    driver, folder, _ = exported
    size = (folder / weights.WEIGHTS).stat().st_size
    numbers = sum(p.numel() for p in driver.parameters())
    # float16, the view router in float32, the head once more (transposed for its product)
    assert size < 1.1 * (2 * numbers + 2 * 49_000 + 2 * driver.vlm.lm_head.weight.numel())
    chunks = set()
    for graph in GRAPHS:
        model = onnx.load(folder / f'{graph}.onnx', load_external_data=False)
        assert {one.domain for one in model.opset_import} == {''}
        assert (
            b'/work/' not in model.SerializeToString() and b'.py' not in model.SerializeToString()
        )
        for tensor in model.graph.initializer:
            field = {one.key: one.value for one in tensor.external_data}
            if field:
                chunks.add((int(field['offset']), int(field['length'])))
    data = (folder / weights.WEIGHTS).read_bytes()
    contents = [hashlib.sha256(data[start : start + length]).digest() for start, length in chunks]
    assert len(set(contents)) == len(contents)


def test_routers_keep_float32(exported):
    _, folder, _ = exported
    model = onnx.load(folder / 'prefill.onnx')
    kinds = {one.name: one.data_type for one in model.graph.initializer}
    routers = [kind for name, kind in kinds.items() if 'routers' in name and 'weight' in name]
    assert routers == [onnx.TensorProto.FLOAT] * 2
    assert onnx.TensorProto.FLOAT16 in kinds.values()


@pytest.mark.parametrize('views', [1, 2, 6])
def test_the_vision_graph_takes_any_number_of_views(exported, views):
    driver, folder, _ = exported
    vision = session.open_session(folder / 'vision.onnx', threads=1)
    m = Manifest.load(folder)
    shape = (views, m.view_frames, m.view_height, m.view_width, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    normal = core_vision.normalize(pictures, m.mean, m.std)
    patches = np.stack([core_vision.patchify(view, m.patch, m.merge) for view in normal])
    with torch.no_grad():
        want = weights.rounded(driver).vlm.see(torch.from_numpy(patches))[1].numpy()
    got = vision.run({'views': pictures})['embeds']
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert not np.allclose(got[:1], vision.run({'views': 255 - pictures})['embeds'][:1])


def test_expert_groups_survive_the_export(tmp_path):
    torch.manual_seed(0)
    skills = {'planning': {'general': '', 'normal': ''}}
    config = preset(
        'nano',
        taxonomy=Taxonomy(skills),
        mose=MoseConfig(layers=((2,),), expert_groups=True, expert_weight=0.9),
    )
    driver = MoseDriver(config).eval()
    mixture = driver.vlm.model.language_model.layers[2].mlp
    with torch.no_grad():
        for weight in driver.vlm.model.language_model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    inputs = graphs.example_inputs(driver)['prefill']
    path = tmp_path / 'prefill.onnx'
    path.write_bytes(graphs.trace(driver, 'prefill').SerializeToString())
    graph = session.open_session(path, threads=1)
    answers = []
    for skill in (0, 1):
        inputs['skill_override'] = torch.tensor([skill])
        with torch.no_grad():
            want = graphs.Prefill(driver)(*inputs.values())[0]
        got = graph.run({name: value.numpy() for name, value in inputs.items()})['logits']
        np.testing.assert_allclose(got, want.numpy(), atol=1e-4)
        answers.append(got)
    assert not np.allclose(*answers, atol=1e-2)
    for group in (mixture.image_experts, mixture.experts):
        with torch.no_grad():
            group[1].down_proj.weight.mul_(3)
            changed = graphs.Prefill(driver)(*inputs.values())[0].numpy()
        assert not np.allclose(changed, answers[1], atol=1e-3)
        answers[1] = changed


def test_a_failed_export_leaves_the_old_bundle_alone(exported, monkeypatch):
    driver, folder, bundling = exported
    before = (folder / 'manifest.json').read_bytes()
    monkeypatch.setattr(export, 'trace', lambda *_: (_ for _ in ()).throw(ValueError('broken')))
    with pytest.raises(ValueError, match='broken'):
        export.export(driver, folder, bundling)
    assert (folder / 'manifest.json').read_bytes() == before
    Manifest.load(folder)
    with pytest.raises(ValueError, match='no bundle of float32 stored as int8'):
        export.export(driver, folder, replace(bundling, storage='int8'))
    assert list(folder.parent.glob('*.partial')) == []


# ---- float16 ----


@pytest.fixture(scope='module')
def half(tmp_path_factory):
    """Return a smaller network, the folder of its bundle of float16, and what was said of it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('half')
    path = make_tokenizer(folder)
    levels = {'planning': {'general': '', 'normal': '', 'give_way': ''}}
    nano = preset('nano')
    config = preset(
        'nano',
        tokenizer=prompt.Tokenizer.load(path),
        taxonomy=Taxonomy(levels),
        decoder=replace(nano.decoder, layers=2),
        mose=MoseConfig(layers=((1,),)),
    )
    driver = MoseDriver(config)
    with torch.no_grad():
        for name, weight in driver.named_parameters():
            if 'experts' in name:
                weight.mul_(1 + torch.rand_like(weight))
    reach = np.ones((config.action.horizon, 2), np.float32)
    bundling = export.Bundling(
        name='half',
        tokenizer=path,
        action=Normalizer(-5 * reach, 5 * reach),
        proprio=Normalizer(np.full(len(PROPRIO), -20.0), np.full(len(PROPRIO), 20.0)),
        num_steps=3,
        max_new_tokens=5,
        precision='float16',
    )
    export.export(driver, folder / 'half', bundling)
    return driver, folder / 'half', bundling


def types(graph, outer=None):
    """Yield each node of a graph and of those inside its conditions, with the types of its inputs."""
    known = dict(outer or {})
    known |= {
        one.name: one.type.tensor_type.elem_type for one in [*graph.value_info, *graph.input]
    }
    known |= {one.name: one.type.tensor_type.elem_type for one in graph.output}
    known |= {one.name: one.data_type for one in graph.initializer}
    for node in graph.node:
        yield node, [known.get(name) for name in node.input]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from types(attribute.g, known)


def test_products_of_a_float16_bundle_are_float16_and_what_decides_is_not(half):
    _, folder, _ = half
    found = {}
    for graph in GRAPHS:
        model = onnx.load(folder / f'{graph}.onnx')
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        assert {one.domain for one in model.opset_import} == {''}
        assert [one.version for one in model.opset_import] == [graphs.OPSET]
        for node, kinds in types(model.graph):
            assert None not in [k for k, name in zip(kinds, node.input, strict=True) if name]
            found.setdefault((graph, node.op_type), []).append((kinds[0], ''.join(node.input)))
    half_, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    wide = {op for (_, op), rows in found.items() for kind, _ in rows if kind == single}
    assert {'Softmax', 'ReduceMean', 'LayerNormalization', 'ArgMax', 'Conv'} <= wide
    for op in ('Softmax', 'ReduceMean', 'LayerNormalization', 'ArgMax', 'Conv'):
        kinds = {k for (_, one), rows in found.items() if one == op for k, _ in rows}
        assert kinds == {single}, op
    products = [row for (g, op), rows in found.items() if op in ('MatMul', 'Gemm') for row in rows]
    assert sum(kind == half_ for kind, _ in products) > 30
    assert all(kind == half_ for kind, _ in found['vision', 'MatMul'] + found['decode', 'MatMul'])
    routed = [k for k, name in found['prefill', 'Gemm'] if 'routers' in name]
    assert routed == [single]


def test_a_float16_bundle_does_what_its_float32_network_does(half):
    driver, folder, _ = half
    manifest = Manifest.load(folder)
    found = manifest.parity
    assert (manifest.precision, manifest.storage) == ('float16', 'float16')
    assert found['against'] == 'PyTorch float32' and found['pictures'] == 'noise'
    assert 1e-6 < found['trajectory_max_m'] < 0.02 and 1e-6 < found['logits_max_abs'] < 0.01
    assert found['text_equal'] and found['views_equal'] and found['skills_equal']
    assert found['experts_reached'] == found['experts_total'] == 3 + 2
    assert all(weight.dtype == torch.float32 for weight in driver.parameters())
    size = (folder / weights.WEIGHTS).stat().st_size
    assert size < 2.6 * sum(p.numel() for p in driver.parameters())


def test_experts_of_a_float16_bundle_are_told_from_one_another(half):
    driver, folder, _ = half
    experts = driver.vlm.model.language_model.layers[1].mlp.experts
    bundle = Bundle.open(folder, threads=1)
    swapped = deepcopy(driver)
    own = swapped.vlm.model.language_model.layers[1].mlp.experts
    own[1].load_state_dict(experts[2].state_dict())
    own[2].load_state_dict(experts[1].state_dict())
    assert parity.parity(driver, bundle)['experts_reached'] == 5
    assert parity.parity(swapped, bundle)['experts_reached'] == 3


def test_numbers_that_are_not_finite_are_no_parity(half, monkeypatch):
    driver, folder, _ = half

    def overflow(*_, **__):
        raise FloatingPointError('half answered with numbers that are not finite')

    monkeypatch.setattr(parity.Driver, 'plan', overflow)
    found = parity.parity(driver, Bundle.open(folder, threads=1))
    assert found['trajectory_max_m'] is None and not found['text_equal']
    assert (found['experts_reached'], found['experts_total']) == (0, 5)
    with pytest.raises(parity.ParityError, match='logits_max_abs not finite') as error:
        parity.judge(found, 'float16')
    assert error.value.found == found
