"""A sample shows what the vehicle would see, and nothing of its labels."""

import cv2
import numpy as np
import pytest

pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.core import vision  # noqa: E402
from mose_ros.training import stages  # noqa: E402
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
