"""A tiny bundle in the contract's format whose answers are known, for tests of whatever runs bundles.

What it does, whatever its weights would be called:
- view router: a camera's score is the mean of its normalised thumbnail, so the brightest candidate is chosen.
- vision: a token is the mean of its normalised pixels.
- routers: a scene is bright where the mean of all views' tokens is positive. Dark: skill 0 on all levels. Bright: skill 1.
- text: DARK or BRIGHT, word for word; `<|unknown|>` once the cache, a position or a skill is not what it must be.
- trajectory: a straight line of equal steps that ends in the guidance's `near` point, however many steps of the flow.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mose_ros.core import action, prompt, rig, skills, types
from mose_ros.core.bundle import Manifest
from mose_ros.engine.bundle import Bundle

DARK = 'perception : it is dark prediction : nothing moves planning : stop'
BRIGHT = 'perception : the sun shines prediction : all goes on planning : drive'
SETTLE_S = 2.0
REACH = 50.0  # m: actions and the guidance's points are normalised by this
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
CARRIED = (
    'embeds',
    'past_k',
    'past_v',
    'new_k',
    'new_v',
)  # from graph to graph, in the bundle's precision


def make_manifest(**changes) -> Manifest:
    """Return the tiny bundle's manifest with some fields changed."""
    taxonomy = skills.Taxonomy.load(skills.default_path())
    horizon = 15
    scales = {'near_x': REACH, 'near_y': REACH, 'far_x': REACH, 'far_y': REACH}
    high = [scales.get(name, 10.0) for name in action.PROPRIO]
    fields = {
        'name': 'known',
        'cameras': list(rig.CAMERAS),
        'anchor': 'front',
        'fixed_views': ['front'],
        'top_k': 1,
        'view_width': 56,
        'view_height': 28,
        'view_frames': 2,
        'frame_gap': 0.4,
        'patch': 14,
        'merge': 2,
        'thumbnail_width': 16,
        'thumbnail_height': 8,
        'mean': [0.5, 0.5, 0.5],
        'std': [0.25, 0.25, 0.25],
        'levels': {level: list(taxonomy.names(level)) for level in taxonomy.levels},
        'num_layers': 2,
        'num_kv_heads': 1,
        'head_dim': 4,
        'width': 8,
        'vocab_size': make_tokenizer().get_vocab_size(),
        'max_prompt_tokens': 96,
        'max_new_tokens': 24,
        'action_skills': list(skills.action_skills(taxonomy)),
        'dt': 0.2,
        'action_low': [[-REACH, -REACH]] * horizon,
        'action_high': [[REACH, REACH]] * horizon,
        'noise': np.random.default_rng(0).normal(size=(horizon, 2)).round(3).tolist(),
        'num_steps': 4,
        'proprio': list(action.PROPRIO),
        'proprio_low': [-value for value in high],
        'proprio_high': high,
    }
    return Manifest(**(fields | changes))


def make_bundle(
    folder: str | Path, *, velocity_gain: float = 1.0, cruise: float = 0.0, **changes
) -> Path:
    """Write the tiny bundle into the folder and return it; changes are fields of its manifest.

    `velocity_gain` scales the velocity field; NaN makes an action expert that has gone mad. With `cruise`, m/s, the
    trajectory leads towards the near point from the speed that the car has to that one within SETTLE_S.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = make_manifest(**changes)
    graphs = {
        'view_router': _view_router(manifest),
        'vision': _vision(manifest),
        'prefill': _prefill(manifest),
        'decode': _decode(manifest),
        'action': _action(manifest, velocity_gain, cruise),
    }
    (folder / 'weights.bin').unlink(missing_ok=True)
    for name, model in graphs.items():
        onnx.checker.check_model(model)
        onnx.save_model(
            model,
            folder / f'{name}.onnx',
            save_as_external_data=name == 'decode',  # one graph with external data is enough
            location='weights.bin',
            size_threshold=100,  # shapes must stay inside
        )
    make_tokenizer().save(str(folder / 'tokenizer.json'))
    manifest.save(folder)
    return folder


def on_tensorrt(folder, **options) -> Bundle:
    """Open a bundle on the TensorRT of the test's machine."""
    return Bundle.open(folder, backend='tensorrt', **options)


def pictures(manifest, views, seed=0) -> np.ndarray:
    """Return views of noise (views, frames, height, width, 3)."""
    shape = (views, manifest.view_frames, manifest.view_height, manifest.view_width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def make_tokenizer():
    """Return a word tokenizer that knows every question and both answers."""
    guidance = [
        types.Guidance(near=np.array([1.0, side]), far=np.array([1.0, side]), command=command)
        for command in types.COMMANDS
        for side in (1.0, -1.0)
    ]
    ego = types.EgoState(x=0.0, y=0.0, yaw=0.0, speed=0.0)
    questions = [prompt.question(rig.CAMERAS, ego, one) for one in guidance]
    texts = [token for text in questions for token in _without_special(text)]
    return prompt.word_tokenizer([*texts, DARK, BRIGHT])


def _without_special(text):
    for token in prompt.SPECIAL:
        text = text.replace(token, ' ')
    return text.split()


class _Graph:
    """Nodes, constants and signatures of one graph, written as expressions."""

    def __init__(self, name, manifest):
        self.name, self.nodes, self.constants, self.inputs, self.outputs = name, [], [], [], []
        is_half = manifest.precision == 'float16'
        self.narrow = dict.fromkeys(CARRIED, TensorProto.FLOAT16) if is_half else {}

    def input(self, name, kind, shape):
        self.inputs.append(helper.make_tensor_value_info(name, self.narrow.get(name, kind), shape))
        return self('Cast', name, to=kind) if name in self.narrow else name

    def constant(self, value, dtype=np.float32):
        name = f'constant_{len(self.constants)}'
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def __call__(self, op, *inputs, **attributes):
        name = f'{op}_{len(self.nodes)}'
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def output(self, name, value, kind, shape):
        if name in self.narrow:
            kind = self.narrow[name]
            value = self('Cast', value, to=kind)
        self.nodes.append(helper.make_node('Identity', [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def build(self):
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, initializer=self.constants
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)

    def pick(self, value, index):
        return self('Gather', value, self.constant(index, np.int64), axis=-1)

    def one_hot(self, token, size):
        off_on = self.constant([0.0, 1.0])
        return self('OneHot', token, self.constant([size], np.int64), off_on, axis=-1)

    def overridden(self, routed, override):
        chosen = self('GreaterOrEqual', override, self.constant(0, np.int64))
        return self('Where', chosen, override, routed)


def _view_router(manifest):
    graph = _Graph('view_router', manifest)
    count = len(manifest.cameras)
    shape = [count, 3, manifest.thumbnail_height, manifest.thumbnail_width]
    thumbnails = graph.input('thumbnails', FLOAT, shape)
    graph.input('present', FLOAT, [count])
    graph.input('proprio', FLOAT, [1, len(manifest.proprio)])
    axes = graph.constant([1, 2, 3], np.int64)
    graph.output('scores', graph('ReduceMean', thumbnails, axes, keepdims=0), FLOAT, [count])
    return graph.build()


def _vision(manifest):
    graph = _Graph('vision', manifest)
    tokens, (rows, columns) = manifest.tokens_per_view, manifest.grid
    size = (manifest.view_frames, manifest.view_height, manifest.view_width, 3)
    views = graph.input('views', TensorProto.UINT8, ['V', *size])
    values = graph('Div', graph('Cast', views, to=FLOAT), graph.constant(255))
    values = graph('Sub', values, graph.constant(manifest.mean))
    values = graph('Div', values, graph.constant(manifest.std))
    unit = manifest.patch * manifest.merge
    cut = [0, manifest.view_frames, rows, unit, columns, unit * 3]
    cells = graph('Reshape', values, graph.constant(cut, np.int64))
    means = graph('ReduceMean', cells, graph.constant([1, 3, 5], np.int64), keepdims=0)
    means = graph('Reshape', means, graph.constant([0, tokens, 1], np.int64))
    embeds = graph('Mul', means, graph.constant(np.ones((1, 1, manifest.width))))
    graph.output('embeds', embeds, FLOAT, ['V', tokens, manifest.width])
    return graph.build()


def _answers():
    """Return the token ids of both answers with their end, padded with ends to one length: (2, longest)."""
    tokenizer = make_tokenizer()
    end = tokenizer.token_to_id(prompt.IM_END)
    ids = [[*tokenizer.encode(text).ids, end] for text in (DARK, BRIGHT)]
    longest = max(map(len, ids))
    return np.array([one + [end] * (longest - len(one)) for one in ids])


def _prefill(manifest):
    graph = _Graph('prefill', manifest)
    layers, _, heads, tokens, width = _cache_shape(manifest, 'T')
    graph.input('input_ids', INT, [1, tokens])
    embeds = graph.input('embeds', FLOAT, ['V', manifest.tokens_per_view, manifest.width])
    positions = graph.input('position_ids', INT, [3, 1, tokens])
    override = graph.input('skill_override', INT, [len(manifest.levels)])

    mean = graph('ReduceMean', embeds, keepdims=0)
    bright = graph('Cast', graph('Greater', mean, graph.constant(0)), to=INT)
    routes = graph('Expand', bright, graph.constant([len(manifest.levels)], np.int64))
    is_forced = graph('GreaterOrEqual', override, graph.constant(0, np.int64))
    skills_ = graph('Where', is_forced, override, routes)
    time = graph('Cast', graph('Gather', positions, graph.constant(0, np.int64)), to=FLOAT)
    column = graph('Reshape', time, graph.constant([1, 1, 1, -1, 1], np.int64))
    past_k = graph('Mul', column, graph.constant(np.ones((layers, 1, heads, 1, width))))
    past_v = _values(graph, past_k, mean, 0.0, graph.pick(skills_, 0))
    first = graph('Gather', graph.constant(_answers()[:, 0], np.int64), bright)
    row = graph('Reshape', first, graph.constant([1], np.int64))

    graph.output('logits', graph.one_hot(row, manifest.vocab_size), FLOAT, [1, None])
    for name, value in (('past_k', past_k), ('past_v', past_v)):
        graph.output(name, value, FLOAT, _cache_shape(manifest, tokens))
    graph.output('skills', skills_, INT, [len(manifest.levels)])
    for level, names in manifest.levels.items():
        index = graph('Reshape', bright, graph.constant([1], np.int64))
        scores = graph.one_hot(index, len(names))
        graph.output(f'skill_scores_{level}', scores, FLOAT, [1, len(names)])
    return graph.build()


def _decode(manifest):
    graph = _Graph('decode', manifest)
    token = graph.input('input_ids', INT, [1, 1])
    positions = graph.input('position_ids', INT, [3, 1, 1])
    past_k = graph.input('past_k', FLOAT, _cache_shape(manifest, 'T'))
    past_v = graph.input('past_v', FLOAT, _cache_shape(manifest, 'T'))
    skills_ = graph.input('skills', INT, [len(manifest.levels)])

    def flat(value):
        return graph('Reshape', value, graph.constant([1], np.int64))

    answers, shape = _answers(), _cache_shape(manifest, 1)
    mean = graph('ReduceMean', graph.pick(past_v, 0), keepdims=0)
    decoded = graph('ReduceMax', graph.pick(past_v, 1), keepdims=0)  # tokens behind the prompt
    is_bright = graph('Greater', mean, graph.constant(0))
    row = graph('Where', is_bright, *(graph.constant(answers[one], np.int64) for one in (1, 0)))
    step = graph('Cast', decoded, to=INT)
    position = flat(
        graph(
            'Cast',
            graph.pick(graph('Reshape', positions, graph.constant([3], np.int64)), 0),
            to=FLOAT,
        )
    )
    newest = flat(graph('ReduceMax', past_k, keepdims=0))
    skill = flat(graph('ReduceMax', graph.pick(past_v, 2), keepdims=0))
    checks = [
        graph('Equal', flat(token), flat(graph('Gather', row, step))),
        graph('Equal', position, graph('Add', newest, graph.constant([1]))),
        graph('Equal', skill, flat(graph('Cast', graph.pick(skills_, 0), to=FLOAT))),
    ]
    is_right = graph('And', graph('And', checks[0], checks[1]), checks[2])
    following = graph('Add', step, graph.constant(1, np.int64))
    last = graph.constant(answers.shape[1] - 1, np.int64)
    answer = flat(graph('Gather', row, graph('Min', following, last)))
    unknown = make_tokenizer().token_to_id('<|unknown|>')
    word = graph('Where', is_right, answer, graph.constant([unknown], np.int64))
    column = graph('Reshape', position, graph.constant([1, 1, 1, 1, 1], np.int64))
    new_k = graph('Mul', column, graph.constant(np.ones(shape)))
    new_v = _values(graph, new_k, mean, graph('Add', decoded, graph.constant(1)), skill)

    graph.output('logits', graph.one_hot(word, manifest.vocab_size), FLOAT, [1, None])
    graph.output('new_k', new_k, FLOAT, shape)
    graph.output('new_v', new_v, FLOAT, shape)
    return graph.build()


def _action(manifest, gain, cruise):
    graph = _Graph('action', manifest)
    horizon, skills_ = manifest.horizon, manifest.action_skills
    noisy = graph.input('noisy', FLOAT, [1, horizon, 2])
    t = graph.input('t', FLOAT, [1])
    proprio = graph.input('proprio', FLOAT, [1, len(manifest.proprio)])
    graph.input('past_k', FLOAT, _cache_shape(manifest, 'T'))
    past_v = graph.input('past_v', FLOAT, _cache_shape(manifest, 'T'))
    override = graph.input('skill_override', INT, [1])

    index = manifest.proprio.index('near_x')
    near = graph('Gather', proprio, graph.constant([[index, index + 1]], np.int64), axis=1)
    near = graph('Reshape', near, graph.constant([1, 1, 2], np.int64))
    share = np.arange(1, horizon + 1).reshape(1, horizon, 1) / horizon
    target = graph('Mul', near, graph.constant(share))
    if cruise:
        t_i = manifest.dt * np.arange(1, horizon + 1).reshape(1, horizon, 1)
        ramp = np.minimum(t_i, SETTLE_S)
        from_speed = ramp - ramp**2 / (2 * SETTLE_S)
        from_cruise = cruise * (ramp**2 / (2 * SETTLE_S) + t_i - ramp)
        speed = manifest.proprio.index('speed')
        metres = graph(  # the speed is normalised by the manifest's bound, near by REACH and is 10 m away
            'Add',
            graph(
                'Mul',
                graph('Gather', proprio, graph.constant([[speed]], np.int64), axis=1),
                graph.constant(manifest.proprio_high[speed] * from_speed),
            ),
            graph.constant(from_cruise),
        )
        target = graph('Mul', near, graph('Mul', metres, graph.constant([1.0 / types.NEAR_M])))
    rest = graph('Sub', graph.constant([1.0]), t)
    velocity = graph('Div', graph('Sub', target, noisy), rest)  # arrives at t = 1
    velocity = graph('Mul', velocity, graph.constant(gain))
    mean = graph('ReduceMean', graph.pick(past_v, 0), keepdims=0)
    bright = graph('Cast', graph('Greater', mean, graph.constant(0)), to=INT)
    routed = graph('Reshape', bright, graph.constant([1], np.int64))
    is_forced = graph('GreaterOrEqual', override, graph.constant([0], np.int64))

    graph.output('velocity', velocity, FLOAT, [1, horizon, 2])
    graph.output('skill_scores', graph.one_hot(routed, len(skills_)), FLOAT, [1, len(skills_)])
    graph.output('skill', graph('Where', is_forced, override, routed), INT, [1])
    return graph.build()


def _cache_shape(manifest, tokens):
    return [manifest.num_layers, 1, manifest.num_kv_heads, tokens, manifest.head_dim]


def _values(graph, like, mean, decoded, skill):
    """Return cached values: what the scene looks like, how many tokens were decoded, the first level's skill, 0."""

    def number(value):
        if isinstance(value, float):
            return graph.constant([value])
        return graph('Reshape', graph('Cast', value, to=FLOAT), graph.constant([1], np.int64))

    row = graph('Concat', number(mean), number(decoded), number(skill), number(0.0), axis=0)
    return graph('Add', graph('Mul', like, graph.constant(0)), row)
