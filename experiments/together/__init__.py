"""Studies that need two families or more."""
