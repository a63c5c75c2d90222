"""What a MoSE is compared with: dense SFT, token-level MoE, Drive-pi0, all of them the same network with other settings."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from mose_ros.modeling.batch import LossWeights
from mose_ros.modeling.config import MoseConfig, preset
from mose_ros.modeling.driver import MoseDriver
from mose_ros.modeling.losses import load_balance
from mose_ros.modeling.mixture import SkillMixture, TokenMixture, pick_by_token
from mose_ros.modeling.mose import MoseQwen2VL
from test.modeling.planning import plan


def make(action=None, **mose):
    torch.manual_seed(0)
    config = preset('nano')
    config = replace(
        config,
        mose=replace(config.mose, **mose),
        action=replace(config.action, **action or {}),
    )
    return config, MoseDriver(config)


def disturb(driver, word):
    with torch.no_grad():
        for name, weight in driver.named_parameters():
            if word in name:
                weight.add_(0.3 * torch.randn_like(weight))


# ---- the language model ----


def test_token_experts_get_the_tokens_that_chose_them():
    torch.manual_seed(0)
    mixture, x = TokenMixture(8, 16, 3, 0.5), torch.randn(2, 7, 8)
    mixture.copy_shared()
    shared, _ = mixture(x)
    torch.testing.assert_close(shared, mixture.experts[0](x))  # copies change nothing
    disturb(mixture, 'experts')

    answer, gates = mixture(x)

    assert len(set(gates.argmax(-1).flatten().tolist())) == 3
    for row, place in [(0, 0), (0, 5), (1, 6)]:
        best, expert = gates[row, place].max(-1)
        own = mixture.experts[expert](x[row, place])
        common = super(TokenMixture, mixture).forward(x, None)[row, place]
        torch.testing.assert_close(answer[row, place], common + 0.5 * best * (own - common))
        other = mixture.experts[(expert + 1) % 3](x[row, place])
        assert not torch.allclose(own, other, atol=1e-3)


@torch.no_grad()
def test_exported_token_experts_answer_alike():
    class Pick(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, chosen):
            return pick_by_token(self.experts, chosen, x)

    torch.manual_seed(0)
    network, x = Pick(), torch.randn(2, 5, 4)
    chosen = torch.tensor([[0, 2, 1, 1, 0], [2, 2, 2, 0, 1]])
    program = torch.export.export(network, (x, chosen)).module()
    torch.testing.assert_close(program(x, chosen), network(x, chosen))
    assert not torch.allclose(program(x, chosen), network(x, chosen.flip(1)))


def test_balance_is_one_when_even_and_the_number_of_experts_when_one_gets_all():
    even = torch.eye(4)[None]  # each of four tokens is certain of another expert
    everyone = torch.ones(1, 4, dtype=torch.long)
    torch.testing.assert_close(load_balance(even, everyone), torch.tensor(1.0))
    one = even[:, :1].expand(1, 4, 4)
    torch.testing.assert_close(load_balance(one, everyone), torch.tensor(4.0))
    padded = torch.cat([even, one], 1)
    mask = torch.cat([everyone, torch.zeros_like(everyone)], 1)
    torch.testing.assert_close(load_balance(padded, mask), torch.tensor(1.0))


@pytest.mark.parametrize('experts', [4, 8])
def test_a_token_moe_trains_its_experts_and_its_router(experts):
    config, driver = make(routing='token', token_experts=experts)
    batch = config.fake_batch(4)
    optimizer = torch.optim.AdamW(driver.parameters(), lr=3e-3)
    outputs = []
    for _ in range(12):
        torch.manual_seed(1)
        outputs.append(driver(batch, LossWeights()))
        optimizer.zero_grad()
        outputs[-1].loss.backward()
        optimizer.step()
    first, last = outputs[0], outputs[-1]
    assert set(first.parts) == {'view_router', 'text', 'balance', 'flow', 'action_router'}
    assert last.parts['text'] < 0.9 * first.parts['text']
    assert not any(name.startswith('router_p') for name in first.metrics)  # no skill is chosen
    for layer in driver.vlm.mose_layers:
        mlp = driver.vlm.model.language_model.layers[layer].mlp
        assert mlp.router.weight.grad.abs().sum() > 0
        reached = [one for one in mlp.experts if one.up_proj.weight.grad is not None]
        assert len(mlp.experts) == experts and len(reached) > 1
    weighed = sum(getattr(LossWeights(), name) * part for name, part in last.parts.items())
    torch.testing.assert_close(last.loss, weighed)
    assert 'balance' not in driver(batch, LossWeights(balance=0.0)).parts


def test_the_balance_loss_evens_out_a_lopsided_router():
    torch.manual_seed(0)
    mixture, x = TokenMixture(8, 16, 4, 0.5), torch.randn(3, 20, 8)
    x[..., 0] = 3.0  # common to all tokens, and the first expert's sign
    with torch.no_grad():
        mixture.router.weight[0, 0] += 2.0
    optimizer = torch.optim.Adam(mixture.router.parameters(), lr=3e-2)
    mask, balances = torch.ones(3, 20).long(), []
    for _ in range(60):
        loss = load_balance(mixture(x)[1], mask)
        balances.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert balances[0] > 3 and balances[-1] < 1.2


@torch.no_grad()
@pytest.mark.parametrize('routing', ['token', 'none'])
def test_a_baseline_begins_as_the_qwen2vl_it_is_made_of(tmp_path, routing):
    config, driver = make(routing=routing)
    driver.save(tmp_path / 'model')
    dense = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / 'model/vlm').eval()
    batch = config.fake_batch(2)
    _, embeds = driver.vlm.see(batch.patches.flatten(0, 1))
    mask = batch.attention_mask.float()
    read = driver.vlm.read(batch.input_ids, embeds.unflatten(0, (2, 2)), batch.position_ids, mask)
    want = dense(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        pixel_values=batch.patches.flatten(0, 2),
        image_grid_thw=torch.tensor([[1, *config.vision.grid]] * 4),
    ).logits
    is_token = batch.attention_mask.bool()
    torch.testing.assert_close(
        driver.vlm.lm_head(read.hidden)[is_token], want[is_token], atol=1e-5, rtol=1e-4
    )
    assert (read.skills == 0).all() and read.skills.shape == (2, 3) and read.scores == []
    loaded = MoseDriver.load(tmp_path / 'model')
    assert loaded.config.mose.routing == routing
    assert list(loaded.state_dict()) == list(driver.state_dict())
    disturb(driver, 'experts')
    again = driver.vlm.read(batch.input_ids, embeds.unflatten(0, (2, 2)), batch.position_ids, mask)
    assert torch.allclose(again.hidden, read.hidden) == (routing == 'none')


def test_token_routers_stay_in_float32(tmp_path):
    _, driver = make(routing='token')
    driver.vlm.save_pretrained(tmp_path)
    loaded = MoseQwen2VL.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mlp = loaded.model.language_model.layers[1].mlp
    assert mlp.router.weight.dtype == torch.float32
    assert mlp.experts[0].up_proj.weight.dtype == torch.bfloat16


def test_a_token_moe_decodes_as_it_reads():
    config, driver = make(routing='token')
    disturb(driver, 'experts')
    batch = config.fake_batch(1)
    answer = plan(driver, batch, max_new_tokens=2)
    assert answer.skills == (0, 0, 0) and len(answer.answer) == 2
    length = int(batch.prompt_lengths)
    ids = torch.cat([batch.input_ids[:, :length], torch.tensor([answer.answer[:1]])], 1)
    place = batch.position_ids[..., : length + 1]
    with torch.no_grad():
        _, embeds = driver.vlm.see(batch.patches[0])
        read = driver.vlm.read(ids, embeds[None], place, torch.ones(1, length + 1))
        logits = driver.vlm.lm_head(read.hidden[0])
    assert (logits[-2].argmax(), logits[-1].argmax()) == answer.answer
    torch.testing.assert_close(logits[-2], answer.logits, atol=1e-4, rtol=1e-4)


def test_baselines_cost_what_they_compute():
    (_, dense), (_, four), (_, eight), (_, skilled) = (
        make(routing='none'),
        make(routing='token', token_experts=4),
        make(routing='token', token_experts=8),
        make(),
    )
    counts = {
        name: driver.count_parameters()
        for name, driver in [('0', dense), ('4', four), ('8', eight), ('s', skilled)]
    }
    ffn = dense.vlm.model.language_model.layers[1].mlp
    size, width, layers = sum(p.numel() for p in ffn.parameters()), 48, 3
    assert not hasattr(ffn, 'experts')
    assert counts['4']['active'] - counts['0']['active'] == layers * (size + 4 * width)
    assert counts['8']['active'] - counts['4']['active'] == layers * 4 * width
    assert counts['4']['total'] - counts['0']['total'] == layers * 4 * (size + width)
    assert counts['8']['total'] - counts['4']['total'] == layers * 4 * (size + width)
    # the same FFNs are active in a MoSE; only its routers, of 5, 5 and 8 skills, are others
    routers = sum(p.numel() for p in skilled.vlm.routers.parameters())
    assert counts['s']['active'] - routers == counts['4']['active'] - layers * 4 * width


@pytest.mark.parametrize('routing', ['token', 'none'])
def test_the_same_layers_are_trained_in_a_baseline(routing):
    _, driver = make(routing=routing)
    driver.train_only('experts')
    moving = {name for name, p in driver.named_parameters() if p.requires_grad}
    blocks = {name.split('.mlp.')[0] for name in moving}
    assert blocks == {f'vlm.model.language_model.layers.{layer}' for layer in (1, 2, 3)}
    assert any('.router.' in name for name in moving) == (routing == 'token')
    with pytest.raises(ValueError, match="begins with 'routers'"):
        driver.train_only('routers')


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="not 'word'"):
        MoseConfig(routing='word')
    with pytest.raises(ValueError, match='need routing'):
        MoseConfig(routing='token', expert_groups=True)
    with pytest.raises(ValueError, match='2 or more'):
        MoseConfig(routing='token', token_experts=1)
    with pytest.raises(ValueError, match='action.moe_layers is 5 of 4'):
        make(action={'moe_layers': 5})
    with pytest.raises(ValueError, match='action.top_k is 8 of 7'):
        make(action={'top_k': 8})
    with pytest.raises(ValueError, match="not 'step'"):
        make(action={'routing': 'step'})
    with pytest.raises(ValueError, match='time_beta'):
        make(action={'time_beta': 0.0})


# ---- the action expert ----


@pytest.mark.parametrize('views', [1, 3, 6])
def test_drive_pi0_is_the_network_without_mixtures(views):
    config, driver = make(action={'moe_layers': 0}, routing='none')
    batch = config.fake_batch(2, views=views)
    output = driver(batch, LossWeights(view_router=0))
    assert set(output.parts) == {'text', 'flow'}
    output.loss.backward()
    assert not any('experts' in name for name, _ in driver.named_parameters())
    lost = {
        name for name, p in driver.named_parameters()
        if p.grad is None and not name.startswith('view_router')
    }  # fmt: skip
    assert not lost, 'all but the view router learns'
    counts = driver.count_parameters()
    assert counts['active'] == counts['total']

    answer = plan(driver, batch)
    assert answer.action.shape == (6, 2) and answer.action_skill == 0
    assert answer.action_scores.shape == (1,)
    torch.testing.assert_close(plan(driver, batch, action_override=0).action, answer.action)
    unseen = replace(batch, patches=torch.zeros_like(batch.patches))
    assert not torch.allclose(plan(driver, unseen).action, answer.action)


@pytest.mark.parametrize('top_k', [1, 3])
def test_the_tokens_of_a_trajectory_can_choose_for_themselves(top_k):
    config, driver = make(action={'routing': 'token', 'top_k': top_k, 'moe_layers': 2})
    batch = config.fake_batch(3)
    output = driver(batch, LossWeights(text=0, view_router=0), teacher_forcing=0.0)
    output.loss.backward()
    assert driver.action_expert.router.weight.grad.abs().sum() > 0
    assert output.parts['action_router'] > 0
    disturb(driver.action_expert, 'experts')
    free = plan(driver, batch)
    noisy = plan(driver, batch, noise=torch.randn_like(batch.action[0]))
    assert not torch.allclose(free.action_scores, noisy.action_scores)  # the points decide
    forced = [plan(driver, batch, action_override=skill) for skill in range(7)]
    assert [one.action_skill for one in forced] == list(range(7))
    _, alike = make(action={'top_k': top_k, 'moe_layers': 2})
    alike.load_state_dict(driver.state_dict())
    for skill, one in enumerate(forced):  # one expert for all tokens is one for the trajectory
        want = plan(alike, batch, action_override=skill).action
        torch.testing.assert_close(one.action, want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(free.action, plan(alike, batch).action)


def test_training_times_follow_the_beta_schedule():
    leaning, flat = (make(action={'time_beta': beta})[1].action_expert for beta in (1.5, 1.0))
    moments = torch.linspace(0.0005, 0.9995, 1000)[:, None].expand(1000, 2)
    action = torch.zeros(1000, 6, 2)
    _, late, _ = leaning.draw(action, moments)
    _, even, _ = flat.draw(action, moments)
    # the mean of Beta(b, 1) is b / (b + 1)
    torch.testing.assert_close(late.mean(), 0.999 * torch.tensor(0.4), atol=1e-3, rtol=0)
    torch.testing.assert_close(even.mean(), 0.999 * torch.tensor(0.5), atol=1e-3, rtol=0)
    assert late.min() >= 0 and late.max() < 0.999


def test_the_flow_ends_with_sigma_of_the_noise():
    _, driver = make(action={'sigma': 0.1})
    action, noise = torch.randn(5, 6, 2), torch.randn(5, 2, 6, 2)
    noisy, t, velocity = driver.action_expert.draw(action, torch.zeros(5, 2), noise)
    torch.testing.assert_close(t, torch.full((5, 2), 0.9))
    torch.testing.assert_close(noisy, (1 - 0.9 * 0.9) * noise + 0.9 * action[:, None])
    torch.testing.assert_close(noisy + 0.1 * velocity, 0.1 * noise + action[:, None])
    assert not torch.allclose(velocity, action[:, None] - noise)


def test_a_weight_of_one_leaves_the_shared_expert_out():
    torch.manual_seed(0)
    mixture, x, chosen = (
        SkillMixture(8, 16, 3, 1.0),
        torch.randn(2, 5, 8),
        torch.tensor([[2], [0]]),
    )
    answer = mixture(x, chosen)
    torch.testing.assert_close(answer[0], mixture.experts[2](x[0]))
    mixture.expert_weight = 0.5
    assert not torch.allclose(mixture(x, chosen)[0], answer[0], atol=1e-3)
