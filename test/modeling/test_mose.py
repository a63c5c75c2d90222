"""The MoSE on Qwen2-VL against Hugging Face's own Qwen2-VL, and its routing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from mose_ros.core import vision
from mose_ros.modeling.config import preset
from mose_ros.modeling.layers import attend, attend_in_products, hide
from mose_ros.modeling.mixture import SkillMixture, SkillRouter, pick_by_branch
from mose_ros.modeling.mixture import pick_by_group as pick
from mose_ros.modeling.mose import MoseQwen2VL
from mose_ros.modeling.qwen2vl import hf_config


def make(**mose):
    torch.manual_seed(0)
    config = preset('nano')
    config = replace(config, mose=replace(config.mose, **mose))
    network = MoseQwen2VL(hf_config(config.vision, config.decoder, config.mose)).eval()
    network.copy_shared()
    return config, network


def dense_like(network, folder):
    """Return Hugging Face's network with the same weights, by way of its own file format."""
    network.save_pretrained(folder)
    return Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()


def read(network, batch, embeds, **routing):
    place = torch.arange(batch.input_ids.shape[1])
    mask = (place < batch.prompt_lengths[:, None]).float()
    hidden = network.embed(batch.input_ids, embeds)
    return network(hidden, batch.position_ids, mask, **routing)


@torch.no_grad()
def test_the_tower_equals_hugging_faces(tmp_path):
    config, network = make()
    patches = config.fake_batch(3).patches[:, 0]
    rows, columns = config.vision.grid
    grid = torch.tensor([[1, rows, columns]] * 3)

    want = dense_like(network, tmp_path).model.visual(patches.flatten(0, 1), grid_thw=grid)
    features, embeds = network.see(patches)

    torch.testing.assert_close(features.flatten(0, 1), want.last_hidden_state)
    torch.testing.assert_close(embeds.flatten(0, 1), want.pooler_output)
    alone = network.see(patches[:1])[1]
    assert not torch.allclose(alone[0], embeds[1])


@torch.no_grad()
def test_pictures_are_seen_as_their_patches_are():
    config, network = make()
    view = config.vision
    shape = (3, view.frames, view.view_height, view.view_width, 3)
    pictures = torch.randint(256, shape, dtype=torch.uint8)
    normal = vision.normalize(pictures.numpy())
    patches = torch.from_numpy(
        np.stack([vision.patchify(one, view.patch, view.merge) for one in normal])
    )

    cut = network.cut(pictures).unflatten(-1, (-1, view.patch**2, 3))
    want = patches.unflatten(-1, (3, view.frames, -1)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(cut, want, atol=1e-6, rtol=0)
    want = network.see(patches)[1]
    torch.testing.assert_close(network.see_pictures(pictures), want)
    assert not torch.allclose(network.see_pictures(pictures.flip(3)), want, atol=1e-3)


@torch.no_grad()
def test_positions_turn_as_hugging_faces_do():
    _, network = make()
    rotary = network.model.language_model.rotary_emb
    places = torch.randint(50, (3, 2, 7))
    cos, sin = rotary(torch.zeros(1), places)
    first, second = sin.chunk(2, -1)
    want = cos[:, None], torch.cat([-first, second], -1)[:, None]

    torch.testing.assert_close(network.angles(places), want, atol=0, rtol=0)
    assert not torch.allclose(network.angles(places.flip(0))[0], want[0])


@torch.no_grad()
@pytest.mark.parametrize('weight', [0.0, 0.5])
def test_a_converted_network_begins_as_the_network_it_was(tmp_path, weight):
    config, network = make(expert_weight=weight)
    batch = config.fake_batch(2)
    embeds = network.see(batch.patches.flatten(0, 1))[1].unflatten(0, (2, 2))
    pixels = batch.patches.flatten(0, 2)
    grid = torch.tensor([[1, *config.vision.grid]] * 4)

    decoded = read(network, batch, embeds)
    dense = dense_like(network, tmp_path)
    want = dense(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        pixel_values=pixels,
        image_grid_thw=grid,
    )

    is_token = batch.attention_mask.bool()
    got = network.lm_head(decoded.hidden)
    torch.testing.assert_close(got[is_token], want.logits[is_token], atol=1e-5, rtol=1e-4)

    for expert in network.model.language_model.layers[2].mlp.experts:
        expert.down_proj.weight.normal_()
    same = torch.allclose(network.lm_head(read(network, batch, embeds).hidden), got, atol=1e-5)
    assert same == (weight == 0.0)


@torch.no_grad()
def test_the_router_reads_the_prompt_and_nothing_else():
    config, network = make()
    batch = config.fake_batch(4)
    embeds = torch.randn(4, 2, config.vision.tokens, config.decoder.width)
    first = read(network, batch, embeds)

    answered = replace(batch, input_ids=batch.input_ids.clone())
    asked = replace(batch, input_ids=batch.input_ids.clone())
    for row, length in enumerate(batch.prompt_lengths):
        answered.input_ids[row, length:] = 7
        asked.input_ids[row, length - 3] = 7

    other_answer = read(network, answered, embeds)
    other_question = read(network, asked, embeds)
    for level in range(3):
        torch.testing.assert_close(other_answer.scores[level], first.scores[level])
        assert not torch.allclose(other_question.scores[level], first.scores[level])


@torch.no_grad()
def test_labels_override_the_router_where_they_are_known():
    config, network = make()
    batch = config.fake_batch(3)
    embeds = torch.randn(3, 2, config.vision.tokens, config.decoder.width)
    own = read(network, batch, embeds).skills
    forced = torch.tensor([[1, -1, 7], [-1, -1, -1], [4, 3, -1]])

    skills = read(network, batch, embeds, forced=forced).skills

    assert (skills == torch.where(forced >= 0, forced, own)).all()


@torch.no_grad()
@pytest.mark.parametrize('scope', ['level', 'layer'])
def test_decoding_token_by_token_equals_reading_at_once(scope):
    config, network = make(router_scope=scope, layers=((0, 1), (2,), (3,)))
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    batch = config.fake_batch(1, answer=4)
    embeds = torch.randn(1, 2, config.vision.tokens, config.decoder.width)
    whole = read(network, batch, embeds)
    assert whole.skills.shape == (1, 3 if scope == 'level' else 4)

    length = int(batch.prompt_lengths)
    hidden = network.embed(batch.input_ids[:, :length], embeds)
    part = network(hidden, batch.position_ids[..., :length], torch.ones(1, length))
    past = list(zip(part.keys, part.values, strict=True))
    token = network.model.language_model.embed_tokens(batch.input_ids[:, length : length + 1])
    place = batch.position_ids[..., length : length + 1]
    step = network(token, place, skills=part.skills, past=past)

    torch.testing.assert_close(step.hidden[:, 0], whole.hidden[:, length], atol=1e-5, rtol=1e-4)
    wrong = network(token, place, skills=(part.skills + 1) % 5, past=past)
    assert not torch.allclose(wrong.hidden[:, 0], whole.hidden[:, length], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    'mose', [{}, {'expert_groups': True}, {'routing': 'token'}], ids=['skill', 'groups', 'token']
)
def test_the_newest_token_is_read_as_among_all(mose):
    config, network = make(**mose)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    batch = config.fake_batch(2)
    embeds = torch.randn(2, 2, config.vision.tokens, config.decoder.width)
    mask = torch.ones_like(batch.input_ids, dtype=torch.float32)
    whole = network.read(batch.input_ids, embeds, batch.position_ids, mask)
    newest = network.read(batch.input_ids, embeds, batch.position_ids, mask, newest=True)

    torch.testing.assert_close(newest.hidden, whole.hidden[:, -1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(newest.keys, whole.keys)
    torch.testing.assert_close(newest.values, whole.values)
    torch.testing.assert_close(newest.scores, whole.scores)
    assert not torch.allclose(newest.hidden, whole.hidden[:, -2:-1], atol=1e-2)


@torch.no_grad()
def test_samples_go_to_their_experts():
    torch.manual_seed(0)
    mixture = SkillMixture(8, 16, 3, 0.5)
    x, chosen = torch.randn(6, 4, 8), torch.tensor([2, 0, 2, 1, 0, 2])

    picked = pick(mixture.experts, chosen, x)

    for row, expert in enumerate(chosen):
        torch.testing.assert_close(picked[row], mixture.experts[expert](x[row]))
        assert not torch.allclose(picked[row], mixture.experts[(expert + 1) % 3](x[row]))
    two, weights = torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]])
    want = 0.25 * mixture.experts[0](x[:1]) + 0.75 * mixture.experts[1](x[:1])
    shared = super(SkillMixture, mixture).forward(x[:1])
    torch.testing.assert_close(mixture(x[:1], two, weights), (shared + want) / 2)


@torch.no_grad()
def test_the_tree_of_conditions_picks_the_same_expert():
    class Tree(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, chosen):
            return pick_by_branch(self.experts, chosen, x)

    tree, x = Tree(), torch.randn(1, 2, 4)
    program = torch.export.export(tree, (x, torch.tensor([0]))).module()
    outputs = [program(x, torch.tensor([index])) for index in range(3)]
    for index, output in enumerate(outputs):
        torch.testing.assert_close(output, pick(tree.experts, torch.tensor([index]), x))
    assert not torch.allclose(outputs[0], outputs[1])


def test_routers_decide_in_float32_under_autocast():
    torch.manual_seed(0)
    router, tokens = SkillRouter(16, 4), torch.randn(2, 5, 16)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    want = router(tokens, mask)
    with torch.autocast('cpu', torch.bfloat16):
        got = router(tokens, mask)
        linear = torch.nn.functional.linear(tokens, router.weight)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    assert linear.dtype == torch.bfloat16


@pytest.mark.parametrize('causal', [False, True])
def test_attention_in_bfloat16_equals_that_in_float32(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = None if causal else torch.rand(2, 1, 9, 9) < 0.7
    want = attend(q, k, v, mask, causal=causal)
    got = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, causal=causal)
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.03)
    assert not torch.allclose(attend(q, k, v.flip(2), mask, causal=causal), want, atol=0.03)


@pytest.mark.parametrize('groups', [2, 4])
def test_attention_in_products_is_attention(groups):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 8)
    mask = torch.rand(1, 1, 9, 9) < 0.7
    want = attend(q, k, v, mask)
    bias = hide(mask, 4 // groups, torch.float32)
    torch.testing.assert_close(attend_in_products(q, k, v, bias), want)
    torch.testing.assert_close(attend_in_products(q, k, v), attend(q, k, v))
    assert not torch.allclose(attend_in_products(q, k, v), want, atol=1e-2)
