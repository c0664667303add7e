"""Launches the studies of this family: python -m experiments.together.launch --study=NAME --preset=smoke."""

from experiments.common.launch import launch

if __name__ == "__main__":
    launch("together")
