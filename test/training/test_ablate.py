"""A table of networks that differ in one thing, made of plain commands; what is done is kept."""

import dataclasses
import json
from itertools import pairwise

import pytest

pytest.importorskip('torch', reason='training is an extra: pip install mose_ros[train]')

from mose_ros.training import ablate, plan_times, presets  # noqa: E402
from mose_ros.training.figures import draw_table  # noqa: E402

ROWS = ('SFT', 'MoSE')
F1 = {'SFT': 0.5, 'MoSE': 0.75}


def language(tmp_path, **changes):
    given = {'shares': (0.5, 1.0), 'seeds': (0, 1), 'only': ROWS, 'bar': False, **changes}
    given = {'preset': 'nano', **given}
    return ablate.Ablation(
        table='language', work=tmp_path / 'work', data=tmp_path / 'data', **given
    )


@pytest.fixture
def typed(monkeypatch):
    """Answer commands as if they had run, and return them."""
    commands = []

    def run(command, log, alone):
        commands.append(list(command))
        value = dict(pairwise(command))
        if command[1] in ('router', 'sft', 'action'):
            stage = log.parent / command[1] / 'stage.json'
            stage.parent.mkdir(parents=True, exist_ok=True)
            stage.write_text(json.dumps({'steps': 2, 'minutes': 0.1}))
        if command[1] == 'language':
            seed = int('-s1' in log.parent.name)
            f1 = F1['SFT' if 'sft' in log.parent.name else 'MoSE'] + 0.1 * seed
            result = {'f1': dict.fromkeys(('perception', 'planning'), f1), 'frames': 7}
            (log.parent / 'language.json').write_text(json.dumps({**result, 'commit': 'abc'}))
            assert value['--json'].endswith('language.json')
        if command[1] == 'closed-loop':
            driven = {'success_rate': 0.5, 'driving_score': 60.0, 'count': 35, 'families': {}}
            driven['plan_ms'] = {'p50': 99.0}  # beside others
            made = {'policies': {'bundle': driven}, 'commit': 'abc'}
            (log.parent / 'driving.json').write_text(json.dumps(made))

    monkeypatch.setattr(ablate, '_run', run)
    return commands


def test_a_table_has_mean_and_spread_over_seeds(typed, tmp_path):
    made = json.loads(ablate.ablate(language(tmp_path)).read_text())
    assert made['made'] == made['of'] == 8 and len(made['rows']) == 4
    rows = {(one['row'], one['share']): one for one in made['rows']}
    assert rows['SFT', 0.5]['mean']['planning'] == pytest.approx(0.55)
    assert rows['MoSE', 0.5]['mean']['planning'] == pytest.approx(0.80)
    assert rows['MoSE', 0.5]['spread']['planning'] == pytest.approx(0.1 / 2**0.5)
    table = (tmp_path / 'work' / 'language.md').read_text().splitlines()
    assert table[0].startswith('| network | data | seeds | perception |')
    assert '| SFT | 50 % | 2 | 0.550 ± 0.071 |' in table[2]
    assert 'nan' in table[2]  # the judgement said nothing of prediction
    picture = draw_table(made)
    titles = [panel.get_title() for panel in picture.axes]
    assert titles == ['perception', 'prediction', 'planning', 'mean']
    assert [panel.get_ylabel() for panel in picture.axes] == ['F1', '', '', '']
    sft, mose = picture.axes[2].lines  # the mean over seeds at each share
    assert sft.get_ydata() == pytest.approx([0.55, 0.55])
    assert mose.get_ydata() == pytest.approx([0.80, 0.80])
    assert not picture.axes[1].lines
    assert (tmp_path / 'work' / 'language.png').read_bytes().startswith(b'\x89PNG')


def test_a_table_of_one_share_has_bars(tmp_path):
    cells = [
        {'row': row, 'share': 1.0, 'figures': {'success_rate': rate}}
        for row, rate in (('all', 0.5), ('all', 0.7), ('routed', 0.8))
    ]
    made = {'table': 'driving', 'figures': ['success_rate'], 'rows': cells, 'cells': cells}
    [panel] = draw_table(made).axes
    assert panel.get_ylabel() == ''
    assert [bar.get_width() for bar in panel.patches] == pytest.approx([0.6, 0.8])
    assert [one.get_text() for one in panel.get_yticklabels()] == ['all', 'routed']
    with pytest.raises(ValueError, match='no cell of the table driving is made'):
        draw_table({**made, 'rows': [], 'cells': []})


def test_cells_differ_in_one_thing_and_stand_in_the_table_as_typed(typed, tmp_path):
    made = json.loads(ablate.ablate(language(tmp_path, shares=(1.0,), seeds=(3,))).read_text())
    sft, mose = (one['commands'] for one in made['cells'])
    assert [
        line.replace('nano+sft', 'nano').replace('sft-100', 'mose-100') for line in sft
    ] == mose
    assert sft != mose and 'router.seed=3' in mose[0]


def test_what_is_made_is_kept_until_its_commands_change(typed, tmp_path):
    few = language(tmp_path, shares=(1.0,), seeds=(0,))
    ablate.ablate(few)
    first = len(typed)
    ablate.ablate(few)
    assert len(typed) == first + 1  # the held clips are looked at
    ablate.ablate(language(tmp_path, shares=(1.0,), seeds=(0, 1)))
    assert len(typed) > first + 2
    before = len(typed)
    ablate.ablate(language(tmp_path, shares=(1.0,), seeds=(0,), settings=('sft.steps=3',)))
    assert sum('sft.steps=3' in command for command in typed[before:]) == 6  # 2 cells, 3 commands


def test_plans_are_timed_together_when_all_else_is_done(typed, tmp_path, monkeypatch):
    rows = ('Drive-pi0 (front only)', 'routed views (MoSE)')
    table = ablate.Ablation(
        table='driving',
        preset='nano',
        work=tmp_path,
        data=tmp_path,
        only=rows,
        seeds=(0,),
        bar=False,
    )
    old, new = table.cells()
    monkeypatch.setattr(plan_times, 'measure', lambda *_: None)
    ablate.ablate(dataclasses.replace(table, only=rows[:1]))  # as an older version left it
    told = json.loads((old.folder / ablate.RESULT).read_text())
    told['figures']['plan_ms'] = 8.76
    (old.folder / ablate.RESULT).write_text(json.dumps(told))
    measured = []

    def measure(bundles, data):
        measured.append((dict(bundles), len(typed)))
        p50 = {name: 10.0 + len(name) for name in bundles}
        return plan_times.PlanTimes(p50_ms=p50, plans=200, moments=50, threads=2)

    monkeypatch.setattr(plan_times, 'measure', measure)
    before = len(typed)
    made = json.loads(ablate.ablate(table).read_text())
    bundles = {one.folder.name: one.folder / 'bundle' for one in (old, new)}
    assert measured == [(bundles, len(typed))] and len(typed) > before, 'after all commands'
    times = [one['figures']['plan_ms'] for one in made['cells']]
    assert times == [10.0 + len(one.folder.name) for one in (old, new)] != [8.76, 99.0]
    assert made['measured'].startswith('plan_ms: median of 200 plans on 50 recorded moments')
    assert made['measured'] in (tmp_path / 'driving.md').read_text()
    assert 'plan_ms' not in json.loads((new.folder / ablate.RESULT).read_text())['figures']
    ablate.write(table, table.cells())  # while cells are made, nothing is said of it
    between = json.loads((tmp_path / 'driving.json').read_text())
    assert not between['measured'] and 'plan_ms' not in between['rows'][0]['mean']


def test_a_table_can_record_its_own_clips(typed, tmp_path):
    few = {'shares': (1.0,), 'seeds': (0,), 'settings': ('collect.seeds=3',)}
    ablate.ablate(language(tmp_path, **few))
    assert [command[1] for command in typed].count('annotate') == 0
    ablate.ablate(language(tmp_path, **few, collects=True))
    collected, labelled = [
        command
        for command in typed
        if str(tmp_path / 'data') in command and '--work' not in command
    ]
    assert (collected[1], labelled[1]) == ('collect', 'annotate')
    assert 'collect.seeds=3' in collected


def test_training_on_what_is_judged_is_refused(typed, tmp_path):
    for folder in ('data', 'work/held'):
        anno = tmp_path / folder / 'normal_19900' / 'anno'
        anno.mkdir(parents=True)
        (anno / '00000.json.gz').write_bytes(b'')
    with pytest.raises(ValueError, match='holds normal_19900, which the networks are judged on'):
        ablate.ablate(language(tmp_path))


@pytest.mark.parametrize('table', ablate.TABLES)
def test_every_row_names_a_run_of_its_own(table):
    runs = [presets.preset('tiny' + variants) for variants in ablate.TABLES[table].rows.values()]
    assert all(one != other for place, one in enumerate(runs) for other in runs[:place])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'only': ('GPT',)}, "no row .'GPT'.; choose of SFT"),
        ({'shares': (0.0,)}, 'shares are above 0'),
        ({'processes': 0}, '0 processes'),
        ({'preset': 'qwen2vl_2b'}, 'moves routers of one that is there; make each row by hand'),
    ],
)
def test_wrong_wishes_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        language(tmp_path, **changes)


def test_a_real_cell_is_trained_exported_and_judged(drawn, tmp_path):
    pytest.importorskip('metadrive', reason='pip install mose_ros[sim]')
    _, data = drawn
    ablation = ablate.Ablation(
        table='language',
        preset='nano',
        work=tmp_path / 'work',
        data=data,
        shares=(1.0,),
        seeds=(0,),
        only=('SFT',),
        families='normal',
        held_seeds='19900',
        frames=3,
        settings=('data.validation_share=0.3',),
        bar=False,
    )
    made = json.loads(ablate.ablate(ablation).read_text())
    (cell,) = made['cells']
    assert cell['figures']['frames'] == 3 and 0 <= cell['figures']['mean'] < 1
    assert cell['stages']['sft']['steps'] == 2
    log = (ablation.folder / 'sft-100-s0' / ablate.LOG).read_text()
    assert log.count('$ ') == 4 and 'nano+sft' in log


def test_a_command_that_fails_shows_the_end_of_its_log(tmp_path):
    (tmp_path / 'data').mkdir()
    with pytest.raises(
        ValueError, match='training collect failed with 1; the end of .*log.txt'
    ) as told:
        ablate.ablate(language(tmp_path, held_seeds='25000'))
    assert '20000' in str(told.value)  # seeds from there on are for judging
