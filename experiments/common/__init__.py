"""Shared by all launchers: studies, flags, runs."""
