"""The one MetaDrive engine of a process: its map blocks and the Bullet dynamics of the ego vehicle.

Only what is needed of MetaDrive runs: no observation, reward, navigation or rendering. One step is 0.1 s of driving.
"""

import threading
from collections.abc import Sequence

import numpy as np

from mose_ros.sim.town import Block, Town, extract_roads, with_defaults

SUBSTEPS, SUBSTEP_S = 5, 0.02
HOLD_SPEED = 0.3  # m/s below which a pressed brake holds the car still, as static friction would


class Physics:
    """Makes road networks and moves the ego vehicle. Main thread only, one per process."""

    def __init__(self):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                'the simulator belongs to the main thread (MetaDrive sets signal handlers)'
            )
        self._engine, self._config = _start_engine()
        self._car = None
        self._still = None  # position and yaw at which the brake holds

    def make_town(
        self,
        blocks: Sequence[Block],
        *,
        lanes: int,
        width: float,
        first: float,
        heading: float,
        seed: int,
    ) -> Town:
        """Lay blocks, the first a straight of `first` m, and return their roads turned by `heading`."""
        from metadrive.component.map.pg_map import PGMap
        from metadrive.component.pgblock.first_block import FirstPGBlock

        engine = self._engine

        class BlockTree(PGMap):
            """A map whose blocks hang on any socket of any earlier block."""

            def _generate(self):
                world, physics = engine.worldNP, engine.physics_world
                made = [
                    FirstPGBlock(
                        self.road_network,
                        width,
                        lanes,
                        world,
                        physics,
                        length=first,
                        ignore_intersection_checking=True,
                    )
                ]
                for index, block in enumerate(map(with_defaults, blocks), 1):
                    parent = made[block.parent if block.parent >= 0 else index - 1]
                    socket = parent.get_socket(f'{parent.name}-socket{block.socket}')
                    kind = engine.global_config['block_dist_config'].get_block(block.letter)
                    new = kind(
                        index,
                        socket,
                        self.road_network,
                        random_seed=0,
                        ignore_intersection_checking=True,
                    )
                    new.construct_from_config(dict(block.config), world, physics)
                    made.append(new)
                self.blocks = made
                self.road_network.after_init()

        block_map = BlockTree(map_config={'type': 'tree'})
        roads = extract_roads(block_map.road_network, heading)
        block_map.destroy()
        return Town(roads, seed)

    def place(self, x: float, y: float, yaw: float, speed: float) -> None:
        """Put a new ego vehicle there, rolling."""
        from metadrive.component.vehicle.vehicle_type import DefaultVehicle

        engine = self._engine
        if self._car is not None:
            # A vehicle that is used again keeps traces of its past in Bullet; a new one does not.
            engine.clear_objects([self._car.id], force_destroy=True)
        self._car = engine.spawn_object(
            DefaultVehicle,
            vehicle_config=self._config['vehicle_config'],
            position=[x, y],
            heading=yaw,
            random_seed=0,
        )
        self._still = None
        for _ in range(25):  # let the springs settle
            self._car.before_step([0.0, -1.0])
            engine.step_physics_world()
        self._car.set_position([x, y])
        self._car.set_heading_theta(yaw)
        self._car.set_velocity([speed, 0.0], in_local_frame=True)
        self._car.before_step([0.0, 0.0])

    def step(self, steer: float, throttle: float, brake: float) -> None:
        """Drive 0.1 s."""
        self._car.before_step([steer, -brake if brake > 0 else throttle])
        for _ in range(SUBSTEPS):
            self._engine.step_physics_world()
        x, y, yaw, speed, _ = self.state()
        if brake > 0.02 and abs(speed) < HOLD_SPEED:
            if self._still is None:
                self._still = (x, y), yaw
            self._car.set_position(self._still[0])
            self._car.set_heading_theta(self._still[1])
            self._car.set_velocity([0.0, 0.0])
            self._car.set_angular_velocity(0.0)
        else:
            self._still = None

    def state(self) -> tuple[float, float, float, float, float]:
        """Return x, y, yaw, signed speed and yaw rate."""
        car = self._car
        (x, y), yaw = car.position, float(car.heading_theta)
        velocity = car.velocity
        speed = float(velocity[0] * np.cos(yaw) + velocity[1] * np.sin(yaw))
        rate = float(car.body.getAngularVelocity()[2])
        return float(x), float(y), yaw, speed, rate

    def size(self) -> tuple[float, float]:
        """Return length and width of the ego vehicle."""
        return float(self._car.LENGTH), float(self._car.WIDTH)

    def close(self) -> None:
        """End the engine; another one can be started after that."""
        from metadrive.engine.engine_utils import close_engine

        close_engine()


def _start_engine():
    from metadrive.engine.base_engine import BaseEngine
    from metadrive.engine.engine_utils import initialize_engine
    from metadrive.envs import MetaDriveEnv

    if BaseEngine.singleton is not None:
        raise RuntimeError('MetaDrive has one engine per process: close the other World first')
    if not hasattr(BaseEngine, 'try_pull_asset'):
        raise RuntimeError(
            'this MetaDrive has no BaseEngine.try_pull_asset; install metadrive-simulator==0.4.3'
        )
    # Every start asks the network for pictures and models, which physics never uses.
    BaseEngine.try_pull_asset = lambda self: None
    config = MetaDriveEnv({'use_render': False, 'log_level': 50, 'force_destroy': True}).config
    engine = initialize_engine(config)
    engine.seed(0)
    engine.reset()
    return engine, config
