"""Speed of the sparse train step and layer on this machine, against transformers + torch in the same run.

    python tests/benchmarks/moe_benchmark.py step      # small Mixtral, tokens per second, dropping and dropless, torch
    python tests/benchmarks/moe_benchmark.py layer     # cost from 8 to 64 experts at fixed active parameters

Ours on one device and, data parallel, on a virtual device a core; memory is kept. Medians of several runs in turns;
compile time apart. The torch side needs the ``parity`` extra and is skipped without it; it runs in processes of its
own, as it comes and with the same settings of malloc (in one process the threads of torch slow ours down).
"""

import argparse
import functools
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

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
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 4096), "MALLOC_ARENA_MAX": "1"}
DISPATCH = {
    "capacity 1.25": {"dispatch": "drop_pad", "capacity_factor": 1.25},
    "dropless": {"dispatch": "padded"},
}


def foldings():
    """One device, and data parallel on a virtual device a core."""
    ranks = math.gcd(BATCH, jax.device_count())
    return [moe.Folding(dp=number, edp=number) for number in sorted({1, ranks})]


def our_step(options, folding):
    """A function that takes one AdamW step and returns its metrics."""
    config = moe.MoEConfig(model=MODEL, remat="norms", **options)
    state = moe.init_train_state(jax.random.key(0), config, folding)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCABULARY)
    batch = jax.device_put(moe.language_batch(tokens), folding.sharding("dp"))
    held = [state]

    def step():
        held[0], metrics = jax.block_until_ready(moe.train_step(held[0], batch))
        return metrics

    return step


def timed(function):
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def in_turns(turns: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each returns, call by call; nobody always follows the same one."""
    names, seconds = list(turns), {name: [] for name in turns}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(turns[name]())
    return seconds


def serve_torch_steps():
    """For every line on the input, one AdamW step of transformers' Mixtral of the same shape; prints its seconds."""
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

    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(timed(step), flush=True)


class TorchSteps:
    """The other side of :func:`serve_torch_steps`."""

    def __init__(self, environment):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command, variables = [sys.executable, __file__, "torch"], {**os.environ, **environment}
        self.process = subprocess.Popen(command, **pipes, text=True, env=variables)
        self.process.stdout.readline()

    def seconds(self):
        """Of one step."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def compare_steps(repeats):
    """Prints tokens per second of each, steps taken in turns."""
    ours = {
        f"{name}, {folding.num_ranks} device{'s'[: folding.num_ranks - 1]}": our_step(options, folding)
        for name, options in DISPATCH.items()
        for folding in foldings()
    }
    first = {name: timed(step) for name, step in ours.items()}
    turns, theirs = {name: functools.partial(timed, step) for name, step in ours.items()}, {}
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        theirs = {"torch": TorchSteps({}), "torch, memory kept": TorchSteps(KEPT_MEMORY)}
    seconds = in_turns(turns | {name: steps.seconds for name, steps in theirs.items()}, repeats)
    for steps in theirs.values():
        steps.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        factors = [f"{medians[other] / median:.2f}x {other}" for other in theirs]
        row = f"{name:<24} {median:6.3f} s ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})"
        print(f"{row}  {BATCH * LENGTH / median:6.0f} tokens/s  {', '.join(factors)}")
        if name in ours:
            dropped = float(ours[name]()["dispatch/drop_rate"])
            print(f"{'':<24} first call {first[name]:.1f} s, drop rate {dropped:.3f}", flush=True)


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
    jax.block_until_ready(gradient(params, x))
    return lambda: jax.block_until_ready(gradient(params, x))


def compare_layers(repeats):
    """Prints the cost by number of experts and by dispatcher."""
    sizes = (8, 16, 32, 64)
    for folding in foldings():
        gradients = {
            (name, n): layer_gradient(n, options, folding) for name, options in DISPATCH.items() for n in sizes
        }
        turns = {key: functools.partial(timed, gradient) for key, gradient in gradients.items()}
        seconds = {key: statistics.median(values) for key, values in in_turns(turns, repeats).items()}
        print(f"{folding.num_ranks} device(s)")
        for name in DISPATCH:
            row = "  ".join(f"{n}: {seconds[name, n] * 1e3:6.1f} ms" for n in sizes)
            print(f"{name:<14} {row}  64/8 {seconds[name, 64] / seconds[name, 8]:.2f}")
        ratios = "  ".join(f"{n}: {seconds['dropless', n] / seconds['capacity 1.25', n]:6.2f}   " for n in sizes)
        print(f"{'ratio':<14} {ratios}", flush=True)


def main():
    """Runs one of the two comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("step", "layer", "torch"))
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.what == "torch":
        serve_torch_steps()
        return
    keep_memory()
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    (compare_steps if arguments.what == "step" else compare_layers)(arguments.repeats)


if __name__ == "__main__":
    sys.exit(main())
