"""Speed of the sparse train step and layer on this machine, against transformers + torch in the same run.

    python tests/benchmarks/moe_benchmark.py step      # small Mixtral, tokens per second, dropping and dropless, torch
    python tests/benchmarks/moe_benchmark.py layer     # cost from 8 to 64 experts at fixed active parameters
    python tests/benchmarks/moe_benchmark.py compile   # seconds to compile the step of few and many layers

Ours on one device and, data parallel, on a virtual device a core; memory is kept. Every step or layer that is timed has
a process of its own, as a run of it would (in one, freed blocks of one program are cut up by the next, and threads of
torch slow ours down), is warmed up, and takes its turns with the others, some calls in a row as in a run; medians of
the calls of all turns, compile time apart.
The torch side needs the ``parity`` extra and is skipped without it; it runs as it comes and with the same settings of
malloc.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_suite import lm, moe
from jaxrl_suite.memory import keep_memory

BATCH, LENGTH, VOCABULARY = 8, 512, 4096
MODEL = lm.LanguageModelConfig(
    family="mixtral",
    vocab_size=VOCABULARY,
    width=256,
    ffn_width=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    num_experts=8,
    experts_per_token=2,
    tied_head=False,
)


# What keep_memory sets, as the environment variables of glibc.
KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 4096),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
WARM_UP, CALLS = 6, 3  # calls before the first that counts, as the heap grows until then; calls of a turn
DISPATCH = {
    "capacity 1.25": {"dispatch": "drop_pad", "capacity_factor": 1.25},
    "dropless": {"dispatch": "padded"},
}


def numbers_of_ranks():
    """One device, and data parallel on a virtual device a core."""
    return sorted({1, math.gcd(BATCH, os.cpu_count())})


def our_step(options, folding):
    """A function that takes one AdamW step and returns its metrics."""
    config = moe.MoEConfig(model=MODEL, remat="norms", **options)
    state = moe.init_train_state(jax.random.key(0), config, folding)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCABULARY)
    batch = jax.device_put(moe.language_batch(tokens), folding.sharding("dp"))
    held = [state]

    def step():
        held[0], metrics = jax.block_until_ready(moe.train_step_in_place(held[0], batch))
        return metrics

    return step


def timed(function):
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def torch_step():
    """A function that takes one AdamW step of transformers' Mixtral of the same shape."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=MODEL.width,
        intermediate_size=MODEL.ffn_width,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        num_local_experts=MODEL.num_experts,
        num_experts_per_tok=MODEL.experts_per_token,
        max_position_embeddings=LENGTH,
        sliding_window=None,
        use_cache=False,
    )
    model = transformers.MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))

    def step():
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {}

    return step


def layer_gradient(num_experts, options, folding):
    """Forward and backward of one layer: k · width fixed, so active parameters do not change."""
    model = MODEL.replace(num_experts=num_experts, expert_width=512)
    config = moe.MoEConfig(model=model, **options)
    params = jax.tree.map(lambda leaf: leaf[0], lm.init_params(jax.random.key(0), model)["layers"]["feed_forward"])
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, MODEL.width))

    def loss(params, x):
        return jnp.sum(jnp.square(moe.moe_layer(params, x, config=config)[0]))

    rows, whole = folding.spec("dp"), PartitionSpec()
    specs, mesh = (whole, rows), folding.mesh()
    gradient = jax.jit(jax.shard_map(jax.grad(loss, argnums=(0, 1)), mesh=mesh, in_specs=specs, out_specs=specs))
    params, x = jax.device_put((params, x), (folding.sharding(), folding.sharding("dp")))

    def call():
        jax.block_until_ready(gradient(params, x))
        return {}

    return call


def serve(what, dispatch, ranks, num_experts):
    """Times one call for every line on the input; before that, prints the first call's seconds and the drop rate."""
    if what == "torch":
        call = torch_step()
    else:
        folding = moe.Folding(dp=ranks, edp=ranks)
        options = DISPATCH[dispatch]
        call = our_step(options, folding) if what == "step" else layer_gradient(num_experts, options, folding)
    first = timed(call)
    metrics = [call() for _ in range(WARM_UP)][-1]
    print(first, float(metrics.get("dispatch/drop_rate", 0)), flush=True)
    for _ in sys.stdin:
        print(timed(call), flush=True)


class Side:
    """The other end of :func:`serve`, in a process of its own."""

    def __init__(self, *arguments, environment=types.MappingProxyType({})):
        command, variables = [sys.executable, __file__, "serve", *map(str, arguments)], {**os.environ, **environment}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True, env=variables)
        self.first, self.drop_rate = map(float, self.process.stdout.readline().split())

    def seconds(self):
        """Of one call."""
        self.process.stdin.write("call\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def in_turns(sides: dict, repeats: int) -> dict:
    """Seconds that each takes, call by call; nobody always follows the same one."""
    names, seconds = list(sides), {name: [] for name in sides}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name] += [sides[name].seconds() for _ in range(CALLS)]
    return seconds


def compare_steps(repeats):
    """Prints tokens per second of each, steps taken in turns."""
    with contextlib.ExitStack() as stack:
        sides, theirs = {}, ()
        for dispatch in DISPATCH:
            for ranks in numbers_of_ranks():
                name = f"{dispatch}, {ranks} device{'s'[: ranks - 1]}"
                sides[name] = stack.enter_context(Side("step", dispatch, ranks))
        ours = dict(sides)
        if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            environments = {"torch": {}, "torch, memory kept": KEPT_MEMORY}
            theirs = tuple(environments)
            for name, environment in environments.items():
                sides[name] = stack.enter_context(Side("torch", environment=environment))
        seconds = in_turns(sides, repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        factors = [f"{medians[other] / median:.2f}x {other}" for other in theirs]
        row = f"{name:<24} {median:6.3f} s ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})"
        print(f"{row}  {BATCH * LENGTH / median:6.0f} tokens/s  {', '.join(factors)}")
        if name in ours:
            print(f"{'':<24} first call {ours[name].first:.1f} s, drop rate {ours[name].drop_rate:.3f}", flush=True)


def compare_layers(repeats):
    """Prints the cost by number of experts and by dispatcher."""
    sizes = (8, 16, 32, 64)
    for ranks in numbers_of_ranks():
        with contextlib.ExitStack() as stack:
            sides = {(name, n): stack.enter_context(Side("layer", name, ranks, n)) for name in DISPATCH for n in sizes}
            seconds = {key: statistics.median(values) for key, values in in_turns(sides, repeats).items()}
        print(f"{ranks} device(s)")
        for name in DISPATCH:
            row = "  ".join(f"{n}: {seconds[name, n] * 1e3:6.1f} ms" for n in sizes)
            print(f"{name:<14} {row}  64/8 {seconds[name, 64] / seconds[name, 8]:.2f}")
        ratios = "  ".join(f"{n}: {seconds['dropless', n] / seconds['capacity 1.25', n]:6.2f}   " for n in sizes)
        print(f"{'ratio':<14} {ratios}", flush=True)


def compare_depths(repeats):
    """Prints the seconds that lowering and compiling the step takes, by number of layers."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    ranks = numbers_of_ranks()[-1]
    folding, batch = moe.Folding(dp=ranks, edp=ranks), moe.language_batch(jnp.zeros((BATCH, LENGTH + 1), jnp.int32))

    def compile_step(num_layers):
        config = moe.MoEConfig(model=MODEL.replace(num_layers=num_layers), remat="norms", **DISPATCH["dropless"])
        state = jax.eval_shape(lambda key: moe.init_train_state(key, config, folding), jax.random.key(0))
        moe.train_step.lower(state, batch).compile()
        jax.clear_caches()

    compile_step(1)  # what is compiled for the first time of all
    for num_layers in (4, 8, 16, 32):
        seconds = [timed(lambda number=num_layers: compile_step(number)) for _ in range(repeats)]
        print(f"{num_layers:>2} layers  {statistics.median(seconds):5.1f} s", flush=True)


def main():
    """Runs one of the comparisons."""
    comparisons = {"step": compare_steps, "layer": compare_layers, "compile": compare_depths}
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=comparisons)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    comparisons[arguments.what](arguments.repeats)


def main_of_a_side(what, dispatch="", ranks="1", num_experts="0"):
    """Sets the process up and serves."""
    if what != "torch":
        keep_memory()
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    serve(what, dispatch, int(ranks), int(num_experts))


if __name__ == "__main__":
    sys.exit(main_of_a_side(*sys.argv[2:]) if sys.argv[1:2] == ["serve"] else main())
