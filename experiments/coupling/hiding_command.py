"""What the commands ``hide`` and ``reveal`` share: flags, errors in one line, files, and the account in words."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from experiments.coupling.steganography import Account, HidingError, TextModel, load_model


def parser(description: str) -> argparse.ArgumentParser:
    """Flags that sender and receiver share."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--model", default="characters", help="model folder, GGUF file, or: characters")
    prompt = "Once upon a time, there was"  # of the prompts tried, the one after which small models write prose
    flags.add_argument("--prompt", default=prompt, help="text before the text; both sides must agree")
    flags.add_argument("--passphrase", default="", help="shared secret")
    flags.add_argument("--rate", type=float, default=math.inf, help="largest entropy of the code a token, bits")
    flags.add_argument("--temperature", type=float, default=1.0, help="of the model; below 1 for plainer text")
    flags.add_argument("--top_k", type=int, default=40, help="candidate tokens a step")
    flags.add_argument("--max_tokens", type=int, default=4000, help="longest text")
    flags.add_argument("--output", help="file to write; standard output by default")
    flags.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    flags.add_argument("--helpshort", action="help", help="the same as --help, as the launchers have it")
    return flags


def run_command(
    flags: argparse.ArgumentParser,
    arguments: list[str] | None,
    work: Callable[[argparse.Namespace, TextModel, dict], tuple[bytes, Account]],
) -> int:
    """Parses, loads the model, works, writes. What a user can mend comes as one line on standard error.

    Args:
        flags: from :func:`parser`.
        arguments: command line, or None for the process's own.
        work: ``work(options, model, channel) -> (output, account)``; ``channel`` holds what both sides must agree on.

    Returns:
        Exit code: 2 if anything does not fit.
    """
    options = flags.parse_args(arguments)
    output = Path(options.output) if options.output else None
    try:
        _check(options, output)
        model = load_model(options.model, options.max_tokens)
        channel = {name: getattr(options, name) for name in ("rate", "temperature", "top_k", "max_tokens")}
        data, account = work(options, model, channel)
        if output is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            # Mode "x" refuses a file that appeared in the meantime.
            with output.open("wb" if options.overwrite else "xb") as file:
                file.write(data)
    except (HidingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(account), file=sys.stderr)
    return 0


def _check(options: argparse.Namespace, output: Path | None) -> None:
    """Before anything expensive."""
    for name in ("message", "text"):
        path = getattr(options, name, None)
        if path is not None and not Path(path).exists():
            raise HidingError(f"--{name}={path}: no such file. It must name a file, not hold the words.")
        if path is not None and Path(path).is_dir():
            raise HidingError(f"--{name}={path}: is a folder. Name a file.")
    if output is not None and output.is_dir():
        raise HidingError(f"--output={output}: is a folder. Name a file in it.")
    if output is not None and output.exists() and not options.overwrite:
        raise HidingError(f"--output={output}: exists. Choose another name, or say --overwrite.")
    if output is not None and not output.parent.is_dir():
        raise HidingError(f"--output={output}: there is no folder {output.parent}. Make it first.")
    if not options.rate > 0:
        raise HidingError(f"--rate={options.rate:g}: must be positive, in bits.")
    if not options.temperature > 0:
        raise HidingError(f"--temperature={options.temperature:g}: must be positive.")
    for name in ("top_k", "max_tokens"):
        if getattr(options, name) < 1:
            raise HidingError(f"--{name}={getattr(options, name)}: must be at least 1.")
    if not options.prompt:
        raise HidingError("--prompt='': must not be empty; the model needs something to go on.")


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
