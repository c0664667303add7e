"""Hypervolume of a batch of fronts against moocore's C code in a loop: python -m tests.benchmarks.pareto_benchmark.

Medians over several runs in one process; compilation apart; quality (largest relative difference) beside speed.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.pareto import hypervolume


def median_seconds(function, repeats, least_seconds=0.5):
    """Median wall time of a call, results waited for.

    Calls of a millisecond are repeated for half a second: the first tens of milliseconds after a compilation run on
    one core, and a median of fifteen calls may lie wholly in them.
    """
    times = []
    while len(times) < repeats or sum(times) < least_seconds:
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def fronts(num_fronts, num_points, num_objectives, dtype):
    """Random mutually non-dominated points on the positive part of the unit sphere."""
    points = np.abs(np.random.default_rng(0).normal(size=(num_fronts, num_points, num_objectives)))
    return (points / np.linalg.norm(points, axis=-1, keepdims=True)).astype(dtype)


def measure(num_objectives, dtype, *, num_fronts, num_points, repeats):
    """One line of the table."""
    import moocore

    points = fronts(num_fronts, num_points, num_objectives, dtype)
    wide, origin = points.astype(float), np.zeros(num_objectives)

    def peer():
        return np.array([moocore.hypervolume(front, ref=origin, maximise=True) for front in wide])

    reference = jnp.zeros(num_objectives, dtype)
    value = jax.jit(jax.vmap(lambda p: hypervolume(p, reference)))
    gradient = jax.jit(jax.vmap(jax.value_and_grad(lambda p: hypervolume(p, reference))))
    device = jnp.asarray(points)
    began = time.perf_counter()
    jax.block_until_ready((value(device), gradient(device)))
    compile_seconds = time.perf_counter() - began
    ours = median_seconds(lambda: value(device), repeats)
    theirs = median_seconds(peer, max(3, repeats // 2))
    both = median_seconds(lambda: gradient(device), repeats)
    error = np.max(np.abs(np.asarray(value(device)) - peer()) / peer())
    print(
        f"{num_objectives}-D {np.dtype(dtype).name}: ours {1e3 * ours:8.2f} ms  moocore {1e3 * theirs:8.2f} ms  "
        f"ratio {theirs / ours:5.1f}x  value and gradient {1e3 * both:8.2f} ms = {both / ours:4.1f}x  "
        f"error {error:.1e}  compile {compile_seconds:.1f} s",
        flush=True,
    )


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_fronts", type=int, default=1000)
    parser.add_argument("--num_points", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--objectives", default="2,3,4")
    parser.add_argument("--dtypes", default="float32,float64")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for dtype in options.dtypes.split(","):
        for num_objectives in map(int, options.objectives.split(",")):
            measure(num_objectives, np.dtype(dtype), num_fronts=options.num_fronts, num_points=options.num_points,
                    repeats=options.repeats)  # fmt: skip


if __name__ == "__main__":
    main()
