"""Speed against torch and transformers on the same machine in the same run; needs the extra ``parity``.

python -m experiments.lm.benchmark --model .cache/models/smollm2-135m --part decode1,decode16,step,compile,load

Every number is a median; the two sides take turns, so that a busy moment hits both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "Write a short story about a fox who learns to read."


def in_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call; every side is called once unmeasured first."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for function in sides.values():
        function()
    for _ in range(repeats):
        for name, function in sides.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return times


def torch_model(folder: Path) -> Any:
    """The same weights in transformers, float32."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    file = next(folder.glob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    return model.eval()


def decode(folder: Path, batch: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of sampled continuations, prefill included, all rows of full length."""
    import jax
    import torch

    from jaxrl_suite import lm

    ours, theirs = lm.load_pretrained(folder), torch_model(folder)
    tokenizer: Any = ours.tokenizer
    prompt = tokenizer.chat([{"role": "user", "content": PROMPT}])
    prompts, mask = lm.left_pad([prompt] * batch)
    sampling = lm.Sampling(max_tokens=new_tokens, greedy=batch == 1)
    params = lm.prepare_decode(ours.params, config=ours.config)
    tokens = torch.tensor(prompts).long()

    def run_ours() -> None:
        out = lm.generate(
            jax.random.key(0), ours.model, params, prompts, mask, row_ids=np.arange(batch), sampling=sampling
        )
        jax.block_until_ready(out)

    def run_theirs() -> None:
        with torch.no_grad():
            theirs.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=batch > 1, min_new_tokens=new_tokens,
                max_new_tokens=new_tokens, top_k=0, temperature=1.0 if batch > 1 else None, pad_token_id=2,
            )  # fmt: skip

    began = time.perf_counter()
    run_ours()
    first = time.perf_counter() - began
    times = in_turns({"ours": run_ours, "transformers": run_theirs}, repeats)
    rates = {name: batch * new_tokens / statistics.median(t) for name, t in times.items()}
    return {"first_call_seconds": first, **rates, "ratio": rates["ours"] / rates["transformers"], "times": times}


def step(folder: Path, rows: int, length: int, repeats: int) -> dict[str, Any]:
    """Seconds of a supervised step with AdamW."""
    import jax.numpy as jnp
    import optax
    import torch

    from jaxrl_suite import lm

    ours, theirs = lm.load_pretrained(folder), torch_model(folder)
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (rows, length), np.int32)
    optimizer = optax.adamw(1e-5)
    batch = lm.SupervisedBatch(jnp.asarray(tokens), jnp.ones(tokens.shape))
    state = [lm.init_supervised(ours.params, optimizer)]
    del ours
    config = lm.load_pretrained(folder).config
    losses: dict[str, float] = {}

    def run_ours() -> None:
        state[0], metrics = lm.jit_supervised_step(state[0], batch, config=config, optimizer=optimizer)
        losses["ours"] = float(metrics["loss/nats_per_token"])

    theirs.train()
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-5)
    torch_tokens = torch.tensor(tokens).long()

    def run_theirs() -> None:
        adam.zero_grad()
        loss = theirs(torch_tokens, labels=torch_tokens).loss
        loss.backward()
        adam.step()
        losses["transformers"] = float(loss.detach())

    began = time.perf_counter()
    run_ours()
    first = time.perf_counter() - began
    times = in_turns({"ours": run_ours, "transformers": run_theirs}, repeats)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    ratio = seconds["transformers"] / seconds["ours"]
    return {"first_call_seconds": first, **seconds, "ratio": ratio, "times": times, "last_losses": losses}


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def load(folder: Path, dtype: str) -> dict[str, Any]:
    """Growth of resident memory over loading, peak and final, in units of the parameters' size; in its own process."""
    code = f"""
import json, resource, jax, jax.numpy as jnp
from pathlib import Path
from jaxrl_suite import lm
from experiments.lm.benchmark import resident_bytes
jax.block_until_ready(jnp.zeros(3) + 1)
Path("/proc/self/clear_refs").write_text("5")
def peak():
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = resident_bytes()
import time
began = time.perf_counter()
p = lm.load_pretrained({str(folder)!r}, dtype={dtype!r})
jax.block_until_ready(p.params)
seconds = time.perf_counter() - began
size = sum(x.nbytes for x in jax.tree.leaves(p.params))
print(json.dumps(dict(final=(resident_bytes() - before) / size, peak=(peak() - before) / size, seconds=seconds)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Reads the command line and prints one JSON line a part."""
    parser = argparse.ArgumentParser(description="Speed against torch and transformers.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--part", default="decode1,decode16,step,load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new_tokens", type=int, default=40)
    arguments = parser.parse_args()
    folder, repeats = arguments.model, arguments.repeats
    parts = {
        "decode1": lambda: decode(folder, 1, arguments.new_tokens, repeats),
        "decode16": lambda: decode(folder, 16, arguments.new_tokens, repeats),
        "step": lambda: step(folder, 8, 256, repeats),
        "load": lambda: {dtype: load(folder, dtype) for dtype in ("float32", "bfloat16")},
    }
    for part in arguments.part.split(","):
        print(part, json.dumps(parts[part](), indent=None), flush=True)


if __name__ == "__main__":
    main()
