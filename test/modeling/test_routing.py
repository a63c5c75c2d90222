"""How skills are learned: routers first, from few labels, then the blocks they choose; groups of experts; any taxonomy."""

from dataclasses import replace

import pytest
import torch

from mose_ros.core.skills import Taxonomy, default_path
from mose_ros.modeling.batch import LossWeights
from mose_ros.modeling.config import even_layers, preset
from mose_ros.modeling.driver import MoseDriver, read_config

ROUTERS = LossWeights(text=0, flow=0, action_router=0, view_router=0)
TEXT = LossWeights(routers=0, flow=0, action_router=0, view_router=0)


def make(taxonomy=None, **mose):
    torch.manual_seed(0)
    config = preset('nano', taxonomy=taxonomy)
    config = replace(config, mose=replace(config.mose, **mose))
    return config, MoseDriver(config)


def train(driver, batch, losses, steps=30, rate=3e-2, **options):
    moving = [p for p in driver.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moving, lr=rate)
    outputs = []
    for _ in range(steps):
        outputs.append(driver(batch, losses, **options))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def moved(driver, before):
    """Return the names of the parameters that are no longer what they were."""
    now = dict(driver.named_parameters())
    return {name for name, value in before.items() if not torch.equal(now[name], value)}


def copy(driver):
    return {name: value.detach().clone() for name, value in driver.named_parameters()}


@pytest.mark.parametrize(('scope', 'routers'), [('level', 3), ('layer', 4)])
def test_routers_learn_few_labels_and_nothing_else_moves(scope, routers):
    config, driver = make(router_scope=scope, layers=((0,), (1, 2), (3,)))
    driver.train_only('routers')
    batch, before = config.fake_batch(8), copy(driver)
    known = batch.skills.clone()
    known[5:] = -1  # most samples have no label
    batch = replace(batch, skills=known)

    outputs = train(driver, batch, ROUTERS)

    assert outputs[-1].parts['routers'] < 0.3 * outputs[0].parts['routers']
    assert outputs[-1].metrics['router_perception'] == 1.0
    assert outputs[-1].metrics['router_prediction'] == 1.0
    changed = moved(driver, before)
    assert changed and all(name.startswith('vlm.routers.') for name in changed)
    assert len({name.split('.')[2] for name in changed}) == routers


@pytest.mark.parametrize('scope', ['level', 'layer'])
@pytest.mark.parametrize('what', ['experts', 'mose'])
def test_then_the_blocks_learn_with_frozen_or_moving_routers(scope, what):
    config, driver = make(router_scope=scope, layers=((0,), (1, 2), (3,)))
    driver.train_only('routers')
    batch = config.fake_batch(6)
    train(driver, batch, ROUTERS)
    learned = read_scores(driver, batch)

    driver.train_only(what)
    before = copy(driver)
    losses = TEXT if what == 'experts' else replace(TEXT, routers=0.5)
    outputs = train(driver, batch, losses, steps=10, rate=3e-3, teacher_forcing=0.0)

    assert outputs[-1].parts['text'] < outputs[0].parts['text']
    changed = moved(driver, before)
    assert any(name.endswith('layers.1.mlp.up_proj.weight') for name in changed)
    assert any('layers.1.mlp.experts.' in name for name in changed)
    assert any(name.startswith('vlm.routers.') for name in changed) == (what == 'mose')
    rest = {n for n in changed if '.mlp.' not in n and not n.startswith('vlm.routers.')}
    assert not rest, 'ViT, attention, norms and embeddings are frozen'
    # the first router reads what no block has touched
    assert torch.equal(read_scores(driver, batch)[0], learned[0]) == (what == 'experts')


@torch.no_grad()
def read_scores(driver, batch):
    _, embeds = driver.vlm.see(batch.patches.flatten(0, 1))
    embeds = embeds.unflatten(0, batch.patches.shape[:2])
    mask = torch.arange(batch.input_ids.shape[1]) < batch.prompt_lengths[:, None]
    read = driver.vlm.read(batch.input_ids, embeds, batch.position_ids, mask.float())
    return read.scores


def test_what_is_trained_is_said_by_word_or_by_prefix():
    _, driver = make()
    driver.train_only('mose, view_router.')
    moving = {name for name, p in driver.named_parameters() if p.requires_grad}
    assert {name.split('.')[0] for name in moving} == {'vlm', 'view_router'}
    assert not any('visual' in name or 'self_attn' in name or 'embed' in name for name in moving)
    assert not any('.layers.0.mlp.' in name for name in moving)  # a plain FFN
    driver.train_only('all')
    assert all(p.requires_grad for p in driver.parameters())
    with pytest.raises(ValueError, match="begins with 'vision', nor is it one of all, routers"):
        driver.train_only('mose,vision')
    with pytest.raises(ValueError, match="begins with ''"):
        driver.train_only('')


def test_mose_layers_are_even_and_shared_out_evenly():
    assert even_layers(28, 3) == ((8, 10, 12, 14), (16, 18, 20), (22, 24, 26))
    assert even_layers(8, 3) == ((2,), (4,), (6,))
    assert even_layers(6, 3) == ((0,), (2,), (4,))
    for depth in range(6, 90):
        layers = even_layers(depth, 3)
        flat = sum(layers, ())
        assert flat == tuple(range(flat[0], depth, 2)) and flat[0] % 2 == 0
        assert max(map(len, layers)) - min(map(len, layers)) <= 1
    with pytest.raises(ValueError, match='2 even-numbered ones for 3 levels'):
        even_layers(4, 3)


def test_a_network_for_robots_has_their_levels(tmp_path):
    robot = Taxonomy.load(default_path('skills_robot.yaml'))
    config, driver = make(robot)
    output = driver(config.fake_batch(3), replace(ROUTERS, text=1.0))
    assert set(output.metrics) == {
        'token_accuracy',
        *(f'router_{level}' for level in robot.levels),
    }
    assert [router.out_features for router in driver.vlm.routers] == [5, 5, 5]
    driver.save(tmp_path / 'robot')
    assert read_config(tmp_path / 'robot').mose.levels == {
        level: list(robot.names(level)) for level in robot.levels
    }
    driving, _ = make()
    assert driving.mose.levels != config.mose.levels


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    _, driver = make()
    driver.save(tmp_path / 'model')
    path = tmp_path / 'model/vlm/config.json'
    path.write_text(path.read_text().replace('"expert_groups": false', '"expert_groups": true'))
    with pytest.raises(ValueError, match='vlm lacks .* weights, as .*image_experts'):
        MoseDriver.load(tmp_path / 'model')


# ---- expert groups ----


@pytest.mark.parametrize('scope', ['level', 'layer'])
def test_both_experts_of_a_skill_learn(scope):
    config, driver = make(expert_groups=True, router_scope=scope)
    driver.train_only('experts')
    batch = config.fake_batch(2)
    batch = replace(batch, skills=torch.ones_like(batch.skills))
    driver(batch, TEXT).loss.backward()
    mlp = driver.vlm.model.language_model.layers[2].mlp
    for group in (mlp.experts, mlp.image_experts):
        assert group[1].up_proj.weight.grad.abs().sum() > 0
        assert group[0].up_proj.weight.grad is None


@torch.no_grad()
def test_a_grouped_network_decodes_as_it_reads():
    config, driver = make(expert_groups=True)
    for name, weight in driver.vlm.named_parameters():
        if 'experts' in name:
            weight.add_(0.3 * torch.randn_like(weight))
    batch = config.fake_batch(1, answer=4)
    _, embeds = driver.vlm.see(batch.patches[0])
    length = int(batch.prompt_lengths)
    mask = (torch.arange(batch.input_ids.shape[1]) < length).float()[None]
    whole = driver.vlm.read(batch.input_ids, embeds[None], batch.position_ids, mask)
    part = driver.vlm.read(
        batch.input_ids[:, :length],
        embeds[None],
        batch.position_ids[..., :length],
        mask[:, :length],
    )
    past = list(zip(part.keys, part.values, strict=True))
    token = driver.vlm.model.language_model.embed_tokens(batch.input_ids[:, length : length + 1])
    place = batch.position_ids[..., length : length + 1]
    step = driver.vlm(token, place, skills=part.skills, past=past)
    torch.testing.assert_close(step.hidden[:, 0], whole.hidden[:, length], atol=1e-5, rtol=1e-4)
    hidden = driver.vlm.embed(batch.input_ids, embeds[None])
    blind = driver.vlm(hidden, batch.position_ids, mask, is_image=torch.zeros_like(mask).bool())
    assert not torch.allclose(blind.hidden, whole.hidden, atol=1e-3)
    with pytest.raises(ValueError, match='need is_image'):
        driver.vlm(hidden, batch.position_ids, mask)


def test_groups_cost_one_more_expert_for_each_block():
    _, plain = make()
    _, grouped = make(expert_groups=True)
    few, many = plain.count_parameters(), grouped.count_parameters()
    block = plain.vlm.model.language_model.layers[1].mlp
    expert = sum(p.numel() for p in block.experts[0].parameters())
    assert many['active'] - few['active'] == 3 * expert
    assert many['total'] - few['total'] == (5 + 5 + 8) * expert
