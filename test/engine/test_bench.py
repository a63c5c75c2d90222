import contextlib
import json
import shutil

import cv2
import numpy as np
import pytest

from engine import bundles
from mose_ros.core.rig import CAMERAS
from mose_ros.engine import bench, counting, matches, memory, peaks, tables, twins
from mose_ros.engine.__main__ import main
from mose_ros.engine.bundle import Bundle
from mose_ros.engine.contestants import Engine, Graph, Looking
from mose_ros.engine.scenery import Scenery


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return bundles.make_bundle(
        tmp_path_factory.mktemp('bench') / 'known', parity={'trajectory_max_m': 1e-6}
    )


@pytest.fixture(autouse=True)
def small_peaks(monkeypatch):
    monkeypatch.setattr(peaks.Gemm.__init__, '__defaults__', ((64,),))
    monkeypatch.setattr(peaks.Copy.__init__, '__defaults__', (1 << 16,))


def test_bench_writes_what_it_measured(folder, tmp_path, capsys):
    path = tmp_path / 'bench.json'
    arguments = ['bench', str(folder), '--plans', '12', '--warmup', '1', '--json', str(path)]
    assert main([*arguments, '--compare', 'int8', '--int8', str(folder)]) == 0
    report = json.loads(path.read_text())
    stages = report['stages']
    assert {'glance', 'preprocess', 'vision', 'prefill', 'flow', 'decode'} <= set(stages)
    for row in [*stages.values(), report['end_to_end']]:
        assert 0 < row['p50_ms'] <= row['p90_ms'] <= row['p99_ms']
    assert stages['vision']['bytes'] > 0 and stages['vision']['flops'] == 0  # it only takes means
    assert report['plans'] == 12 and len(report['looked_at']) == 2
    assert report['views']['ratio_6_to_2'] > 0 and report['views']['ratio_6_to_1'] > 0
    assert report['reasoning_interference']['p99_ratio'] > 0
    assert (
        report['gemm_share'] == report['gemm_share_best'] == 0
        and report['end_to_end']['to_stages'] >= 1
    )
    assert report['memory']['peak_mib'] >= report['memory']['with_engine_mib'] > 0
    assert {'machine', 'versions', 'commit', 'command'} <= report.keys()
    assert report['parity'] == {'trajectory_max_m': 1e-6}
    itself = report['compare']['int8']
    assert itself['parity']['trajectory_max_m'] == 0 and itself['flops_ratio'] == 1
    assert 0.2 < itself['ratio'] < 5 and itself['pairs'] == 12
    shown = capsys.readouterr().out
    assert 'end to end' in shown and '| int8 |' in shown


def test_on_a_gpu_it_is_named_and_nothing_is_held_against_the_cpus_peaks(
    machine, folder, tmp_path, capsys
):
    machine(name='Fake Orin')
    path = tmp_path / 'gpu.json'
    arguments = ['bench', str(folder), '--plans', '3', '--warmup', '1', '--parts', '']
    assert main([*arguments, '--backend', 'tensorrt', '--json', str(path)]) == 0
    report, box = json.loads(path.read_text()), json.loads(path.read_text())['machine']
    assert (box['provider'], box['gpu'], box['cuda']) == ('TensorRT', 'Fake Orin', '12.6')
    assert not [key for key in report if 'share' in key]
    assert not [key for one in report['stages'].values() for key in one if 'share' in key]
    shown = capsys.readouterr().out
    assert 'No peaks: they are known of the CPU alone, this ran on TensorRT' in shown
    assert 'Fake Orin' in shown
    assert main([*arguments, '--backend', 'onnxruntime', '--json', str(path)]) == 0
    report = json.loads(path.read_text())
    assert report['machine']['provider'] == 'CPU' and 'gpu' not in report['machine']
    assert 'gemm_share' in report and 'GEMM peak' in capsys.readouterr().out


def test_what_a_graph_runs_on_is_told_of_each(folder):
    bundle = Bundle.open(folder, backend='onnxruntime')
    ours = Engine(bundle, Scenery(bundle.manifest))
    assert ours.hardware() == {'provider': 'CPU'}
    ours.policy.driver._prefill.provider = 'CUDA'
    assert ours.policy.driver.provider == 'CPU, CUDA'


def test_ways_of_choosing_are_held_against_a_constant_one(folder, tmp_path):
    ways, path = tmp_path / 'ways', tmp_path / 'ways.json'
    ways.mkdir()
    for way in ('constant', 'if'):
        shutil.copy(folder / 'prefill.onnx', ways / f'{way}.onnx')
    arguments = ['bench', str(folder), '--plans', '8', '--warmup', '1', '--parts', '']
    assert main([*arguments, '--selection', str(ways), '--json', str(path)]) == 0
    found = json.loads(path.read_text())['expert_selection']
    assert found['constant']['ratio'] == 1.0 and 0.2 < found['if']['ratio'] < 5
    bundle = Bundle.open(folder, backend='onnxruntime')
    runs = counting.watch(Engine(bundle, Scenery(bundle.manifest)))
    prefill = next(one.inputs for one in runs if one.graph == 'prefill')
    graph = Graph(ways / 'if.onnx', 1, 3, tokens=9, known=prefill)
    graph.plan(4)
    assert graph._inputs['skill_override'].tolist() == [1, 1, 1]  # 4 of 3 experts
    assert (graph._inputs['input_ids'] == prefill['input_ids']).all()


def test_flow_steps_say_how_far_trajectories_move(folder, tmp_path):
    path = tmp_path / 'steps.json'
    arguments = ['bench', str(folder), '--plans', '1', '--warmup', '0', '--json', str(path)]
    assert main([*arguments, '--parts', 'steps']) == 0
    report = json.loads(path.read_text())
    steps = report['flow_steps']['steps']
    assert report['flow_steps']['default'] == 4 and list(steps) == [*'12345', '7', '10', '20']
    assert steps['1']['trajectory_max_m'] < 1e-3  # this bundle's velocity field is straight
    assert steps['10']['trajectory_max_m'] == 0
    assert not {'views', 'reasoning_interference', 'operators'} & report.keys()


def test_flow_steps_take_turns_and_share_their_graphs(folder, monkeypatch):
    opened, session = [], Bundle.session
    monkeypatch.setattr(
        Bundle,
        'session',
        lambda self, graph, threads=None: (
            opened.append((graph, threads)),
            session(self, graph, threads=threads),
        )[1],
    )
    bundle = Bundle.open(folder, backend='onnxruntime')
    ours = Engine(bundle, Scenery(bundle.manifest))
    opened.clear()
    order, plan = [], Engine.plan

    def noted(self, index):
        order.append((index, self.bundle.manifest.num_steps))
        return plan(self, index)

    monkeypatch.setattr(Engine, 'plan', noted)
    found = bench.flow_steps(ours, plans=3)
    # five graphs, one of them for one thread and for two
    assert len(opened) == len(set(opened)) == 6
    assert [index for index, _ in order] == [one for one in range(3) for _ in bench.STEPS]
    assert list(found['steps']) == [str(one) for one in bench.STEPS]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--plans', '0'], 'plans >= 1'),
        (['--parts', 'speed'], "no 'speed' to measure; known: views"),
        (['--compare', 'int8'], 'int8: name its bundle'),
        (['--compare', 'jax'], "no 'jax' to measure; known: torch_eager"),
        (['--views', '9'], 'looks at 1 to 6, not at 9'),
        (['--views', '1', '--view', 'back'], 'looks at 2 to 6, not at 1'),
        (['--clip', '/nowhere'], '/nowhere is no clip'),
        (['--soak', '10'], '10 plans are too few'),
        (['--sweep', 'colour'], "no axis 'colour'"),
        (['--selection', '/nowhere'], 'has no constant.onnx'),
    ],
)
def test_what_cannot_be_measured_is_named(folder, capsys, arguments, message):
    assert main(['bench', str(folder), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_network_that_cannot_be_made_is_told(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(twins, 'MAKER', 'mose_ros.no_such_room')
    arguments = ['bench', str(folder), '--plans', '1', '--compare', 'dense', '--made']
    assert main([*arguments, str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert 'needs the extra mose_ros[train]' in said and 'No module named mose_ros.no_such' in said


def test_a_compiler_that_fails_is_a_row_and_eager_that_fails_an_error(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(matches, 'OPPONENT', 'mose_ros.no_such_room')
    path = tmp_path / 'failed.json'
    arguments = ['bench', str(folder), '--plans', '2', '--warmup', '0', '--parts', '']
    arguments += ['--checkpoint', str(tmp_path), '--json', str(path), '--compare']
    assert main([*arguments, 'torch_compile']) == 0
    row = json.loads(path.read_text())['compare']['torch_compile']
    assert 'has died with status 1' in row['error'] and 'no_such_room' in row['error']
    assert '| torch_compile | failed |' in capsys.readouterr().out
    assert main([*arguments, 'torch_eager']) == 1
    assert 'torch_eager, which is compared, has died' in capsys.readouterr().err


def test_scenery_shows_a_clip_or_noise_that_is_the_same_for_all(tmp_path):
    m = bundles.make_manifest()
    one, other = Scenery(m)(3), Scenery(m)(3)
    assert one.time == pytest.approx(0.3)
    assert all((one.images[name] == other.images[name]).all() for name in CAMERAS)
    assert (one.images['front'] != Scenery(m)(4).images['front']).any()
    for camera in CAMERAS:
        place = tmp_path / 'camera' / f'rgb_{camera}'
        place.mkdir(parents=True)
        for name, red in (('00000.png', 200), ('00001.png', 100)):
            cv2.imwrite(str(place / name), np.full((20, 30, 3), (10, 20, red), np.uint8))
    scenery = Scenery(m, clip=tmp_path)
    assert len(scenery) == 2
    assert scenery(5).images['back'][0, 0].tolist() == [100, 20, 10]
    (tmp_path / 'camera/rgb_back/00000.png').unlink()
    with pytest.raises(ValueError, match='rgb_back/00000.png cannot be read'):
        Scenery(m, clip=tmp_path)


@pytest.mark.parametrize(
    ('looking', 'count'),
    [
        (Looking(), 2),
        (Looking(views=4), 4),
        (Looking(force_view='back'), 2),
        (Looking(mode='all'), 6),
        (Looking(mode='fixed'), 1),
    ],
)
def test_all_that_are_compared_look_at_the_same_views(
    folder, tmp_path, monkeypatch, looking, count
):
    commands = []

    class Rival:
        facts = {}

        def __init__(self, name, command):
            commands.append(command)

        def close(self):
            pass

    monkeypatch.setattr(matches, 'Opponent', Rival)
    bundle = Bundle.open(folder, backend='onnxruntime')
    setting = matches.Setting(
        bundle=bundle,
        scenery=Scenery(bundle.manifest),
        looking=looking,
        tokens=9,
        clip='',
        made=tmp_path,
        checkpoint=tmp_path,
        int8=folder,
    )
    with contextlib.ExitStack() as stack:
        theirs = matches.join('int8', setting, stack).field['int8']
        matches.join('torch_eager', setting, stack)
    seen = theirs.plan(0).views
    assert len(seen) == count and (looking.force_view in ('', *seen))
    looked = [one for one in counting.watch(theirs) if one.graph == 'vision']
    assert sum(len(one.inputs['views']) for one in looked) == count  # what is counted is done
    assert len(looked) == count  # each view alone, by one of two threads
    assert {one.threads for one in looked} == {1 if count > 1 else 2}
    at = commands[0].index('--views')
    assert commands[0][at + 1 :: 2] == [str(looking.views), looking.mode, looking.force_view]


def test_a_mode_that_gives_the_number_of_views_takes_none():
    with pytest.raises(ValueError, match="in mode 'all' their number is given"):
        Looking(views=2, mode='all')
    assert Looking(views=2).views == 2


def test_memory_that_grows_is_told_from_memory_that_is_flat():
    random = np.random.default_rng(0)
    noise = random.normal(0, 4096, 80)
    assert memory.slope(1e8 + noise, 200)['flat']
    assert memory.slope(np.full(80, 1e8), 200)['flat']
    page = 1e8 + memory.PAGE * (np.arange(80) > 40)  # one more, somewhere in 80 windows
    assert memory.slope(page, 200, grain=memory.PAGE)['flat']
    assert not memory.slope(1e8 + 5 * (page - 1e8), 200, grain=memory.PAGE)['flat']
    leak = memory.slope(1e8 + noise + 100.0 * 200 * np.arange(80), 200)
    assert not leak['flat'] and leak['low'] < 100 < leak['high']


def test_a_soak_reports_memory_and_latency(folder, tmp_path):
    path = tmp_path / 'soak.json'
    assert main(['bench', str(folder), '--soak', '100', '--json', str(path)]) == 0
    found = json.loads(path.read_text())['soak']
    assert found['plans'] == 100 and len(found['resident']['by_window_mib']) == 100
    assert abs(found['traced']['bytes_per_plan']) < 2000
    bundle = Bundle.open(folder, backend='onnxruntime')
    leaking = Engine(bundle, Scenery(bundle.manifest))
    kept, plan = [], leaking.plan
    leaking.plan = lambda index: (kept.append(bytearray(50_000)), plan(index))[1]
    assert memory.soak(leaking, 100)['traced']['bytes_per_plan'] > 40_000


def test_views_are_swept_once(folder, tmp_path):
    path = tmp_path / 'sweep.json'
    arguments = ['bench', str(folder), '--plans', '2', '--warmup', '0', '--json', str(path)]
    assert main([*arguments, '--sweep', 'views']) == 0
    first = json.loads(path.read_text())['sweep']
    assert list(first['views']) == [*'123456']
    assert main([*arguments, '--sweep', 'views']) == 0  # is done
    assert json.loads(path.read_text())['sweep'] == first


def test_tables_go_between_the_marks_of_a_document(folder, tmp_path, capsys):
    report, document = tmp_path / 'mine.json', tmp_path / 'page.md'
    arguments = ['bench', str(folder), '--plans', '2', '--warmup', '0', '--parts', '']
    assert main([*arguments, '--json', str(report)]) == 0
    document.write_text(f'# Before\n\n{tables.START}\nwhat was there\n{tables.END}\nbehind\n')
    assert main(['table', str(report), '--into', str(document)]) == 0
    text = document.read_text()
    assert text.startswith('# Before\n') and text.endswith(f'{tables.END}\nbehind\n')
    assert 'what was there' not in text and '### Stages (mine)' in text
    p50 = json.loads(report.read_text())['stages']['vision']['p50_ms']
    assert f'| vision | {p50:.2f} |' in text
    document.write_text('no marks')
    assert main(['table', str(report), '--into', str(document)]) == 1
    assert 'has no lines' in capsys.readouterr().err


def test_goals_are_judged_by_the_reports_figures():
    good = {'gemm_share': 0.6, 'compare': {'dense': {'ratio': 0.9, 'flops_ratio': 0.93}}}
    bad = {'gemm_share': 0.4, 'compare': {'dense': {'ratio': 0.8, 'flops_ratio': 0.93}}}

    def judged(*reports):
        lines = tables._goals([('mine', one) for one in reports]).splitlines()[6:]
        cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
        return {what: (found, met) for what, _, found, met in cells}

    share, dense = (
        'share of the GEMM peak, vision + prefill',
        'dense over ours, by what their FLOPs say',
    )
    assert judged(good)[share] == ('0.60', 'yes') and judged(good)[dense] == ('0.97', 'yes')
    assert judged(bad)[share] == ('0.40', '**no**') and judged(bad)[dense] == ('0.86', '**no**')
    assert judged(good, bad)[share] == ('0.60, 0.40', '**no**')  # the worst decides
    assert judged(good)['6 views over 1'] == ('', 'not measured')
    faster = tables.Goal('', ['a'], least=1.3, inverse=True)
    assert faster.met(faster.found({'a': 0.7})) and not faster.met(faster.found({'a': 0.8}))


def test_twins_are_kept_by_what_they_are_made_of(monkeypatch, tmp_path, folder):
    commands = []

    class Done:
        returncode = 0

    monkeypatch.setattr(
        twins.subprocess, 'run', lambda command, **_: commands.append(command) or Done
    )
    bundle = Bundle.open(folder, backend='onnxruntime')
    places = [twins.made(bundle, tmp_path, changes) for changes in ((), twins.DENSE, twins.DENSE)]
    assert places[0] != places[1] == places[2]
    assert commands[1][-2:] == list(twins.DENSE)
