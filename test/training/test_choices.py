"""A stage may look at the views that the router draws, and learn from what came of it."""

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.modeling.batch import LossWeights  # noqa: E402
from mose_ros.modeling.driver import MoseDriver  # noqa: E402
from mose_ros.training import stages  # noqa: E402
from mose_ros.training.batches import Order, collate  # noqa: E402
from mose_ros.training.index import Index  # noqa: E402
from mose_ros.training.samples import Samples  # noqa: E402


def keys_of(run, **options):
    training, data = run
    config = stages.model_config(training, data)
    index = Index.load(data, config)
    order = Order(index, training.data, stage='sft', seed=0, batch=3, start=0, stop=6, **options)
    return Samples(index, config, training.data), list(order)


def test_all_candidates_come_with_the_prompts_that_name_them(drawn):
    samples, batches = keys_of(drawn, view_choice='router')
    keys = next(keys for keys in batches if keys[0].views == 2)
    quiet = [replace(key, numbers=None) for key in keys]
    batch = collate([samples[key] for key in quiet])
    plain = collate([samples[replace(key, draws=False)] for key in quiet])
    assert plain.choices is None and torch.equal(plain.patches, batch.patches)
    choices = batch.choices
    assert choices.places.tolist() == [1, 2, 3, 4, 5]  # all but the front
    known = batch.camera > 0
    assert known.any()
    for row in known.nonzero()[:, 0]:
        own = int(batch.camera[row]) - 1
        assert torch.equal(choices.patches[row, own], batch.patches[row, 1])
        end = int(batch.attention_mask[row].sum())
        for name in ('input_ids', 'labels'):
            mine = getattr(choices, name)[row, own]
            assert torch.equal(mine[:end], getattr(batch, name)[row][:end])
        places = choices.position_ids[:, row, own]
        assert torch.equal(places[:, :end], batch.position_ids[:, row, :end])
        other = choices.input_ids[row, (own + 1) % 5]
        assert not torch.equal(other[:end], batch.input_ids[row][:end])
    answers = (choices.labels >= 0).sum(-1)
    assert (answers == answers[:, :1]).all()


def test_a_batch_that_looks_at_the_fixed_views_alone_draws_nothing(drawn):
    training, data = drawn
    alone = replace(training, data=replace(training.data, fixed_alone=1.0))
    _, batches = keys_of((alone, data), view_choice='router')
    assert not any(key.draws for keys in batches for key in keys)
    with pytest.raises(ValueError, match='data.top_k is 1, not 2'):
        keys_of((replace(training, data=replace(training.data, top_k=2)), data),
                view_choice='router')  # fmt: skip
    with pytest.raises(ValueError, match="not 'driver'"):
        keys_of(drawn, view_choice='driver')


def test_a_stage_with_the_routers_own_views_teaches_the_router_without_labels(drawn, tmp_path):
    training, data = drawn
    rates = {}
    for choice in ('label', 'router'):
        stage = replace(
            training.action, steps=2, view_choice=choice, losses=LossWeights(view_router=0)
        )
        stages.train(
            'action',
            replace(training, action=stage),
            data,
            tmp_path / choice,
            limits=stages.Limits(bar=False),
        )
        result = json.loads((tmp_path / choice / stages.RESULT).read_text(encoding='utf-8'))
        assert result['identity']['settings']['view_choice'] == choice
        model = MoseDriver.load(tmp_path / choice / stages.MODEL)
        rates[choice] = model.view_router.head[0].bias
    torch.manual_seed(training.action.seed)
    fresh = MoseDriver(stages.model_config(training, data)).view_router.head[0].bias
    assert torch.equal(rates['label'], fresh) and not torch.equal(rates['router'], fresh)


@pytest.mark.parametrize(
    ('history', 'past'), [('all', [1, 1]), ('fixed', [1, 0]), ('none', [0, 0])]
)
def test_views_show_their_past_or_now_twice(drawn, history, past):
    training, data = drawn
    changed = replace(training, data=replace(training.data, history=history))
    samples, batches = keys_of((changed, data))
    view = stages.model_config(training, data).vision
    key = next(key for keys in batches for key in keys if key.views == 2)
    i = next(i for i in range(24) if samples._index.older[i] < samples._index.frame[i])
    patches = torch.from_numpy(samples[replace(key, frame=i, numbers=None)]['patches'])
    before, now = patches.view(2, -1, 3, view.frames, view.patch**2).unbind(3)
    assert [int(not torch.equal(a, b)) for a, b in zip(before, now, strict=True)] == past
    with pytest.raises(ValueError, match="all, fixed, none, not 'some'"):
        keys_of((replace(training, data=replace(training.data, history='some')), data))
