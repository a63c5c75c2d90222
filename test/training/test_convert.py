"""Any Qwen2-VL folder becomes a MoSE that begins as what it was; a MoSE gets expert groups and stays what it is."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl, processing_qwen2_vl

from mose_ros.core import prompt, vision
from mose_ros.core.skills import Taxonomy, default_path
from mose_ros.modeling.driver import MoseDriver
from mose_ros.modeling.mose import MoseQwen2VL
from mose_ros.training import convert

VIEW = (64, 32)  # width, height in pixels; tokens of 16 pixels
SMALL = (
    *('vision.view_width=64', 'vision.view_height=32'),
    *('action.width=32', 'action.ffn=48', 'action.moe_layers=1'),
)
TEXT = (
    f'{prompt.IM_START}user\nfront {prompt.VISION_START}{prompt.IMAGE_PAD}{prompt.VISION_END} left '
    f'{prompt.VISION_START}{prompt.IMAGE_PAD}{prompt.VISION_END} speed 5{prompt.IM_END}\n'
)
TOKENIZER = prompt.word_tokenizer([TEXT])


class Processor(processing_qwen2_vl.Qwen2VLProcessor):
    """Hugging Face's, without the part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def qwen2vl(**text):
    """Return a random Qwen2-VL in which nothing is symmetric by chance."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            'vocab_size': 80,
            'hidden_size': 48,
            'intermediate_size': 64,
            'num_hidden_layers': 8,
            'num_attention_heads': 2,
            'num_key_value_heads': 1,
            'initializer_range': 0.2,
            'rope_parameters': {'rope_type': 'default', 'mrope_section': [4, 4, 4]},
        }
        | text,
        vision_config={
            'depth': 2,
            'embed_dim': 32,
            'hidden_size': 48,
            'num_heads': 2,
            'patch_size': 8,
            'initializer_range': 0.2,
        },
        image_token_id=TOKENIZER.token_to_id(prompt.IMAGE_PAD),
        vision_start_token_id=TOKENIZER.token_to_id(prompt.VISION_START),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config).eval()


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    """Return a Qwen2-VL and its folder."""
    folder = tmp_path_factory.mktemp('qwen') / 'whole'
    network = qwen2vl()
    network.save_pretrained(folder)
    (folder / 'tokenizer.json').write_text(TOKENIZER.to_str())
    return network, folder


@pytest.fixture(scope='module')
def made(original, tmp_path_factory):
    """Return the folder of the MoSE that was made of it."""
    out = tmp_path_factory.mktemp('mose') / 'made'
    convert.convert(original[1], out, settings=SMALL)
    return out


@pytest.fixture
def folder(original, tmp_path):
    """Return a copy of the Qwen2-VL's folder, to be spoiled."""
    return shutil.copytree(original[1], tmp_path / 'copy')


def pictures():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (VIEW[1], VIEW[0], 3), np.uint8) for _ in range(2)]


@torch.no_grad()
def theirs(network):
    """Return the logits of all tokens, all in Hugging Face's ways: processor, positions, network."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, pad_token='<|endoftext|>')
    images = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(do_resize=False, patch_size=8)
    inputs = Processor(images, tokenizer)(images=pictures(), text=[TEXT], return_tensors='pt')
    assert inputs['input_ids'].shape[1] > 2 * 8  # a view is 4 x 2 tokens
    return network(**inputs).logits[0]


@torch.no_grad()
def ours(driver, **options):
    """Return the logits and skills of the same moment in our ways."""
    view = driver.config.vision
    patches = [
        vision.patchify(vision.normalize(np.stack([one, one])), view.patch, view.merge)
        for one in pictures()
    ]
    tokenizer = prompt.Tokenizer(TOKENIZER)
    ids = tokenizer.encode_prompt(TEXT, view.tokens)
    grid = (view.grid[0] // view.merge, view.grid[1] // view.merge)
    places = prompt.rope_positions(ids, tokenizer.image_id, grid)
    embeds = driver.vlm.see(torch.from_numpy(np.stack(patches)))[1]
    ids, places = torch.from_numpy(ids)[None], torch.from_numpy(places)[:, None]
    read = driver.vlm.read(ids, embeds[None], places, torch.ones(ids.shape), **options)
    return driver.vlm.lm_head(read.hidden[0]), read.skills[0].tolist()


def disturb(experts):
    torch.manual_seed(1)
    with torch.no_grad():
        for expert in experts:
            expert.down_proj.weight.add_(0.3 * torch.randn_like(expert.down_proj.weight))


@pytest.mark.parametrize('shape', ['whole', 'sharded', 'published'])
@pytest.mark.parametrize('weight', [0.0, 0.5])
def test_a_converted_network_answers_as_the_original(original, tmp_path, shape, weight):
    network, folder = original
    if shape == 'sharded':
        folder = tmp_path / 'sharded'
        network.save_pretrained(folder, max_shard_size='60KB')
        assert len(list(folder.glob('*.safetensors'))) > 3
    elif shape == 'published':  # the names of tensors and the flat config.json of transformers 4
        folder = shutil.copytree(folder, tmp_path / 'published')
        as_published(folder)
    settings = [*SMALL, f'mose.expert_weight={weight}']
    convert.convert(folder, tmp_path / 'out', settings=settings)
    driver = MoseDriver.load(tmp_path / 'out').eval()

    torch.testing.assert_close(ours(driver)[0], theirs(network), atol=2e-5, rtol=1e-4)

    logits, skills = ours(driver)
    layer = driver.vlm.model.language_model.layers[driver.config.mose.layers[0][0]]
    disturb([layer.mlp.experts[skills[0]]])
    assert torch.equal(ours(driver)[0], logits) == (weight == 0)


def as_published(folder):
    tensors = {
        name.replace('model.language_model.', 'model.').replace('model.visual.', 'visual.'): value
        for name, value in load_file(folder / 'model.safetensors').items()
    }
    assert 'visual.blocks.0.attn.qkv.weight' in tensors and 'model.norm.weight' in tensors
    save_file(tensors, folder / 'model.safetensors')
    config = json.loads((folder / 'config.json').read_text())
    text = config.pop('text_config')
    text['rope_scaling'] = {'type': 'mrope', 'mrope_section': [4, 4, 4]}
    text['rope_theta'] = text.pop('rope_parameters')['rope_theta']
    (folder / 'config.json').write_text(json.dumps(text | config | {'model_type': 'qwen2_vl'}))


def test_a_decoder_with_a_head_of_its_own_keeps_it(tmp_path):
    network = qwen2vl()
    network.config.tie_word_embeddings = False
    network.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(80, 48))
    network.save_pretrained(tmp_path / 'loose')
    convert.convert(tmp_path / 'loose', tmp_path / 'out', settings=SMALL)
    driver = MoseDriver.load(tmp_path / 'out').eval()
    torch.testing.assert_close(ours(driver)[0], theirs(network), atol=2e-5, rtol=1e-4)
    assert not torch.equal(driver.vlm.lm_head.weight, network.get_input_embeddings().weight)


def test_loading_and_saving_changes_nothing(original, made, tmp_path):
    driver = MoseDriver.load(made)
    driver.save(tmp_path / 'again')
    again = MoseDriver.load(tmp_path / 'again').eval()
    want, got = driver.state_dict(), again.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[name], got[name]) for name in want)
    assert again.config.to_json() == driver.config.to_json()
    other = convert.convert(original[1], tmp_path / 'other', settings=SMALL, seed=1)
    drawn = MoseDriver.load(tmp_path / 'other').state_dict()
    same = {name for name in want if torch.equal(want[name], drawn[name])}
    assert {name for name in want if name.startswith('vlm.model.')} <= same
    assert 'vlm.routers.0.weight' not in same and 'action_expert.query' not in same
    assert other['total'] == sum(value.numel() for value in driver.parameters())


@pytest.mark.parametrize('saved', [False, True])
def test_the_language_model_lies_there_in_hugging_faces_format(original, made, tmp_path, saved):
    if saved:
        MoseDriver.load(made).save(tmp_path / 'saved')
        made = tmp_path / 'saved'
    dense = Qwen2VLForConditionalGeneration.from_pretrained(made / 'vlm').eval()
    torch.testing.assert_close(theirs(dense), theirs(original[0]))
    config = json.loads((made / 'vlm/config.json').read_text())
    assert config['model_type'] == 'qwen2_vl' and config['vision_config']['depth'] == 2
    assert (made / 'vlm/tokenizer.json').is_file() or saved


def test_weights_keep_their_type_and_routers_are_float32(original, tmp_path):
    network = qwen2vl().bfloat16()
    network.save_pretrained(tmp_path / 'half')
    convert.convert(tmp_path / 'half', tmp_path / 'out', settings=SMALL)
    (file,) = (tmp_path / 'out/vlm').glob('*.safetensors')
    with safe_open(file, 'pt') as stored:
        kinds = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    assert {kind for name, kind in kinds.items() if 'routers' in name} == {'F32'}
    assert {kind for name, kind in kinds.items() if 'routers' not in name} == {'BF16'}
    vlm = MoseQwen2VL.from_pretrained(tmp_path / 'out/vlm', dtype=torch.bfloat16)
    assert vlm.routers[0].weight.dtype == torch.float32
    assert vlm.model.language_model.layers[2].mlp.experts[0].up_proj.weight.dtype == torch.bfloat16


def test_no_more_than_a_shard_is_held_at_once(original, made, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, 'SHARD', 100_000)
    convert.convert(original[1], tmp_path / 'out', settings=SMALL)
    shards = list((tmp_path / 'out/vlm').glob('*.safetensors'))
    assert len(shards) > 5 and all(path.stat().st_size < 110_000 for path in shards)
    want, got = MoseDriver.load(made).state_dict(), MoseDriver.load(tmp_path / 'out').state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)


def spoil_config(folder, **changes):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_tensors(folder, change):
    tensors = load_file(folder / 'model.safetensors')
    change(tensors)
    save_file(tensors, folder / 'model.safetensors')


NORM = 'model.norm.weight'  # in the file; transformers 5 calls it model.language_model.norm.weight


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (lambda at: (at / 'config.json').unlink(), 'has no config.json'),
        (lambda at: (at / 'config.json').write_text('{'), 'config.json is no JSON'),
        (lambda at: spoil_config(at, model_type='llama'), "model_type is 'llama'"),
        (lambda at: (at / 'model.safetensors').unlink(), 'model.safetensors is missing'),
        (lambda at: (at / 'model.safetensors').write_bytes(b'cut'), 'model.safetensors cannot be'),
        (lambda at: spoil_tensors(at, lambda t: t.pop(NORM)), 'lacks model.language_model.norm'),
        (
            lambda at: spoil_tensors(at, lambda t: t.update({NORM: torch.zeros(7)})),
            r'norm.weight \(7,\) instead of \(48,\)',
        ),
        (
            lambda at: spoil_tensors(at, lambda t: t.update(strange=torch.zeros(7))),
            'no Qwen2-VL has: strange',
        ),
        (
            lambda at: spoil_tensors(at, lambda t: t.update({NORM: torch.zeros(48).double()})),
            'is of type F64',
        ),
        (lambda at: spoil_config(at, mose={}), 'language model of a MoSE'),
    ],
)
def test_what_is_no_whole_qwen2vl_is_refused_by_name(folder, tmp_path, spoil, says):
    spoil(folder)
    with pytest.raises(ValueError, match=says):
        convert.convert(folder, tmp_path / 'out', settings=SMALL)
    assert not list(tmp_path.glob('out*'))


def test_a_missing_shard_is_named(original, tmp_path):
    original[0].save_pretrained(tmp_path / 'sharded', max_shard_size='60KB')
    lost = sorted((tmp_path / 'sharded').glob('*.safetensors'))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f'{lost.name} is missing'):
        convert.convert(tmp_path / 'sharded', tmp_path / 'out', settings=SMALL)


@pytest.mark.parametrize(
    ('settings', 'says'),
    [
        (('vision.view_width=64', 'vision.view_height=40'), '64x40 is no multiple of 16'),
        ((*SMALL, 'decoder.ffn=128'), "are the checkpoint's"),
        ((*SMALL, 'mose.layers=[[1],[3],[8]]'), r'mose.layers names \[8\]'),
        ((*SMALL, 'mose.router_scop=layer'), 'did you mean router_scope'),
        ((*SMALL, 'mose.router_scope=token'), "'level' or 'layer', not 'token'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(original, tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        convert.convert(original[1], tmp_path / 'out', settings=settings)


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ({'num_hidden_layers': 4}, '4 decoder layers have 2 even-numbered ones for 3 levels'),
        ({'use_sliding_window': True}, 'use_sliding_window True is not supported'),
    ],
)
def test_a_qwen2vl_that_does_not_fit_is_refused(tmp_path, text, says):
    qwen2vl(**text).save_pretrained(tmp_path / 'odd')
    with pytest.raises(ValueError, match=says):
        convert.convert(tmp_path / 'odd', tmp_path / 'out', settings=SMALL)


def test_nothing_is_begun_on_a_full_disk_nor_over_what_is_no_checkpoint(
    original, tmp_path, monkeypatch
):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/diary.txt').write_text('dear diary')
    with pytest.raises(ValueError, match='mine is there and no checkpoint'):
        convert.convert(original[1], tmp_path / 'mine', settings=SMALL)
    with pytest.raises(ValueError, match='holds what is converted'):
        convert.convert(original[1], original[1].parent, settings=SMALL)
    monkeypatch.setattr(
        convert.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(9, 8, 1)
    )
    with pytest.raises(ValueError, match='has 0.0 GB free, the checkpoint needs 0.0 GB'):
        convert.convert(original[1], tmp_path / 'out', settings=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['mine']


def test_what_fails_half_way_leaves_the_old_checkpoint_alone(original, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    convert.convert(original[1], out, settings=SMALL)
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*')}

    def fail(*_, **__):
        raise OSError('the cable is out')

    monkeypatch.setattr(convert, 'save_file', fail)
    with pytest.raises(OSError, match='cable'):
        convert.convert(original[1], out, settings=SMALL, seed=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('out/**/*')} == before
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_any_taxonomy_can_be_learned(original, tmp_path):
    robot = Taxonomy.load(default_path('skills_robot.yaml'))
    counts = convert.convert(original[1], tmp_path / 'out', settings=SMALL, taxonomy=robot)
    driver = MoseDriver.load(tmp_path / 'out').eval()
    assert list(driver.config.mose.levels) == list(robot.levels)
    assert [router.out_features for router in driver.vlm.routers] == [5, 5, 5]
    assert ours(driver, forced=torch.tensor([[4, -1, 2]]))[1][::2] == [4, 2]
    assert counts == convert.count_only(original[1], 'qwen2vl_2b', SMALL, taxonomy=robot)


def test_the_real_one_stays_below_three_billion_active_parameters():
    counts = convert.count_only(None, 'qwen2vl_2b')
    assert 2.5e9 < counts['active'] < 3e9 < counts['total'] < 5e9
    assert counts['active_more'] == pytest.approx(0.4e9, rel=0.05)
    everywhere = ('mose.layers=[[0,2,4,6,8],[10,12,14,16,18],[20,22,24,26]]',)
    more = convert.count_only(None, 'qwen2vl_2b', everywhere)
    assert more['active_more'] == pytest.approx(0.58e9, rel=0.01) and more['active'] < 3e9
    grouped = convert.count_only(None, 'qwen2vl_2b', ('mose.expert_groups=true',))
    assert grouped['active_more'] == pytest.approx(0.8e9, rel=0.05)
    assert '2.78 B active' in convert.describe(counts)


# ---- expert groups ----


@pytest.fixture(scope='module')
def trained(made, tmp_path_factory):
    """Return the folder of a MoSE whose experts and routers have learned something."""
    driver = MoseDriver.load(made)
    for layer in driver.vlm.routed:
        disturb(driver.vlm.model.language_model.layers[layer].mlp.experts)
    out = tmp_path_factory.mktemp('trained') / 'model'
    driver.save(out)
    return out


def test_expert_groups_begin_as_the_experts_they_were(trained, tmp_path):
    counts = convert.widen(trained, tmp_path / 'wide')
    before, after = MoseDriver.load(trained).eval(), MoseDriver.load(tmp_path / 'wide').eval()
    (logits, skills), (wider, still) = ours(before), ours(after)
    torch.testing.assert_close(wider, logits, atol=2e-5, rtol=1e-4)
    assert still == skills
    old, new = before.state_dict(), after.state_dict()
    assert all(torch.equal(new[name], value) for name, value in old.items())
    assert all('.image_experts.' in name for name in set(new) - set(old))
    layer = after.vlm.model.language_model.layers[after.config.mose.layers[0][0]]
    expert = sum(p.numel() for p in layer.mlp.image_experts[0].parameters())
    assert counts['active'] == before.count_parameters()['active'] + 3 * expert
    assert counts['total'] == before.count_parameters()['total'] + (5 + 5 + 8) * expert


def test_image_tokens_go_to_the_image_expert_and_no_others(trained, tmp_path):
    convert.widen(trained, tmp_path / 'wide')
    driver = MoseDriver.load(tmp_path / 'wide').eval()
    logits, skills = ours(driver)
    layer = driver.config.mose.layers[-1][0]
    mlp = driver.vlm.model.language_model.layers[layer].mlp
    seen = []
    for group in (mlp.experts, mlp.image_experts):
        group[skills[-1]].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[-2]))
    assert torch.equal(ours(driver)[0], logits)
    assert seen == [len(logits) - 2 * 8, 2 * 8]  # text tokens, then those of two views
    disturb([mlp.image_experts[(skills[-1] + 1) % 8]])
    assert torch.equal(ours(driver)[0], logits)
    disturb([mlp.image_experts[skills[-1]]])
    assert not torch.allclose(ours(driver)[0], logits)


def test_only_a_mose_without_groups_is_widened(made, original, tmp_path):
    convert.widen(made, tmp_path / 'wide')
    with pytest.raises(ValueError, match='with expert groups already'):
        convert.widen(tmp_path / 'wide', tmp_path / 'wider')
    with pytest.raises(ValueError, match='is a MoSE already'):
        convert.widen(made, tmp_path / 'out', settings=())
    with pytest.raises(ValueError, match='only mose.expert_groups can be set'):
        convert.widen(
            made, tmp_path / 'out', settings=('mose.expert_groups=true', 'mose.expert_weight=0')
        )
    with pytest.raises(ValueError, match='is no checkpoint'):
        convert.widen(original[1], tmp_path / 'out')
    with pytest.raises(ValueError, match='holds what is converted'):
        convert.widen(made, made)


@pytest.mark.parametrize(('routing', 'more'), [('token', 4), ('none', 0)])
def test_a_baseline_is_made_of_the_same_folder(original, tmp_path, routing, more):
    out = tmp_path / 'baseline'
    counts = convert.convert(
        original[1], out, settings=(*SMALL, f'mose.routing={routing}', 'mose.token_experts=4')
    )
    driver = MoseDriver.load(out).eval()
    logits, skills = ours(driver)
    torch.testing.assert_close(logits, theirs(original[0]), atol=1e-4, rtol=1e-4)
    assert skills == [0, 0, 0]
    mixtures = [layer.mlp for layer in driver.vlm.model.language_model.layers][2::2]
    assert [len(getattr(mlp, 'experts', ())) for mlp in mixtures] == [more] * 3
    if more:
        expert = sum(p.numel() for p in mixtures[0].experts[0].parameters())
        assert counts['active_more'] == 3 * (expert + 4 * 48)
        disturb(mixtures[1].experts)
        assert not torch.allclose(ours(driver)[0], logits, atol=1e-2)
    else:
        assert counts['active_more'] == 0
