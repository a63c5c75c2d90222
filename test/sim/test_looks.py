"""What a driver must read in a picture of 256 pixels, whoever draws it."""

import numpy as np
import pytest

from mose_ros.sim.landscape import Light
from mose_ros.sim.looks import mesh_of
from mose_ros.sim.roadside_looks import LAMPS
from sim import scenes
from sim.pictures import ORIGIN, is_class


def _colours(picture, where):
    """Return how many of those pixels are clearly red, yellow, green."""
    r, g, b = picture[where].astype(int).T
    return {
        'red': int(((r > 190) & (g < 90) & (b < 90)).sum()),
        'yellow': int(((r > 190) & (g > 140) & (b < 90)).sum()),
        'green': int(((g > 170) & (r < 90) & (b < 150)).sum()),
    }


@pytest.mark.parametrize('distance', [8.0, 20.0, 35.0])
@pytest.mark.parametrize('state', LAMPS)
def test_a_light_shows_its_state(renderer, state, distance):
    renderer.load(scenes.town(seed=3))
    lights = [scenes.light(state, distance)]
    where = is_class(renderer.semantics(ORIGIN, lights)['front'], 'traffic_light')
    counts = _colours(renderer.render(ORIGIN, lights)['front'], where)
    assert counts.pop(state) >= 4
    assert set(counts.values()) == {0}


def test_a_light_shows_its_back_to_the_others(renderer):
    renderer.load(scenes.town(seed=3))
    lights = [scenes.light('red', 12.0, yaw=np.pi)]
    where = is_class(renderer.semantics(ORIGIN, lights)['front'], 'traffic_light')
    assert where.any()
    assert _colours(renderer.render(ORIGIN, lights)['front'], where)['red'] == 0


@pytest.mark.parametrize('type_id', ['vehicle.car', 'vehicle.truck', 'vehicle.parked'])
def test_brake_lights_glare_at_20_m_on_every_paint(renderer, type_id):
    renderer.load(scenes.town())
    size = (8.0, 2.4, 3.2) if type_id == 'vehicle.truck' else scenes.CAR
    for name in 'abcdefgh':
        counts = []
        for state in ('', 'braking'):
            cars = [scenes.actor(name, 'vehicle', type_id, 22.0, 0.0, size, state=state)]
            where = is_class(renderer.semantics(ORIGIN, cars)['front'], 'vehicle')
            counts.append(_colours(renderer.render(ORIGIN, cars)['front'], where)['red'])
        assert counts[0] == 0 and counts[1] >= 6


def test_front_and_rear_of_a_car_differ(renderer):
    renderer.load(scenes.town())

    def bright(yaw):
        cars = [scenes.actor('a', 'vehicle', 'vehicle.car', 20.0, 0.0, scenes.CAR, yaw)]
        where = is_class(renderer.semantics(ORIGIN, cars)['front'], 'vehicle')
        rows = slice(74, 86)  # where the lamps are
        return (renderer.render(ORIGIN, cars)['front'].min(2)[rows][where[rows]] > 215).sum()

    assert bright(np.pi) >= 4 and bright(0.0) <= 2  # head lamps; nothing but the plate


def test_the_siren_lights_blue_beacons(renderer):
    renderer.load(scenes.town())

    def blue(state):
        kind = ('vehicle', 'vehicle.emergency')
        vans = [scenes.actor('e', *kind, 35.0, 0.0, (5.4, 2.0, 2.4), state=state)]
        where = is_class(renderer.semantics(ORIGIN, vans)['front'], 'vehicle')
        r, g, b = renderer.render(ORIGIN, vans)['front'][where].astype(int).T
        return ((b > 200) & (r < 110)).sum()

    assert blue('siren') >= 4 and blue('') == 0


def test_light_and_colours_come_from_the_seed():
    car = scenes.everyone()[0]
    assert Light.of(4) == Light.of(4) != Light.of(5)
    assert np.array_equal(mesh_of(car, 4).colors, mesh_of(car, 4).colors)
    paints = {mesh_of(car, seed).colors.tobytes() for seed in range(20)}
    assert len(paints) > 4
