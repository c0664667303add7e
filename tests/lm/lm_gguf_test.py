"""GGUF files, written by the gguf package from known numbers or known bytes."""

import jax
import numpy as np
import pytest

from jaxrl_suite import lm
from jaxrl_suite.lm import pretrained as pretrained_module
from jaxrl_suite.lm.tensor_files import read_gguf
from tests.reference import lm_decoder

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

# Where the float16 scales stand in a block of each quantisation; the rest of a block may be any bytes.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jax.numpy.bfloat16)}


def blocks(kind, count, seed=0):
    """Bytes of ``count`` blocks with random contents and scales of 0.01 and 0.02: uint8 [count, bytes]."""
    data = np.random.default_rng(seed).integers(0, 256, (count, gguf.GGML_QUANT_SIZES[Type[kind]][1]), np.uint8)
    for place, scale in zip(SCALES[kind], (0.01, 0.02)):
        data[:, place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return data


def write_gguf(path, pretrained, kinds=("F32",), tokens=None, architecture="llama"):
    """Writes a dense Llama; matrices take the kinds in turn (quantised ones hold random blocks, not the parameters).

    Returns:
        name of each tensor -> the numbers that it stands for, and the kinds that were used.
    """
    config, leaves = pretrained.config, lm.flatten(pretrained.params)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(config.head_dim)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3] + [1] * (len(tokens) - 1))
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(0)
    written, used = {}, []

    def add(name, array):
        array = np.ascontiguousarray(array, np.float32)
        kind = "F32" if array.ndim == 1 else kinds[len(used) % len(kinds)]
        if array.ndim > 1:
            used.append(kind)
        if kind in PLAIN:
            data = array.astype(PLAIN[kind])
            written[name] = data.astype(np.float32)
            writer.add_tensor(name, data.view(np.uint8) if kind == "BF16" else data, raw_dtype=Type[kind])
            return
        size = gguf.GGML_QUANT_SIZES[Type[kind]][0]
        data = blocks(kind, array.size // size, seed=len(used)).reshape(array.shape[0], -1)
        written[name] = gguf.quants.dequantize(data, Type[kind])
        writer.add_tensor(name, data, raw_dtype=Type[kind])

    add("token_embd.weight", leaves["embed/table"])
    add("output_norm.weight", leaves["final_norm/scale"])
    for i in range(config.num_layers):
        for ours, theirs in (("attention_norm/scale", "attn_norm"), ("feed_forward_norm/scale", "ffn_norm")):
            add(f"blk.{i}.{theirs}.weight", leaves[f"layers/{ours}"][i])
        for ours, theirs in (("query", "attn_q"), ("key", "attn_k"), ("value", "attn_v")):
            w = np.asarray(leaves[f"layers/attention/{ours}"][i])  # [D, H, C]
            if ours != "value":
                w = w[:, :, interleaved_order(config)]
            add(f"blk.{i}.{theirs}.weight", w.reshape(config.width, -1).T)
        add(f"blk.{i}.attn_output.weight", np.asarray(leaves["layers/attention/output"][i]).reshape(-1, config.width).T)
        for name in ("gate", "up", "down"):
            add(f"blk.{i}.ffn_{name}.weight", np.asarray(leaves[f"layers/feed_forward/{name}"][i]).T)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written, used


def interleaved_order(config):
    """Row 2 j + s of a head holds dimension j + s C / 2."""
    half = config.head_dim // 2
    return [j + s * half for j in range(half) for s in range(2)]


def model(width=32, **changes):
    config = lm.LanguageModelConfig(
        vocab_size=40, width=width, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=64, norm_eps=2**-16
    ).replace(**changes)
    return lm.Pretrained(lm.LanguageModel(config), lm_decoder.parameters(config), config, None)


def test_interleaved_rows_are_undone(tmp_path):
    expected = model()
    write_gguf(tmp_path / "model.gguf", expected)
    actual = lm.load_pretrained(tmp_path)
    assert actual.config == expected.config
    for path, leaf in lm.flatten(expected.params).items():
        np.testing.assert_array_equal(lm.flatten(actual.params)[path], leaf, err_msg=path)


def test_every_quantisation_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    """Matrices of F32, F16, BF16, Q4_0 to Q8_0 and Q2_K to Q6_K are the numbers that the package dequantises; no more
    than a chunk is dequantised at once."""
    whole = model(width=256, head_dim=64, ffn_width=256)
    config = whole.config
    kinds = [*PLAIN, *SCALES]
    written, used = write_gguf(tmp_path / "m.gguf", whole, kinds)
    assert set(used) == set(kinds)
    largest, dequantize = [], gguf.quants.dequantize

    def watched(data, kind):
        values = dequantize(data, kind)
        largest.append(values.nbytes)
        return values

    monkeypatch.setattr(gguf.quants, "dequantize", watched)
    monkeypatch.setattr(pretrained_module, "_CHUNK_BYTES", 1 << 14)
    leaves = lm.flatten(lm.load_pretrained(tmp_path / "m.gguf").params)
    assert max(largest) <= 64 * 256 * 4  # a head of queries: fewer rows would not hold both halves of a rotation
    undo = np.argsort(interleaved_order(config))
    np.testing.assert_array_equal(leaves["embed/table"], written["token_embd.weight"])
    for i in range(config.num_layers):
        for ours, theirs in (("query", "attn_q"), ("key", "attn_k"), ("value", "attn_v")):
            expected = written[f"blk.{i}.{theirs}.weight"].T.reshape(config.width, -1, config.head_dim)
            expected = expected if ours == "value" else expected[:, :, undo]
            np.testing.assert_array_equal(leaves[f"layers/attention/{ours}"][i], expected, err_msg=theirs)
        expected = written[f"blk.{i}.attn_output.weight"].T.reshape(-1, config.head_dim, config.width)
        np.testing.assert_array_equal(leaves["layers/attention/output"][i], expected)
        for name in ("gate", "up", "down"):
            expected = written[f"blk.{i}.ffn_{name}.weight"].T
            np.testing.assert_array_equal(leaves[f"layers/feed_forward/{name}"][i], expected, err_msg=name)


def q4_k_by_hand(block):
    """256 numbers in 8 groups: ``d scale q - m minimum``, scales and minima of 6 bits, q of 4 bits."""
    d, m = (float(block[at : at + 2].view(np.float16)[0]) for at in (0, 2))
    packed, quants = [int(b) for b in block[4:16]], [int(b) for b in block[16:]]
    numbers = []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] % 64, packed[group + 4] % 64
        else:
            scale = packed[group + 4] % 16 + packed[group - 4] // 64 * 16
            minimum = packed[group + 4] // 16 + packed[group] // 64 * 16
        for byte in quants[group // 2 * 32 : group // 2 * 32 + 32]:
            numbers.append(d * scale * (byte // 16 if group % 2 else byte % 16) - m * minimum)
    return numbers


def q6_k_by_hand(block):
    """256 numbers in 16 groups: ``d scale (q - 32)``, q of 6 bits: 4 low ones and 2 high ones in other bytes."""
    low, high, scales = (
        [int(b) for b in block[:128]],
        [int(b) for b in block[128:192]],
        [int(b) for b in block[192:208].view(np.int8)],
    )
    d, numbers = float(block[208:].view(np.float16)[0]), []
    for place in range(256):
        half, quarter, column = place // 128, place % 128 // 32, place % 32
        byte = low[64 * half + 32 * (quarter % 2) + column]
        nibble = byte // 16 if quarter > 1 else byte % 16
        top = high[32 * half + column] // 4**quarter % 4
        numbers.append(d * scales[8 * half + 2 * quarter + column // 16] * (nibble + 16 * top - 32))
    return numbers


@pytest.mark.parametrize(("kind", "by_hand"), [("Q4_K", q4_k_by_hand), ("Q6_K", q6_k_by_hand)])
def test_k_quants_by_hand(kind, by_hand, tmp_path):
    """Two rows of two blocks, number by number from the layout of the format."""
    data = blocks(kind, 4, seed=3)
    writer = gguf.GGUFWriter(str(tmp_path / "t.gguf"), "llama")
    writer.add_tensor("t", data.reshape(2, -1), raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "t.gguf")[1]["t"]
    assert tensor.shape == (2, 512)
    expected = np.array([by_hand(block) for block in data]).reshape(2, 512)
    np.testing.assert_allclose(tensor.rows(0, 2), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(tensor.rows(1, 2), tensor.rows(0, 2)[1:])


def test_tokenizer_reads_the_metadata(tmp_path):
    pytest.importorskip("tokenizers")
    tokens = ["<end>", "a", "b", "ab", "Ġ", "1", "2"] + [f"<{i}>" for i in range(33)]
    write_gguf(tmp_path / "m.gguf", model(), tokens=tokens)
    tokenizer = lm.load_pretrained(tmp_path).tokenizer
    assert tokenizer.encode("ab a12<end>") == [3, 4, 1, 5, 6, 0]
    assert tokenizer.decode([3, 4, 1, 5, 6, 0]) == "ab a12"
    assert tokenizer.decode([0], special=True) == "<end>"
    assert tokenizer.stop_tokens == (0,)


# ---- bad input


def with_kind(data, tensor, kind):
    """The bytes of a file whose header gives a matrix another type."""
    at = data.index(tensor.encode()) + len(tensor) + 4 + 2 * 8  # name, number of axes, two axes
    return data[:at] + kind.to_bytes(4, "little") + data[at + 4 :]


def test_damaged_files_and_other_quantisations_are_named_before_anything_is_read(tmp_path):
    path, name = tmp_path / "m.gguf", "blk.1.ffn_up.weight"
    write_gguf(path, model(width=256, ffn_width=256))
    data = path.read_bytes()
    cases = [
        (data[:-64], "ends at byte"),
        (data[:100], "is truncated"),
        (b"XXXX" + data[4:], "not a GGUF"),
        (data[:4] + b"\x01" + data[5:], "GGUF version must be 2 or 3"),
        (with_kind(data, name, 15), f"m.gguf='{name}': its type Q8_K cannot be dequantised. Convert the file"),
        (with_kind(data, name, 99), f"m.gguf='{name}': is of unknown type 99"),
        (with_kind(data, "token_embd.weight", 28), "begins at byte .* of the data, inside of what is before it"),
    ]
    for damaged, message in cases:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            lm.load_pretrained(path)


def test_rows_that_do_not_divide_into_blocks_are_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", model())
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(with_kind(data, "token_embd.weight", 12))
    with pytest.raises(ValueError, match=r"token_embd.weight': rows of 32 do not divide into blocks of 256"):
        lm.load_pretrained(tmp_path / "m.gguf")


def test_other_architectures_are_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", model(), architecture="gemma")
    with pytest.raises(ValueError, match=r"general\.architecture='gemma': unsupported"):
        lm.load_pretrained(tmp_path / "m.gguf")


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    tokens = ["<end>", "a", "b", "ab"] + [f"t{i}" for i in range(37)]
    write_gguf(tmp_path / "m.gguf", model(), tokens=tokens)
    with pytest.raises(ValueError, match="vocabulary=41: the tokenizer has more tokens"):
        lm.load_pretrained(tmp_path / "m.gguf")


def test_files_with_random_bytes_changed_never_raise_anything_but_a_named_error(tmp_path):
    """Sixty headers with up to three bytes changed or the end cut off (seeded)."""
    path, generator = tmp_path / "m.gguf", np.random.default_rng(0)
    write_gguf(path, model(), tokens=["<end>", "a", "b", "ab"] + [f"t{i}" for i in range(30)])
    data = path.read_bytes()
    border, refused = data.index(b"blk.1.attn_norm"), 0
    for _ in range(60):
        damaged = bytearray(data)
        for place in generator.integers(0, border, generator.integers(1, 4)):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged if generator.random() < 0.8 else damaged[: generator.integers(len(data))])
        try:
            lm.load_pretrained(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 30
