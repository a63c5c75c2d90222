"""The Leaderboard's agent that drives with our ROS 2 nodes: it has them launched and names the sensors, no more.

    --agent=mose_ros/agents/mose_ros_agent.py

The base class starts carla_ros_bridge and our launch file, waits for the latched /carla/hero/status, publishes the route and
waits at every tick for one command that carries the tick's stamp. Sources: carla-simulator/leaderboard (ros2_agent.py,
ros_base_agent.py).
"""

from leaderboard.autoagents.autonomous_agent import Track
from leaderboard.autoagents.ros2_agent import ROS2Agent

from mose_ros.core.carla import sensors


def get_entry_point() -> str:
    """Return the name of the agent's class."""
    return 'MoseRosAgent'


class MoseRosAgent(ROS2Agent):
    """Names what is to be launched and what the vehicle carries."""

    def setup(self, path_to_conf_file: str) -> None:
        """Choose the track; what the nodes do stands in their own parameters files."""
        self.track = Track.SENSORS

    def get_ros_entrypoint(self) -> dict:
        """Return package, launch file and arguments, as `ros2 launch` takes them."""
        return {
            'package': 'mose_ros',
            'launch_file': 'drive.launch.py',
            'parameters': {'platform': 'leaderboard', 'role_name': 'hero'},
        }

    def sensors(self) -> list[dict]:
        """Return the rig, GNSS, IMU and speedometer."""
        return sensors()
