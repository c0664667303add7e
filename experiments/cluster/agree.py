"""Does every kernel compute here what it computes on a CPU? python -m experiments.cluster.agree, beside a GPU or TPU.

Runs what ``experiments.cluster.kernels`` compiles for one device (every line of the contract tests, gradients and one
step of each loop included, and other sizes) on the accelerator and on the CPU of the same process, from the same
inputs, with float32 products in full precision. Prints the largest difference of any output, in units of the largest
entry of its array (or of a thousandth of the largest output, for residuals, which are rounding alone). Discrete outputs
(choices, tokens, permutations) may differ where rounding breaks a tie; they are counted apart, and both are failures.

Needs a checkout with its tests. ``JAX_PLATFORMS=cuda,cpu`` (or tpu,cpu), which is the default here.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TOLERANCE = 1e-4  # of the largest entry: float32 sums in another order, through a few hundred operations


class Agreement(NamedTuple):
    """What became of a kernel.

    Attributes:
        name: of the kernel.
        device: kind of the accelerator.
        difference: largest |a - b| over the scale of its array, see :func:`compare`; NaN and infinities must be at the
            same places.
        discrete: share of integer and boolean entries that differ.
        seconds: to compile and run on the accelerator.
        error: first line of what it raised, if anything.
    """

    name: str
    device: str
    difference: float
    discrete: float
    seconds: float
    error: str

    @property
    def failed(self) -> bool:
        """Whether the accelerator computes something else, or nothing."""
        return bool(self.error) or not self.difference <= TOLERANCE or self.discrete > 0


def compare(actual: Any, expected: Any) -> tuple[float, float]:
    """(largest relative difference of numbers, share of other entries that differ) of two pytrees of arrays.

    >>> import numpy as np
    >>> compare([np.array([1.0, 2.0]), np.array([1, 2])], [np.array([1.0, 4.0]), np.array([1, 3])])
    (0.5, 0.5)
    """
    import jax
    import jax.numpy as jnp

    def arrays(tree: Any) -> list[np.ndarray]:
        def plain(leaf: Any) -> np.ndarray:
            is_key = jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
            return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.inexact) else array

        return [plain(leaf) for leaf in jax.tree.leaves(tree)]

    def largest_of(array: np.ndarray) -> float:
        return float(np.max(np.abs(array[np.isfinite(array)]), initial=0.0))

    pairs = list(zip(arrays(actual), arrays(expected), strict=True))
    floor = 1e-3 * max((largest_of(b) for _, b in pairs if b.dtype == np.float64), default=0.0)
    largest, wrong, number = 0.0, 0, 0
    for a, b in pairs:
        if b.dtype != np.float64:
            wrong, number = wrong + int(np.sum(a != b)), number + a.size
            continue
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
            largest = float("nan")
        scale = max(largest_of(b), floor) or 1.0
        largest = max(
            largest, float(np.max(np.abs(a[finite] - b[finite]), initial=0.0)) / scale, key=lambda x: (x != x, x)
        )
    return largest, wrong / max(number, 1)


def agreement(name: str, function: Callable[..., Any], example: Callable[[Any], Any]) -> Agreement:
    """Runs one kernel on the first accelerator and on the CPU."""
    import jax

    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    began, difference, discrete, error = time.perf_counter(), float("nan"), 0.0, ""
    try:
        with jax.default_device(cpu):
            arguments = example(jax.random.key(0))
            expected = jax.block_until_ready(jax.jit(function)(*arguments))
        began = time.perf_counter()
        moved = jax.tree.map(lambda leaf: jax.device_put(leaf, here), arguments)
        with jax.default_device(here):
            actual = jax.block_until_ready(jax.jit(function)(*moved))
        difference, discrete = compare(actual, expected)
    except Exception as problem:  # whatever the compiler or the device raises is the result
        lines = [line for line in str(problem).splitlines() if line.strip()]
        error = f"{type(problem).__name__}: {lines[0] if lines else ''}"[:200]
    return Agreement(name, here.device_kind, difference, discrete, time.perf_counter() - began, error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares what is asked for; returns 0 if all agree, 1 if not, 2 where there is nothing to compare with."""
    options = _parser().parse_args(arguments)
    if "JAX_PLATFORMS" not in os.environ:
        import importlib.util

        found = next((name for name, module in (("tpu", "libtpu"), ("cuda", "jax_cuda13_plugin"))
                      if importlib.util.find_spec(module)), "cuda")  # fmt: skip
        os.environ["JAX_PLATFORMS"] = f"{found},cpu"
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if devices[0].platform == "cpu":
        print("error: no accelerator is here, so there is nothing to compare with the CPU.", file=sys.stderr)
        return 2
    from experiments.cluster.kernels import contract_items
    from experiments.cluster.kernels_by_hand import kernels_by_hand
    from experiments.cluster.plan_report import print_table

    jax.config.update("jax_default_matmul_precision", "highest")  # not TF32, which is XLA's choice for float32 on GPUs
    words = options.only.split(",")
    items = [item for item in (*contract_items(), *kernels_by_hand()) if any(word in item[0] for word in words)]
    if not items:
        print(f"error: --only={options.only}: is in no kernel's name.", file=sys.stderr)
        return 2
    results = []
    for item in items[options.part :: options.parts]:
        result = agreement(*item)
        results.append(result)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result._asdict()) + "\n")
        verdict = result.error or f"{result.difference:.1e}" + (
            f", {result.discrete:.2%} of choices differ" if result.discrete else ""
        )
        mark = "DIFFERS " if result.failed else ""
        print(f"{result.seconds:6.1f} s  {result.name}  {mark}{verdict}", flush=True)
    rows = []
    for family in dict.fromkeys(result.name.split(".")[0] for result in results):
        mine = [result for result in results if result.name.split(".")[0] == family]
        good = sum(not result.failed for result in mine)
        worst = max((result.difference for result in mine if not result.failed), default=float("nan"))
        rows.append([family, f"{good} of {len(mine)}", f"{worst:.1e}", f"{sum(r.seconds for r in mine):.0f}"])
    print()
    print_table(rows, ("family", f"agree on {devices[0].device_kind}", "worst of these", "seconds"))
    return int(any(result.failed for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cluster.agree",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--only", default="", help="only kernels with this (or one of these, comma-separated) in their name")
    add("--part", type=int, default=0, help="with --parts: which share, from 0")
    add("--parts", type=int, default=1, help="run every PARTS-th kernel only")
    add("--out", type=Path, help="append a JSON line for each kernel to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
