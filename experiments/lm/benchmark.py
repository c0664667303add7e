"""Speed against torch and transformers on the same machine in one command; needs the extra ``parity``.

python -m experiments.lm.benchmark --model .cache/models/smollm2-135m --part decode1,decode16,step,load

Each side runs in a process of its own, since the thread pools of two frameworks in one process slow each other; the
processes take turns, so that a busy moment hits both. Every number is a median, and what was computed stands beside
it: equal losses, equal greedy tokens, nats a drawn token.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_suite import lm

PROMPT = "Write a short story about a fox who learns to read."
SIDES = ("ours", "transformers")


class Side:
    """A process that holds one side and calls it when asked (see experiments.lm.benchmark_sides)."""

    def __init__(self, name: str, task: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "experiments.lm.benchmark_sides"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first = self.ask(json.dumps({"side": name, **task}))

    def ask(self, line: str = "") -> dict[str, Any]:
        """Writes a line and waits for the answer."""
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        if pipe_in is None or pipe_out is None:
            raise RuntimeError("the process has no pipes")
        pipe_in.write(line + "\n")
        pipe_in.flush()
        answer = pipe_out.readline()
        if not answer:
            raise RuntimeError(f"a side ended with status {self.process.wait()}; its error stands above")
        return json.loads(answer)

    def end(self) -> None:
        """Closes the process."""
        self.process.communicate()


def compare(task: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Calls both sides in turns; the first call of each, which compiles, is told apart.

    Returns:
        Median seconds of each side, ours over theirs, all times, and what each side computed last.
    """
    sides = {name: Side(name, task) for name in SIDES}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for _ in range(repeats):
        for name, side in sides.items():
            answers[name].append(side.ask())
    for side in sides.values():
        side.end()
    times = {name: [answer.pop("seconds") for answer in found] for name, found in answers.items()}
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "first_call_seconds": sides["ours"].first["seconds"],
        "seconds": medians,
        "ratio": medians["transformers"] / medians["ours"],
        "times": times,
        "computed": {name: found[-1] for name, found in answers.items()},
    }


def decode(folder: Path, batch: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second, prefill included: greedy for one row, sampled for more, all rows of full length."""
    tokenizer: Any = lm.load_pretrained(folder, dtype="bfloat16").tokenizer
    prompts = [tokenizer.chat([{"role": "user", "content": PROMPT}])] * batch
    found = compare({"kind": "decode", "folder": str(folder), "tokens": prompts, "new_tokens": new_tokens}, repeats)
    rates = {name: batch * new_tokens / seconds for name, seconds in found["seconds"].items()}
    rows = [found["computed"][name].pop("first_row") for name in SIDES]
    return {"tokens_per_second": rates, "same_first_row": rows[0] == rows[1], **found}


def step(folder: Path, rows: int, length: int, repeats: int) -> dict[str, Any]:
    """Seconds of a supervised step with AdamW; both sides take the same steps on the same rows."""
    tokens = np.random.default_rng(0).integers(0, 49152, (rows, length)).tolist()
    return compare({"kind": "step", "folder": str(folder), "tokens": tokens}, repeats)


LOAD = """
import json, time, jax, jax.numpy as jnp
from pathlib import Path
from jaxrl_suite import lm
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
jax.block_until_ready(jnp.zeros(3) + 1)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, began = status("VmRSS"), time.perf_counter()
params = jax.block_until_ready(lm.load_pretrained({folder!r}, dtype={dtype!r}).params)
seconds = time.perf_counter() - began
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps(dict(
    final=(status("VmRSS") - before) / size, peak=(status("VmHWM") - before) / size, seconds=seconds, bytes=size
)))
"""


def load(folder: Path, dtype: str) -> dict[str, Any]:
    """Growth of resident memory over loading, peak and final, in units of the parameters' size (Linux)."""
    code = LOAD.format(folder=str(folder), dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Reads the command line and prints one line of JSON a part."""
    parser = argparse.ArgumentParser(description="Speed against torch and transformers.")
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M")
    parser.add_argument("--part", default="decode1,decode16,step,load", help="parts, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each side")
    parser.add_argument("--new_tokens", type=int, default=40, help="tokens of a continuation")
    parser.add_argument("--helpshort", action="help", help="the same as --help, as the launchers have it")
    arguments = parser.parse_args()
    folder, repeats = arguments.model, arguments.repeats
    parts = {
        "decode1": lambda: decode(folder, 1, arguments.new_tokens, repeats),
        "decode16": lambda: decode(folder, 16, arguments.new_tokens, repeats),
        "step": lambda: step(folder, 8, 256, repeats),
        "load": lambda: {dtype: load(folder, dtype) for dtype in ("float32", "bfloat16")},
    }
    chosen = arguments.part.split(",")
    unknown = [part for part in chosen if part not in parts]
    if unknown:
        parser.error(f"--part={unknown[0]!r}: must be {', '.join(parts)}")
    for part in chosen:
        print(part, json.dumps(parts[part]()), flush=True)


if __name__ == "__main__":
    main()
