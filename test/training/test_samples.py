"""A sample shows what the vehicle would see, and nothing of its labels."""

import cv2
import numpy as np
import pytest

pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.core import vision  # noqa: E402
from mose_ros.training import stages  # noqa: E402
from mose_ros.training.batches import Order  # noqa: E402
from mose_ros.training.index import Index  # noqa: E402
from mose_ros.training.samples import Key, Samples  # noqa: E402


@pytest.fixture
def samples(drawn):
    training, root = drawn
    model = stages.model_config(training, root)
    return Samples(Index.load(root, model), model, training.data)


def test_the_glance_does_not_tell_which_views_are_looked_at(samples):
    one, two, all_views = (samples[Key(frame=3, views=views, numbers=None)] for views in (1, 2, 6))
    assert len(one['patches']) == 1 and len(two['patches']) == 2 and len(all_views['patches']) == 6
    np.testing.assert_array_equal(one['thumbnails'], two['thumbnails'])
    np.testing.assert_array_equal(one['thumbnails'], all_views['thumbnails'])
    other = samples[Key(frame=4, views=2, numbers=None)]
    assert not np.array_equal(two['thumbnails'], other['thumbnails'])


def test_stages_of_one_seed_see_other_samples(samples, drawn):
    training, _ = drawn

    def keys(stage, start=0):
        size = {'batch': 3, 'start': start, 'stop': 4}
        return list(Order(samples._index, training.data, stage=stage, seed=5, **size))

    first, second = keys('router'), keys('sft')
    assert first == keys('router') and first[2:] == keys('router', start=2)
    frames = [[[key.frame for key in batch] for batch in all_] for all_ in (first, second)]
    assert frames[0] != frames[1]
    numbers = [{key.numbers for batch in all_ for key in batch} for all_ in (first, second)]
    assert len(numbers[0]) == len(numbers[1]) == 12 and not numbers[0] & numbers[1]


def test_no_sample_repeats_the_numbers_of_its_batch(samples, drawn, monkeypatch):
    training, _ = drawn
    asked, make = [], np.random.default_rng
    monkeypatch.setattr(np.random, 'default_rng', lambda seed: asked.append(seed) or make(seed))
    order = Order(samples._index, training.data, stage='sft', seed=0, batch=3, start=0, stop=2)
    seeds = [key.numbers for batch in order for key in batch] + asked
    assert len(seeds) == 2 * 3 + 2
    assert len({make(seed).random() for seed in seeds}) == len(seeds)
    assert make(asked[0]).random() == make([*asked[0], 0]).random(), 'zeros are of no account'


def test_the_glance_is_that_of_the_vehicle(samples, drawn):
    _, root = drawn
    model = samples._model
    view, glance = model.vision, model.glance
    clip = sorted(root.glob('*_*'))[0]
    pictures = {
        camera: vision.resize(
            cv2.imread(str(clip / f'camera/rgb_{camera}/00003.jpg'), cv2.IMREAD_COLOR_RGB),
            view.view_width,
            view.view_height,
        )
        for camera in model.cameras
    }

    seen, _ = vision.glance(pictures, model.cameras, glance.width, glance.height)

    np.testing.assert_allclose(
        samples[Key(frame=3, views=2, numbers=None)]['thumbnails'], seen, atol=1e-6
    )
