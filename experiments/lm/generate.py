"""Talks to a model: python -m experiments.lm.generate --model PATH --prompt "What is a monad?"

The answer appears token by token. --speed also prints tokens per second, compilation left out.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxrl_suite import lm


def pieces(tokenizer: lm.Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it grows: a piece is held back while its last character is still incomplete."""
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(seen)[len(shown) :]


def answer(arguments: argparse.Namespace) -> None:
    """Loads the model and streams one answer."""
    began = time.perf_counter()
    pretrained = lm.load_pretrained(arguments.model, dtype=arguments.dtype)
    tokenizer = pretrained.tokenizer
    if tokenizer is None:
        raise ValueError(f"{arguments.model}: holds no tokenizer, so that text cannot be read. Add its tokenizer.json.")
    loaded = time.perf_counter()
    plain = arguments.plain or tokenizer.chat_template is None
    turns = [{"role": "user", "content": arguments.prompt}]
    prompt = tokenizer.encode(arguments.prompt, special=True) if plain else tokenizer.chat(turns)
    if not prompt:
        raise ValueError("--prompt: needs at least one token. Give some text.")
    sampling = lm.Sampling(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature or 1.0,
        greedy=arguments.temperature == 0,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        stop_tokens=tokenizer.stop_tokens,
        pad_token=tokenizer.pad_token,
    )
    params = lm.prepare_decode(pretrained.params, config=pretrained.config)
    key = jax.random.key(arguments.seed)
    if arguments.speed:  # once for the compiler
        for count, _ in enumerate(lm.stream(key, pretrained.model, params, prompt, sampling=sampling)):
            if count == 2:
                break
    ready = time.perf_counter()
    times: list[float] = []

    def clocked() -> Iterator[int]:
        for token in lm.stream(key, pretrained.model, params, prompt, sampling=sampling):
            times.append(time.perf_counter())
            yield token

    for piece in pieces(tokenizer, clocked()):
        print(piece, end="", flush=True)
    print()
    if arguments.speed:
        rate = f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else "one token only"
        print(
            f"load {loaded - began:.1f} s · compile {ready - loaded:.1f} s · "
            f"prompt of {len(prompt)} tokens {times[0] - ready:.3f} s · answer of {len(times)} tokens, {rate}",
            file=sys.stderr,
        )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Streams a model's answer.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder or GGUF file")
    parser.add_argument("--prompt", required=True, help="what to say")
    parser.add_argument("--plain", action="store_true", help="continue the prompt instead of answering as a chat")
    parser.add_argument("--max_tokens", type=int, default=256, help="most new tokens")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the most probable token")
    parser.add_argument("--top_k", type=int, default=0, help="keep this many most probable tokens; 0 for all")
    parser.add_argument("--top_p", type=float, default=0.95, help="keep the most probable tokens up to this mass")
    parser.add_argument("--min_p", type=float, default=0.0, help="keep tokens at least this share of the best")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--speed", action="store_true", help="print tokens per second")
    parser.add_argument("--helpshort", action="help", help="the same as --help, as the launchers have it")
    try:
        answer(parser.parse_args())
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
