"""What `analyse` says of networks and labels whose answer is known beforehand, and the files it writes."""

import gzip
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.core.bundle import TOKENIZER  # noqa: E402
from mose_ros.modeling import config as modeling_config  # noqa: E402
from mose_ros.modeling.driver import MoseDriver  # noqa: E402
from mose_ros.training import __main__ as command  # noqa: E402
from mose_ros.training import analyse, annotate, figures, stages  # noqa: E402
from mose_ros.training.fit import Fit  # noqa: E402
from mose_ros.training.index import Index  # noqa: E402
from mose_ros.training.samples import Samples  # noqa: E402

PNG = b'\x89PNG'


@pytest.fixture
def driver():
    torch.manual_seed(0)
    return MoseDriver(modeling_config.preset('nano')).eval()


@pytest.fixture
def run(drawn, driver, tmp_path):
    """Return a nano run, its data, and a work folder that holds an untrained model as its last stage."""
    training, data = drawn
    torch.manual_seed(0)
    model = MoseDriver(stages.model_config(training, data))
    model.save(tmp_path / 'work' / 'sft' / stages.MODEL)
    (tmp_path / 'work' / 'sft' / stages.RESULT).write_text('{}')
    return training, data, tmp_path / 'work'


def force(driver, skill, level):
    """Make a level's router choose one skill always."""
    router = driver.vlm.routers[level]
    router.weight.data.zero_()
    router.bias.data.zero_()
    router.bias.data[skill] = 1.0


def test_equal_experts_are_alike_and_changed_ones_less(driver):
    layers = analyse.experts(driver)['layers']
    assert [one.get('level') for one in layers] == ['perception', 'prediction', 'planning', None]
    for one in layers:
        assert np.allclose(one['similarity'], 1, atol=1e-5) and one['mean'] == 1.0
    mixture = driver.vlm.model.language_model.layers[layers[0]['layer']].mlp
    with torch.no_grad():
        mixture.experts[1].up_proj.weight.neg_()
        mixture.experts[2].up_proj.weight.normal_()
        mixture.experts[3].down_proj.weight.normal_()  # is not looked at
    changed, same = analyse.experts(driver)['layers'][:2]
    similarity = np.array(changed['similarity'])
    assert changed['experts'][:3] == ['shared', 'general', 'vehicle']
    assert similarity[0, 2] == pytest.approx(-1, abs=1e-5) == similarity[2, 1]
    assert abs(similarity[0, 3]) < 0.1 and similarity[3, 3] == pytest.approx(1)
    assert similarity[0, 4] == pytest.approx(1) and np.allclose(similarity, similarity.T)
    assert changed['mean'] < 0.6 and same['mean'] == 1.0
    down = analyse.experts(driver, matrix='down_proj')['layers'][0]['similarity']
    assert abs(down[0][4]) < 0.1 and down[0][2] == pytest.approx(1)


def test_expert_groups_are_named_and_a_dense_network_has_nothing_to_compare():
    nano = modeling_config.PRESETS['nano']
    grouped = replace(nano.mose, expert_groups=True)
    driver = MoseDriver(modeling_config.preset('nano', mose=grouped))
    names = analyse.experts(driver)['layers'][0]['experts']
    assert names[1] == 'general' and 'vehicle (image)' in names and len(names) == 11
    for layer in driver.vlm.model.language_model.layers:
        layer.mlp.experts = torch.nn.ModuleList()
    for layer in driver.action_expert.layers:
        layer.mlp.experts = torch.nn.ModuleList()
    with pytest.raises(ValueError, match='no mixture'):
        analyse.experts(driver)


def test_experts_that_tokens_choose_have_numbers_and_no_router_of_skills():
    nano = modeling_config.PRESETS['nano']
    mose = replace(nano.mose, routing='token', token_experts=8)  # as many as skills of planning
    driver = MoseDriver(modeling_config.preset('nano', mose=mose)).eval()
    names = [one['experts'][1] for one in analyse.experts(driver)['layers']]
    assert names == ['expert 0'] * 3 + ['normal']
    found = analyse.routing(driver, [driver.config.fake_batch(2)])
    assert [one['name'] for one in found['routers']] == ['action', 'view']


def test_a_confusion_counts_what_is_known():
    router = analyse.Router(name='planning', choices=('a', 'b', 'c'), label=2)
    known = np.array([0, 0, 0, 0, 1, 1, -1])
    chosen = np.array([0, 0, 0, 1, 1, 0, 2])
    found = analyse.confusion(router, known, chosen)
    assert found['counts'] == [[3, 1, 0], [1, 1, 0], [0, 0, 0]] and found['labelled'] == 6
    assert found['accuracy'] == pytest.approx(4 / 6, abs=1e-4)
    assert found['balanced_accuracy'] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found['skills']['a'] == {
        'labels': 4, 'chosen': 4, 'precision': 0.75, 'recall': 0.75, 'f1': 0.75,
    }  # fmt: skip
    assert found['skills']['c']['recall'] is None
    assert found['macro_f1'] == pytest.approx((0.75 + 0.5) / 2)
    assert analyse.confusion(router, known, known)['accuracy'] == 1.0
    nothing = analyse.confusion(router, np.full(3, -1), np.zeros(3, int))
    assert nothing['accuracy'] is None and nothing['labelled'] == 0


def test_routing_finds_what_the_routers_were_made_to_do(driver):
    force(driver, 1, level=0)
    force(driver, 2, level=2)
    batch = driver.config.fake_batch(6)
    batch.skills[:, 0] = torch.tensor([1, 1, 1, 2, 2, -1])
    found = analyse.routing(driver, [batch, driver.config.fake_batch(2)], fixed=('front',))
    by_name = {one['name']: one for one in found['routers']}
    assert list(by_name) == ['perception', 'prediction', 'planning', 'action', 'view']
    assert found['samples'] == 8 and by_name['perception']['labelled'] == 7
    assert np.array(by_name['perception']['counts'])[:, 1].sum() == 7
    assert by_name['perception']['skills']['vehicle']['recall'] == 1.0
    assert by_name['planning']['skills']['merging']['chosen'] == 8
    assert by_name['view']['skills']['front']['chosen'] == 0, 'a fixed view is not chosen'
    force(driver, 2, level=0)
    other = analyse.routing(driver, [batch])['routers'][0]
    assert other['accuracy'] == pytest.approx(2 / 5) != by_name['perception']['accuracy']


def test_a_router_of_each_layer_is_a_router_of_its_own():
    nano = modeling_config.PRESETS['nano']
    mose = replace(nano.mose, router_scope='layer', layers=((0, 1), (2,), (3,)))
    driver = MoseDriver(modeling_config.preset('nano', mose=mose)).eval()
    names = [router.name for router in analyse.routers(driver)]
    assert names[:3] == ['perception, layer 0', 'perception, layer 1', 'prediction, layer 2']
    chosen, known = analyse.decide(driver, driver.config.fake_batch(2))
    assert chosen.shape == known.shape == (2, 6)
    assert (known[:, 0] == known[:, 1]).all()


def test_a_chain_tells_label_and_choice_of_every_frame(run):
    training, data, work = run
    driver = MoseDriver.load(work / 'sft' / stages.MODEL).eval()
    force(driver, 1, level=0)
    index = Index.load(data, driver.config)
    samples = Samples(index, driver.config, training.data)
    (data / 'merging_00000' / 'camera' / 'rgb_front' / '00007.jpg').write_bytes(b'cut')
    found = analyse.chains(driver, samples, index, 'merging_00000', training.data, frame_dt=0.2)
    frames = found['frames']
    assert [one['frame'] for one in frames] == list(range(7)), 'the one that cannot be read'
    assert [one['time'] for one in frames[:3]] == [0.0, 0.2, 0.4]
    assert {one['chosen']['perception'] for one in frames} == {'vehicle'}
    labels = [one['label']['planning'] for one in frames]
    assert labels == ['normal', 'merging', None] * 2 + ['normal']
    with pytest.raises(ValueError, match="no annotated clip 'nowhere'"):
        analyse.chains(driver, samples, index, 'nowhere', training.data, frame_dt=0.2)


@pytest.mark.parametrize('kind', analyse.KINDS)
def test_the_command_writes_figures_and_a_picture(kind, run):
    _, data, work = run
    for clip in data.glob('*_0*'):
        (clip / 'anno').mkdir()
        frame = {'bounding_boxes': [{}], 'mose': {'frame_dt': 0.2}}
        (clip / 'anno' / '00000.json.gz').write_bytes(gzip.compress(json.dumps(frame).encode()))
    ask = ['--preset', 'nano', '--work', str(work), '--data', str(data), '--samples', '6']
    assert command.main(['analyse', kind, *ask]) == 0
    found = json.loads((work / 'analysis' / f'{kind}.json').read_text())
    assert found['checkpoint'] == str(work / 'sft' / stages.MODEL)
    picture = (work / 'analysis' / f'{kind}.png').read_bytes()
    assert picture.startswith(PNG)
    image = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert min(image.shape[:2]) > 300 and image.std() > 10


def test_a_network_is_asked_in_its_own_words_and_scales(run, tmp_path, monkeypatch):
    """Its tokens have other numbers than the data's, as those of a Qwen2-VL have."""
    training, data, work = run
    plain = work / 'sft' / stages.MODEL
    driver, fit = MoseDriver.load(plain), Fit.to_data(data, training)
    words = json.loads((data / annotate.TOKENIZER).read_text(encoding='utf-8'))
    last = len(words['model']['vocab']) - 1
    words['model']['vocab'] = {word: last - i for word, i in words['model']['vocab'].items()}
    for token in words['added_tokens']:
        token['id'] = last - token['id']
    decoder = driver.config.decoder
    other = MoseDriver(
        replace(driver.config, decoder=replace(decoder, image_id=last - decoder.image_id))
    )
    weights = driver.state_dict()
    embedding = 'vlm.model.language_model.embed_tokens.weight'
    assert len(weights[embedding]) == last + 1
    weights = {
        name: value.flip(0) if value is weights[embedding] or 'lm_head' in name else value
        for name, value in weights.items()
    }
    other.load_state_dict(weights)
    renamed = tmp_path / 'renamed'
    other.save(renamed)
    (renamed / TOKENIZER).write_text(json.dumps(words), encoding='utf-8')

    shown = []
    monkeypatch.setattr(
        analyse,
        'decide',
        lambda *given, decide=analyse.decide: shown.append(given[1]) or decide(*given),
    )

    def look(checkpoint):
        asked = analyse.Asked(checkpoint=checkpoint, root=data, data=training.data, samples=6)
        return analyse.run('routing', asked, tmp_path / 'out')['routers']

    expected = look(plain)
    fit.save(renamed, None)
    assert look(renamed) == expected, 'the same network, and the scales of the data'
    assert torch.equal(shown[0].proprio, shown[1].proprio)
    assert not torch.equal(shown[0].input_ids, shown[1].input_ids)
    wider = [2 * one for one in fit.proprio_high]
    replace(fit, proprio_high=wider, top_k=0).save(renamed, None)
    look(renamed)
    assert not torch.equal(shown[0].proprio, shown[2].proprio), 'states are other numbers to it'
    assert (shown[0].patches.shape[1], shown[2].patches.shape[1]) == (2, 1)
    (renamed / TOKENIZER).unlink()
    with pytest.raises(ValueError, match='put the tokenizer.json that it was made with'):
        look(renamed)


def test_wrong_questions_are_refused(run, capsys):
    _, data, work = run
    ask = ['--preset', 'nano', '--data', str(data)]
    assert command.main(['analyse', 'dreams', *ask, '--work', str(work)]) == 1
    assert "'dreams' is none of experts, routing, chains" in capsys.readouterr().err
    assert command.main(['analyse', 'experts', *ask, '--work', str(data)]) == 1
    assert 'no finished stage' in capsys.readouterr().err


def test_the_last_round_is_the_newest_model(tmp_path):
    for name in ('router', 'sft', 'action', 'action-r2', 'action-r10'):
        (tmp_path / name).mkdir()
        (tmp_path / name / stages.RESULT).write_text('{}')
    assert analyse.newest(tmp_path) == tmp_path / 'action-r10' / stages.MODEL
    (tmp_path / 'action-r10' / stages.RESULT).unlink()
    assert analyse.newest(tmp_path) == tmp_path / 'action-r2' / stages.MODEL


def test_a_picture_replaces_another_only_when_it_is_whole(tmp_path):
    layer = {'part': 'decoder', 'layer': 1, 'experts': ['shared', 'a'], 'mean': None}
    layer['similarity'] = [[1, 0.5], [0.5, 1]]
    figure = figures.draw_experts({'matrix': 'up_proj', 'layers': [layer]})
    figures.save(figure, tmp_path / 'experts.png')
    assert (tmp_path / 'experts.png').read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ['experts.png']
