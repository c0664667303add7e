"""A whole GRPO step against TRL, and the price of the influence: python -m tests.benchmarks.alignment_benchmark.

11 million parameters, vocabulary 49,152, 8 prompts x 8 samples x 48 tokens, float32, three rewards on the host. TRL
runs in a process of its own in the environment of ``--trl_python`` (one with trl and torch), in turns with ours.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_suite import alignment, lm, pareto
from jaxrl_suite.memory import keep_memory

SHAPE = {"vocabulary": 49152, "width": 192, "layers": 4, "heads": 3, "kv_heads": 3, "ffn": 512}
TASK = {"prompts": 8, "group": 8, "prompt_tokens": 16, "tokens": 48}


def make_model():
    """The decoder with the sizes of the peer's."""
    return lm.LanguageModel(lm.LanguageModelConfig(
        vocab_size=SHAPE["vocabulary"], width=SHAPE["width"], num_layers=SHAPE["layers"], num_heads=SHAPE["heads"],
        num_kv_heads=SHAPE["kv_heads"], head_dim=SHAPE["width"] // SHAPE["heads"], ffn_width=SHAPE["ffn"],
        tied_head=True,
    ))  # fmt: skip


def scores(tokens):
    """Three rewards on the host, [3, N], of the same kind as the peer's."""
    texts = [" ".join(f"w{t}" for t in row) for row in np.asarray(tokens)]
    return np.array([
        [float(sum(map(ord, text)) % 2) for text in texts],
        [len(text) / 1000 for text in texts],
        [len(set(text.split())) / TASK["tokens"] for text in texts],
    ], np.float32)  # fmt: skip


def our_steps(num_steps, weights):
    """Seconds of rollout, rewards and update of each step after the first, which compiles."""
    model = make_model()
    params = lm.init_params(jax.random.key(0), model.config)
    equal = jnp.full(3, 1 / 3)
    rule = pareto.influence_weights(equal, 0.1) if weights == "influence" else pareto.fixed_weights(equal)
    trainer = alignment.Trainer(
        policy=lm.policy(model), config=alignment.TrainerConfig(group_size=TASK["group"]),
        loss=alignment.LossConfig(kl_kind="none"), rule=rule, optimizer=optax.adamw(1e-5),
        sampling=lm.Sampling(max_tokens=TASK["tokens"], stop_tokens=(1,)),
        early=lm.early_gradient(model),
    )  # fmt: skip
    state = alignment.init_trainer(jax.random.key(1), trainer, params, num_objectives=3)
    prompts = np.random.default_rng(0).integers(3, 1000, (TASK["prompts"], TASK["prompt_tokens"]), np.int32)
    mask = np.ones(prompts.shape, bool)
    step = jax.jit(lambda state, generation, rewards, laws: alignment.update(
        trainer, state, prompts, mask, generation, rewards, laws=laws))  # fmt: skip
    rows, laws = [], None
    for _ in range(num_steps):
        marks = [time.perf_counter()]
        generation, laws = jax.block_until_ready(alignment.rollout_with_laws(trainer, state, prompts, mask, spare=laws))
        marks.append(time.perf_counter())
        rewards = scores(generation.tokens).reshape(3, TASK["prompts"], TASK["group"])
        marks.append(time.perf_counter())
        state, _ = jax.block_until_ready(step(state, generation, rewards, laws))
        marks.append(time.perf_counter())
        rows.append(np.diff(marks))
    return np.array(rows[1:])


def influence_price(repeats, num_objectives=8):
    """Seconds of the influence of K objectives, and of one value and gradient, on the same batch; in turns."""
    model = make_model()
    params = lm.init_params(jax.random.key(0), model.config)
    length = TASK["prompt_tokens"] + TASK["tokens"]
    rows = TASK["prompts"] * TASK["group"]
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 3, 1000)
    advantages = jax.random.normal(jax.random.key(2), (num_objectives, rows))

    def objectives(params):
        values = lm.token_log_probs(model, params, tokens)
        return advantages @ jnp.mean(values, axis=1) / rows

    influence = jax.jit(lambda p: pareto.influence(objectives, p))
    single = jax.jit(jax.value_and_grad(lambda p: objectives(p)[0]))
    jax.block_until_ready((influence(params), single(params)))
    times = {"influence": [], "single": []}
    for _ in range(repeats):
        for name, function in (("influence", influence), ("single", single)):
            began = time.perf_counter()
            jax.block_until_ready(function(params))
            times[name].append(time.perf_counter() - began)
    return statistics.median(times["influence"]), statistics.median(times["single"])


def trl_steps(python, num_steps):
    """Seconds of TRL's steps after the first."""
    script = Path(__file__).with_name("alignment_trl_peer.py")
    flags = [f"--{name}={value}" for name, value in {**SHAPE, **TASK, "steps": num_steps}.items()]
    done = subprocess.run([python, str(script), *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--trl_python", default="", help="Python of an environment with trl and torch; empty: ours only"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=1, help="0: the influence alone")
    parser.add_argument("--skip_influence", action="store_true")
    options = parser.parse_args()
    keep_memory()
    if not options.skip_influence:
        influence, single = influence_price(options.steps)
        print(f"influence of 8 objectives {influence:.2f} s, value and gradient of one {single:.2f} s, "
              f"ratio {influence / single:.2f}", flush=True)  # fmt: skip
    for _ in range(options.turns):
        for weights in ("fixed", "influence"):
            rows = np.median(our_steps(options.steps, weights), axis=0)
            shares = ", ".join(f"{name} {value / rows.sum():.0%}" for name, value in
                               zip(("rollout", "rewards", "update"), rows, strict=True))  # fmt: skip
            print(f"ours, {weights} weights: {rows.sum():.2f} s a step ({shares})", flush=True)
        if options.trl_python:
            peer = trl_steps(options.trl_python, options.steps)
            print(
                f"TRL: {statistics.median(peer['seconds']):.2f} s a step, {peer['parameters']} parameters", flush=True
            )


if __name__ == "__main__":
    main()
