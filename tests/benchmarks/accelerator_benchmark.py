"""Speed on one accelerator: python -m tests.benchmarks.accelerator_benchmark [part …]; all parts without names.

Parts: ceilings, products (grouped products of the sparse layer), attention, decoding, step (a sparse train step beside
transformers + torch on the same device, where they are installed), game (10,000 coding episodes in one call). Medians,
the first call (which compiles) apart; FLOPs of the mathematics over time, not of what a kernel happens to compute.
"""

import importlib.util
import statistics
import subprocess
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite import lm, moe
from jaxrl_suite.lm.attention import blockwise_attend
from jaxrl_suite.moe import grouped

BF16 = jnp.bfloat16
STEP = {"vocab_size": 32000, "width": 1024, "ffn_width": 3584, "num_layers": 6, "num_heads": 16, "num_kv_heads": 8,
        "head_dim": 64, "num_experts": 8, "experts_per_token": 2}  # fmt: skip
ROWS, LENGTH = 8, 2048


def timed(function, *arguments, repeats=10, most_seconds=2.0):
    """(median milliseconds, seconds of the first call)."""
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    first, times = time.perf_counter() - began, []
    while len(times) < repeats and sum(times) < most_seconds:
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times), first


def row(name, function, *arguments, flops=0.0, moved=0.0, **options):
    """Times and prints one line."""
    milliseconds, first = timed(jax.jit(function), *arguments, **options)
    rates = (f"{flops / milliseconds / 1e9:8.1f} TFLOP/s" if flops else "") + (
        f"{moved / milliseconds / 1e9:8.2f} TB/s" if moved else ""
    )
    print(f"  {name:<46} {milliseconds:9.3f} ms {rates}  first {first:.1f} s", flush=True)


def ceilings():
    """What the device does at best."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), BF16)
    row("product 8192^3, bfloat16", lambda a: a @ a, a, flops=2 * 8192**3)
    row("product 8192^3, float32, default precision", lambda a: a @ a, a.astype(jnp.float32), flops=2 * 8192**3)
    row("copy of 1 GiB", lambda b: b + 1, jnp.ones(1 << 28, jnp.float32), moved=2 * 4 * 2**28)


def products():
    """16,384 tokens to two experts each, width 1,024, 3,584 hidden units active a token and copy, bfloat16."""
    for num_experts, width in ((8, 3584), (64, 448)):
        keys = jax.random.split(jax.random.key(1), 4)
        layout = grouped.align(jax.random.randint(keys[0], (32768,), 0, num_experts), num_experts)
        slots, where = layout.source.shape[0], (layout.expert, layout.live)
        x, weights, g = (
            jax.random.normal(key, shape, BF16)
            for key, shape in zip(keys[1:], ((slots, 1024), (num_experts, 1024, width), (slots, width)), strict=True)
        )
        flops, label = 2.0 * 32768 * 1024 * width, f"{num_experts} experts of {width}"
        even = x[: slots // num_experts * num_experts].reshape(num_experts, -1, 1024)
        row(f"{label}: batched, equal shares", lambda x, w: x @ w, even, weights, flops=flops)
        row(f"{label}: block_matmul", grouped.block_matmul, x, weights, *where, flops=flops)
        row(f"{label}: block_matmul, transposed", lambda *a: grouped.block_matmul(*a, True), g, weights, *where,
            flops=flops)  # fmt: skip
        like = jnp.zeros((num_experts, 0))
        row(f"{label}: block_outer", grouped.block_outer, x, g, *where, like, flops=flops)
        sizes = jnp.bincount(jnp.where(layout.live, layout.expert, num_experts), length=num_experts + 1)[:-1] * 128
        row(f"{label}: ragged_dot", jax.lax.ragged_dot, x, weights, sizes.astype(jnp.int32), flops=flops)
        row(f"{label}: block_matmul as a loop", lambda *a: grouped._walk_matmul(*a, transposed=False), x, weights,
            *where, flops=flops, repeats=3)  # fmt: skip


def attention():
    """Forward and backward, 8 x 2,048 tokens, 16 heads of 64, bfloat16, causal."""
    shape = (8, 2048, 16, 64)
    q, k, v = (jax.random.normal(key, shape, BF16) for key in jax.random.split(jax.random.key(2), 3))
    positions = jnp.broadcast_to(jnp.arange(2048, dtype=jnp.int32), (8, 2048))
    flops = 3.5 * 2 * 2 * 8 * 16 * 2048 * 2048 * 64 / 2

    def gradient(attend):
        return jax.grad(lambda *a: jnp.sum(attend(*a).astype(jnp.float32) ** 2), argnums=(0, 1, 2))

    for block in (128, None):
        row(f"blockwise, block_size={block}", gradient(
            lambda q, k, v, block=block: blockwise_attend(q, k, v, positions, None, block_size=block)
        ), q, k, v, flops=flops)  # fmt: skip
    for name in ("xla", "cudnn"):
        row(f"jax.nn, {name}", gradient(
            lambda q, k, v, name=name: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=name)
        ), q, k, v, flops=flops)  # fmt: skip


def decoding():
    """A model of the shape of SmolLM2-135M with random weights, bfloat16: 64 tokens after 32."""
    config = lm.LanguageModelConfig(
        vocab_size=49152, width=576, ffn_width=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        tied_head=True, param_dtype="bfloat16", compute_dtype="bfloat16",
    )  # fmt: skip
    model, params = lm.LanguageModel(config), lm.init_params(jax.random.key(0), config)
    for batch in (1, 64, 512):
        prompts, mask = np.full((batch, 32), 5, np.int32), np.ones((batch, 32), bool)

        def run(key, prompts=prompts, mask=mask, batch=batch):
            rows = np.arange(batch)
            return lm.generate(key, model, params, prompts, mask, row_ids=rows, sampling=lm.Sampling(max_tokens=64))

        milliseconds, first = timed(run, jax.random.key(1), repeats=3)
        print(f"  batch {batch}: {batch * 64e3 / milliseconds:.0f} tokens/s, {milliseconds / 64:.2f} ms a token, "
              f"first {first:.1f} s", flush=True)  # fmt: skip


def step():
    """One AdamW step of a sparse model, float32 weights, bfloat16 products, 8 x 2,048 tokens."""
    model = lm.LanguageModelConfig(family="mixtral", tied_head=False, compute_dtype="bfloat16", **STEP)
    active = sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: lm.init_params(jax.random.key(0), model)))
    )
    active -= (8 - 2) * 3 * STEP["width"] * STEP["ffn_width"] * STEP["num_layers"] + STEP["vocab_size"] * STEP["width"]
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH + 1), 0, STEP["vocab_size"])
    for name, options in {
        "dropless": {"dispatch": "padded"},
        "capacity 1.25": {"dispatch": "drop_pad", "capacity_factor": 1.25},
    }.items():
        config = moe.MoEConfig(model=model, **options)
        held = [moe.init_train_state(jax.random.key(0), config, moe.Folding())]

        def advance(held=held):
            held[0], metrics = moe.train_step(held[0], moe.language_batch(tokens))
            return metrics

        _report_step(name, *timed(advance, repeats=6), active)
        held.clear()
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        done = subprocess.run([sys.executable, __file__, "torch"], capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        print(lines[-1] if lines else done.stderr[-500:], flush=True)


def _report_step(name, milliseconds, first, active):
    tokens = ROWS * LENGTH
    rate = 6 * active * tokens / milliseconds / 1e9
    print(f"  {name:<24} {milliseconds:8.1f} ms, {1e3 * tokens / milliseconds:8.0f} tokens/s, {rate:6.1f} TFLOP/s of "
          f"weights, first {first:.1f} s", flush=True)  # fmt: skip


def torch_step():
    """The peer, in a process of its own: transformers' Mixtral under bfloat16 autocast, sdpa, fused AdamW."""
    import torch
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=STEP["vocab_size"], hidden_size=STEP["width"], intermediate_size=STEP["ffn_width"],
        num_hidden_layers=STEP["num_layers"], num_attention_heads=STEP["num_heads"],
        num_key_value_heads=STEP["num_kv_heads"], num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
        use_cache=False, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, STEP["vocab_size"], (ROWS, LENGTH), device="cuda")
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    milliseconds = 1e3 * statistics.median(times[2:])
    print(f"  torch {torch.__version__}, transformers {transformers.__version__}: {milliseconds:.1f} ms, "
          f"{1e3 * ROWS * LENGTH / milliseconds:.0f} tokens/s")  # fmt: skip


def game():
    """10,000 episodes of the 8x8 coding game with 512 messages, horizon 100, in one compiled call."""
    from jaxrl_suite.coupling.games import CodingGame, play
    from jaxrl_suite.envs.rate_grid import RateGridConfig, next_state, rate_grid, soft_policy

    grid = rate_grid(RateGridConfig())
    policy = soft_policy(grid, float(np.exp(-4.5)))

    def move(key, state, action):
        return next_state(key, grid, state, action)

    world = CodingGame(policy, move, grid.entry_reward, grid.terminal, grid.start)
    messages = jax.random.randint(jax.random.key(0), (10_000,), 0, 512)
    for lanes in (2048, 10_000):

        def run(key, lanes=lanes):
            return play(key, world, messages, 3.0, num_messages=512, horizon=100, num_lanes=lanes)

        milliseconds, first = timed(run, jax.random.key(2), repeats=2)
        accuracy = float((run(jax.random.key(2)).decoded == messages).mean())
        print(f"  {lanes} lanes: {milliseconds / 10_000:.4f} ms an episode, accuracy {accuracy:.3f}, "
              f"first {first:.1f} s", flush=True)  # fmt: skip


PARTS = (ceilings, products, attention, decoding, step, game)


def main():
    """Runs the parts that are named; a part that fails does not hide the others."""
    names = sys.argv[1:]
    if names == ["torch"]:
        torch_step()
        return 0
    known = {part.__name__: part for part in PARTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown part {unknown[0]}; parts: {', '.join(known)}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    failed = False
    for name in names or known:
        print(f"{name}: {known[name].__doc__}", flush=True)
        try:
            known[name]()
        except Exception:
            failed = True
            traceback.print_exc(limit=3)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
