"""Trains a mixture-of-experts model under a folding, on a text file or Python's own source.

    python -m experiments.moe.train --folding="attention=tp2.dp4 experts=ep8" --num_steps=50 --workdir=runs/moe/a
    python -m experiments.moe.train --folding="attention=tp4.dp2 experts=etp2.ep4" --num_steps=80 --workdir=runs/moe/a

The second command continues the first under another folding: checkpoints know nothing of foldings. A run that was
killed goes on from its last checkpoint to the same numbers. Without a folding training is data parallel over the cores
of the CPU, a virtual device each, which beats one device there. The workdir gets ``checkpoints/`` and
``metrics.jsonl``, ``--export=FOLDER`` writes a Hugging Face folder at the end. ``--model=small`` is a byte model; a
folder with pretrained weights of a Mixtral, Qwen2-MoE or Qwen3-MoE is read straight onto the folding.

On several hosts start one process each with the same flags, ``--coordinator=HOST:PORT --num_processes=2`` and its own
``--process_id``; the ranks of the folding are shared out among them, the first one writes and prints.
"""

import contextlib
import functools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments.common.flags import read_flags
from experiments.common.launch import fail, other_has_stopped, virtual_devices

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "folding", "", "where attention and experts lie; data parallel over the cores of a CPU if empty", flag_values=FLAGS
)
flags.DEFINE_string("model", "small", "small, or a Hugging Face folder", flag_values=FLAGS)
flags.DEFINE_string("data", "", "a text file, read as bytes (as tokens with a folder's tokenizer)", flag_values=FLAGS)
flags.DEFINE_string("workdir", "runs/moe/train", "checkpoints and metrics", flag_values=FLAGS)
flags.DEFINE_string("export", "", "Hugging Face folder to write at the end", flag_values=FLAGS)
flags.DEFINE_integer("num_steps", 50, "steps in all, those of earlier starts included", flag_values=FLAGS)
flags.DEFINE_integer("save_every", 100, "steps between checkpoints; the last step has one too", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 8, "sequences of a step", flag_values=FLAGS)
flags.DEFINE_integer("length", 128, "tokens of a sequence", flag_values=FLAGS)
flags.DEFINE_integer("num_microbatches", 0, "micro-batches; 0 for the number of stages", flag_values=FLAGS)
flags.DEFINE_float("learning_rate", 1e-3, "step of AdamW", flag_values=FLAGS)
flags.DEFINE_float("capacity_factor", 0.0, "slots of an expert over its even share; 0 for dropless", flag_values=FLAGS)
flags.DEFINE_float("balance_coef", 0.01, "weight of the balancing loss", flag_values=FLAGS)
flags.DEFINE_bool("keep_memory", True, "keep freed memory: faster on a CPU, a third more of it", flag_values=FLAGS)
flags.DEFINE_float("peak_tflops", 0.0, "peak of one device for the MFU column; 0 leaves it out", flag_values=FLAGS)
flags.DEFINE_string(
    "coordinator", "", "host:port of the first of several processes, or auto under a scheduler", flag_values=FLAGS
)
flags.DEFINE_integer("num_processes", 1, "processes of the job", flag_values=FLAGS)
flags.DEFINE_integer("process_id", 0, "number of this process, from 0", flag_values=FLAGS)


def check_flags() -> None:
    """Refuses what cannot be, before JAX starts."""
    from jaxrl_suite.config import check, check_count

    least = {"batch_size": 1, "length": 1, "save_every": 1, "num_processes": 1, "num_steps": 0, "num_microbatches": 0}
    for name, number in least.items():
        counts: dict[str, Any] = {f"--{name}": FLAGS[name].value}
        check_count(number, **counts)
    for name in ("learning_rate", "capacity_factor", "balance_coef", "peak_tflops"):
        value = float(FLAGS[name].value or 0.0)
        fits = 0 < value < math.inf if name == "learning_rate" else 0 <= value < math.inf
        rule = "must be finite and positive" if name == "learning_rate" else "must be finite and not negative"
        check(fits, argument=f"--{name}", value=value, rule=rule)
    alone = FLAGS.num_processes == 1 or bool(FLAGS.coordinator)
    rule, remedy = "several processes need a place to meet", "Add --coordinator=host:port of the first"
    check(alone, argument="--num_processes", value=FLAGS.num_processes, rule=rule, remedy=remedy)
    if FLAGS.data:
        remedy = "Name a text file, or leave --data out to train on Python's own source"
        found = Path(FLAGS.data).is_file()
        check(found, argument="--data", value=FLAGS.data, rule="there is no such file", remedy=remedy)
    if FLAGS.model != "small":
        remedy = "Name a Hugging Face folder, or leave --model out for a small byte model"
        found = (Path(FLAGS.model) / "config.json").is_file()
        check(found, argument="--model", value=FLAGS.model, rule="holds no config.json", remedy=remedy)


def choose_folding() -> Any:
    """The folding of the flag, or data parallelism over as many cores of the CPUs as divide the batch."""
    from jaxrl_suite.config import check
    from jaxrl_suite.moe.folding import Folding

    number = FLAGS.num_processes
    cores = math.gcd(FLAGS.batch_size, number * (os.cpu_count() or 1))
    folding = Folding.parse(FLAGS.folding) if FLAGS.folding else Folding(dp=cores, edp=cores)
    rule = f"must divide the {folding.num_ranks} ranks of {str(folding)!r}"
    check(folding.num_ranks % number == 0, argument="--num_processes", value=number, rule=rule)
    return folding


def build(folding: Any) -> tuple[Any, Any, Any]:
    """Configuration, fresh (or pretrained) state and tokenizer."""
    import jax

    from jaxrl_suite import lm, moe
    from jaxrl_suite.moe.pretrained import load_pretrained

    options: dict[str, Any] = {
        "num_microbatches": FLAGS.num_microbatches or folding.pp,
        "dispatch": "drop_pad" if FLAGS.capacity_factor else "padded",
        "capacity_factor": FLAGS.capacity_factor or None,
        "balance": "global",
        "block_rows": 32,
        "remat": "norms",
    }
    if FLAGS.model == "small":
        model = lm.LanguageModelConfig(
            family="mixtral", vocab_size=256, width=64, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=8,
            ffn_width=128, num_experts=8, tied_head=False,
        )  # fmt: skip
        config = moe.MoEConfig(model=model, **options)
        moe.check_folding(config, folding, batch_size=FLAGS.batch_size, length=FLAGS.length)
        return config, moe.init_train_state(jax.random.key(0), config, folding), None
    loaded = load_pretrained(FLAGS.model, folding, **options)
    return loaded.config, moe.state_from_params(loaded.params, loaded.config, folding), loaded.tokenizer


def read_tokens(tokenizer: Any) -> Any:
    """The training text as one array of tokens."""
    import numpy as np

    from experiments.common.corpus import source_bytes

    if not FLAGS.data:
        raw = source_bytes(1_000_000)
    else:
        raw = np.frombuffer(Path(FLAGS.data).read_bytes(), np.uint8)
    if tokenizer is None:
        return raw
    return np.asarray(tokenizer.encode(raw.tobytes().decode("utf-8", errors="replace")), np.int32)


def flops_per_token(model: Any, length: int) -> float:
    """Training floating-point operations of one token, causal attention counted (three times the forward pass)."""
    attention = 2 * model.width * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    core = 2 * length * model.num_heads * model.head_dim
    sparse = 6 * model.experts_per_token * model.width * model.routed_width + 2 * model.width * model.num_experts
    shared = 6 * model.width * model.shared_width
    return 3 * (model.num_layers * (attention + core + sparse + shared) + 2 * model.width * model.vocab_size)


def train(folding: Any) -> None:
    """The loop: continues the newest checkpoint of the workdir, whatever folding wrote it."""
    import jax
    import jax.numpy as jnp

    from experiments.moe.corpus import windows
    from jaxrl_suite import moe
    from jaxrl_suite.config import check
    from jaxrl_suite.io import checkpoint, processes
    from jaxrl_suite.io.metrics import JsonlWriter, truncate_jsonl
    from jaxrl_suite.io.progress import ProgressBar
    from jaxrl_suite.moe.pretrained import save_pretrained

    config, state, tokenizer = build(folding)
    text = jnp.asarray(read_tokens(tokenizer))
    least = FLAGS.length + 2
    remedy = "Use a longer text or a smaller --length"
    rule = f"has {len(text)} tokens, windows of --length={FLAGS.length} take at least {least}"
    check(len(text) >= least, argument="--data", value=FLAGS.data, rule=rule, remedy=remedy)
    writes = processes.is_writer()
    say = functools.partial(print, flush=True) if writes else lambda _: None
    folder, log = Path(FLAGS.workdir) / "checkpoints", Path(FLAGS.workdir) / "metrics.jsonl"
    if checkpoint.latest_step(folder) is not None:
        state, _ = checkpoint.restore_checkpoint(folder, state)
        say(f"continuing at step {int(state.step)} of {folder}")
    begun = int(state.step)
    hparams = moe.HParams(learning_rate=FLAGS.learning_rate, balance_coef=FLAGS.balance_coef)
    tokens, key = FLAGS.batch_size * FLAGS.length, jax.random.key(1)
    work = flops_per_token(config.model, FLAGS.length) * tokens / folding.num_ranks
    every = max(1, FLAGS.num_steps // 10)
    with contextlib.ExitStack() as stack:
        writer = bar = None
        if writes:
            truncate_jsonl(log, begun)
            writer = stack.enter_context(contextlib.closing(JsonlWriter(log)))
            bar = stack.enter_context(ProgressBar("steps", FLAGS.num_steps))
            bar.advance(begun)
        for step in range(begun, FLAGS.num_steps):
            batch = moe.language_batch(windows(key, step, text, FLAGS.batch_size, FLAGS.length))
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(moe.train_step_in_place(state, batch, hparams=hparams))
            seconds = time.perf_counter() - began
            record = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
            record |= {"time/step_seconds": seconds, "speed/tokens_per_second": tokens / seconds}
            if FLAGS.peak_tflops:
                record["speed/mfu"] = work / seconds / (FLAGS.peak_tflops * 1e12)
            if writer is not None and bar is not None:
                writer.write(step, record)
                bar.advance(loss=record["loss/nats"], dropped=record["dispatch/drop_rate"])
            if step % every == 0 or step == FLAGS.num_steps - 1:
                say(_line(step, record))
            if (step + 1) % FLAGS.save_every == 0 or step == FLAGS.num_steps - 1:
                checkpoint.save_checkpoint(folder, step + 1, state, metadata={"folding": str(folding)})
    if begun < FLAGS.num_steps:
        say(f"saved step {int(state.step)} in {folder}")
    else:
        say(f"all {FLAGS.num_steps} steps are done; a larger --num_steps goes on")
    if FLAGS.export:
        params = jax.tree.map(processes.to_host, state.params)
        if writes:
            say(f"exported to {save_pretrained(FLAGS.export, params, config, tokenizer=tokenizer, overwrite=True)}")
    processes.broadcast_json(None)  # nobody leaves before all is on disk


def _line(step: int, record: dict[str, float]) -> str:
    use = f"MFU {record['speed/mfu']:.1%}  " if "speed/mfu" in record else ""
    return (
        f"step {step:>5}  loss {record['loss/nats']:.4f} nats  {record['speed/tokens_per_second']:8.0f} tokens/s  {use}"
        f"dropped {record['dispatch/drop_rate']:.2%}  load {record['load/max_over_mean']:.2f}"
    )


def main(arguments: list[str]) -> int:
    """Reads flags and trains."""
    done = read_flags(FLAGS, arguments, __doc__ or "")
    if done is not None:
        return done
    import jax

    from jaxrl_suite.io import processes
    from jaxrl_suite.memory import keep_memory

    try:
        check_flags()
        folding = choose_folding()
        if FLAGS.keep_memory:
            keep_memory()
        together = bool(FLAGS.folding or FLAGS.coordinator)
        virtual_devices(folding.num_ranks // FLAGS.num_processes, threads=4 if together else 1)
        if FLAGS.coordinator:
            processes.connect(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
        train(folding)
    except (ValueError, FileNotFoundError, processes.ProcessError) as error:
        if jax.distributed.is_initialized():
            fail(error)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        fail(f"{other_has_stopped(error)}. Start all of them again: training goes on from the last checkpoint.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
