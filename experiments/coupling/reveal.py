"""Reads a hidden file back: python -m experiments.coupling.reveal --model PATH --text FILE --output MESSAGE."""

import sys
from pathlib import Path

from experiments.coupling.hide import parser, report
from experiments.coupling.steganography import HidingError, load_model, reveal


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 2 if the text was changed or anything else does not fit."""
    flags = parser("Reads the file that is hidden in a text.")
    flags.add_argument("--text", required=True, help="the text, exactly as it was written")
    flags.add_argument("--output", help="where the message goes; standard output by default")
    options = flags.parse_args(arguments)
    try:
        with Path(options.text).open(encoding="utf-8", newline="") as file:
            text = file.read()
        model = load_model(options.model, options.max_tokens)
        message, account = reveal(
            model,
            text,
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
        Path(options.output).write_bytes(message)
    else:
        sys.stdout.buffer.write(message)
    print(report(account), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
