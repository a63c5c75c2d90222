"""What the graphs of a bundle leave to the runtime: no product for a token that nobody asks for."""

from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch

from mose_ros.core.skills import Taxonomy
from mose_ros.modeling.config import MoseConfig, preset
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import graphs

LEVELS = {'planning': {'general': '', 'normal': '', 'give_way': ''}}
LAYERS, WEIGHT, ACTION_WEIGHT = 2, 0.75, 0.625  # of the chosen expert


@pytest.fixture(scope='module')
def driver():
    """Return a network of two layers with a mixture in the first, the tokens of which all go on."""
    torch.manual_seed(0)
    nano = preset('nano')
    config = preset(
        'nano',
        taxonomy=Taxonomy(LEVELS),
        decoder=replace(nano.decoder, layers=LAYERS),
        mose=MoseConfig(layers=((0,),), expert_weight=WEIGHT),
        action=replace(nano.action, expert_weight=ACTION_WEIGHT),
    )
    return MoseDriver(config).eval().requires_grad_(False)


@pytest.fixture(scope='module')
def traced(driver):
    """Return the graphs that run once a plan, a step or a token."""
    return {name: graphs.trace(driver, name) for name in ('prefill', 'decode', 'action')}


def rows(model):
    """Return of each product of tokens with weights how many tokens it has, in order; but for those in conditions."""
    graph = model.graph
    sizes = {
        one.name: one.type.tensor_type.shape.dim for one in [*graph.value_info, *graph.output]
    }
    weights = {one.name for one in graph.initializer}
    found = [
        sizes[node.output[0]][1]
        for node in graph.node
        if node.op_type == 'MatMul' and node.input[1] in weights
    ]
    return [one.dim_param or one.dim_value for one in found]


def test_the_last_layer_of_a_prompt_goes_on_with_its_last_token(traced):
    everyone = [
        'tokens'
    ] * 5  # queries with keys and values, the way out of attention, three of the FFN
    assert rows(traced['prefill']) == [*everyone, 'tokens', *[1] * 4]


def optimised(model, folder):
    """Return what ONNX Runtime makes of a graph, as nodes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / 'optimised.onnx')
    options.log_severity_level = 4
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider']
    )
    found = onnx.load(folder / 'optimised.onnx')
    return [node for graph in graphs.subgraphs(found.graph) for node in graph.node]


def scales(nodes):
    """Return by what the products of these nodes are multiplied, where they are."""
    found = [
        (one.f, any(a.name == 'transB' and a.i for a in node.attribute))
        for node in nodes
        if node.op_type == 'FusedMatMul'
        for one in node.attribute
        if one.name == 'alpha'
    ]
    return [pytest.approx(alpha) for alpha, turned in found if not turned], [
        pytest.approx(alpha) for alpha, turned in found if turned
    ]


@pytest.mark.parametrize('graph', ['prefill', 'decode', 'action'])
def test_the_share_of_the_common_expert_is_part_of_its_product(traced, tmp_path, graph):
    nodes = optimised(traced[graph], tmp_path)
    weighed, _ = scales(nodes)
    assert weighed == [1 - (ACTION_WEIGHT if graph == 'action' else WEIGHT)]
    assert graph != 'decode' or 'Where' not in [node.op_type for node in nodes]


@pytest.mark.parametrize('graph', ['vision', 'prefill', 'decode', 'action'])
def test_the_scale_of_queries_is_part_of_their_product_with_keys(driver, traced, tmp_path, graph):
    config = driver.config
    model = traced.get(graph) or graphs.trace(driver, graph)
    _, scaled = scales(optimised(model, tmp_path))
    layers, heads = config.decoder.layers, config.decoder.head_dim
    if graph == 'vision':
        layers, heads = config.vision.depth, config.vision.width // config.vision.heads
    assert scaled == [heads**-0.5] * layers


def test_a_condition_within_another_costs_one_operator(traced):
    for name in ('prefill', 'decode'):
        operators = [
            [node.op_type for node in graph.node] for graph in graphs.subgraphs(traced[name].graph)
        ]
        assert [one for one in operators[1:] if 'If' in one] == [['Less', 'If']]


@pytest.mark.parametrize('graph', ['prefill', 'decode'])
def test_the_angles_of_positions_are_taken_once(traced, tmp_path, graph):
    operators = [node.op_type for node in optimised(traced[graph], tmp_path)]
    assert operators.count('Sin') == operators.count('Cos') == 1 and 'Neg' not in operators


def test_a_token_is_decoded_without_turning_it(traced, tmp_path):
    operators = [node.op_type for node in optimised(traced['decode'], tmp_path)]
    assert operators.count('Transpose') == 1  # of the position


@pytest.mark.parametrize('graph', ['decode', 'action'])
def test_the_cache_is_taken_apart_at_once(traced, graph):
    nodes = traced[graph].graph.node
    for past in ('past_k', 'past_v'):
        [squeezed] = [
            node.output[0] for node in nodes if past in node.input and node.op_type == 'Squeeze'
        ]
        [layers] = [node.output for node in nodes if squeezed in node.input]
        assert len(layers) == LAYERS


def test_a_step_of_the_flow_asks_nothing_of_the_prompt_but_its_length(traced, tmp_path):
    operators = [node.op_type for node in optimised(traced['action'], tmp_path)]
    assert 'Tile' not in operators and operators.count('Where') == 1  # of the forced skill
    assert operators.count('Transpose') == 2 * LAYERS + 2 * LAYERS
