"""Speed of the sparse train step and layer on this machine, against transformers + torch in the same run.

    python tests/benchmarks/moe_benchmark.py step      # small Mixtral, tokens per second, dropping and dropless, torch
    python tests/benchmarks/moe_benchmark.py layer     # cost from 8 to 64 experts at fixed active parameters

Medians of several runs; compile time apart. The torch side needs the ``parity`` extra and is skipped without it.
"""

import argparse
import statistics
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


def our_step(options, repeats):
    """Seconds of one AdamW step."""
    config = moe.MoEConfig(model=MODEL, **options)
    state = moe.init_train_state(jax.random.key(0), config, moe.Folding())
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, VOCABULARY)
    batch = moe.language_batch(tokens)
    held = [state]

    def step():
        held[0], metrics = moe.train_step(held[0], batch)
        jax.block_until_ready((held[0], metrics))
        return metrics

    seconds, first = median_seconds(step, repeats)
    return seconds, first, float(step()["dispatch/drop_rate"])


def torch_step(repeats):
    """Seconds of one AdamW step of transformers' Mixtral of the same shape, or None without torch."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
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

    return median_seconds(step, repeats)[0]


def compare_steps(repeats):
    """Prints tokens per second of each."""
    theirs = torch_step(repeats)
    rows = [("torch + transformers", theirs, None, None)] if theirs else []
    for name, options in {
        "capacity 1.25": {"dispatch": "drop_pad", "capacity_factor": 1.25},
        "dropless": {"dispatch": "padded"},
    }.items():
        seconds, first, dropped = our_step(options, repeats)
        rows.append((name, seconds, first, dropped))
    for name, seconds, first, dropped in rows:
        rate = BATCH * LENGTH / seconds
        factor = f"{theirs / seconds:.2f}x torch" if theirs else ""
        extra = "" if first is None else f"first call {first:.1f} s, drop rate {dropped:.3f}"
        print(f"{name:<22} {seconds:6.3f} s  {rate:8.0f} tokens/s  {factor:<12} {extra}", flush=True)


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
    parser.add_argument("what", choices=("step", "layer"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    (compare_steps if arguments.what == "step" else compare_layers)(arguments.repeats)


if __name__ == "__main__":
    sys.exit(main())
