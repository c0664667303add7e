"""Live comparison with transformers on real and tiny models; needs the extra ``parity``.

python -m pip install -e ".[parity,test]"
python -m experiments.common.fetch_model smollm2-135m
python -m pytest -m slow -n0 tests/lm/lm_live_test.py -s
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_suite import lm

pytestmark = pytest.mark.slow
MODEL = Path(os.environ.get("SMOLLM2", ".cache/models/smollm2-135m"))
GOLDEN = Path(__file__).parent.parent / "golden" / "lm"
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain recursion to a child.",
    "def quicksort(values):",
    "What is 12 + 7?",
    "Name three primary colours.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "List the planets of the solar system.",
    "Why is the sky blue?",
    "Give a synonym of 'quick'.",
    "What does HTTP stand for?",
    "Tell me a short story about a fox.",
    "How many days are in a leap year?",
    "Summarise the water cycle.",
    "What is the boiling point of water in Celsius?",
    "The year 1969 was",
    "Describe a sunset in two sentences.",
    "What is photosynthesis?",
    "Continue: one, two, three,",
]


@pytest.fixture(scope="module")
def both():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if not MODEL.exists():
        pytest.skip(f"no model at {MODEL}")
    file = next(MODEL.glob("*.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL, gguf_file=file.name, dtype=torch.float32).eval()
    return torch, theirs, lm.load_pretrained(MODEL)


def test_logits_and_greedy_text_of_the_real_model(both):
    """Within 1e-5 of the largest |logit| on 20 prompts; 64 greedy tokens equal unless the two best are closer."""
    torch, theirs, ours = both
    worst, equal = 0.0, 0
    apply = jax.jit(lambda params, tokens, segments: lm.apply(params, tokens, config=ours.config, segments=segments))
    rows = [ours.tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    prompts, mask = lm.left_pad(rows)
    logits = np.asarray(apply(ours.params, prompts, mask.astype(np.int32)))
    sampling = lm.Sampling(max_tokens=64, greedy=True, stop_tokens=ours.tokenizer.stop_tokens)
    ids = np.arange(len(rows))
    out = lm.generate(jax.random.key(0), ours.model, ours.params, prompts, mask, row_ids=ids, sampling=sampling)
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = theirs(torch.tensor([row])).logits[0].numpy()
        error = np.abs(logits[i, -len(row) :] - expected).max() / np.abs(expected).max()
        worst = max(worst, float(error))
        mine = np.asarray(out.tokens[i])[np.asarray(out.mask[i])].tolist()
        with torch.no_grad():
            full = theirs(torch.tensor([row + mine])).logits[0].numpy()
        for t, token in enumerate(mine):
            step = full[len(row) + t - 1]
            best = int(step.argmax())
            gap = step[best] - step[token]
            assert gap <= 2e-5 * np.abs(step).max(), (PROMPTS[i], t, gap)
        equal += all(int(full[len(row) + t - 1].argmax()) == token for t, token in enumerate(mine))
    print(f"largest error / largest |logit| {worst:.2e}; greedy rows identical {equal} of {len(rows)}")
    assert worst < 1e-5


def test_tokenizers_agree(both):
    transformers = pytest.importorskip("transformers")
    file = next(MODEL.glob("*.gguf"))
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL, gguf_file=file.name)
    ours = both[2].tokenizer
    texts = [*PROMPTS, "Ünïcode, tabs\tand\n\nlines; 1234567 emoji 🙂 <|im_end|>", "  leading and trailing  "]
    for text in texts:
        tokens = ours.encode(text)
        assert tokens == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(tokens, special=True) == text
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    expected = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert ours.render(turns) == expected


@pytest.mark.parametrize("case", sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz")))
def test_export_loads_in_transformers(case, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm.save_pretrained(tmp_path / case, lm.load_pretrained(GOLDEN / case), max_shard_bytes=8_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / case, dtype=torch.float32).eval()
    expected = np.load(GOLDEN / case / "expected.npz")
    with torch.no_grad():
        logits = model(torch.tensor(expected["tokens"]).long()).logits.numpy()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


def test_export_of_the_real_model_loads_in_transformers(both, tmp_path):
    torch, theirs, ours = both
    transformers = pytest.importorskip("transformers")
    lm.save_pretrained(tmp_path / "m", ours)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    tokens = torch.tensor([tokenizer.encode("The export of a model")])
    with torch.no_grad():
        difference = (again(tokens).logits - theirs(tokens).logits).abs().max()
    assert float(difference) < 1e-4
