"""The Leaderboard's and Bench2Drive's agent, called as they call it, with CARLA's real types and no server."""

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from agents import stand_in
from agents.stand_in import Lincoln, RoadOption
from engine.bundles import make_bundle
from mose_ros.agents.pilot import AgentConfig
from mose_ros.core import carla as words
from mose_ros.core.types import VehicleCommand

carla = pytest.importorskip('carla', reason='the carla wheel is not installed: pip install carla')
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp('bundle') / 'known')


@pytest.fixture
def settings(bundle, tmp_path):
    def write(**changes):
        lines = {'bundle': str(bundle), 'threads': 1, 'image_width': 64, 'image_height': 36}
        path = tmp_path / 'agent.yaml'
        path.write_text('\n'.join(f'{k}: {v}' for k, v in {**lines, **changes}.items()))
        return str(path)

    return write


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports the agent on top of a base class, as the Leaderboard does."""

    def load(base=stand_in.AutonomousAgent):
        stand_in.install(monkeypatch, base)
        import mose_ros.agents.mose_agent as found

        return found

    return load


def start(module, path, route, plan_first=True):
    agent = getattr(module, module.get_entry_point())('localhost', 2000, False)
    if plan_first:  # as Leaderboard 2 does
        agent.set_global_plan(*route)
    agent.setup(path)
    if not plan_first:
        agent.set_global_plan(*route)
    return agent


def drive(agent, car, ticks, on_tick=lambda tick, data: None):
    """Call the agent tick by tick; return controls and the track."""
    controls, track = [], []
    for tick in range(ticks):
        data = car.data()
        on_tick(tick, data)
        control = agent.run_step(data, tick * 0.05)
        assert isinstance(control, carla.VehicleControl)
        controls.append(control)
        track.append((car.x, car.y))
        car.apply(control)
    return controls, np.array(track)


def off_route(track, world):
    lane = np.array([(t.location.x, t.location.y) for t, _ in world])
    return np.array([np.hypot(*(lane - place).T).min() for place in track])


@pytest.mark.parametrize(('turn', 'option'), [(1.3, RoadOption.RIGHT), (-1.3, RoadOption.LEFT)])
def test_it_drives_round_a_bend_of_a_real_map_on_the_right_hand(module, settings, turn, option):
    """The known bundle plans straight to the near point, so it cuts the bend a little; a mirrored sign would leave the road."""
    gps, world = stand_in.plan(stand_in.bend(carla, turn), option)
    end = world[-1][0]
    assert math.copysign(1.0, end.location.y - world[0][0].location.y) == math.copysign(1.0, turn)
    agent = start(module(), settings(), (gps, world))
    car = Lincoln(world[0][0])
    controls, track = drive(agent, car, 560)

    assert off_route(track, world).max() < 2.0
    assert np.hypot(car.x - end.location.x, car.y - end.location.y) < 25.0
    steered = np.array([control.steer for control in controls])
    assert math.copysign(1.0, steered.sum()) == math.copysign(
        1.0, turn
    )  # CARLA: right is positive
    assert agent._pilot.failures == 0
    agent.destroy()


def test_the_first_ticks_brake_and_plans_come_at_every_second_tick(module, settings):
    gps, world = stand_in.plan(stand_in.bend(carla, 0.5), RoadOption.RIGHT)
    agent = start(module(), settings(), (gps, world), plan_first=False)
    asked = []
    inner = agent._pilot._policy.plan
    agent._pilot._policy.plan = lambda seen, scene: asked.append(seen) or inner(seen, scene)
    controls, _ = drive(agent, Lincoln(world[0][0]), 31)
    agent._pilot._policy.plan = inner

    assert all(c.brake > 0.1 and c.throttle == 0 for c in controls[:11])
    assert all(c.throttle > 0.1 and c.brake == 0 for c in controls[12:])
    assert [round(seen.time / 0.05) for seen in asked] == list(range(0, 31, 2))
    seen = asked[0]  # what the network is told: our frame, both points, RGB of all cameras
    assert sorted(seen.images) == sorted(words.sensor_id(n)[4:] for n in seen.images)
    assert len(seen.images) == 6 and seen.images['front'].shape == (36, 64, 3)
    assert seen.guidance.near == pytest.approx([10.0, 0.0], abs=1.5)  # the first fix scatters
    assert seen.guidance.far[0] == pytest.approx(25.0, abs=1.5)


def test_the_same_ticks_give_the_same_commands(module, settings):
    gps, world = stand_in.plan(stand_in.bend(carla, 0.8), RoadOption.RIGHT)
    found = []
    for seed in (0, 0, 1):
        agent = start(module(), settings(), (gps, world))
        controls, _ = drive(agent, Lincoln(world[0][0], seed=seed), 40)
        found.append([(c.steer, c.throttle, c.brake) for c in controls])
    assert found[0] == found[1] != found[2]


def test_whatever_fails_every_tick_is_answered_and_the_car_comes_to_rest(module, settings, caplog):
    gps, world = stand_in.plan(stand_in.bend(carla, 0.5), RoadOption.RIGHT)
    agent, car = start(module(), settings(), (gps, world)), Lincoln(world[0][0])
    drive(agent, car, 80)
    assert car.speed > 2.0

    def blind(tick, data):
        del data['rgb_front']

    controls, _ = drive(agent, car, 60, blind)
    assert car.speed < 0.2 and all(c.throttle == 0 for c in controls[10:])
    assert agent._pilot.failures >= 25 and 'no plan' in caplog.text

    def broken(tick, data):
        data['imu'] = (0, np.zeros(2))

    caplog.clear()
    [control], _ = drive(agent, car, 1, broken)
    assert control.brake == 1.0 and 'full brake' in caplog.text


def test_it_comes_to_rest_along_its_plan_where_the_road_bends(module, settings):
    gps, world = stand_in.plan(stand_in.bend(carla, 1.3), RoadOption.RIGHT)
    agent, car = start(module(), settings(), (gps, world)), Lincoln(world[0][0])
    begun = car.yaw

    def blind(tick, data):
        if abs(math.remainder(car.yaw - begun, 2 * math.pi)) > 0.5 or agent._pilot.failures:
            del data['rgb_front']

    controls, track = drive(agent, car, 400, blind)
    rest = np.array([c.steer for c in controls if c.brake > 0.1][20:])
    assert agent._pilot.failures and car.speed < 0.2
    assert rest.max() > 0.1 and off_route(track, world).max() < 2.0  # straight on: 0


NASTY = {
    'nothing': {},
    'fix is nan': {'gnss': np.full(3, np.nan)},
    'fix beyond the pole': {'gnss': np.array([95.0, 2.0, 0.0])},
    'fix far away': {'gnss': np.array([89.9, 2.0, 0.0])},
    'imu is nan': {'imu': np.full(7, np.nan)},
    'imu is infinite': {'imu': np.full(7, np.inf)},
    'imu is short': {'imu': np.zeros(3)},
    'speed is nan': {'speedometer': {'speed': np.nan}},
    'speed is missing': {'speedometer': {}},
    'picture without colour': {'rgb_front': np.zeros((36, 64), np.uint8)},
    'picture of floats': {'rgb_front': np.zeros((36, 64, 4))},
    'picture is none': {'rgb_front': None},
}


@pytest.mark.parametrize('name', NASTY)
def test_what_no_sensor_should_say_is_answered_and_forgotten(module, settings, name):
    gps, world = stand_in.plan(stand_in.bend(carla, 0.5), RoadOption.RIGHT)
    agent, car = start(module(), settings(), (gps, world)), Lincoln(world[0][0])
    drive(agent, car, 30)
    for tick in range(30, 34):
        data = {**car.data(), **{key: (tick, value) for key, value in NASTY[name].items()}}
        control = agent.run_step({} if name == 'nothing' else data, tick * 0.05)
        for value, low in ((control.throttle, 0), (control.brake, 0), (control.steer, -1)):
            assert low <= value <= 1  # which nan is not
    assert agent.run_step(car.data(), math.nan).brake == 1.0
    for tick in range(34, 40):
        control = agent.run_step(car.data(), tick * 0.05)
    assert control.throttle > 0.1 and control.brake == 0


def test_one_lost_frame_is_driven_over(module, settings):
    gps, world = stand_in.plan(stand_in.bend(carla, 0.5), RoadOption.RIGHT)
    agent, car = start(module(), settings(), (gps, world)), Lincoln(world[0][0])

    def lose(tick, data):
        if tick == 60:
            del data['rgb_front']

    controls, _ = drive(agent, car, 64, lose)
    assert agent._pilot.failures == 1
    assert all(control.brake == 0 for control in controls[58:])


def test_without_a_plan_or_with_a_hopeless_one_nothing_moves(module, settings):
    loaded = module()
    agent = getattr(loaded, loaded.get_entry_point())('localhost', 2000)
    agent.setup(settings())
    start_pose = carla.Transform()
    assert agent.run_step(Lincoln(start_pose).data(), 0.0).brake == 1.0
    place = ({'lat': 42.0, 'lon': 2.0, 'z': 0.0}, RoadOption.LANEFOLLOW)
    with pytest.raises(ValueError, match='tells no scale'):
        agent.set_global_plan([place] * 3, [(start_pose, RoadOption.LANEFOLLOW)] * 3)


def test_bench2drives_metrics_are_written_where_it_looks(module, settings, monkeypatch, tmp_path):
    monkeypatch.setenv('SAVE_PATH', str(tmp_path / 'out'))
    gps, world = stand_in.plan(stand_in.bend(carla, 0.5), RoadOption.RIGHT)
    loaded = module(stand_in.Bench2DriveAgent)
    # the names of the routes so far pile up in its argument
    agent = start(loaded, settings() + '+RouteScenario_3+RouteScenario_7', (gps, world))
    drive(agent, Lincoln(world[0][0]), 3)
    agent.destroy()
    written = json.loads((tmp_path / 'out/RouteScenario_7/metric_info.json').read_text())
    assert list(written) == ['0', '1', '2'] and written['0']['location'] == [1.0, 2.0, 3.0]


def test_metrics_that_fail_cost_no_answer(module, settings, caplog):
    class Broken(stand_in.AutonomousAgent):
        def get_metric_info(self):
            raise AttributeError('the hero is gone')

    gps, world = stand_in.plan(stand_in.bend(carla, 0.5), RoadOption.RIGHT)
    agent = start(module(Broken), settings(), (gps, world))
    drive(agent, Lincoln(world[0][0]), 2)
    assert 'the hero is gone' in caplog.text


def test_the_shipped_configuration_drives_as_it_is(module):
    gps, world = stand_in.plan(stand_in.bend(carla, 0.5), RoadOption.RIGHT)
    agent = start(module(), str(ROOT / 'config/carla/agent.yaml'), (gps, world))
    drive(agent, Lincoln(world[0][0]), 16)
    plan = agent._pilot.plan
    assert agent._pilot.failures == 0 and plan.views[0] == 'front' and len(plan.skills) == 3


def test_sensors_fit_the_rules(module, settings):
    agent = start(module(), settings(), stand_in.plan(stand_in.bend(carla, 0.5), RoadOption.LEFT))
    found = agent.sensors()
    kinds = [one['type'] for one in found]
    assert kinds.count('sensor.camera.rgb') == 6 <= 8  # the Leaderboard's limit
    assert len({one['id'] for one in found}) == len(found) == 9
    assert {(one['width'], one['height']) for one in found if 'width' in one} == {(64, 36)}
    assert agent.track is stand_in.Track.SENSORS


def test_a_command_becomes_carlas_control(module):
    control = module().to_control(VehicleCommand(steer=0.25, throttle=0.5, brake=0.0))
    assert (control.steer, control.throttle, control.brake) == (-0.25, 0.5, 0.0)
    assert not (control.hand_brake or control.reverse or control.manual_gear_shift)


def ros_agent(monkeypatch, module, config):
    """Return the agent over ROS 2, in an evaluator that was started with that --agent-config."""
    module()
    import mose_ros.agents.mose_ros_agent as found

    monkeypatch.setattr(
        sys, 'argv', ['evaluator.py', '--agent', 'x.py', f'--agent-config={config}']
    )
    return getattr(found, found.get_entry_point())('localhost', 2000)


def test_the_ros_agent_names_what_is_launched(module, monkeypatch):
    agent = ros_agent(monkeypatch, module, '')
    agent.setup('')
    assert agent.launched['package'] == 'mose_ros' and agent.track is stand_in.Track.SENSORS
    assert agent.launched['parameters'] == {'platform': 'leaderboard', 'role_name': 'hero'}
    assert (ROOT / 'launch' / agent.launched['launch_file']).is_file()
    assert {'gnss', 'imu', 'speedometer', 'rgb_front'} <= {one['id'] for one in agent.sensors()}


def test_the_ros_agent_launches_the_network_of_its_file(module, monkeypatch, tmp_path):
    path = tmp_path / 'ros_agent.yaml'
    path.write_text('bundle: models/mine\nbackend: onnxruntime\nparams_file: mine.yaml')
    agent = ros_agent(monkeypatch, module, path)
    agent.setup(f'{path}+route_7')  # as Bench2Drive says it
    launched = agent.launched['parameters']
    assert launched['bundle'] == str(tmp_path / 'models/mine')
    assert launched['params_file'] == str(tmp_path / 'mine.yaml')
    assert launched['backend'] == 'onnxruntime' and launched['platform'] == 'leaderboard'
    launch_file = (ROOT / 'launch/drive.launch.py').read_text()
    assert all(f"    '{name}': (" in launch_file for name in launched)


def test_the_ros_agent_ignores_no_setting(module, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown setting 'threads'"):  # of the agent in process
        ros_agent(monkeypatch, module, ROOT / 'config/carla/agent.yaml')
    agent = ros_agent(monkeypatch, module, '')
    with pytest.raises(ValueError, match='other.yaml: the nodes were launched before'):
        agent.setup('other.yaml')


def test_the_ros_agents_shipped_configuration_launches_the_shipped_bundle(module, monkeypatch):
    agent = ros_agent(monkeypatch, module, ROOT / 'config/carla/ros_agent.yaml')
    assert (Path(agent.launched['parameters']['bundle']) / 'manifest.json').is_file()


# ---- the configuration ----


def test_the_shipped_configuration_finds_the_shipped_bundle():
    config = AgentConfig.load(ROOT / 'config/carla/agent.yaml')
    assert (Path(config.bundle) / 'manifest.json').is_file()
    assert config == AgentConfig(bundle=config.bundle)


@pytest.mark.parametrize(
    ('text', 'match'),
    [
        ('bundel: x', "did you mean 'bundle'"),
        ('threads: many', 'threads must be int'),
        ('threads: 0', 'must be positive'),
        ('route: short', 'choose one of sparse, dense'),
        ('jpeg_quality: 300', 'not in 0..100'),
        ('[1, 2]', 'holds no settings'),
        ('a: [', 'cannot be read as YAML'),
    ],
)
def test_a_wrong_configuration_names_file_and_remedy(tmp_path, text, match):
    path = tmp_path / 'agent.yaml'
    path.write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        AgentConfig.load(path)
    assert 'agent.yaml' in str(error.value)


def test_pictures_pass_through_jpeg_where_the_network_was_trained_so(module, settings):
    route = stand_in.plan(stand_in.bend(carla, 0.5), RoadOption.RIGHT)
    noise = np.random.default_rng(0).integers(0, 256, (36, 64, 4), np.uint8)
    plain = start(module(), settings(), route)._pilot._picture(noise)
    coarse = start(module(), settings(jpeg_quality=20), route)._pilot._picture(noise)
    assert (plain == noise[:, :, 2::-1]).all()
    assert coarse.shape == plain.shape and np.abs(coarse.astype(int) - plain).mean() > 5


@pytest.fixture(autouse=True)
def _logs(caplog):
    caplog.set_level(logging.WARNING)
