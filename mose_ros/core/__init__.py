"""The vocabulary and the pure maths that all rooms share. Knows nothing of simulators, networks, runtimes or ROS."""
