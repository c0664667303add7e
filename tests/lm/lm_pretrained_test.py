import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_suite import lm

GOLDEN = Path(__file__).parent.parent / "golden" / "lm"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))


def assert_equal_params(actual, expected):
    actual, expected = lm.flatten(actual), lm.flatten(expected)
    assert actual.keys() == expected.keys()
    for path in actual:
        np.testing.assert_array_equal(np.asarray(actual[path]), np.asarray(expected[path]), err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact_also_in_shards(case, tmp_path):
    """Property 20: what save_pretrained writes is the file of transformers, tensor by tensor, and loads again."""
    pretrained = lm.load_pretrained(GOLDEN / case)
    for name, shard in (("whole", 5_000_000_000), ("shards", 4_000)):
        again = lm.load_pretrained(lm.save_pretrained(tmp_path / name, pretrained, max_shard_bytes=shard))
        assert again.config == pretrained.config
        assert_equal_params(again.params, pretrained.params)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", GOLDEN / case))
    assert header(ours) == header(theirs)


def header(data):
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__")
    start = 8 + length
    return {
        name: (e["dtype"], e["shape"], data[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in entries.items()
    }


def test_each_device_reads_its_own_part(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    specs = {
        "layers/feed_forward/experts/gate": P(None, "x", None, "y"),
        "layers/attention/query": P(None, "x", "y"),
        "embed/table": P("x", "y"),
        "layers/attention/query_bias": P(None, "y"),
    }
    pretrained = lm.load_pretrained(
        GOLDEN / "qwen2_moe", sharding=lambda path, shape: NamedSharding(mesh, specs.get(path, P()))
    )
    leaves = lm.flatten(pretrained.params)
    assert leaves["layers/feed_forward/experts/gate"].sharding.spec == specs["layers/feed_forward/experts/gate"]
    assert_equal_params(pretrained.params, lm.load_pretrained(GOLDEN / "qwen2_moe").params)


def test_bfloat16_rounds_each_number():
    whole = lm.flatten(lm.load_pretrained(GOLDEN / "llama").params)
    half = lm.load_pretrained(GOLDEN / "llama", dtype="bfloat16")
    assert half.config.param_dtype == "bfloat16"
    for path, leaf in lm.flatten(half.params).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(whole[path].astype(jnp.bfloat16)))


# ---- GGUF: files written by the gguf package from known numbers


def write_gguf(path, pretrained, quantise=None, tokens=None, architecture="llama"):
    gguf = pytest.importorskip("gguf")
    config = pretrained.config
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
    leaves = lm.flatten(pretrained.params)
    written = {}

    def add(name, array):
        array = np.ascontiguousarray(array, np.float32)
        if quantise is None or array.ndim == 1:
            writer.add_tensor(name, array)
            written[name] = array
        else:
            data = gguf.quants.quantize(array, quantise)
            writer.add_tensor(name, data, raw_dtype=quantise)
            written[name] = gguf.quants.dequantize(data, quantise)

    add("token_embd.weight", leaves["embed/table"])
    add("output_norm.weight", leaves["final_norm/scale"])
    for i in range(config.num_layers):
        for ours, theirs in (("attention_norm/scale", "attn_norm"), ("feed_forward_norm/scale", "ffn_norm")):
            add(f"blk.{i}.{theirs}.weight", leaves[f"layers/{ours}"][i])
        for ours, theirs in (("query", "attn_q"), ("key", "attn_k"), ("value", "attn_v")):
            w = np.asarray(leaves[f"layers/attention/{ours}"][i])  # [D, H, C]
            if ours != "value":  # row 2 j + s of a head holds dimension j + s C / 2
                half = config.head_dim // 2
                order = [j + s * half for j in range(half) for s in range(2)]
                w = w[:, :, order]
            add(f"blk.{i}.{theirs}.weight", w.reshape(config.width, -1).T)
        add(f"blk.{i}.attn_output.weight", np.asarray(leaves["layers/attention/output"][i]).reshape(-1, config.width).T)
        for name in ("gate", "up", "down"):
            add(f"blk.{i}.ffn_{name}.weight", np.asarray(leaves[f"layers/feed_forward/{name}"][i]).T)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def model_of_width_32():
    config = lm.LanguageModelConfig(
        vocab_size=40, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=64, norm_eps=2**-16
    )
    return lm.Pretrained(lm.LanguageModel(config), lm.init_params(jax.random.key(0), config), config, None)


def test_gguf_undoes_the_interleaved_rows(tmp_path):
    expected = model_of_width_32()
    write_gguf(tmp_path / "model.gguf", expected)
    actual = lm.load_pretrained(tmp_path)
    assert actual.config == expected.config
    assert_equal_params(actual.params, expected.params)


@pytest.mark.parametrize("quantisation", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_quantised_tensors_are_what_the_package_dequantises(quantisation, tmp_path):
    gguf = pytest.importorskip("gguf")
    written = write_gguf(tmp_path / "m.gguf", model_of_width_32(), getattr(gguf.GGMLQuantizationType, quantisation))
    leaves = lm.flatten(lm.load_pretrained(tmp_path / "m.gguf").params)
    for i in range(2):
        for name in ("gate", "up", "down"):
            expected = written[f"blk.{i}.ffn_{name}.weight"].T
            np.testing.assert_array_equal(leaves[f"layers/feed_forward/{name}"][i], expected)
    np.testing.assert_array_equal(leaves["embed/table"], written["token_embd.weight"])


def test_gguf_tokenizer_reads_its_metadata(tmp_path):
    pytest.importorskip("tokenizers")
    tokens = ["<end>", "a", "b", "ab", "Ġ", "1", "2"] + [f"<{i}>" for i in range(33)]
    write_gguf(tmp_path / "m.gguf", model_of_width_32(), tokens=tokens)
    tokenizer = lm.load_pretrained(tmp_path).tokenizer
    assert tokenizer.encode("ab a12<end>") == [3, 4, 1, 5, 6, 0]
    assert tokenizer.decode([3, 4, 1, 5, 6, 0]) == "ab a12"
    assert tokenizer.decode([0], special=True) == "<end>"
    assert tokenizer.stop_tokens == (0,)


# ---- bad input


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type='gpt2': unsupported architecture"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act='gelu': must be silu"),
        ({"attention_bias": True}, "attention_bias=True: is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic': unsupported"),
        ({"intermediate_size": 24}, r"gate_proj.weight=\(20, 16\): shape must be \(24, 16\)"),
        ({"num_hidden_layers": 3}, "9 missing .*model.layers.2"),
        ({"num_hidden_layers": 1}, "9 unexpected .*model.layers.1"),
        ({"tie_word_embeddings": False}, "1 missing .lm_head.weight"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        lm.load_pretrained(folder)


def test_mixed_dense_and_sparse_layers_are_refused_by_name(tmp_path):
    shutil.copytree(GOLDEN / "qwen2_moe", tmp_path / "m")
    edit_config(tmp_path / "m", mlp_only_layers=[0])
    with pytest.raises(ValueError, match=r"mlp_only_layers=\[0\]: dense and sparse layers cannot be mixed"):
        lm.load_pretrained(tmp_path / "m")


def damage(data, what):
    length = int.from_bytes(data[:8], "little")
    if what == "cut":
        return data[:-10]
    if what == "cut_header":
        return data[:20]
    if what == "empty":
        return b""
    if what == "not_json":
        return data[:8] + b"x" * length + data[8 + length :]
    if what == "shape":
        return data.replace(b'"shape":[16]', b'"shape":[17]', 1)
    return data.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut", "model.safetensors=.*ends at byte"),
        ("cut_header", "is truncated"),
        ("empty", "too short"),
        ("not_json", "header is not JSON"),
        ("shape", "but its shape .17,. needs 68"),
        ("dtype", "dtype I32 is not supported"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_read(folder, what, message):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes(), what))
    with pytest.raises(ValueError, match=message):
        lm.load_pretrained(folder)


def test_a_missing_shard_is_named(tmp_path):
    lm.save_pretrained(tmp_path / "m", lm.load_pretrained(GOLDEN / "llama"), max_shard_bytes=4_000)
    next((tmp_path / "m").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002.*the shard that it names is missing"):
        lm.load_pretrained(tmp_path / "m")


def test_damaged_gguf_files_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, model_of_width_32())
    data = path.read_bytes()
    for cut, message in (
        (data[:-64], "ends at byte"),
        (data[:100], "is truncated"),
        (b"XXXX" + data[4:], "not a GGUF"),
    ):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=message):
            lm.load_pretrained(path)


def test_other_architectures_of_gguf_are_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", model_of_width_32(), architecture="gemma")
    with pytest.raises(ValueError, match=r"general\.architecture='gemma': unsupported"):
        lm.load_pretrained(tmp_path / "m.gguf")


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    write_gguf(
        tmp_path / "m.gguf", model_of_width_32(), tokens=["<end>", "a", "b", "ab"] + [f"t{i}" for i in range(37)]
    )
    with pytest.raises(ValueError, match="vocabulary=41: the tokenizer has more tokens"):
        lm.load_pretrained(tmp_path / "m.gguf")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        lm.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor a .gguf"):
        lm.load_pretrained(tmp_path)


# ---- export


def test_export_overwrites_only_when_told(tmp_path):
    pretrained = lm.load_pretrained(GOLDEN / "llama")
    lm.save_pretrained(tmp_path / "m", pretrained)
    with pytest.raises(ValueError, match=r"exists\. Give another name or overwrite=True"):
        lm.save_pretrained(tmp_path / "m", pretrained)
    (tmp_path / "m" / "stale").touch()
    lm.save_pretrained(tmp_path / "m", pretrained, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    assert not (tmp_path / "m" / "stale").exists()


def test_export_refuses_what_the_family_cannot_express(tmp_path):
    pretrained = lm.load_pretrained(GOLDEN / "mixtral")
    config = pretrained.config.replace(router_score="sigmoid")
    with pytest.raises(ValueError, match="router_score='sigmoid': family 'mixtral' cannot express it"):
        lm.save_pretrained(tmp_path / "m", pretrained._replace(config=config))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.subprocess
def test_a_killed_export_leaves_nothing_that_looks_whole(tmp_path):
    """The process dies in the middle of the second tensor file."""
    code = f"""
import os
from jaxrl_suite import lm
from jaxrl_suite.lm import pretrained
write, count = pretrained.write_safetensors, []
def dying(path, tensors, read):
    count.append(path)
    if len(count) == 2:
        path.write_bytes(b"half")
        os._exit(9)
    write(path, tensors, read)
pretrained.write_safetensors = dying
lm.save_pretrained({str(tmp_path / "m")!r}, lm.load_pretrained({str(GOLDEN / "llama")!r}), max_shard_bytes=4000)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert not (tmp_path / "m").exists()
    assert all(path.name.startswith(".m.partial-") for path in tmp_path.iterdir())
