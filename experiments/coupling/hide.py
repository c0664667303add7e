"""Hides a file in text: python -m experiments.coupling.hide --model PATH --message FILE --output TEXT.

``--model`` is a model folder or a GGUF file, or ``characters``, a small model of Python source that needs no download.
Read it back with ``python -m experiments.coupling.reveal`` and the same model, prompt, passphrase, rate and top_k.
"""

import sys
from pathlib import Path

from experiments.coupling.hiding_command import parser, run_command
from experiments.coupling.steganography import hide


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    flags = parser("Hides a file in text of a language model.")
    flags.add_argument("--message", required=True, help="file to hide")

    def work(options, model, channel):
        message = Path(options.message).read_bytes()
        text, account = hide(model, message, options.prompt, options.passphrase, **channel)
        return text.encode(), account

    return run_command(flags, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
