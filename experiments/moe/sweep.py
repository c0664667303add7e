"""Every mapping of eight devices against one device; stops and resumes at any time.

    python -m experiments.moe.sweep --out=runs/moe/sweep.jsonl

One line a mapping: largest relative gradient error, loss error, ten optimizer steps, and the communication audit. A
mapping that is already in the file is not run again; ``--limit=N`` runs N more and stops, ``--only=TEXT`` runs one.
Pipelined mappings run two micro-batches, GPipe and 1F1B in turn. The summary is printed after each start.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common.flags import read_flags
from experiments.common.launch import virtual_devices

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", "runs/moe/sweep.jsonl", "file of results", flag_values=FLAGS)
flags.DEFINE_integer("limit", 0, "mappings to run in this start; 0 for all that are left", flag_values=FLAGS)
flags.DEFINE_string("only", "", "one folding to run", flag_values=FLAGS)
flags.DEFINE_integer("num_steps", 10, "optimizer steps of the trajectory check", flag_values=FLAGS)


def problem_config() -> Any:
    """The eight-layer model of the sweep: eight heads, eight experts, top-2."""
    from jaxrl_suite import lm, moe
    from jaxrl_suite.moe.verify import shrink

    model = shrink(lm.LanguageModelConfig(num_experts=8), moe.Folding.parse("attention=tp8 experts=ep8"))
    return moe.MoEConfig(model=model, block_rows=16)


def options_of(config: Any, folding: Any, index: int) -> Any:
    """Micro-batches and schedule of a mapping."""
    if folding.pp == 1:
        return config.replace(context="ring" if index % 2 else "all_gather")
    return config.replace(num_microbatches=2, schedule="1f1b" if index % 2 else "gpipe")


def run_mapping(index: int, folding: Any, config: Any, problem: Any, num_steps: int) -> dict[str, Any]:
    """Verifies one mapping; the row that is stored."""
    from jaxrl_suite.moe.verify import verify

    began = time.perf_counter()
    options = options_of(config, folding, index)
    report = verify(options, folding, problem=problem, num_steps=num_steps, modes=())
    values = {check.name: check.value for check in report.checks}
    return {
        "folding": str(folding),
        "passed": report.passed,
        "context": options.context,
        "schedule": options.schedule if folding.pp > 1 else None,
        "seconds": time.perf_counter() - began,
        "failed": [check.name for check in report.checks if not check.passed],
        "values": values,
    }


def summary(path: Path, total: int) -> str:
    """Counts and worst values of a results file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        return f"0 of {total} mappings done"
    lines = [f"{len(rows)} of {total} mappings done, {sum(row['passed'] for row in rows)} passed"]
    for name in rows[0]["values"]:
        values = [row["values"][name] for row in rows if name in row["values"]]
        lines.append(f"  worst {name}: {max(values):.3g}")
    lines += [f"  FAILED {row['folding']}: {', '.join(row['failed'])}" for row in rows if not row["passed"]]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs what is left and prints the summary; the exit code is 0 if nothing failed."""
    done = read_flags(FLAGS, arguments, __doc__ or "")
    if done is not None:
        return done
    virtual_devices(8)
    import jax

    from jaxrl_suite import moe
    from jaxrl_suite.moe.verify import make_problem

    path = Path(FLAGS.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["folding"] for line in path.read_text().splitlines()} if path.exists() else set()
    everything = list(enumerate(moe.foldings(8)))
    wanted = str(moe.Folding.parse(FLAGS.only, 8)) if FLAGS.only else ""
    left = [(i, f) for i, f in everything if str(f) not in done and (not wanted or str(f) == wanted)]
    left = left[: FLAGS.limit or None]
    if left:
        config = problem_config()
        problem = make_problem(jax.random.key(0), config, 8, 16)
        for number, (index, folding) in enumerate(left):
            row = run_mapping(index, folding, config, problem, FLAGS.num_steps)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            state = "ok" if row["passed"] else "FAILED " + ", ".join(row["failed"])
            print(f"{number + 1}/{len(left)}  {folding}  {state}  {row['seconds']:.0f} s", flush=True)
            if number % 16 == 15:
                jax.clear_caches()  # programs of eight devices are large, and no two mappings share one
    text = summary(path, len(everything))
    print(text)
    return int("FAILED" in text)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
