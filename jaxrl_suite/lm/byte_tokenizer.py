"""A tokenizer without a vocabulary file: bytes of UTF-8, for small models."""

from collections.abc import Sequence


class ByteTokenizer:
    """Token i < 256 is the byte i; 256 ends a text, 257 pads, 258 begins one.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("hé")
    [104, 195, 169]
    >>> tokenizer.decode([104, 195, 169, 256])
    'hé'
    """

    vocab_size = 259
    eos_token = 256
    pad_token = 257
    bos_token = 258
    stop_tokens = (256,)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of a text; ``special`` puts the beginning token in front."""
        return [self.bos_token] * special + list(text.encode())

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens; special tokens are left out, or written as ``<eos>`` and so on with ``special``."""
        names = {self.eos_token: b"<eos>", self.pad_token: b"<pad>", self.bos_token: b"<bos>"}
        parts = (bytes([t]) if t < 256 else (names.get(int(t), b"") if special else b"") for t in tokens)
        return b"".join(parts).decode(errors="replace")

    def chat(self, turns: Sequence[dict[str, str]], *, generation_prompt: bool = True) -> list[int]:
        """Tokens of a conversation of ``{"role", "content"}`` turns, as ``role: content`` lines."""
        text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns)
        return self.encode(text + ("assistant: " if generation_prompt else ""), special=True)
