"""Experiments of jaxrl-suite: launchers, studies, notebooks. Not part of the wheel."""
