"""In-process agents: the CARLA Leaderboard's and Bench2Drive's contract around the engine."""
