"""The whole chain at nano size: collect, annotate, every stage with a stop in the middle, export, drive."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')
pytest.importorskip('metadrive', reason='the simulator is an extra: pip install mose_ros[sim]')

from mose_ros.core import vision  # noqa: E402
from mose_ros.core.bundle import Manifest  # noqa: E402
from mose_ros.core.prompt import IM_END, Tokenizer  # noqa: E402
from mose_ros.data.clips import ClipReader  # noqa: E402
from mose_ros.training import __main__ as command  # noqa: E402
from mose_ros.training import annotate, collect, journal, loop, plan_times, presets, stages  # noqa: E402
from mose_ros.training.batches import Order, load  # noqa: E402
from mose_ros.training.config import Collect  # noqa: E402
from mose_ros.training.index import Index  # noqa: E402
from mose_ros.training.samples import NO_TOKEN, Key, Samples  # noqa: E402

FAMILIES = ('normal', 'merging')
SETTINGS = Collect(
    families=FAMILIES, seeds='0-1', processes=1, max_seconds=3.0, software_share=1.0,
    disturbed_share=1.0, disturb_every=1.0, semantics_every=2,
)  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def training():
    nano = presets.preset('nano')
    model = replace(nano.model, semantic_classes=14)
    return replace(nano, model=model, collect=SETTINGS)


@pytest.fixture(scope='module')
def data(tmp_path_factory, training):
    """Four short clips of two families, recorded and labelled."""
    root = tmp_path_factory.mktemp('run') / 'data'
    collect.collect(training.collect, root, camera_size=(128, 72), bar=False)
    annotate.annotate(root, target(training), processes=0, bar=False)
    return root


@pytest.fixture(scope='module')
def index(data, training):
    return Index.load(data, stages.model_config(training, data))


@pytest.fixture(scope='module')
def samples(index, data, training):
    return Samples(index, stages.model_config(training, data), training.data)


def target(training):
    action = training.model.action
    return annotate.Target(horizon=action.horizon, dt=action.dt, data=training.data)


def test_clips_hold_the_expert_plan_of_every_frame(data):
    for family in FAMILIES:
        clip = ClipReader(data / f'{family}_00000')
        assert len(clip) >= 10 and clip.frame_dt == pytest.approx(0.2)
        assert all(clip.expert_trajectory(i) is not None for i in range(len(clip)))
        assert clip.scene(1).time - clip.scene(0).time == pytest.approx(0.2)


def test_recording_again_does_nothing(data, training, monkeypatch):
    monkeypatch.setattr(collect, 'fan_out', lambda _, arguments, *__: pytest.fail('drove again') if arguments else iter(()))  # fmt: skip
    found = collect.collect(training.collect, data, bar=False)
    assert {family: counts['episodes'] for family, counts in found.items()} == dict.fromkeys(
        FAMILIES, 2
    )


def test_the_car_is_pushed_and_the_push_ends():
    config = Collect(disturb_every=0.5, disturb_seconds=0.3)
    one = collect.Disturbance(config, np.random.default_rng(0))
    calm = collect.VehicleCommand(steer=0.0, throttle=0.0, brake=0.0)
    pushed = [one.apply(calm, 8.0) != calm for _ in range(400)]
    assert 0.2 < np.mean(pushed) < 0.7


def test_corrupt_clips_are_named_and_skipped(data, training, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(data, root, ignore=shutil.ignore_patterns(annotate.LABELS))
    (root / 'normal_00000' / 'anno' / '00003.json.gz').write_bytes(b'not gzip')
    found = annotate.annotate(root, target(training), processes=0, bar=False)
    assert list(found['skipped']) == ['normal_00000'] and found['clips'] == 3
    assert '00003' in found['skipped']['normal_00000']


def test_a_sample_is_what_the_vehicle_would_make_of_the_frame(samples, index, data, training):
    frame = len(index) // 2
    sample = samples[Key(frame=frame, views=2, numbers=None)]
    clip = ClipReader(data / index.clips[index.clip[frame]])
    view = samples._model.vision
    names = ['front', index.camera[frame]]
    for place, name in enumerate(names):
        frames = [
            vision.resize(clip.image(int(i), name), view.view_width, view.view_height)
            for i in (index.older[frame], index.frame[frame])
        ]
        expected = vision.patchify(vision.normalize(np.stack(frames)), view.patch, view.merge)
        np.testing.assert_allclose(sample['patches'][place], expected, atol=1e-5)
    tokenizer = Tokenizer.load(data / annotate.TOKENIZER)
    answer = sample['labels'][sample['labels'] != NO_TOKEN]
    assert tokenizer.decode(answer.tolist()) == index.answer[frame]
    assert answer[-1] == tokenizer.end_id == tokenizer.encode(IM_END)[0]
    metres = samples.metres(torch.from_numpy(sample['action'])[None])[0]
    np.testing.assert_allclose(metres, index.action[frame], atol=1e-4)
    np.testing.assert_allclose(sample['semantics'].sum(-1)[0], float(index.frame[frame] % 2 == 0))


def test_samples_follow_from_seed_and_step(index, samples, training):
    def keys(seed, start):
        order = Order(index, training.data, stage='sft', seed=seed, batch=4, start=start, stop=6)
        return list(order)

    assert keys(0, 0)[3:] == keys(0, 3)
    assert keys(0, 0) != keys(1, 0)
    key = keys(0, 0)[0][0]
    one, again = samples[key], samples[key]
    others = [samples[replace(key, numbers=(0, 99, slot))] for slot in range(6)]
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not any(np.array_equal(one['noise'], other['noise']) for other in others)
    # every second is changed in its colours
    assert not all(np.array_equal(one['thumbnails'], other['thumbnails']) for other in others)


def test_threads_make_the_same_batches_in_the_same_order(index, samples, training):
    order = Order(index, training.data, stage='sft', seed=0, batch=3, start=0, stop=5)
    alone = list(load(samples, order, workers=0))
    beside = list(load(samples, order, workers=2))
    assert len(alone) == len(beside) == 5
    for one, other in zip(alone, beside, strict=True):
        assert torch.equal(one.batch.patches, other.batch.patches)
        assert torch.equal(one.batch.labels, other.batch.labels)
    assert not torch.equal(alone[0].batch.action, alone[1].batch.action)


def test_training_and_validation_share_no_clip(index, training):
    held, seen = (index.split(side, training.data) for side in (True, False))
    assert len(held) + len(seen) == len(index)
    assert not set(index.clip[held]) & set(index.clip[seen])


def test_a_smaller_share_of_the_clips_lies_within_a_larger_one(index, training):
    clips = tuple(f'normal_{number:05d}' for number in range(len(index)))
    many = replace(index, clips=clips, clip=np.arange(len(index)))

    def used(share, validation=False):
        config = replace(training.data, validation_share=0.2, share=share)
        return set(many.split(validation, config))

    small, half, whole = map(used, (1e-9, 0.5, 1.0))
    assert len(small) == 1 and small < half < whole
    assert (
        used(0.5, validation=True) == used(1.0, validation=True) == set(range(len(many))) - whole
    )
    with pytest.raises(ValueError, match='data.share is above 0 and at most 1, not 0'):
        used(0)


def test_the_rare_start_from_rest_is_drawn_more_often(index, training):
    proprio, action = index.proprio.copy(), np.zeros_like(index.action)
    proprio[:, 0], proprio[0, 0] = 0.0, 5.0  # m/s: all but the first are at rest
    action[1:3, :, 0] = np.linspace(0, 5, action.shape[1])  # two set off, the others stay
    changed = replace(index, proprio=proprio, action=action, family=('normal',) * len(index))
    changed = replace(changed, skills=np.zeros_like(index.skills))
    assert changed.motions()[:4] == ['brakes', 'starts', 'starts', 'stands']
    everyone = np.arange(len(index))
    chances = changed.chances(everyone, replace(training.data, balance=1.0))
    assert chances[1] > 2 * chances[4]
    same = changed.chances(everyone, replace(training.data, balance=0.0))
    assert same[1] / changed.weight[1] == pytest.approx(same[4] / changed.weight[4])


def test_a_stopped_stage_goes_on_exactly(data, training, tmp_path):
    def losses(folder):
        lines = (folder / journal.METRICS).read_text().splitlines()
        return [json.loads(line)['train']['loss'] for line in lines if 'train' in line]

    stages.train('action', training, data, tmp_path / 'straight', limits=quiet())
    with pytest.raises(loop.Stopped):
        stages.train('action', training, data, tmp_path / 'stopped', limits=quiet(stop_at=1))
    assert len(losses(tmp_path / 'stopped')) == 1
    stages.train('action', training, data, tmp_path / 'stopped', limits=quiet())
    assert losses(tmp_path / 'stopped') == losses(tmp_path / 'straight')
    assert len(losses(tmp_path / 'straight')) == training.action.steps
    other = replace(training, action=replace(training.action, seed=1))
    stages.train('action', other, data, tmp_path / 'other', limits=quiet())
    assert losses(tmp_path / 'other') != losses(tmp_path / 'straight')
    with pytest.raises(ValueError, match='settings.seed: 0 -> 1'):
        stages.train('action', other, data, tmp_path / 'straight', limits=quiet())


def quiet(stop_at=None):
    return stages.Limits(bar=False, stop_at=stop_at, max_minutes=math.inf)


def test_routers_are_trained_on_what_an_annotator_labelled(data, tmp_path, caplog):
    run = ['--preset', 'nano', '--work', str(tmp_path), '--data', str(data), '--quiet']
    assert command.main(['annotate', *run, '--source', 'clips', '--samples', '12']) == 0
    labels = tmp_path / 'skills' / 'clips-rules' / 'labels.jsonl'
    caplog.set_level('INFO')
    assert command.main(['router', *run, '--labels', str(labels)]) == 0
    told = json.loads((tmp_path / 'router' / stages.RESULT).read_text(encoding='utf-8'))
    assert 0 < told['identity']['frames'] <= 12 and told['identity']['labels']
    assert f'{told["identity"]["frames"]} frames of 4 clips' in caplog.text
    whole = ['--work', str(tmp_path / 'whole'), '--data', str(data), '--quiet', '--preset', 'nano']
    assert command.main(['router', *whole]) == 0
    other = json.loads((tmp_path / 'whole' / 'router' / stages.RESULT).read_text(encoding='utf-8'))
    assert other['identity']['frames'] > 12 and other['identity']['labels'] is None


def test_the_chain_ends_in_a_bundle_that_drives(data, tmp_path):
    run = ['--preset', 'nano', '--work', str(tmp_path), '--data', str(data), '--quiet']
    run += ['--set', 'model.semantic_classes=14']
    for stage in presets.STAGES:
        assert command.main([stage, *run]) == 0
    assert command.main(['router', *run, '--set', 'router.steps=3']) == 1  # it says what differs
    report, bundle = tmp_path / 'parity.json', tmp_path / 'bundle'
    export = ['export', '--checkpoint', str(tmp_path / 'action' / 'model')]  # it says all itself
    assert command.main([*export, '--out', str(bundle), '--json', str(report)]) == 0
    manifest = Manifest.load(bundle)
    assert manifest.parity['experts_reached'] == manifest.parity['experts_total']
    assert json.loads(report.read_text(encoding='utf-8'))['parity'] == manifest.parity
    assert manifest.training['preset'] == 'nano' and manifest.data['clips'] == 4
    assert set(manifest.quality['minutes']) == set(presets.STAGES)
    times = plan_times.measure({'one': bundle, 'again': bundle}, data, plans=3, warmup=1)
    assert set(times.p50_ms) == {'one', 'again'} and min(times.p50_ms.values()) > 0
    assert times.moments == 2 * 4
    driven = Collect(
        families=('normal',), seeds='5', processes=1, max_seconds=2.0, software_share=1.0,
        policy=str(tmp_path / 'bundle'), round=1, expert_share=0.0,
    )  # fmt: skip
    found = collect.collect(driven, tmp_path / 'driven', bar=False)
    assert found['normal']['frames'] >= 2  # it drives badly: two steps of training
    assert (tmp_path / 'driven' / 'normal_00005_r1').is_dir()
