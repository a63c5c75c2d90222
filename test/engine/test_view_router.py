from dataclasses import replace

import numpy as np
import pytest

from engine import bundles
from mose_ros.core import vision
from mose_ros.core.rig import CAMERAS
from mose_ros.core.types import Command, EgoState, Guidance
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.view_router import MissingAnchor, ViewRouter

EGO = EgoState(x=0.0, y=0.0, yaw=0.0, speed=5.0)
AHEAD = Guidance(near=np.array([10.0, 0.0]), far=np.array([25.0, 0.0]), command=Command.FOLLOW)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    folder = bundles.make_bundle(tmp_path_factory.mktemp('router') / 'known', top_k=2)
    return Bundle.open(folder, threads=1)


@pytest.fixture
def router(bundle):
    return ViewRouter(bundle)


def pictures(**grey):
    """Return pictures of the named cameras, each of one grey."""
    return {name: np.full((56, 112, 3), value, np.uint8) for name, value in grey.items()}


ALL = pictures(**{name: 10 * (index + 1) for index, name in enumerate(CAMERAS)})


def select(router, time=0.0, images=ALL, ego=EGO, guidance=AHEAD):
    return router.select(time, images, ego, guidance)


def levels_of_grey(router, views):
    """Return the mean of each frame: (views, frames)."""
    m = router.manifest
    frames = vision.split_views(views.image, len(views.names), m.view_frames)
    return frames.mean((2, 3, 4)).round().tolist()


def test_fixed_views_come_first_then_the_brightest(router):
    views = select(router, time=7.0)
    assert views.time == 7.0
    assert views.names == ('front', 'back_right', 'back_left')
    assert levels_of_grey(router, views) == [[10, 10], [60, 60], [50, 50]]
    assert views.image.shape == (3 * 2 * 28, 56, 3)


def test_weights_are_the_softmax_of_the_scores_that_are_there(router):
    weights = select(router, images=pictures(front=0, back=255)).weights
    ratio = np.exp((0 - 0.5) / 0.25 - (1 - 0.5) / 0.25)  # a score is the normalised grey
    assert weights['front'] / weights['back'] == pytest.approx(ratio, rel=1e-4)
    assert sum(weights.values()) == pytest.approx(1)
    assert tuple(weights) == CAMERAS


def test_a_missing_camera_is_masked_and_never_chosen(router):
    images = pictures(front=10, back=1)  # the darkest of all, but the only one
    views = select(router, images=images)
    assert views.names == ('front', 'back')
    assert {name for name, weight in views.weights.items() if weight > 0} == {'front', 'back'}


def test_a_missing_anchor_is_an_error_of_its_own(router):
    images = {name: image for name, image in ALL.items() if name != 'front'}
    with pytest.raises(MissingAnchor, match='front'):
        select(router, images=images)
    assert select(router).names[0] == 'front'


def test_a_camera_that_the_bundle_does_not_know_is_not_looked_at(router):
    views = select(router, images={**ALL, **pictures(roof=255)})
    assert 'roof' not in views.names
    assert 'roof' not in views.weights


def test_frames_are_the_one_a_gap_ago_and_now(router):
    for step in range(8):
        views = select(router, time=step / 10, images=pictures(front=20 * step, back=step))
    assert views.names == ('front', 'back')
    assert levels_of_grey(router, views) == [[60, 140], [3, 7]]


@pytest.mark.parametrize(
    ('history', 'grey'),
    [('fixed', [[60, 140], [7, 7]]), ('none', [[140, 140], [7, 7]])],
)
def test_a_bundle_says_which_views_show_their_past(tmp_path, history, grey):
    folder = bundles.make_bundle(tmp_path / 'known', history=history)
    router = ViewRouter(Bundle.open(folder, threads=1))
    for step in range(8):
        views = select(router, time=step / 10, images=pictures(front=20 * step, back=step))
    assert views.names == ('front', 'back')
    assert levels_of_grey(router, views) == grey


def test_a_camera_has_its_frames_even_when_it_was_not_chosen_before(router):
    for step in range(5):
        views = select(router, time=step / 10, images={**ALL, **pictures(back=step)})
        assert 'back' not in views.names
    views = select(router, time=0.5, images={**ALL, **pictures(back=255)})
    assert views.names[1] == 'back'
    assert levels_of_grey(router, views)[1] == [1, 255]


@pytest.mark.parametrize(('age', 'older'), [(0.31, 1), (0.49, 1), (0.29, 2), (0.51, 2)])
def test_the_newest_stands_in_where_no_frame_is_near_the_gap(router, age, older):
    select(router, time=0.0, images=pictures(front=1))
    views = select(router, time=age, images=pictures(front=2))
    assert levels_of_grey(router, views) == [[older, 2]]


def test_time_going_back_forgets_the_frames(router):
    select(router, time=10.0, images=pictures(front=1))
    views = select(router, time=9.0, images=pictures(front=2))
    assert levels_of_grey(router, views) == [[2, 2]]
    views = select(router, time=9.4, images=pictures(front=3))
    assert levels_of_grey(router, views) == [[2, 3]]


def test_a_camera_that_was_gone_starts_anew(router):
    select(router, time=0.0, images=pictures(front=1, back=1))
    select(router, time=0.2, images=pictures(front=1))
    views = select(router, time=0.4, images=pictures(front=3, back=3))
    assert levels_of_grey(router, views) == [[1, 3], [3, 3]]


def test_reset_forgets_and_the_same_moment_asked_twice_is_the_same(router):
    select(router, time=0.0, images=pictures(front=1))
    first = select(router, time=0.4, images=pictures(front=2))
    again = select(router, time=0.4, images=pictures(front=2))
    assert np.array_equal(first.image, again.image)
    router.reset()
    fresh = select(router, time=0.4, images=pictures(front=2))
    assert not np.array_equal(first.image, fresh.image)


def test_the_caller_may_reuse_its_pictures(router):
    image = np.full((28, 56, 3), 50, np.uint8)  # already of the view's size
    views = select(router, time=0.0, images={'front': image})
    image[:] = 99
    views_later = select(router, time=0.4, images={'front': image})
    assert levels_of_grey(router, views) == [[50, 50]]
    assert levels_of_grey(router, views_later) == [[50, 99]]


@pytest.mark.parametrize('size', [(90, 160), (900, 1600)])
def test_pictures_are_shrunk_alike_however_large_they_are(router, size):
    m, random = router.manifest, np.random.default_rng(0)
    images = {name: random.integers(0, 256, (*size, 3), np.uint8) for name in CAMERAS}
    views = select(router, images=images)
    frames = vision.split_views(views.image, len(views.names), m.view_frames)
    for name, frame in zip(views.names, frames, strict=True):
        assert np.array_equal(frame[-1], vision.resize(images[name], m.view_width, m.view_height))
    assert not np.array_equal(frames[0], frames[1])


def test_threads_that_share_the_cameras_choose_alike(router, bundle):
    random = np.random.default_rng(0)
    images = {name: random.integers(0, 256, (90, 160, 3), np.uint8) for name in CAMERAS}
    shared = select(ViewRouter(replace(bundle, threads=2)), images=images)
    alone = select(router, images=images)
    assert (shared.names, shared.weights) == (alone.names, alone.weights)
    assert np.array_equal(shared.image, alone.image)
    brighter = select(router, time=0.1, images={**images, 'back': images['back'] // 2 + 128})
    assert brighter.weights != alone.weights


def test_memory_does_not_grow(router):
    for step in range(200):
        select(router, time=step / 10)
    assert max(map(len, router._history.values())) <= 6


@pytest.mark.parametrize(
    ('options', 'names'),
    [
        ({'mode': 'fixed'}, ('front',)),
        ({'mode': 'all'}, CAMERAS),
        ({'force_view': 'front_left'}, ('front', 'front_left', 'back_right')),
    ],
)
def test_the_choice_can_be_taken_over(bundle, options, names):
    views = select(ViewRouter(bundle, **options))
    assert views.names == names


def test_a_bundle_that_looks_at_its_fixed_views_only_is_forced_too(bundle):
    narrow = replace(bundle, manifest=replace(bundle.manifest, top_k=0))
    assert select(ViewRouter(narrow)).names == ('front',)
    assert select(ViewRouter(narrow, force_view='front_left')).names == ('front', 'front_left')
    assert select(ViewRouter(narrow, force_view='front')).names == ('front',)


def test_a_forced_view_without_picture_is_not_forced(bundle):
    router = ViewRouter(bundle, force_view='front_left')
    assert select(router, images=pictures(front=1, back=2)).names == ('front', 'back')


@pytest.mark.parametrize(
    ('options', 'message'),
    [({'mode': 'random'}, "no mode 'random'"), ({'force_view': 'roof'}, "no view 'roof'.*front")],
)
def test_unknown_options_are_named(bundle, options, message):
    with pytest.raises(ValueError, match=message):
        ViewRouter(bundle, **options)


@pytest.mark.parametrize(
    'image',
    [
        np.zeros((28, 56), np.uint8),
        np.zeros((28, 56, 4), np.uint8),
        np.zeros((28, 56, 3), np.float32),
        np.zeros((0, 56, 3), np.uint8),
    ],
)
def test_a_malformed_picture_is_named(router, image):
    with pytest.raises(ValueError, match='camera back_left: expected'):
        select(router, images={**ALL, 'back_left': image})


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'time': float('nan')}, 'time is nan'),
        ({'ego': EgoState(x=0.0, y=0.0, yaw=0.0, speed=float('nan'))}, 'not finite: speed'),
        (
            {
                'guidance': Guidance(
                    near=np.array([np.inf, 0.0]), far=np.zeros(2), command=Command.LEFT
                )
            },
            'not finite: near_x',
        ),
    ],
)
def test_numbers_that_are_not_finite_are_named_and_change_nothing(router, arguments, message):
    select(router, time=0.0, images=pictures(front=1))
    with pytest.raises(ValueError, match=message):
        select(router, **({'time': 0.2} | arguments))
    views = select(router, time=0.4, images=pictures(front=2))
    assert levels_of_grey(router, views) == [[1, 2]]
