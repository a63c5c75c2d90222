"""Which view is looked at: the labelled one, or, later in training, the one that the router draws."""

from dataclasses import replace

import pytest
import torch

from mose_ros.modeling.batch import LossWeights
from mose_ros.modeling.config import GlanceConfig, preset
from mose_ros.modeling.driver import MoseDriver
from mose_ros.modeling.view_router import draw_view

BLIND = LossWeights(view_router=0, semantics=0.5)  # no label teaches the router


def make():
    torch.manual_seed(0)
    config = preset('nano', semantic_classes=3)
    return config, MoseDriver(config)


def test_views_are_drawn_as_often_as_their_scores_say():
    torch.manual_seed(0)
    scores = torch.tensor([2.0, 0.0, -1.0, -1e4])
    rows = scores.expand(20000, 4).clone().requires_grad_()
    drawn = draw_view(rows, torch.rand(20000, 4))
    torch.testing.assert_close(drawn.detach().round(), drawn.detach())  # one view, whole
    torch.testing.assert_close(drawn.mean(0), scores.softmax(0), atol=0.01, rtol=0)
    assert drawn[:, 3].abs().max() < 1e-6  # a camera that is absent
    (drawn * torch.tensor([0.0, 1.0, 0.0, 0.0])).sum().backward()
    assert rows.grad[:, 1].min() >= 0 and rows.grad[:, 0].max() <= 0 < rows.grad[:, 1].max()


@torch.no_grad()
def test_the_drawn_view_is_the_one_that_is_read():
    config, driver = make()
    batch = config.fake_batch(4, candidates=5)
    for wish in range(5):
        noise = torch.full((4, 5), 1e-6)
        noise[:, wish] = 1 - 1e-6  # larger than any score
        choosing = replace(batch, choices=replace(batch.choices, noise=noise))
        given = replace(
            batch,
            choices=None,
            patches=torch.cat([batch.patches[:, :1], batch.choices.patches[:, wish, None]], 1),
            semantics=batch.semantics[:, :1],
            coin=torch.zeros(4),
            **batch.choices.text(torch.full((4,), wish)),
        )
        choosing = replace(choosing, coin=torch.zeros(4))
        got, want = (seeded(driver, one) for one in (choosing, given))
        for name, part in want.items():
            torch.testing.assert_close(got[name], part, atol=1e-4, rtol=1e-4)
        other = replace(given, patches=given.patches.flip(0))
        assert not torch.allclose(seeded(driver, other)['text'], want['text'], atol=1e-4)


def seeded(driver, batch):
    torch.manual_seed(3)
    return driver(batch, BLIND).parts


def test_losses_of_language_and_action_teach_the_router_which_view_helps():
    config, driver = make()
    batch = config.fake_batch(4, candidates=5)
    driver(replace(batch, choices=None), BLIND).loss.backward()
    assert all(p.grad is None for p in driver.view_router.parameters())
    driver(batch, BLIND).loss.backward()
    assert all(p.grad is not None for p in driver.view_router.head.parameters())
    assert driver.view_router.head[0].weight.grad.abs().sum() > 0


def test_a_batch_moves_with_its_choices():
    config, _ = make()
    batch = config.fake_batch(2, candidates=3).to('meta')
    assert batch.choices.noise.is_meta and batch.input_ids.is_meta
    assert config.fake_batch(2).to('meta').choices is None


def test_the_front_glance_scores_all_cameras_from_the_first():
    config = preset('nano', glance=replace(preset('nano').glance, glance='front'))
    torch.manual_seed(0)
    driver = MoseDriver(config)
    batch = config.fake_batch(3)
    score = driver.view_router
    base = score(batch.thumbnails, batch.present, batch.proprio)
    assert base.shape == (3, 6) and base.std(1).min() > 0
    front, goal = batch.thumbnails.clone(), batch.proprio + 1
    front[:, 0] += 1
    for changed in (
        score(front, batch.present, batch.proprio),
        score(batch.thumbnails, batch.present, goal),
    ):
        assert not torch.allclose(changed[:, 1:], base[:, 1:])
    with pytest.raises(ValueError, match="'all' or 'front'"):
        GlanceConfig(glance='back')
