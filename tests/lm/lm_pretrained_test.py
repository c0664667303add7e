import json
import shutil
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
        ({"vocab_size": 31}, r"embed_tokens.weight=\(24, 16\): shape must be \(31, 16\), as config.json"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers of 1 tensors need more than the 20 tensors"),
        ({"num_key_value_heads": 0.5}, "num_kv_heads=0.5"),
        ({"rope_parameters": ["yarn"]}, r"config.json: rope_parameters=\['yarn'\]: must be an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"model: its description is damaged .*KeyError\('factor'\)"),
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
    if what == "longer":
        return data + b"more"
    if what == "shape":
        return data.replace(b'"shape":[16]', b'"shape":[17]', 1)
    if what == "twice":  # the second tensor stands where the first does
        header = json.loads(data[8 : 8 + length])
        names = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        same = next(n for n in names[1:] if header[n]["shape"] == header[names[1]]["shape"] and n != names[1])
        header[same]["data_offsets"] = header[names[1]]["data_offsets"]
        return data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + data[8 + length :]
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
        ("longer", "bytes'?: must be .* bytes, as its header says"),
        ("twice", "begins at byte .* of the data, but what is before it ends at"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"model.norm.weight": "../model.safetensors"}, "must be a file of the same folder"),
        (lambda m: m | {"more": m["model.norm.weight"]}, "safetensors='more': the index puts this tensor here"),
        (
            lambda m: {n: f for n, f in m.items() if n != "model.norm.weight"},
            "'model.norm.weight': is stored here, but",
        ),
        (lambda m: ["model.norm.weight"], "its description is damaged"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_named(change, message, tmp_path):
    path = lm.save_pretrained(tmp_path / "m", lm.load_pretrained(GOLDEN / "llama"), max_shard_bytes=4_000)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(ValueError, match=message):
        lm.load_pretrained(path)


def test_a_tokenizer_with_a_number_beyond_the_table_is_refused(folder):
    """Also where holes keep the count of its tokens small."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 32}, unk_token="a"))
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="vocabulary=33: the tokenizer has more tokens than the embedding table has"):
        lm.load_pretrained(folder)


def test_changed_bytes_and_fields_never_raise_anything_but_a_named_error(folder):
    """Sixty damaged headers and every field of config.json replaced (seeded)."""
    file, generator = folder / "model.safetensors", np.random.default_rng(0)
    data, refused = file.read_bytes(), 0
    length = 8 + int.from_bytes(data[:8], "little")

    def load():
        try:
            lm.load_pretrained(folder)
        except ValueError as error:
            assert str(folder) in str(error)
            return 1
        return 0

    for _ in range(60):
        damaged = bytearray(data)
        for place in generator.integers(0, length, generator.integers(1, 4)):
            damaged[place] = generator.integers(256)
        file.write_bytes(damaged)
        refused += load()
    assert refused > 50
    file.write_bytes(data)
    values = json.loads((folder / "config.json").read_text())
    for name in values:
        for value in ("x", {"rope_type": 3}, 10**12):
            (folder / "config.json").write_text(json.dumps(values | {name: value}))
            refused += load()
    assert refused > 80


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        lm.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor a .gguf"):
        lm.load_pretrained(tmp_path)
