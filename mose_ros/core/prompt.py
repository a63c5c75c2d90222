"""The question and the answer as text and tokens: Qwen2-VL's chat format with one user turn and one assistant turn.

The user turn shows the chosen views, each after its camera's name, then what the vehicle knows in words. The answer is
three sentences, one per level, each opened by the level's name (MoSE: description, prediction, planning in one pass).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int64

from mose_ros.core.types import Command, EgoState, Guidance

IM_START, IM_END = '<|im_start|>', '<|im_end|>'
VISION_START, IMAGE_PAD, VISION_END = '<|vision_start|>', '<|image_pad|>', '<|vision_end|>'
SPECIAL = ('<|endoftext|>', IM_START, IM_END, VISION_START, IMAGE_PAD, VISION_END)
COMMAND_WORDS = {
    Command.LEFT: 'turn left',
    Command.RIGHT: 'turn right',
    Command.STRAIGHT: 'go straight',
    Command.FOLLOW: 'follow the road',
    Command.LANE_LEFT: 'change to the left lane',
    Command.LANE_RIGHT: 'change to the right lane',
}
MAX_NUMBER = 60  # numbers in words are whole and clipped to this: every one is a word of the tiny vocabulary


def _number(value: float) -> str:
    return str(min(MAX_NUMBER, int(round(abs(value)))))


def _point(name: str, point) -> str:
    side = 'left' if point[1] >= 0 else 'right'
    return f'{name} {_number(max(0.0, point[0]))} ahead {_number(point[1])} {side}'


def question(views: Sequence[str], ego: EgoState, guidance: Guidance) -> str:
    """Return the text of the user's turn with one IMAGE_PAD for each view; `encode_prompt` widens it."""
    pictures = ''.join(
        f'{name.replace("_", " ")} {VISION_START}{IMAGE_PAD}{VISION_END} ' for name in views
    )
    state = f'speed {_number(ego.speed)} , command {COMMAND_WORDS[guidance.command]}'
    goal = f'{_point("near", guidance.near)} , {_point("far", guidance.far)}'
    return f'{IM_START}user\n{pictures}{state} , {goal} .{IM_END}\n{IM_START}assistant\n'


def answer(sentences: dict[str, str]) -> str:
    """Join the sentences of all levels, in order, into the answer: `perception : ... prediction : ...`."""
    return ' '.join(f'{level} : {sentence}' for level, sentence in sentences.items())


def parse_answer(text: str, levels: Sequence[str]) -> dict[str, str]:
    """Split an answer into its levels' sentences; a level that is not there is missing from the result."""
    starts = [(text.find(f'{level} :'), level) for level in levels]
    found = sorted((start, level) for start, level in starts if start >= 0)
    ends = [*(start for start, _ in found), len(text)][1:]
    return {
        level: text[start + len(level) + 2 : end].strip()
        for (start, level), end in zip(found, ends, strict=True)
    }


class Tokenizer:
    """A `tokenizer.json` with Qwen2-VL's special tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
        missing = [token for token, index in ids.items() if index is None]
        if missing:
            raise ValueError(
                f'the tokenizer lacks {", ".join(missing)}; it is not one of Qwen2-VL or of mose_ros'
            )
        self.image_id, self.end_id = ids[IMAGE_PAD], ids[IM_END]
        self.vocab_size = tokenizer.get_vocab_size()

    @classmethod
    def load(cls, path: str | Path) -> 'Tokenizer':
        """Read tokenizer.json; ValueError names the file when it is none."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None
        except (
            Exception
        ) as error:  # the library raises bare Exception for a missing or malformed file
            raise ValueError(f'{path} cannot be read as a tokenizer: {error}') from None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def encode_prompt(self, text: str, tokens_per_view: int) -> Int64[np.ndarray, 'T']:
        """Return the ids of a question with each view's IMAGE_PAD repeated for its tokens."""
        ids = self.encode(text)
        counts = [tokens_per_view if index == self.image_id else 1 for index in ids]
        return np.repeat(np.asarray(ids, np.int64), counts)


def word_tokenizer(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """Make the tiny vocabulary: one token for each word of the texts and each number up to MAX_NUMBER, in fixed order."""
    words = sorted(
        {word for text in texts for word in text.split()} | {str(n) for n in range(MAX_NUMBER + 1)}
    )
    words = [word for word in words if word not in SPECIAL]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, '<|unknown|>', *words])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token='<|unknown|>')
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def rope_positions(
    ids: Int64[np.ndarray, 'T'], image_id: int, grid: tuple[int, int]
) -> Int64[np.ndarray, '3 T']:
    """Return Qwen2-VL's multimodal rotary positions (time, row, column) of a prompt.

    Text counts on all three axes alike; a view stands at one time and spreads over rows and columns of `grid` (after
    merging); what follows it continues behind the largest position so far.
    """
    rows, columns = grid
    positions = np.zeros((3, len(ids)), np.int64)
    following, index = 0, 0
    while index < len(ids):
        if ids[index] != image_id:
            positions[:, index] = following
            following, index = following + 1, index + 1
            continue
        span = slice(index, index + rows * columns)
        if not (ids[span] == image_id).all() or len(ids[span]) != rows * columns:
            raise ValueError(f'a view at token {index} is not {rows} x {columns} tokens long')
        positions[0, span] = following
        positions[1, span] = following + np.repeat(np.arange(rows), columns)
        positions[2, span] = following + np.tile(np.arange(columns), rows)
        following, index = following + max(rows, columns), span.stop
    return positions
