"""The agent of the CARLA Leaderboard 2 and of Bench2Drive: give them this file and a YAML file of `AgentConfig`.

    --agent=mose_ros/agents/mose_agent.py --agent-config=config/carla/agent.yaml

Needs the Leaderboard's own modules and carla; all driving is `Pilot`'s. Sources: carla-simulator/leaderboard
(autonomous_agent.py, agent_wrapper.py), Thinklab-SJTU/Bench2Drive (the same files, docs).
"""

import logging
import os
from functools import lru_cache
from pathlib import Path

import carla
from leaderboard.autoagents.autonomous_agent import AutonomousAgent, Track

from mose_ros.agents.pilot import AgentConfig, Pilot, Senses, emergency, follow_plan
from mose_ros.core.carla import sensors
from mose_ros.core.files import write_json
from mose_ros.core.types import VehicleCommand
from mose_ros.engine.policy import Policy

_log = logging.getLogger(__name__)


def get_entry_point() -> str:
    """Return the name of the agent's class."""
    return 'MoseAgent'


class MoseAgent(AutonomousAgent):
    """Drives one route with a bundle on board, in this process."""

    _config: AgentConfig | None = None
    _pilot: Pilot | None = None
    _whole_plan = None  # both plans as they came, before they were thinned

    def setup(self, path_to_conf_file: str) -> None:
        """Read the configuration and open the bundle; ValueError says what is wrong with them.

        Bench2Drive appends `+<name of the route's results>` to the path.
        """
        self.track = Track.SENSORS
        path, *names = path_to_conf_file.split('+')
        self._name = names[-1] if names else ''
        self._config = AgentConfig.load(path)
        self._metrics: dict[str, dict] = {}
        self._start()

    def sensors(self) -> list[dict]:
        """Return the rig, GNSS, IMU and speedometer."""
        return sensors(self._config.image_width, self._config.image_height)

    def set_global_plan(self, global_plan_gps, global_plan_world_coord) -> None:
        """Take the route; the Leaderboard calls this before `setup`, other evaluators after it."""
        super().set_global_plan(global_plan_gps, global_plan_world_coord)
        self._whole_plan = (global_plan_gps, global_plan_world_coord)
        self._start()

    def run_step(self, input_data, timestamp: float) -> carla.VehicleControl:
        """Answer a tick: with the brake where anything fails, since the evaluation waits for an answer."""
        try:
            if self._pilot is None:
                raise RuntimeError('there is no global plan yet')
            command = self._pilot.tick(float(timestamp), Senses.read(input_data))
        except Exception:
            _log.exception('no command at %.2f s: full brake', timestamp)
            command = emergency()
        self._measure()
        return to_control(command)

    def destroy(self) -> None:
        """Write what Bench2Drive judges comfort by, and let go of the route."""
        folder = os.environ.get('SAVE_PATH')
        if folder and self._metrics:
            write_json(Path(folder) / self._name / 'metric_info.json', self._metrics)
        if self._pilot is not None and self._pilot.failures:
            _log.warning('%d plans failed on this route', self._pilot.failures)
        self._pilot, self._metrics = None, {}

    def _start(self) -> None:
        if self._config is None or self._whole_plan is None:
            return
        plans = (self._global_plan, self._global_plan_world_coord)
        frame, route = follow_plan(*(self._whole_plan if self._config.route == 'dense' else plans))
        c = self._config
        policy = _open_policy(c.bundle, c.backend, c.threads, c.mode)
        self._pilot = Pilot(policy, self._config, frame, route)

    def _measure(self) -> None:
        if not hasattr(self, 'get_metric_info'):  # Bench2Drive's base class has it
            return
        try:
            self._metrics[str(len(self._metrics))] = self.get_metric_info()
        except Exception:  # a missing measurement costs comfort, a missing answer the route
            _log.exception('no metrics of this tick')


@lru_cache(maxsize=1)
def _open_policy(bundle: str, backend: str, threads: int, mode: str) -> Policy:
    """Open a bundle once for all routes: the Leaderboard makes a new agent for each."""
    return Policy.load(bundle, backend=backend, threads=threads, mode=mode)


def to_control(command: VehicleCommand) -> carla.VehicleControl:
    """Return the command as CARLA takes it: its steering is positive to the right."""
    return carla.VehicleControl(
        throttle=float(command.throttle),
        steer=-float(command.steer),
        brake=float(command.brake),
        hand_brake=False,
        reverse=False,
        manual_gear_shift=False,
    )
