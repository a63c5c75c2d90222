"""The five graphs of a bundle: parts of the network as functions of tensors, traced to ONNX.

Inputs and outputs are exactly those that docs/architecture.md lists; what is dynamic is what the vehicle changes: how many views
and tokens there are. Only operators of the standard domain.
"""

import contextlib
from collections.abc import Iterator, Mapping

import onnx
import torch
from torch import nn

from mose_ros.core.bundle import GRAPHS
from mose_ros.modeling.driver import MoseDriver
from mose_ros.modeling.mixture import TokenMixture
from mose_ros.modeling.mose import Decoded
from mose_ros.training.folding import fold

SURE = 1e4  # more than any score of a router
OPSET = 20  # the newest that TensorRT 10.3, ONNX Runtime and torch's exporter all read or write in full


class Graph(nn.Module):
    """A part of the driver as a function of tensors; inputs are those of `forward`."""

    dynamic: Mapping[str, dict[int, str]] = {}

    def __init__(self, driver: MoseDriver):
        super().__init__()
        self.driver = driver

    def outputs(self) -> list[str]:
        """Return the names of the outputs, in order."""
        raise NotImplementedError


class ViewRouter(Graph):
    def forward(self, thumbnails, present, proprio):
        return self.driver.view_router(thumbnails[None], present[None], proprio)[0]

    def outputs(self):
        return ['scores']


class Vision(Graph):
    dynamic = {'views': {0: 'views'}}

    def forward(self, views):
        return self.driver.vlm.see_pictures(views)

    def outputs(self):
        return ['embeds']


class Prefill(Graph):
    dynamic = {'input_ids': {1: 'tokens'}, 'embeds': {0: 'views'}, 'position_ids': {2: 'tokens'}}

    def forward(self, input_ids, embeds, position_ids, skill_override):
        vlm = self.driver.vlm
        everyone = torch.ones_like(input_ids, dtype=torch.float32)
        with steered(self.driver, skill_override):
            done = vlm.read(
                input_ids,
                embeds[None],
                position_ids,
                everyone,
                forced=skill_override[None],
                newest=True,
            )
        logits = vlm.lm_head(done.hidden[:, -1]).float()
        # without skill routers: 'general' on each level
        scores = done.scores or [logits.new_zeros(1, 1) for _ in skill_override]
        return (
            logits,
            *cache(done),
            skill_override.clamp(min=0)
            if self.driver.config.mose.routing == 'token'
            else done.skills[0],
            *scores,
        )

    def outputs(self):
        levels = self.driver.config.mose.levels
        return ['logits', 'past_k', 'past_v', 'skills', *(f'skill_scores_{one}' for one in levels)]


def cache(done: Decoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of all layers (L, 1, G, T, d) of one text."""
    keys, values = (torch.cat(list(one))[:, None] for one in (done.keys, done.values))
    return keys, values


def by_layer(
    past_k: torch.Tensor, past_v: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Undo `cache`: return the keys and values (1, G, T, d) of each layer."""
    # split, since each layer that unbind takes out costs an operator of its own
    layers = (one.squeeze(1).split(1) for one in (past_k, past_v))
    return list(zip(*layers, strict=True))


_PAST = {'past_k': {3: 'past_tokens'}, 'past_v': {3: 'past_tokens'}}


class Decode(Graph):
    dynamic = _PAST

    def forward(self, input_ids, position_ids, past_k, past_v, skills):
        vlm = self.driver.vlm
        hidden = vlm.model.language_model.embed_tokens(input_ids)
        past = by_layer(past_k, past_v)
        with steered(self.driver, skills):
            done = vlm(hidden, position_ids, skills=skills[None], past=past)
        logits = vlm.lm_head(done.hidden[:, -1]).float()
        return logits, *cache(done)

    def outputs(self):
        return ['logits', 'new_k', 'new_v']


class Action(Graph):
    dynamic = _PAST

    def forward(self, noisy, t, proprio, past_k, past_v, skill_override):
        past = by_layer(past_k, past_v)
        answer = self.driver.action_expert(
            noisy[:, None], t[:, None], proprio, past, None, skill_override
        )
        return answer.velocity[:, 0], answer.scores, answer.skill

    def outputs(self):
        return ['velocity', 'skill_scores', 'skill']


PARTS = dict(zip(GRAPHS, (ViewRouter, Vision, Prefill, Decode, Action), strict=True))


@contextlib.contextmanager
def steered(driver: MoseDriver, wishes: torch.Tensor) -> Iterator[None]:
    """Send all tokens to expert `wishes[level] - 1` of the level's token mixtures, for sure, where that is not below 0.

    Token mixtures choose by themselves; this is how each of their experts can be driven, to be compared.
    """
    handles = []
    for layer, decoder_layer in enumerate(driver.vlm.model.language_model.layers):
        if not isinstance(decoder_layer.mlp, TokenMixture):
            continue
        wish = wishes[driver.config.mose.level_of(layer)]
        experts = torch.arange(len(decoder_layer.mlp.experts))

        def prefer(module, inputs, scores, wish=wish, experts=experts):
            return scores + SURE * (experts == wish - 1).to(scores.dtype)

        handles.append(decoder_layer.mlp.router.register_forward_hook(prefer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def example_inputs(driver: MoseDriver) -> dict[str, dict[str, torch.Tensor]]:
    """Return inputs of every graph, of some size where sizes are dynamic."""
    config = driver.config
    batch = config.fake_batch(1)
    length = int(batch.prompt_lengths[0])
    decoder, levels = config.decoder, len(config.mose.levels)
    shape = (decoder.layers, 1, decoder.kv_heads, length, decoder.head_dim)
    carried = driver.vlm.lm_head.weight.dtype  # what passes from graph to graph
    past = {name: torch.randn(shape).to(carried) for name in ('past_k', 'past_v')}
    embeds = torch.randn(batch.patches.shape[1], config.vision.tokens, decoder.width).to(carried)
    override = torch.full((levels,), -1)
    view = config.vision
    pictures = (len(batch.patches[0]), view.frames, view.view_height, view.view_width, 3)
    return {
        'view_router': {
            'thumbnails': batch.thumbnails[0],
            'present': batch.present[0],
            'proprio': batch.proprio,
        },
        'vision': {'views': torch.zeros(pictures, dtype=torch.uint8)},
        'prefill': {
            'input_ids': batch.input_ids[:, :length],
            'embeds': embeds,
            'position_ids': batch.position_ids[:, :, :length].contiguous(),
            'skill_override': override,
        },
        'decode': {
            'input_ids': batch.input_ids[:, :1],
            'position_ids': batch.position_ids[:, :, :1].contiguous(),
            **past,
            'skills': torch.zeros_like(override),
        },
        'action': {
            'noisy': torch.randn_like(batch.action),
            't': torch.rand(1),
            'proprio': batch.proprio,
            **past,
            'skill_override': torch.full((1,), -1),
        },
    }


def trace(driver: MoseDriver, graph: str) -> onnx.ModelProto:
    """Return one graph of the driver as ONNX with its weights inside; ValueError for operators outside the standard."""
    part = PARTS[graph](driver).eval()
    inputs = example_inputs(driver)[graph]
    program = torch.onnx.export(
        part,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=part.outputs(),
        dynamic_shapes=tuple(part.dynamic.get(name) for name in inputs),
        verbose=False,
    )
    model = program.model_proto
    foreign = {one.domain for one in model.opset_import} - {'', 'ai.onnx'}
    if foreign or model.functions:
        raise ValueError(f'{graph}: operators outside the standard: {foreign or model.functions}')
    for one in subgraphs(model.graph):
        one.ClearField('metadata_props')  # file names and lines of the machine that exported
        for node in one.node:
            node.ClearField('metadata_props')
            node.ClearField('doc_string')
        for value in [*one.value_info, *one.input, *one.output]:
            value.ClearField('metadata_props')
    fold(model)
    return model


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and all graphs inside its conditions."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from subgraphs(attribute.g)
