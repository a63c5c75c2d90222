"""The Leaderboard's agent that drives with our ROS 2 nodes: it has them launched and names the sensors, no more.

    --agent=mose_ros/agents/mose_ros_agent.py --agent-config=config/carla/ros_agent.yaml

The base class starts carla_ros_bridge and our launch file, waits for the latched /carla/hero/status, publishes the route and
waits at every tick for one command that carries the tick's stamp. Sources: carla-simulator/leaderboard (ros2_agent.py,
ros_base_agent.py).
"""

import argparse
import sys
from dataclasses import dataclass

from leaderboard.autoagents.autonomous_agent import Track
from leaderboard.autoagents.ros2_agent import ROS2Agent

from mose_ros.agents import settings
from mose_ros.core.carla import sensors


@dataclass(frozen=True, kw_only=True)
class RosAgentConfig:
    """What the ROS agent's YAML file may say: arguments of drive.launch.py; empty: as config/leaderboard.yaml says."""

    bundle: str = ''  # folder of the exported network, seen from the file
    backend: str = ''  # as `python -m mose_ros.engine` knows them
    params_file: str = ''  # parameters of the nodes, seen from the file


def get_entry_point() -> str:
    """Return the name of the agent's class."""
    return 'MoseRosAgent'


class MoseRosAgent(ROS2Agent):
    """Names what is to be launched and what the vehicle carries."""

    def setup(self, path_to_conf_file: str) -> None:
        """Choose the track; ValueError where the nodes could not be launched with this file.

        Bench2Drive appends `+<name of the route's results>` to the path.
        """
        self.track = Track.SENSORS
        path = path_to_conf_file.split('+')[0]
        if path != _given_config():
            raise ValueError(
                f'{path}: the nodes were launched before its name was told: give it as --agent-config on the '
                "evaluator's command line"
            )

    def get_ros_entrypoint(self) -> dict:
        """Return package, launch file and arguments, as `ros2 launch` takes them; ValueError for a wrong file."""
        path = _given_config()
        config = RosAgentConfig()
        if path:
            config = settings.load(RosAgentConfig, path, paths=('bundle', 'params_file'))
        given = {name: value for name, value in vars(config).items() if value}
        return {
            'package': 'mose_ros',
            'launch_file': 'drive.launch.py',
            'parameters': {'platform': 'leaderboard', 'role_name': 'hero', **given},
        }

    def sensors(self) -> list[dict]:
        """Return the rig, GNSS, IMU and speedometer."""
        return sensors()


def _given_config() -> str:
    """Return the evaluator's --agent-config: the base class launches the nodes before `setup` tells it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--agent-config', default='')
    return parser.parse_known_args(sys.argv[1:])[0].agent_config.split('+')[0]
