"""Studies of minimum entropy coupling with a bottleneck."""
