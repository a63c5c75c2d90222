"""What the graphs of a bundle leave to the runtime: no product for a token that nobody asks for."""

from dataclasses import replace

import pytest
import torch

from mose_ros.core.skills import Taxonomy
from mose_ros.modeling.config import MoseConfig, preset
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import graphs

LEVELS = {'planning': {'general': '', 'normal': '', 'give_way': ''}}
LAYERS = 2


@pytest.fixture(scope='module')
def driver():
    """Return a network of two layers with a mixture in the first, the tokens of which all go on."""
    torch.manual_seed(0)
    nano = preset('nano')
    config = preset(
        'nano',
        taxonomy=Taxonomy(LEVELS),
        decoder=replace(nano.decoder, layers=LAYERS),
        mose=MoseConfig(layers=((0,),)),
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
