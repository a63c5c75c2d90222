"""Bundles of integers: what of a graph becomes one, that ONNX Runtime computes it so, and what it costs in precision."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mose_ros.core import prompt
from mose_ros.core.action import PROPRIO, Normalizer
from mose_ros.core.bundle import GRAPHS, Manifest
from mose_ros.core.skills import Taxonomy
from mose_ros.engine.bundle import Bundle
from mose_ros.modeling.config import MoseConfig, preset
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import annotate, export, graphs, moments, parity, quantize
from test.engine.test_tensorrt_operators import problems

WIDTH, RANDOM = 64, np.random.default_rng(0)
PIXELS = 3 * 2 * 8 * 8  # of a patch of nano


def small_model():
    """Return a graph with everything that a product can be: joined, biased, inside a condition, of one row, narrow, computed."""
    constants = {
        **{name: RANDOM.normal(size=(WIDTH, WIDTH)) / 8 for name in ('q', 'k', 'one', 'two')},
        'few': RANDOM.normal(size=(WIDTH, 2)),
        'bias': RANDOM.normal(size=WIDTH),
        'row': RANDOM.normal(size=(WIDTH, WIDTH)) / 8,
    }
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in constants.items()]
    tensors.append(numpy_helper.from_array(np.array([1]), 'axis'))

    def branch(weight):
        nodes = [helper.make_node('MatMul', ['a', weight], [f'chose_{weight}'])]
        return helper.make_graph(nodes, weight, [], [value(f'chose_{weight}', (1, 'T', WIDTH))])

    nodes = [
        helper.make_node('MatMul', ['x', 'q'], ['xq']),
        helper.make_node('Add', ['xq', 'bias'], ['a']),
        helper.make_node('MatMul', ['x', 'k'], ['b']),
        helper.make_node('Transpose', ['b'], ['bt'], perm=[0, 2, 1]),
        helper.make_node('MatMul', ['a', 'bt'], ['scores']),
        helper.make_node(
            'If', ['which'], ['c'], then_branch=branch('one'), else_branch=branch('two')
        ),
        helper.make_node('MatMul', ['c', 'few'], ['ends']),
        helper.make_node('ReduceMean', ['c', 'axis'], ['mean'], keepdims=0),
        helper.make_node('MatMul', ['mean', 'row'], ['head']),
    ]
    ends = [('scores', (1, 'T', 'T')), ('ends', (1, 'T', 2)), ('head', (1, WIDTH))]
    graph = helper.make_graph(
        nodes,
        'small',
        [
            value('x', (1, 'T', WIDTH)),
            helper.make_tensor_value_info('which', TensorProto.BOOL, ()),
        ],
        [value(name, shape) for name, shape in ends],
        tensors,
    )
    opset = helper.make_opsetid('', graphs.OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def value(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def run(model, x, which):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return dict(
        zip(
            [one.name for one in session.get_outputs()],
            session.run(None, {'x': x, 'which': np.array(which)}),
            strict=True,
        )
    )


def operators(model, folder):
    """Return how often ONNX Runtime runs each operator once it has optimised a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / 'optimised.onnx')
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    optimised = onnx.load(folder / 'optimised.onnx').graph
    return Counter(node.op_type for one in graphs.subgraphs(optimised) for node in one.node)


def scales_of(model, inputs):
    """Return the scale of what each product reads."""
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    names = quantize.watch(watched)
    onnx.checker.check_model(watched, full_check=True)
    histograms = [quantize.Histogram() for _ in names]
    for x, which in inputs:
        answer = run(watched, x, which)
        for name, histogram in zip(names, histograms, strict=True):
            histogram.add(answer[name])
    return [one.scale() for one in histograms]


def moment(seed):
    return np.random.default_rng(seed).normal(size=(1, 20, WIDTH)).astype(np.float32)


def test_products_are_found_where_they_stand_and_joined():
    model = small_model()
    found = [(one.place, one.weight.name) for one in quantize.products(model)]
    assert found == [
        (0, 'q'),
        (0, 'k'),
        (1, 'two'),
        (2, 'one'),
    ]  # ONNX sorts attributes: else, then
    before = run(model, moment(0), True)
    quantize.join(model)
    onnx.checker.check_model(model, full_check=True)
    counts = [list(one.weight.dims) for one in quantize.products(model)]
    assert counts == [[WIDTH, 2 * WIDTH], [WIDTH, WIDTH], [WIDTH, WIDTH]]
    after = run(model, moment(0), True)
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, atol=1e-4)
    assert not np.allclose(run(model, moment(0), False)['ends'], after['ends'])


def test_int8_is_computed_as_int8_and_near_to_float(tmp_path):
    model = small_model()
    quantize.join(model)
    floats = {which: run(model, moment(5), which) for which in (True, False)}
    scales = scales_of(model, [(moment(seed), seed % 2 == 0) for seed in range(4)])
    quantize.to_int8(model, scales)
    onnx.checker.check_model(model, full_check=True)
    codes = [
        numpy_helper.to_array(one)
        for one in model.graph.initializer
        if one.data_type == TensorProto.INT8
    ]
    most = max(int(np.abs(one).max()) for one in codes)
    assert 2 * most * 255 < 2**15  # two products fit where x86 without VNNI adds them
    counts = operators(model, tmp_path)
    assert counts['MatMulIntegerToFloat'] == 3 and counts['DequantizeLinear'] == 0
    assert counts['QuantizeLinear'] == 3  # the head, the narrow and the computed product stay
    for which, wanted in floats.items():
        got = run(model, moment(5), which)
        for name, array in wanted.items():
            error = np.abs(got[name] - array).max() / np.abs(array).max()
            assert 1e-5 < error < 0.05, name
    quantize_wrongly = [10 * scale for scale in scales]
    model = small_model()
    quantize.join(model)
    quantize.to_int8(model, quantize_wrongly)
    assert np.abs(run(model, moment(5), True)['head'] - floats[True]['head']).max() > 0.1


def test_int4_is_read_as_int4(tmp_path):
    model = small_model()
    wanted = run(model, moment(5), False)
    quantize.join(model)
    quantize.to_int4(model)
    assert model.opset_import[0].version == 21
    onnx.checker.check_model(model, full_check=True)
    tensors = [one for part in graphs.subgraphs(model.graph) for one in part.initializer]
    kinds = [one.data_type for one in tensors if one.name.endswith('weight')]
    assert kinds == [TensorProto.INT4] * 3
    assert operators(model, tmp_path)['MatMulNBits'] == 3
    got = run(model, moment(5), False)
    error = np.abs(got['head'] - wanted['head']).max() / np.abs(wanted['head']).max()
    assert 1e-4 < error < 0.2


def test_four_bits_have_a_scale_for_each_block():
    rows = np.random.default_rng(0).normal(size=(128, 3)).astype(np.float32)
    rows[:64] *= 100
    codes, steps = quantize.four_bits(rows)
    assert codes.shape == (128, 3) and steps.shape == (2, 3)
    near = codes.astype(np.float32) * steps.repeat(64, 0)
    errors = np.abs(near - rows).reshape(2, 64, 3).max((1, 2))
    assert errors[0] < 30 and errors[1] < 0.5  # the small block does not pay for the large one


def test_a_scale_clips_what_is_rare_and_only_that():
    even, rare = quantize.Histogram(), quantize.Histogram()
    for seed in range(3):
        random = np.random.default_rng(seed)
        even.add(random.uniform(-4, 4, 20_000))
        rare.add(random.normal(size=20_000))
    rare.add(np.array([40.0]))
    assert even.scale() == pytest.approx(4 / 127, rel=0.02)
    assert 4.5 / 127 < rare.scale() < 36 / 127
    with pytest.raises(ValueError, match='not finite'):
        rare.add(np.array([np.inf]))
    with pytest.raises(ValueError, match='nothing but zeros'):
        quantize.Histogram().scale()


# ---- whole bundles ----


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Return a small network and what its bundle says; its graphs are traced once for all precisions."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('integers')
    tokenizer = prompt.word_tokenizer(annotate.vocabulary())
    tokenizer.save(str(folder / 'tokenizer.json'))
    nano = preset('nano')
    config = preset(
        'nano',
        tokenizer=prompt.Tokenizer.load(folder / 'tokenizer.json'),
        taxonomy=Taxonomy({'planning': {'general': '', 'normal': '', 'give_way': ''}}),
        decoder=replace(nano.decoder, layers=2),
        mose=MoseConfig(layers=((1,),)),
    )
    driver = MoseDriver(config)
    with torch.no_grad():
        for name, weight in driver.named_parameters():
            if 'experts' in name:
                weight.add_(2 * weight.std() * torch.randn_like(weight))
    reach = np.ones((config.action.horizon, 2), np.float32)
    bundling = export.Bundling(
        name='integers',
        tokenizer=folder / 'tokenizer.json',
        action=Normalizer(-5 * reach, 5 * reach),
        proprio=Normalizer(np.full(len(PROPRIO), -20.0), np.full(len(PROPRIO), 20.0)),
        num_steps=3,
        max_new_tokens=5,
    )
    traced = {}

    def trace(network, graph):
        if graph not in traced:
            traced[graph] = graphs.trace(network, graph).SerializeToString()
        return onnx.ModelProto.FromString(traced[graph])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, 'trace', trace)
        for precision in quantize.INTEGERS:
            export.export(driver, folder / precision, replace(bundling, precision=precision))
    return driver, folder


@pytest.mark.parametrize('precision', quantize.INTEGERS)
def test_a_bundle_of_integers_does_what_its_network_does(made, precision):
    driver, folder = made
    manifest = Manifest.load(folder / precision)
    found = manifest.parity
    assert (manifest.precision, manifest.storage) == (precision, precision)
    assert manifest.carried == 'float32' and found['against'] == 'PyTorch float32'
    assert 1e-5 < found['trajectory_mean_m'] < parity.LIMITS[precision]['trajectory_mean_m']
    assert found['trajectory_mean_m'] < found['trajectory_max_m']
    assert found['skills_share'] == found['views_share'] == 1
    assert found['experts_reached'] == found['experts_total'] == 3 + 2
    kept = {path.name for path in (folder / precision).iterdir()}
    assert kept == {
        *('manifest.json', 'tokenizer.json', 'weights.bin'),
        *(f'{graph}.onnx' for graph in GRAPHS),
    }
    size = (folder / precision / 'weights.bin').stat().st_size
    assert size < 2 * sum(weight.numel() for weight in driver.parameters())


def test_each_product_of_an_int8_bundle_is_computed_so_and_routers_are_not(made, tmp_path):
    _, folder = made
    for graph in quantize.QUANTISED:
        model = onnx.load(folder / 'int8' / f'{graph}.onnx')
        pairs = sum(
            node.op_type == 'QuantizeLinear'
            for one in graphs.subgraphs(model.graph)
            for node in one.node
        )
        counts = operators(model, tmp_path)
        assert counts['MatMulIntegerToFloat'] == counts['QuantizeLinear'] == pairs > 0, graph
        assert counts['DequantizeLinear'] == 0, graph
    routers = [
        one
        for one in onnx.load(folder / 'int8/prefill.onnx').graph.initializer
        if 'router' in one.name
    ]
    assert {one.data_type for one in routers if 'weight' in one.name} == {TensorProto.FLOAT}
    with_int4 = onnx.load(folder / 'int4/prefill.onnx')
    assert with_int4.opset_import[0].version == quantize.INT4_OPSET
    assert operators(with_int4, tmp_path)['MatMulNBits'] > 0


def test_pixels_are_int8_as_they_are(made):
    _, folder = made
    model = onnx.load(folder / 'int8' / 'vision.onnx')
    known = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    steps = {
        node.input[0]: float(known[node.input[1]])
        for node in model.graph.node
        if node.op_type == 'QuantizeLinear'
    }
    assert steps.pop(quantize.WHOLE) == 1
    assert len(steps) > 3 and 1 not in steps.values()  # the others are measured
    codes = [one for one in known.values() if one.dtype == np.int8 and one.ndim == 2]
    assert PIXELS in {len(one) for one in codes}


@pytest.mark.parametrize('graph', quantize.QUANTISED)
def test_each_operator_of_integers_is_in_the_lists_of_tensorrt(made, graph):
    _, folder = made
    for precision, old in (('int8', []), ('int4', [f'opset ai.onnx {quantize.INT4_OPSET}'])):
        model = onnx.load(folder / precision / f'{graph}.onnx', load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        assert list(problems(model, '10.1')) == old  # int4 is listed, all else of opset 21 is not
        assert list(problems(model, '10.15')) == []


def test_experts_of_an_int8_bundle_are_told_from_one_another(made):
    driver, folder = made
    bundle = Bundle.open(folder / 'int8', threads=1)
    experts = driver.vlm.model.language_model.layers[1].mlp.experts
    states = [{n: v.clone() for n, v in one.state_dict().items()} for one in experts[1:3]]
    for expert, state in zip(experts[1:3], reversed(states), strict=True):
        expert.load_state_dict(state)
    try:
        assert parity.parity(driver, bundle)['experts_reached'] == 3
    finally:
        for expert, state in zip(experts[1:3], states, strict=True):
            expert.load_state_dict(state)


def test_too_little_agreement_is_no_parity():
    found = {
        **{'trajectory_mean_m': 0.05, 'trajectory_max_m': 0.4, 'logits_max_abs': 3.0},
        **{'text_share': 0.5, 'views_share': 1.0, 'skills_share': 0.99},
        **{'experts_reached': 5, 'experts_total': 5},
    }
    parity.judge(found, 'int8')
    with pytest.raises(parity.ParityError, match='skills equal at 98.0% < 99% of the moments'):
        parity.judge({**found, 'skills_share': 0.98}, 'int8')
    with pytest.raises(parity.ParityError, match='trajectory_mean_m 0.11 > 0.1'):
        parity.judge({**found, 'trajectory_mean_m': 0.11}, 'int8')


def test_int8_wants_clips_and_no_clip_judges_its_own_scales(made, tmp_path):
    _, folder = made
    asked = export.Asked(checkpoint=folder, out=tmp_path, name='x', precision='int8')
    with pytest.raises(ValueError, match='name with --data a folder of them'):
        export._moments(asked, Manifest.load(folder / 'int8'))
    for number in range(10):
        (tmp_path / f'clip_{number}/anno').mkdir(parents=True)
        (tmp_path / f'clip_{number}/anno/00000.json.gz').touch()
    judged, calibrated = moments.spread(tmp_path, (50, 32))
    assert (len(judged), len(calibrated)) == (6, 4) and not {*judged} & {*calibrated}
    judged, calibrated = moments.spread(tmp_path, (3, 2))
    assert (len(judged), len(calibrated)) == (3, 2) and not {*judged} & {*calibrated}
    assert [one.name for one in moments.spread(tmp_path, (3, 0))[0]] == [
        'clip_0',
        'clip_4',
        'clip_9',
    ]
    for number in range(1, 10):
        (tmp_path / f'clip_{number}/anno/00000.json.gz').unlink()
    with pytest.raises(ValueError, match='has 1 clips; record more'):
        moments.spread(tmp_path, (50, 32))
