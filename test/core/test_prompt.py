import numpy as np
import pytest
import tokenizers

from mose_ros.core import prompt
from mose_ros.core.types import COMMANDS, Command, EgoState, Guidance

EGO = EgoState(x=0.0, y=0.0, yaw=0.0, speed=5.4)
AHEAD = Guidance(near=np.array([9.6, 1.2]), far=np.array([24.0, -3.7]), command=Command.LEFT)
VIEWS = ('front', 'back_left')


@pytest.fixture(scope='module')
def tokenizer():
    texts = [prompt.question(VIEWS, EGO, AHEAD).replace(prompt.IM_START, ' '), 'all is well']
    return prompt.Tokenizer(prompt.word_tokenizer(texts))


def test_the_question_shows_the_views_and_says_what_the_vehicle_knows():
    text = prompt.question(VIEWS, EGO, AHEAD)
    image = '<|vision_start|><|image_pad|><|vision_end|>'
    assert text == (
        f'<|im_start|>user\nfront {image} back left {image} '
        'speed 5 , command turn left , near 10 ahead 1 left , far 24 ahead 4 right .'
        '<|im_end|>\n<|im_start|>assistant\n'
    )


def test_numbers_are_whole_and_bounded():
    ego = EgoState(x=0.0, y=0.0, yaw=0.0, speed=99.0)
    behind = Guidance(near=np.array([-7.0, 0.0]), far=np.array([70.0, 61.0]), command=Command.LEFT)
    text = prompt.question((), ego, behind)
    assert 'speed 60 ,' in text
    assert 'near 0 ahead 0 left , far 60 ahead 60 left' in text


def test_every_command_has_words_of_its_own():
    assert prompt.COMMAND_WORDS.keys() == set(COMMANDS)
    assert len(set(prompt.COMMAND_WORDS.values())) == len(COMMANDS)


def test_an_answer_is_parsed_into_its_levels():
    sentences = {'perception': 'a car .', 'prediction': 'it stops .', 'planning': 'wait .'}
    text = prompt.answer(sentences)
    assert text == 'perception : a car . prediction : it stops . planning : wait .'
    assert prompt.parse_answer(text, list(sentences)) == sentences


def test_a_broken_answer_gives_what_is_there():
    levels = ['perception', 'prediction', 'planning']
    assert prompt.parse_answer('', levels) == {}
    assert prompt.parse_answer('planning : go perception : a', levels) == {
        'planning': 'go',
        'perception': 'a',
    }


def test_text_survives_the_tokenizer(tokenizer):
    ids = tokenizer.encode('all is well')
    assert len(ids) == 3
    assert tokenizer.decode(ids) == 'all is well'
    assert tokenizer.decode([*ids, tokenizer.end_id]) == 'all is well'
    assert tokenizer.decode(tokenizer.encode('all is lost')) != 'all is lost'


def test_every_number_is_a_word(tokenizer):
    for number in range(prompt.MAX_NUMBER + 1):
        assert tokenizer.decode(tokenizer.encode(str(number))) == str(number)


def test_each_view_is_as_wide_as_its_tokens(tokenizer):
    text = prompt.question(VIEWS, EGO, AHEAD)
    narrow, wide = (tokenizer.encode_prompt(text, tokens) for tokens in (1, 6))
    assert (narrow == tokenizer.image_id).sum() == 2
    assert (wide == tokenizer.image_id).sum() == 12
    others = [ids[ids != tokenizer.image_id] for ids in (narrow, wide)]
    assert np.array_equal(*others)


def test_the_vocabulary_does_not_depend_on_the_order_of_texts():
    one = prompt.word_tokenizer(['b a', 'c']).get_vocab()
    two = prompt.word_tokenizer(['c', 'a b a']).get_vocab()
    assert one == two
    assert one != prompt.word_tokenizer(['b a']).get_vocab()
    assert [one[token] for token in prompt.SPECIAL] == list(range(len(prompt.SPECIAL)))


def test_a_tokenizer_that_is_none_of_ours_is_refused(tmp_path):
    path = tmp_path / 'tokenizer.json'
    with pytest.raises(ValueError, match='tokenizer.json cannot be read'):
        prompt.Tokenizer.load(path)
    path.write_text('{}')
    with pytest.raises(ValueError, match='tokenizer.json'):
        prompt.Tokenizer.load(path)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, unk_token='a')).save(str(path))
    with pytest.raises(ValueError, match='tokenizer.json: .* lacks .*im_start'):
        prompt.Tokenizer.load(path)


def test_positions_of_text_count_up():
    positions = prompt.rope_positions(np.array([7, 8, 9]), image_id=4, grid=(2, 3))
    assert positions.tolist() == [[0, 1, 2]] * 3


def test_a_view_stands_at_one_time_and_spreads_over_rows_and_columns():
    ids = np.array([7] + [4] * 6 + [8])
    time, row, column = prompt.rope_positions(ids, image_id=4, grid=(2, 3)).tolist()
    assert time == [0, 1, 1, 1, 1, 1, 1, 4]
    assert row == [0, 1, 1, 1, 2, 2, 2, 4]
    assert column == [0, 1, 2, 3, 1, 2, 3, 4]


def test_positions_are_those_of_hugging_face():
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    rows, columns, image = 2, 3, 4
    ids = np.array([7, 8] + [image] * 6 + [9] + [image] * 6 + [5, 6, 7])
    config = transformers.Qwen2VLConfig()
    # only the rule is wanted: a model of meta tensors costs nothing
    with torch.device('meta'):
        text = {'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2}
        text |= {'num_key_value_heads': 1, 'intermediate_size': 8, 'vocab_size': 10}
        vision = {'depth': 1, 'embed_dim': 8, 'num_heads': 1, 'hidden_size': 8}
        model = transformers.Qwen2VLModel(
            type(config)(text_config=text, vision_config=vision, image_token_id=image)
        )
    theirs, _ = model.get_rope_index(
        torch.tensor(ids)[None],
        torch.tensor(ids == image)[None].int(),
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]] * 2),
    )
    ours = prompt.rope_positions(ids, image, (rows, columns))
    assert ours.tolist() == theirs[:, 0].tolist()
    turned = prompt.rope_positions(ids, image, (columns, rows))
    assert turned.tolist() != theirs[:, 0].tolist()


def test_a_view_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match='a view at token 1 is not 2 x 3 tokens long'):
        prompt.rope_positions(np.array([7, 4, 4, 4, 4, 4, 8]), image_id=4, grid=(2, 3))
    with pytest.raises(ValueError, match='token 1 is not 2 x 3'):
        prompt.rope_positions(np.array([7, 4, 4]), image_id=4, grid=(2, 3))
