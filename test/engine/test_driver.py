import dataclasses
import itertools
import threading

import numpy as np
import pytest

from engine import bundles
from mose_ros.core.bundle import BundleError
from mose_ros.core.types import Command, EgoState, Guidance, Views
from mose_ros.engine import onnxruntime_session
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.driver import Driver

EGO = EgoState(x=0.0, y=0.0, yaw=0.0, speed=5.0)
AHEAD = Guidance(near=np.array([10.0, 1.0]), far=np.array([25.0, 2.0]), command=Command.FOLLOW)
DARK, BRIGHT = 40, 200


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    folder = bundles.make_bundle(tmp_path_factory.mktemp('driver') / 'known')
    return Bundle.open(folder, threads=1)


@pytest.fixture
def driver(bundle):
    return Driver(bundle)


def look(grey=DARK, names=('front', 'back'), time=3.0, rows=28):
    """Return views of one grey."""
    image = np.full((len(names) * 2 * rows, 56, 3), grey, np.uint8)
    return Views(time=time, names=names, image=image, weights=dict.fromkeys(names, 0.5))


def noise(seed=0, names=('front', 'back')):
    views = look(names=names)
    image = np.random.default_rng(seed).integers(0, 256, views.image.shape, np.uint8)
    return dataclasses.replace(views, image=image)


def whole_text(driver, *args, **options):
    return list(driver.reason(*args, **options))[-1]


def test_a_plan_is_what_the_graphs_answer(driver):
    plan = driver.plan(look(time=3.0), EGO, AHEAD)
    steps = np.arange(1, 16)[:, None] / 15
    np.testing.assert_allclose(plan.trajectory.xy, steps * AHEAD.near, atol=1e-4)
    assert (plan.trajectory.time, plan.trajectory.dt) == (3.0, 0.2)
    assert plan.skills == {'perception': 'general', 'prediction': 'general', 'planning': 'general'}
    assert plan.action_skill == 'normal'
    assert plan.views == ('front', 'back')
    stages = ['preprocess', 'vision', 'prefill', 'flow', 'total']
    assert list(plan.timings_ms) == stages
    assert plan.timings_ms['total'] >= sum(plan.timings_ms[stage] for stage in stages[:-1])


def test_views_that_threads_share_are_seen_bit_for_bit_alike(driver, bundle):
    shared = Driver(dataclasses.replace(bundle, threads=3))
    for names in (('front',), ('front', 'back'), ('front', 'back', 'front_left', 'back_left')):
        seen = noise(names=names)
        plan, want = (one.plan(seen, EGO, AHEAD) for one in (shared, driver))
        assert plan.trajectory.xy.tobytes() == want.trajectory.xy.tobytes()
        assert shared.thought.past_v.tobytes() == driver.thought.past_v.tobytes()
        driver.plan(noise(1, names), EGO, AHEAD)
        assert not np.array_equal(shared.thought.past_v, driver.thought.past_v)


def test_what_is_seen_decides_the_skills_and_the_text(driver):
    plan = driver.plan(look(BRIGHT), EGO, AHEAD)
    assert list(plan.skills.values()) == ['vehicle', 'slowing', 'normal']
    assert plan.action_skill == 'merging'
    assert whole_text(driver) == bundles.BRIGHT
    driver.plan(look(DARK), EGO, AHEAD)
    assert whole_text(driver) == bundles.DARK


@pytest.mark.parametrize('num_steps', [1, 3, 10])
def test_the_flow_arrives_whatever_the_number_of_steps(tmp_path, num_steps):
    driver = Driver(bundles.make_bundle(tmp_path / 'known', num_steps=num_steps), threads=1)
    plan = driver.plan(look(), EGO, AHEAD)
    np.testing.assert_allclose(plan.trajectory.xy[-1], AHEAD.near, atol=1e-4)


def test_a_bundle_of_float16_carries_float16_and_answers_the_same(driver, tmp_path):
    half = Driver(bundles.make_bundle(tmp_path / 'half', precision='float16'), threads=1)
    for grey, text in ((DARK, bundles.DARK), (BRIGHT, bundles.BRIGHT)):
        plan, want = (one.plan(look(grey), EGO, AHEAD) for one in (half, driver))
        np.testing.assert_allclose(plan.trajectory.xy, want.trajectory.xy, atol=1e-3)
        assert (plan.skills, plan.action_skill) == (want.skills, want.action_skill)
        assert whole_text(half) == whole_text(driver) == text
    assert half.thought.past_k.dtype == half.thought.past_v.dtype == np.float16
    assert driver.thought.past_k.dtype == np.float32
    bundles.make_manifest(precision='float32').save(tmp_path / 'half')
    with pytest.raises(BundleError, match=r'embeds is float16 .*, not float32'):
        Driver(tmp_path / 'half')


def test_any_number_of_views_is_taken(driver):
    for names in [('front',), ('front', 'back', 'back_left')]:
        assert driver.plan(look(names=names), EGO, AHEAD).views == names
        assert whole_text(driver) == bundles.DARK


def test_what_stays_on_a_device_gives_the_same_bits(bundle, driver, monkeypatch):
    """The way of a GPU, over the runtime's memory of the CPU: values pass from graph to graph without the host."""
    monkeypatch.setattr(onnxruntime_session, '_MEMORIES', {'CPU': 'cpu'})
    resident = Driver(bundle)
    monkeypatch.undo()
    for views in (look(DARK), look(BRIGHT, names=('front', 'back', 'back_left')), noise()):
        plan, want = (one.plan(views, EGO, AHEAD) for one in (resident, driver))
        assert plan.trajectory.xy.tobytes() == want.trajectory.xy.tobytes()
        assert plan.skills == want.skills
        assert list(resident.reason()) == list(driver.reason())
    assert isinstance(resident.thought.past_k, onnxruntime_session.DeviceValue)
    assert isinstance(driver.thought.past_k, np.ndarray)
    assert np.array_equal(resident.thought.past_k.numpy(), driver.thought.past_k)


def test_the_same_input_gives_the_same_bits(bundle):
    plans = [Driver(bundle).plan(noise(), EGO, AHEAD) for _ in range(2)]
    assert plans[0].trajectory.xy.tobytes() == plans[1].trajectory.xy.tobytes()
    assert plans[0].skills == plans[1].skills
    elsewhere = dataclasses.replace(AHEAD, near=np.array([10.0, 1.001]))
    other = Driver(bundle).plan(noise(), EGO, elsewhere)
    assert other.trajectory.xy.tobytes() != plans[0].trajectory.xy.tobytes()


def test_skills_can_be_forced(driver):
    plan = driver.plan(look(), EGO, AHEAD, force={'planning': 'give_way', 'action': 'overtaking'})
    assert list(plan.skills.values()) == ['general', 'general', 'give_way']
    assert plan.action_skill == 'overtaking'
    assert whole_text(driver) == bundles.DARK


@pytest.mark.parametrize(
    ('force', 'message'),
    [
        ({'planing': 'normal'}, "no level 'planing'; known: perception.*action"),
        ({'planning': 'fly'}, "no skill 'fly' on level planning; known: general"),
        ({'action': 'general'}, "no skill 'general' on level action"),
    ],
)
def test_unknown_forced_skills_are_named(driver, force, message):
    with pytest.raises(ValueError, match=message):
        driver.plan(look(), EGO, AHEAD, force=force)


# ---- what was seen already ----


@pytest.fixture
def looks(driver, monkeypatch):
    """Return a list with one entry for each time that the driver has looked at pictures."""
    run, looked = driver._vision.run, []

    def counted(inputs, keep=()):
        looked.append(inputs)
        return run(inputs, keep)

    monkeypatch.setattr(driver._vision, 'run', counted)
    return looked


def test_the_same_pictures_are_looked_at_once(bundle, driver, looks):
    seen = noise()
    driver.plan(seen, EGO, AHEAD)
    later = dataclasses.replace(seen, time=9.0, image=seen.image.copy())
    again = driver.plan(later, EGO, AHEAD, force={'planning': 'give_way'})
    assert len(looks) == 1
    anew = Driver(bundle).plan(later, EGO, AHEAD, force={'planning': 'give_way'})
    assert again.trajectory.xy.tobytes() == anew.trajectory.xy.tobytes()
    assert (again.skills, again.trajectory.time) == (anew.skills, 9.0)
    assert list(again.timings_ms) == list(anew.timings_ms)
    driver.reset()
    driver.plan(seen, EGO, AHEAD)
    assert len(looks) == 2


def test_one_other_pixel_is_looked_at_whatever_the_stamp(driver, looks):
    seen = noise()
    driver.plan(seen, EGO, AHEAD)
    seen.image[-1, -1, -1] ^= 1  # in the very array that was seen
    driver.plan(seen, EGO, AHEAD)
    assert len(looks) == 2
    driver.plan(look(names=('front',)), EGO, AHEAD)
    driver.plan(look(names=('front', 'back')), EGO, AHEAD)
    assert len(looks) == 4


# ---- text ----


def test_text_grows_word_by_word(driver):
    driver.plan(look(), EGO, AHEAD)
    texts = list(driver.reason())
    words = bundles.DARK.split()
    assert texts == [' '.join(words[: index + 1]) for index in range(len(words))]


def test_text_ends_at_the_manifests_maximum(tmp_path):
    driver = Driver(bundles.make_bundle(tmp_path / 'known', max_new_tokens=4), threads=1)
    driver.plan(look(), EGO, AHEAD)
    assert whole_text(driver) == ' '.join(bundles.DARK.split()[:4])


def test_reasoning_stops_at_the_next_token_when_cancelled(driver):
    driver.plan(look(), EGO, AHEAD)
    asked = itertools.count()
    texts = list(driver.reason(cancel=lambda: next(asked) >= 6))
    assert 1 <= len(texts) < len(bundles.DARK.split())
    assert list(driver.reason(cancel=lambda: True)) == []


def test_a_thought_outlives_newer_plans(driver):
    driver.plan(look(DARK), EGO, AHEAD)
    thought = driver.thought
    words = driver.reason(thought)
    started = [next(words) for _ in range(3)]
    driver.plan(look(BRIGHT, names=('front', 'back_left', 'back')), EGO, AHEAD)
    assert [*started, *words][-1] == bundles.DARK
    assert whole_text(driver) == bundles.BRIGHT
    assert whole_text(driver, thought) == bundles.DARK


def test_a_thought_never_changes_whatever_is_planned_after_it(driver):
    driver.plan(look(DARK), EGO, AHEAD)
    thoughts = [driver.thought]
    copies = [np.array(driver.thought.past_v)]
    for index in range(12):
        names = ('front', 'back', 'back_left')[: 1 + index % 3]
        driver.plan(look((BRIGHT, DARK)[index % 2], names=names), EGO, AHEAD)
        thoughts.append(driver.thought)
        copies.append(np.array(driver.thought.past_v))
        list(driver.reason())
    for thought, copy in zip(thoughts, copies, strict=True):
        assert np.array_equal(thought.past_v, copy)
    assert not np.array_equal(copies[0], copies[1])


def test_a_thought_is_read_only(driver):
    driver.plan(look(), EGO, AHEAD)
    with pytest.raises(ValueError, match='read-only'):
        driver.thought.past_k[:] = 0


def test_planning_and_reasoning_in_two_threads_do_not_disturb_each_other(driver):
    plans, stop, wrong = {}, threading.Event(), []
    for grey in (DARK, BRIGHT):
        plans[grey] = driver.plan(look(grey), EGO, AHEAD).trajectory.xy.tobytes()

    def reason():
        while not stop.is_set():
            text = whole_text(driver)
            if text not in (bundles.DARK, bundles.BRIGHT):
                wrong.append(text)

    thread = threading.Thread(target=reason)
    thread.start()
    try:
        for index in range(300):
            grey = (DARK, BRIGHT)[index % 2]
            assert driver.plan(look(grey), EGO, AHEAD).trajectory.xy.tobytes() == plans[grey]
    finally:
        stop.set()
        thread.join(timeout=10)
    assert wrong == []


def test_there_is_no_reasoning_before_a_plan_nor_after_a_reset(driver):
    with pytest.raises(RuntimeError, match='before the first plan'):
        driver.reason()
    driver.plan(look(), EGO, AHEAD)
    driver.reset()
    with pytest.raises(RuntimeError, match='before the first plan'):
        driver.reason()


# ---- what is refused ----


@pytest.mark.parametrize(
    ('views', 'message'),
    [
        (look(names=('front', 'roof')), 'does not know roof, only front'),
        (look(names=('front', 'front')), 'name a camera twice'),
        (look(names=('back',)), 'anchor front is not among'),
        (look(names=()), 'anchor front is not among'),
        (look(rows=29), r'the image is \(116, 56\), but 2 views .* are \(112, 56\)'),
        (look(time=float('nan')), 'time is nan'),
        (dataclasses.replace(look(), image=np.zeros((112, 57, 3), np.uint8)), r'\(112, 57\)'),
    ],
)
def test_malformed_views_are_named(driver, views, message):
    with pytest.raises(ValueError, match=message):
        driver.plan(views, EGO, AHEAD)


@pytest.mark.parametrize('field', ['speed', 'acceleration', 'yaw_rate', 'since_stop'])
def test_a_state_that_is_not_finite_is_named(driver, field):
    with pytest.raises(ValueError, match=f'not finite: {field}'):
        driver.plan(look(), dataclasses.replace(EGO, **{field: float('nan')}), AHEAD)


def test_a_prompt_longer_than_the_bundle_takes_is_refused(tmp_path):
    driver = Driver(bundles.make_bundle(tmp_path / 'known', max_prompt_tokens=20), threads=1)
    with pytest.raises(ValueError, match=r'2 of them make \d+ tokens, known takes 20'):
        driver.plan(look(), EGO, AHEAD)


def test_a_network_gone_mad_never_plans(tmp_path):
    mad = bundles.make_bundle(tmp_path / 'known', velocity_gain=float('nan'))
    driver = Driver(mad, threads=1)
    with pytest.raises(
        FloatingPointError, match='known answered with numbers that are not finite'
    ):
        driver.plan(look(), EGO, AHEAD)
    with pytest.raises(RuntimeError, match='before the first plan'):
        driver.reason()


def test_actions_beyond_training_are_clipped(tmp_path):
    wild = Driver(bundles.make_bundle(tmp_path / 'known', velocity_gain=100.0), threads=1)
    plan = wild.plan(look(), EGO, AHEAD)
    assert np.abs(plan.trajectory.xy).max() <= 1.5 * bundles.REACH + 1e-6
