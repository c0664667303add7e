"""The ``tokenizers`` library behind one small class: text to tokens and back, chat template, special tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_suite.config import check

_CHATML = "<|im_start|>"
# Splits that come before byte-level merges, by the name that GGUF files give them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "Reading a tokenizer needs the tokenizers package. Remedy: python -m pip install 'jaxrl-suite[hf]'"
        ) from error
    return tokenizers


class Tokenizer:
    """Text to tokens and back.

    Attributes:
        backend: the ``tokenizers.Tokenizer``.
        vocab_size: one more than the largest number of a token, special ones included.
        bos_token: number of the token that begins a text, or None.
        eos_token: number of the token that ends one, or None.
        pad_token: number of the padding token; the end token where the files name none.
        stop_tokens: tokens that end an answer.
        chat_template: Jinja text, or None.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_token: int | None = None,
        eos_token: int | None = None,
        pad_token: int | None = None,
        stop_tokens: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token, self.eos_token = bos_token, eos_token
        first = [token for token in (pad_token, eos_token, 0) if token is not None]
        self.pad_token = first[0]
        known = [*stop_tokens, *([eos_token] if eos_token is not None else [])]
        self.stop_tokens = tuple(dict.fromkeys(known))
        self.chat_template = chat_template

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of a text; ``special`` adds what the tokenizer puts around a text (a beginning token, say)."""
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens; special tokens are left out unless ``special``."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=not special)

    def render(self, turns: Sequence[Mapping[str, str]], *, generation_prompt: bool = True) -> str:
        """Text of a conversation by the chat template.

        Without ``jinja2`` a template of the ChatML kind is written as plain ChatML, so that a default system message
        which the template may add is left out.

        Args:
            turns: ``{"role": ..., "content": ...}`` in order.
            generation_prompt: end with the opening of the assistant's answer.

        Raises:
            ValueError: there is no template, or it refuses the turns.
            ImportError: the template is not ChatML and ``jinja2`` is missing.
        """
        rule, remedy = "the model has none", "Give a plain prompt"
        check(self.chat_template is not None, argument="chat_template", value=None, rule=rule, remedy=remedy)
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            if _CHATML not in str(self.chat_template):
                raise ImportError("Chat templates need jinja2. Remedy: python -m pip install jinja2") from error
            return _chatml(turns, generation_prompt)

        def refuse(message: str) -> None:
            raise ValueError(f"chat_template: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(str(self.chat_template)).render(
            raise_exception=refuse,
            messages=[dict(turn) for turn in turns],
            add_generation_prompt=generation_prompt,
            bos_token=self._text(self.bos_token),
            eos_token=self._text(self.eos_token),
        )

    def chat(self, turns: Sequence[Mapping[str, str]], *, generation_prompt: bool = True) -> list[int]:
        """Tokens of a conversation, see :meth:`render`."""
        return self.encode(self.render(turns, generation_prompt=generation_prompt))

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.backend.id_to_token(token) or ""

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        self.backend.save(str(folder / "tokenizer.json"))
        named = (("bos_token", self.bos_token), ("eos_token", self.eos_token), ("pad_token", self.pad_token))
        values: dict[str, Any] = {name: self._text(token) for name, token in named if token is not None}
        values |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.chat_template is not None:
            values["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _chatml(turns: Sequence[Mapping[str, str]], generation_prompt: bool) -> str:
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return text + ("<|im_start|>assistant\n" if generation_prompt else "")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, None where there is no tokenizer.json.

    Raises:
        ValueError: the file is not a tokenizer.
        ImportError: without the ``tokenizers`` package.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        backend = _tokenizers().Tokenizer.from_file(str(path))
    except ImportError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({error}).") from error
    settings = _read_json(folder / "tokenizer_config.json")
    stops = _read_json(folder / "generation_config.json").get("eos_token_id")
    stops = _read_json(folder / "config.json").get("eos_token_id") if stops is None else stops
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)

    def number(name: str) -> int | None:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        return None if token is None else backend.token_to_id(token)

    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((item["template"] for item in template if item.get("name") == "default"), None)
    separate = folder / "chat_template.jinja"
    if template is None and separate.exists():
        template = separate.read_text()
    return Tokenizer(
        backend,
        bos_token=number("bos_token"),
        eos_token=number("eos_token") if number("eos_token") is not None else (stops or [None])[0],
        pad_token=number("pad_token"),
        stop_tokens=stops,
        chat_template=template,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from error


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, where: str) -> Tokenizer | None:
    """The tokenizer in the metadata of a GGUF file, None where there is none.

    Raises:
        ValueError: a kind of tokenizer that is not byte-level BPE, or an unknown split.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    lib = _tokenizers()
    kind = metadata.get("tokenizer.ggml.model")
    remedy = "Put the model's tokenizer.json beside it, in a folder"
    check(kind == "gpt2", argument=f"{where}: tokenizer.ggml.model", value=kind, rule="must be gpt2", remedy=remedy)
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        backend = lib.Tokenizer(lib.models.BPE(vocabulary, merges, fuse_unk=False))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{where}: tokenizer.ggml.merges do not fit the tokens ({error}).") from error
    backend.pre_tokenizer = _pre_tokenizer(lib, metadata.get("tokenizer.ggml.pre", "default"), where)
    backend.decoder = lib.decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    special = [token for token, t in zip(tokens, kinds) if t == 3]  # control
    backend.add_special_tokens([lib.AddedToken(token, special=True, normalized=False) for token in special])
    added = [token for token, t in zip(tokens, kinds) if t == 4]  # user-defined
    backend.add_tokens([lib.AddedToken(token, normalized=False) for token in added])
    return Tokenizer(
        backend,
        bos_token=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token=metadata.get("tokenizer.ggml.padding_token_id"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _pre_tokenizer(lib: Any, name: str, where: str) -> Any:
    pre = lib.pre_tokenizers
    if name in ("default", "gpt-2"):
        return pre.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("smollm", "starcoder", "refact", "command-r"):
        return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    known = ("default", "gpt-2", "smollm", *_SPLITS)
    check(
        name in _SPLITS,
        argument=f"{where}: tokenizer.ggml.pre",
        value=name,
        rule=f"must be {', '.join(known)}",
        remedy="Put the model's tokenizer.json beside it, in a folder",
    )
    split = pre.Split(lib.Regex(_SPLITS[name]), behavior="isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
