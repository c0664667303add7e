"""Letter frequencies of the Python standard library's own source text, in code and in prose."""

import io
import string
import tokenize

import numpy as np

from experiments.common.corpus import source_files

LETTERS = string.ascii_lowercase


def letter_counts(num_files: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of a..z in names (code) and in comments and strings (prose), capitals as small letters, each ``[26]``."""
    code, prose = np.zeros(26, np.int64), np.zeros(26, np.int64)
    for path in source_files()[:num_files]:
        text = path.read_text(encoding="utf-8", errors="replace")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                code += _count(token.string)
            elif token.type in (tokenize.COMMENT, tokenize.STRING):
                prose += _count(token.string)
    return code, prose


def _count(text: str) -> np.ndarray:
    values = np.frombuffer(text.lower().encode("ascii", "ignore"), np.uint8).astype(np.int64) - ord("a")
    return np.bincount(values[(values >= 0) & (values < 26)], minlength=26)
