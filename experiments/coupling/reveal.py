"""Reads a hidden file back: python -m experiments.coupling.reveal --model PATH --text FILE --output MESSAGE."""

import sys
from pathlib import Path

from experiments.coupling.hiding_command import parser, run_command
from experiments.coupling.steganography import HidingError, reveal


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 2 if the text was changed or anything else does not fit."""
    flags = parser("Reads the file that is hidden in a text.")
    flags.add_argument("--text", required=True, help="the text, exactly as it was written")

    def work(options, model, channel):
        try:
            text = Path(options.text).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise HidingError(f"--text={options.text}: is not UTF-8 text, at byte {error.start}.") from None
        return reveal(model, text, options.prompt, options.passphrase, **channel)

    return run_command(flags, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
