"""Launches the studies of this family: python -m experiments.alignment.launch --study=NAME --preset=smoke.

Without ``--study`` it trains on data of your own:
python -m experiments.alignment.launch --model PATH --data FILE.parquet --objectives accuracy,conciseness,clarity
"""

import sys

from experiments.common.launch import launch

if __name__ == "__main__":
    arguments = sys.argv[1:]
    own = any(argument.lstrip("-").split("=")[0] in ("model", "data") for argument in arguments)
    named = any(argument.lstrip("-").split("=")[0] == "study" for argument in arguments)
    launch("alignment", ["--study=own_data", *arguments] if own and not named else arguments)
