"""Hides a file in text: python -m experiments.coupling.hide --model PATH --message FILE --output TEXT.

``--model`` is a model folder or a GGUF file, or ``characters``, a small model of Python source that needs no download.
Read it back with ``python -m experiments.coupling.reveal`` and the same model, prompt, passphrase, rate and top_k.
"""

import argparse
import math
import sys
from pathlib import Path

from experiments.coupling.steganography import Account, HidingError, hide, load_model


def parser(description: str) -> argparse.ArgumentParser:
    """Flags that sender and receiver share."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--model", default="characters", help="model folder, GGUF file, or: characters")
    flags.add_argument("--prompt", default="The weather today is", help="text before the text; both sides must agree")
    flags.add_argument("--passphrase", default="", help="shared secret")
    flags.add_argument("--rate", type=float, default=math.inf, help="largest entropy of the code a token, bits")
    flags.add_argument("--top_k", type=int, default=40, help="candidate tokens a step")
    flags.add_argument("--max_tokens", type=int, default=4000, help="longest text")
    return flags


def report(account: Account) -> str:
    """The account in words."""
    lines = [
        f"tokens                               {account.tokens}",
        f"hidden bits (with frame)             {account.bits}",
        f"bits a token                         {account.bits / account.tokens:.3f}",
        f"share of the entropy used            {account.bits / account.entropy_bits:.1%}",
        f"bits a second (with compilation)     {account.bits / account.seconds:.1f}",
        f"KL of the coupling, bits a token     {account.coupling_kl:.2e}",
        f"KL of top-k, counts and token rule   {account.total_kl:.4f}",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    flags = parser("Hides a file in text of a language model.")
    flags.add_argument("--message", required=True, help="file to hide")
    flags.add_argument("--output", help="where the text goes; standard output by default")
    options = flags.parse_args(arguments)
    try:
        message = Path(options.message).read_bytes()
        model = load_model(options.model, options.max_tokens)
        text, account = hide(
            model,
            message,
            options.prompt,
            options.passphrase,
            rate=options.rate,
            top_k=options.top_k,
            max_tokens=options.max_tokens,
        )
    except (HidingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output:
        Path(options.output).write_text(text, encoding="utf-8", newline="")
    else:
        print(text)
    print(report(account), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
