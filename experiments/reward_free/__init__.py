"""Studies of reward-free exploration."""
