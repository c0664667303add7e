"""One side of the speed comparison, in a process of its own; started by experiments.lm.benchmark.

The first line on standard input is the task, in JSON. The answer to it, and to every line after it, is a line of JSON:
the seconds of one call and what it computed.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.01
# A call ends when its results are there; it returns a function that says, off the clock, what was computed.
Call = Callable[[], Callable[[], dict[str, Any]]]


def our_decoding(folder: Path, prompts: np.ndarray, new_tokens: int) -> Call:
    """Continuations of full length, prefill included: greedy for one row, drawn from the model for more."""
    import jax

    from jaxrl_suite import lm

    pretrained = lm.load_pretrained(folder)
    params = lm.prepare_decode(pretrained.params, config=pretrained.config)
    model, rows = pretrained.model, np.arange(len(prompts))
    del pretrained  # decoding reads `params` alone
    sampling = lm.Sampling(max_tokens=new_tokens, greedy=len(prompts) == 1)

    def call() -> Callable[[], dict[str, Any]]:
        out = lm.generate(
            jax.random.key(0), model, params, prompts, np.ones_like(prompts, bool), row_ids=rows, sampling=sampling
        )
        tokens, log_probs = np.asarray(out.tokens), np.asarray(out.log_probs)
        return lambda: {"first_row": tokens[0].tolist(), "nats_per_token": -float(log_probs.mean())}

    return call


def their_decoding(folder: Path, prompts: np.ndarray, new_tokens: int) -> Call:
    """The same in transformers, which reports no log-probabilities: they are scored afterwards."""
    import torch

    model, tokens = _torch_model(folder), torch.tensor(prompts).long()
    draws = len(prompts) > 1

    def call() -> Callable[[], dict[str, Any]]:
        with torch.no_grad():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=draws, min_new_tokens=new_tokens,
                max_new_tokens=new_tokens, top_k=0, temperature=1.0 if draws else None, pad_token_id=2,
            )  # fmt: skip
        return lambda: describe(out)

    @torch.no_grad()
    def describe(out: Any) -> dict[str, Any]:
        length = tokens.shape[1]
        log_probs = torch.log_softmax(model(out).logits[:, length - 1 : -1], dim=-1)
        picked = log_probs.gather(2, out[:, length:, None]) if draws else torch.zeros(1)
        return {"first_row": out[0, length:].tolist(), "nats_per_token": -float(picked.mean())}

    return call


def our_step(folder: Path, tokens: np.ndarray) -> Call:
    """A supervised step with AdamW on the same rows."""
    import jax.numpy as jnp
    import optax

    from jaxrl_suite import lm

    pretrained = lm.load_pretrained(folder)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batch = lm.SupervisedBatch(jnp.asarray(tokens), jnp.ones(tokens.shape))
    config, state = pretrained.config, [lm.init_supervised(pretrained.params, optimizer)]
    del pretrained  # the step may write over its parameters

    def call() -> Callable[[], dict[str, Any]]:
        state[0], metrics = lm.jit_supervised_step(state[0], batch, config=config, optimizer=optimizer)
        loss = float(metrics["loss/nats_per_token"])
        return lambda: {"loss": loss}

    return call


def their_step(folder: Path, tokens: np.ndarray) -> Call:
    """The same in torch."""
    import torch

    model, rows = _torch_model(folder).train(), torch.tensor(tokens).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def call() -> Callable[[], dict[str, Any]]:
        optimizer.zero_grad()
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        return lambda: {"loss": float(loss.detach())}

    return call


def _torch_model(folder: Path) -> Any:
    """The same weights in transformers, float32."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    file = next(folder.glob("*.gguf"), None)
    options = {} if file is None else {"gguf_file": file.name}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


CALLS: dict[tuple[str, str], Callable[..., Call]] = {
    ("ours", "decode"): our_decoding,
    ("transformers", "decode"): their_decoding,
    ("ours", "step"): our_step,
    ("transformers", "step"): their_step,
}


def main() -> None:
    """Reads the task and then answers every line with one timed call."""
    task = json.loads(sys.stdin.readline())
    tokens = np.asarray(task.pop("tokens"), np.int32)
    call = CALLS[task.pop("side"), task.pop("kind")](Path(task.pop("folder")), tokens, **task)
    while True:
        began = time.perf_counter()
        computed = call()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, **computed()}), flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main()
