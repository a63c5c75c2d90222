#!/bin/bash
# Run a command with ROS and mose_ros in its environment.
set -e
source "/opt/ros/${ROS_DISTRO}/setup.bash"
source /opt/mose_ros/install/setup.bash
exec "$@"
