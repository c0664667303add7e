"""Speed of the sparse train step and layer on this machine, against transformers + torch in the same run.

    python tests/benchmarks/moe_benchmark.py step      # small Mixtral, tokens per second, dropping and dropless, torch
    python tests/benchmarks/moe_benchmark.py layer     # cost from 8 to 64 experts at fixed active parameters

Medians of several runs; compile time apart. The torch side needs the ``parity`` extra and is skipped without it; it
runs in a process of its own, and the steps are taken in turns (in one process the threads of torch slow ours down).
"""

import argparse
import functools
import importlib.util
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from jaxrl_suite import lm, moe

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


def median_seconds(function, repeats):
    """Median of several calls after one to warm up; seconds, and seconds of the first call."""
    began = time.perf_counter()
    function()
    first = time.perf_counter() - began
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times), first


def our_step(options):
    """A function that takes one AdamW step and returns its metrics."""
    config = moe.MoEConfig(model=MODEL, **options)
    state = moe.init_train_state(jax.random.key(0), config, moe.Folding())
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCABULARY)
    batch = moe.language_batch(tokens)
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

    def __init__(self):
        command = [sys.executable, __file__, "torch"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    ours = {
        "capacity 1.25": our_step({"dispatch": "drop_pad", "capacity_factor": 1.25}),
        "dropless": our_step({"dispatch": "padded"}),
    }
    first = {name: timed(step) for name, step in ours.items()}
    theirs, seconds = TorchSteps() if has_torch else None, {name: [] for name in (*ours, "torch + transformers")}
    turns = {name: functools.partial(timed, step) for name, step in ours.items()}
    if theirs:
        turns["torch + transformers"] = theirs.seconds
    for turn in range(repeats):
        names = list(turns)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
            seconds[name].append(turns[name]())
    if theirs:
        theirs.close()
    medians = {name: statistics.median(values) for name, values in seconds.items() if values}
    for name, median in medians.items():
        torch = medians.get("torch + transformers")
        factor = f"{torch / median:.2f}x torch" if torch else ""
        extra = ""
        if name in ours:
            extra = f"first call {first[name]:.1f} s, drop rate {float(ours[name]()['dispatch/drop_rate']):.3f}"
        row = f"{name:<22} {median:6.3f} s  {BATCH * LENGTH / median:8.0f} tokens/s  {factor:<12}"
        print(row, extra, f"({min(seconds[name]):.3f} to {max(seconds[name]):.3f})", flush=True)


def layer_seconds(num_experts, dispatch, factor, repeats):
    """Forward and backward of one layer: k · width fixed, so active parameters do not change."""
    model = MODEL.replace(num_experts=num_experts, expert_width=512)
    config = moe.MoEConfig(model=model, dispatch=dispatch, capacity_factor=factor)
    params = jax.tree.map(lambda leaf: leaf[0], lm.init_params(jax.random.key(0), model)["layers"]["feed_forward"])
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, MODEL.width))

    def loss(params, x):
        return jnp.sum(jnp.square(moe.moe_layer(params, x, config=config)[0]))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return median_seconds(lambda: jax.block_until_ready(gradient(params, x)), repeats)[0]


def compare_layers(repeats):
    """Prints the cost by number of experts and by dispatcher."""
    for dispatch, factor in (("drop_pad", 1.25), ("padded", None)):
        seconds = {n: layer_seconds(n, dispatch, factor, repeats) for n in (8, 16, 32, 64)}
        row = "  ".join(f"{n}: {s * 1e3:6.1f} ms" for n, s in seconds.items())
        print(f"{dispatch:<10} {row}  64/8 {seconds[64] / seconds[8]:.2f}", flush=True)


def main():
    """Runs one of the two comparisons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("step", "layer", "torch"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.what == "torch":
        serve_torch_steps()
        return
    (compare_steps if arguments.what == "step" else compare_layers)(arguments.repeats)


if __name__ == "__main__":
    sys.exit(main())
