"""Fetches the data sets of the studies where there is a network: python -m experiments.common.fetch_data math500.

``math500`` splits the 500 problems of MATH-500 into 300 for training, 100 for validation and 100 for testing, the sizes
of the paper (its very rows depend on the tool that shuffled them); the files have the columns that ``--data=…`` of the
alignment studies reads. Nothing is fetched unless this is called.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_suite.extras import require

MATH500_ADDRESS = "https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/test.jsonl"
SPLITS = {"train": 300, "val": 100, "test": 100}


def split_math500(problems: list[dict[str, Any]], *, seed: int = 42) -> dict[str, list[dict[str, Any]]]:
    """Random split 60/20/20, with the columns that the studies read.

    Args:
        problems: the 500 problems, with ``problem`` and ``answer``.
        seed: of the split.

    Returns:
        Split name -> rows with ``prompt`` (a user turn) and ``reward_model`` (the reference answer).

    Raises:
        ValueError: the number of problems is not 500.
    """
    from jaxrl_suite.alignment.tasks import INSTRUCTION

    if len(problems) != sum(SPLITS.values()):
        raise ValueError(f"problems={len(problems)}: expected {sum(SPLITS.values())}. Is the file complete?")
    order = np.random.default_rng(seed).permutation(len(problems))
    result, start = {}, 0
    for name, size in SPLITS.items():
        result[name] = [
            {
                "prompt": [{"role": "user", "content": f"{problems[i]['problem']} {INSTRUCTION}"}],
                "reward_model": {"ground_truth": problems[i]["answer"], "style": "rule"},
                "subject": problems[i].get("subject", ""),
                "level": str(problems[i].get("level", "")),
            }
            for i in order[start : start + size]
        ]
        start += size
    return result


def fetch_math500(folder: Path, *, address: str = MATH500_ADDRESS, timeout: float = 60.0) -> list[Path]:
    """Downloads MATH-500 and writes one parquet file a split.

    Args:
        folder: where to write; created if missing.
        address: of the JSON-lines file.
        timeout: seconds without an answer before giving up.

    Returns:
        The files.

    Raises:
        ImportError: pyarrow is not installed.
    """
    table, parquet = require("pyarrow", "experiments").Table, require("pyarrow.parquet", "experiments")
    with urllib.request.urlopen(address, timeout=timeout) as reply:
        problems = [json.loads(line) for line in reply.read().decode().splitlines() if line.strip()]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in split_math500(problems).items():
        paths.append(folder / f"{name}.parquet")
        parquet.write_table(table.from_pylist(rows), paths[-1])
    return paths


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Fetches data sets of the studies.")
    parser.add_argument("name", choices=["math500"], help="which data set")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where to write")
    parser.add_argument("--helpshort", action="help", help="the same as --help, as the launchers have it")
    options = parser.parse_args()
    try:
        for path in fetch_math500(options.folder / options.name):
            print(path)
    except (urllib.error.URLError, OSError, ValueError, ImportError) as error:
        print(f"error: {options.name} could not be fetched: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
