"""The whole network: losses that fall, decisions that do not depend on the noise, checkpoints that come back."""

from dataclasses import replace

import pytest
import torch

from mose_ros.modeling.config import DriverConfig, preset
from mose_ros.modeling.driver import LossWeights, MoseDriver
from mose_ros.modeling.losses import accuracy, focal, soft_cross_entropy
from test.modeling.planning import plan

ALL = LossWeights(semantics=1.0)


def make(**changes):
    torch.manual_seed(0)
    config = preset('nano', semantic_classes=4, **changes)
    return config, MoseDriver(config)


@pytest.mark.parametrize('bfloat16', [False, True])
def test_every_loss_falls(bfloat16):
    config, driver = make()
    batch = config.fake_batch(6)
    optimizer = torch.optim.AdamW(driver.parameters(), lr=3e-3)
    outputs = []
    for _ in range(25):
        torch.manual_seed(1)  # the same noises, so that the flow's loss can be compared
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            outputs.append(driver(batch, ALL))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    first, last = outputs[0].parts, outputs[-1].parts
    assert set(first) == {
        'text', 'routers', 'flow', 'action_router', 'view_router', 'semantics'
    }  # fmt: skip
    assert all(last[name] < 0.9 * first[name] for name in first), (first, last)
    assert outputs[-1].metrics['router_planning'] >= outputs[0].metrics['router_planning']


def test_a_loss_of_weight_zero_trains_nothing():
    config, driver = make()
    batch = config.fake_batch(2)
    weights = LossWeights(text=0, routers=0, flow=0, action_router=0)
    assert set(driver(batch, weights).parts) == {'view_router'}
    driver(batch, weights).loss.backward()
    touched = {name.split('.')[0] for name, p in driver.named_parameters() if p.grad is not None}
    assert touched == {'view_router'}
    with pytest.raises(ValueError, match='nothing is left'):
        driver(batch, replace(weights, view_router=0))


@pytest.mark.parametrize('insulated', [False, True])
def test_knowledge_insulation_keeps_the_flow_out_of_the_language_model(insulated):
    action = replace(preset('nano').action, knowledge_insulation=insulated)
    config, driver = make()
    driver.action_expert.config = action
    only = LossWeights(text=0, routers=0, view_router=0)
    driver(config.fake_batch(2), only).loss.backward()
    reached = driver.vlm.model.language_model.layers[0].self_attn.k_proj.weight.grad is not None
    assert reached != insulated


@torch.no_grad()
def test_the_action_skill_depends_on_the_moment_and_not_on_the_noise():
    config, driver = make()
    batch = config.fake_batch(2)
    calm = plan(driver, batch)
    noisy = plan(driver, batch, noise=torch.randn_like(batch.action[0]))
    torch.testing.assert_close(calm.action_scores, noisy.action_scores)
    assert not torch.allclose(calm.action, noisy.action)
    other = plan(driver, replace(batch, patches=batch.patches.flip(0)))
    assert not torch.allclose(calm.action_scores, other.action_scores)


@torch.no_grad()
def test_draws_of_one_trajectory_do_not_see_each_other():
    config, driver = make()
    expert, decoder = driver.action_expert, config.decoder
    prompt = [
        (torch.randn(2, decoder.kv_heads, 5, decoder.head_dim),) * 2 for _ in range(decoder.layers)
    ]
    mask = torch.ones(2, 5, dtype=torch.bool)
    noisy, t = torch.randn(2, 3, config.action.horizon, 2), torch.rand(2, 3)
    state = torch.randn(2, config.proprio)
    together = expert(noisy, t, state, prompt, mask).velocity
    for draw in range(3):
        alone = expert(noisy[:, draw : draw + 1], t[:, draw : draw + 1], state, prompt, mask)
        torch.testing.assert_close(alone.velocity[:, 0], together[:, draw])
    blind = expert(noisy, t, state, prompt, mask & (torch.arange(5) < 3)).velocity
    assert not torch.allclose(blind, together)


@pytest.mark.parametrize('top_k', [1, 3])
@torch.no_grad()
def test_action_experts_can_be_forced(top_k):
    action = replace(preset('nano').action, top_k=top_k)
    config, driver = make()
    driver.action_expert.config = action
    for name, weight in driver.named_parameters():
        if 'experts' in name:
            weight.add_(0.2 * torch.randn_like(weight))
    batch = config.fake_batch(1)
    own = plan(driver, batch)
    chain = own.skills
    forced = [plan(driver, batch, action_override=skill) for skill in range(7)]
    assert [one.action_skill for one in forced] == list(range(7))
    assert all(one.skills == chain for one in forced)
    same = [torch.allclose(one.action, own.action) for one in forced]
    assert sum(same) == (1 if top_k == 1 else 0)  # three experts together are none of them alone


@torch.no_grad()
def test_a_forced_skill_stays_while_the_answer_is_decoded():
    config, driver = make()
    batch = config.fake_batch(1)
    answer = plan(driver, batch, max_new_tokens=3, skill_override=[2, -1, 5])
    free = plan(driver, batch, max_new_tokens=3)
    assert answer.skills == (2, free.skills[1], 5)
    assert len(answer.answer) == 3
    assert plan(driver, batch, max_new_tokens=3, end_id=free.answer[0]).answer == ()


@torch.no_grad()
def test_the_view_router_ignores_what_absent_cameras_would_show():
    for glance, sees_others in (('all', True), ('front', False)):
        config, driver = make(glance=replace(preset('nano').glance, glance=glance))
        batch = config.fake_batch(2)
        present = batch.present.clone()
        present[:, 3] = 0
        changed = batch.thumbnails.clone()
        changed[:, 3] = 9.0
        score = driver.view_router
        want = score(batch.thumbnails, present, batch.proprio)
        torch.testing.assert_close(score(changed, present, batch.proprio), want)
        seen = score(changed, batch.present, batch.proprio)
        assert torch.allclose(seen, score(*vars_of(batch))) != sees_others


def vars_of(batch):
    return batch.thumbnails, batch.present, batch.proprio


def test_a_checkpoint_comes_back_whole(tmp_path):
    config, driver = make()
    driver.save(tmp_path / 'one')
    driver.save(tmp_path / 'one')  # replaces what is there
    loaded = MoseDriver.load(tmp_path / 'one')
    assert loaded.config.to_json() == config.to_json()
    want, got = driver.state_dict(), loaded.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[name], got[name]) for name in want)
    other = MoseDriver(config).state_dict()
    assert not all(torch.equal(want[name], other[name]) for name in want)
    with pytest.raises(ValueError, match='is no checkpoint'):
        MoseDriver.load(tmp_path)


def test_the_tiny_preset_keeps_its_promises():
    config = preset('tiny')
    driver = MoseDriver(config)
    counts = driver.count_parameters()
    assert counts['total'] <= 15e6 and counts['view_router'] <= 0.3e6
    assert counts['active'] < 0.7 * counts['total']
    assert config.vision.tokens == 32
    assert DriverConfig.from_json(config.to_json()).to_json() == config.to_json()
    with pytest.raises(ValueError, match='known: tiny, mini, nano'):
        preset('large')


def test_focal_loss_counts_the_hard_and_the_rare():
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
    target = torch.tensor([0, 0, -1])
    plain = torch.nn.functional.cross_entropy(logits[:2], target[:2])
    torch.testing.assert_close(focal(logits, target, gamma=0.0), plain)
    torch.testing.assert_close(focal(logits, target, gamma=0.0, counts=(30, 10)), plain * 2 / 3)
    easy, hard = logits[:1], logits[1:2]
    assert focal(easy, target[:1]) < 1e-3 * focal(easy, target[:1], gamma=0.0)
    assert focal(hard, target[:1]) > 0.9 * focal(hard, target[:1], gamma=0.0)
    with pytest.raises(ValueError, match='3 counts for 2 classes'):
        focal(logits, target, counts=(1, 2, 3))


def test_unknown_targets_are_left_out():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert accuracy(scores, torch.tensor([0, 1, -1])) == 0.5
    assert focal(scores, torch.tensor([-1, -1, -1])) == 0
    shares = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    got = soft_cross_entropy(torch.zeros(2, 2), shares)
    torch.testing.assert_close(got, torch.tensor(2.0).log())


@torch.no_grad()
def test_a_prompt_without_a_mask_is_seen_whole():
    config, driver = make()
    expert, decoder = driver.action_expert, config.decoder
    shape = (1, decoder.kv_heads, 9, decoder.head_dim)
    prompt = [(torch.randn(shape), torch.randn(shape)) for _ in range(decoder.layers)]
    noisy, t = torch.randn(1, 1, config.action.horizon, 2), torch.rand(1, 1)
    proprio, everyone = torch.randn(1, config.proprio), torch.ones(1, 9, dtype=torch.bool)

    def velocity(mask):
        return expert(noisy, t, proprio, prompt, mask).velocity

    assert torch.equal(velocity(None), velocity(everyone))
    everyone[0, 3] = False
    assert not torch.allclose(velocity(None), velocity(everyone), atol=1e-4)
