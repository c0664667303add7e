"""The four models of the paper, under the names of its tables and of the command line."""

import difflib

from jaxrl_suite.lm import LanguageModelConfig, named_config

# Name on the command line -> name in the paper's tables. Shapes are the public ones, kept in ``lm``; the paper does not
# state the top-k of Llama3-8x70B: 2 is assumed.
PAPER_NAMES = {
    "mixtral-8x22b": "Mixtral 8x22B",
    "qwen2-57b-a14b": "Qwen2-57B-A14B",
    "mixtral-8x22b-g8t8": "Mixtral-8x22B-G8T8",
    "llama3-8x70b": "Llama3-8x70B",
}

MODELS: dict[str, LanguageModelConfig] = {name: named_config(name) for name in PAPER_NAMES}
# Sparse models that the planner knows besides.
MODELS |= {name: named_config(name) for name in ("mixtral-8x7b", "qwen3-30b-a3b")}


def find_model(name: str) -> LanguageModelConfig:
    """A known model, by name.

    Raises:
        ValueError: unknown; the message has the nearest name.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.4)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"--model={name}: unknown.{guess} Known: {', '.join(MODELS)}.")
    return MODELS[name]
