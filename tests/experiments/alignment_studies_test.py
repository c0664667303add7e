"""The studies of alignment: the language of sums and products, runs compared, answers judged by their last number."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from experiments.alignment import arithmetic_task as task
from experiments.alignment import shared_program
from experiments.alignment.arithmetic_run import ArithmeticSizes, Trace, make_model, make_trainer, train_run
from experiments.alignment.comparison import at_tokens, interval, median_steps, steps_to_reach
from experiments.alignment.families import FamiliesConfig, _compare
from experiments.alignment.own_data import OwnDataConfig, _Session
from experiments.alignment.questions import encode_prompt, load_task
from experiments.alignment.rules import candidate_rule, rule_label
from experiments.alignment.shared_program import Contestant, compiled_runs
from jaxrl_suite import lm, pareto
from jaxrl_suite.alignment.tasks import parquet_task


def _row(text):
    return [int(c) if c.isdigit() else {"o": 10, "=": 11, ";": 12, ">": 13, ".": 14, "_": 15}[c] for c in text]


@pytest.mark.parametrize(
    ("operation", "prompt", "right", "sum_for_product"),
    [("sums", "37o25=", ";21;50>260.", ">521."), ("products", "37o05=", ";53;51>581.", ">240.")],
)
def test_a_worked_example_of_each_operation(operation, prompt, right, sum_for_product):
    texts = [right, right[-5:], sum_for_product, right[:-1] + "_"]
    tokens = np.full((4, task.COMPLETION_LENGTH), task.PAD)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = _row(text)
    prompts = jnp.tile(jnp.array(_row(prompt)), (4, 1))
    correct, length, clear = task.objectives_of(
        prompts, jnp.asarray(tokens), jnp.asarray(tokens != task.PAD), operation
    )
    np.testing.assert_array_equal(correct, [1, 1, 0, 0])  # the last one never stops
    np.testing.assert_array_equal(length, [11, 5, 5, 10])
    np.testing.assert_array_equal(clear, [1, 0, 0, 1])


@pytest.mark.parametrize("operation", ["sums", "products"])
@pytest.mark.parametrize("digits", [1, 2])
def test_supervised_traces_are_right_and_vary_in_length(operation, digits):
    batch = task.supervised_batch(jax.random.key(digits), 256, digits=digits, operation=operation)
    prompts, completions = batch.tokens[:, : task.PROMPT_LENGTH], batch.tokens[:, task.PROMPT_LENGTH :]
    correct, length, clear = task.objectives_of(prompts, completions, completions != task.PAD, operation)
    assert float(correct.min()) == 1
    assert set(np.unique(length)) == {5, 8, 11, 14, 17} and 0.5 < float(clear.mean()) < 0.7
    a, b = (10 * prompts[:, i] + prompts[:, i + 1] for i in (0, 3))
    assert int(a.max()) >= 10 ** (digits - 1) and int(b.max()) < (10 if operation == "products" else 10**digits)
    result = a * b if operation == "products" else a + b
    np.testing.assert_array_equal(task.answer_digits(prompts, operation) @ jnp.array([1, 10, 100]), result)


def test_families_differ_in_their_parameters():
    shapes = {name: make_model(ArithmeticSizes(family=name)).config for name in ("llama", "qwen2", "qwen3")}
    assert (shapes["qwen3"].qk_norm, shapes["qwen2"].qkv_bias) == (True, True)
    assert not shapes["llama"].qk_norm and not shapes["llama"].qkv_bias


def test_runs_are_compared_at_equal_tokens_and_in_steps():
    traces = {
        "hypervolume": np.array([[0.1, 0.2, 0.4], [0.1, 0.3, 0.3]]),
        "tokens": np.array([[0, 10, 20], [0, 8, 16]]),
    }
    np.testing.assert_array_equal(at_tokens(traces, np.array([10, 9])), [0.2, 0.3])
    np.testing.assert_array_equal(at_tokens(traces, np.array([99, 0])), [0.4, 0.1])  # never reached: its last one
    steps = steps_to_reach(traces["hypervolume"], np.array([0.2, 0.35]), 5)
    np.testing.assert_array_equal(steps, [5, np.inf])
    assert median_steps(steps) is None and median_steps(np.array([5.0, 10.0, np.inf])) == 10
    mean, low, high = interval(np.array([0.0, 2.0]))
    assert mean == 1 and np.isclose(high - mean, 12.7062) and np.isclose(mean - low, 12.7062)  # t(0.975, 1 degree)


def test_a_rule_is_compared_with_the_fixed_run_of_its_seed():
    config = FamiliesConfig(num_steps=2, eval_every=1, num_repeats=2)
    fixed = {
        "hypervolume": np.array([[0.1, 0.2, 0.2, 0.5], [0.1, 0.1, 0.3, 0.3]]),
        "tokens": np.array([[0, 5, 10, 15]] * 2),
    }
    rule = {"hypervolume": np.array([[0.1, 0.1, 0.6], [0.1, 0.2, 0.2]]), "tokens": np.array([[0, 6, 12]] * 2)}
    found = _compare(config, {"fixed": fixed, "saw": rule})
    np.testing.assert_allclose(found["saw"]["difference"], [0.1, -0.1])  # 12 tokens: the fixed run's last checkpoint
    np.testing.assert_array_equal(found["saw"]["steps"], [2, np.inf])
    np.testing.assert_array_equal(found["fixed"]["steps"], [1, 2])
    np.testing.assert_allclose(found["fixed"]["share"], [0.2, 0.3])  # after as many steps as the rule had


def test_rules_that_share_a_program_keep_to_themselves(monkeypatch):
    """Each contestant's weights are its own, at its own length; influences and a gain have programs of their own."""
    traced = []

    def three_steps(trainer, sizes, params, key, num_steps):
        traced.append(("influence" in trainer.rule.reads, sizes.num_steps))
        state, weights = trainer.rule.init(), []
        for t in range(3):
            rewards = jax.random.uniform(jax.random.fold_in(key, t), (3, 2, 4))
            signals = pareto.Signals(rewards.mean((1, 2)), rewards[:, 0, 0], rewards, rewards.sum(0))
            state, used = trainer.rule.step(state, signals)
            weights.append(used * pareto.weight_gain(state) * params)
        weights = jnp.stack(weights)
        return Trace(weights, weights[:, 0], weights[:, 1], weights, jnp.full((3, 3), num_steps))

    monkeypatch.setattr(shared_program, "train_run", three_steps)
    config = ArithmeticSizes(num_steps=2, eval_every=1)
    settings = {"saw": 0.9, "sweep": 0.5, "influence": 0.1, "hypervolume_gain": 1.0}
    contest = {name: Contestant(candidate_rule(name, 2), 2) for name in settings}
    contest["fixed"], settings["fixed"] = Contestant(pareto.fixed_weights, 3), [0.2, 0.3, 0.5]
    runs, key = compiled_runs(contest, config, 2.0), jax.random.key(5)
    found = {name: run(key, np.broadcast_to(settings[name], 3), 1e-3) for name, run in runs.items()}
    assert sorted(traced) == [(False, 2), (False, 3), (True, 2)]  # the gain; saw, sweep and the longer run; influence
    for name, (rule, length, _) in contest.items():
        own = make_trainer(config, rule(jnp.broadcast_to(jnp.float32(settings[name]), 3)))
        expected = three_steps(own, config, 2.0, key, length)
        np.testing.assert_allclose(found[name].points, expected.points[: length + 1], rtol=1e-6)
        np.testing.assert_allclose(found[name].weights, expected.weights[:length], rtol=1e-6)
        np.testing.assert_array_equal(found[name].rewards, np.full((length, 3), length))
    assert len({trace.weights[:2].tobytes() for trace in found.values()}) == len(contest)


@pytest.mark.slow
def test_a_run_that_stops_early_is_the_start_of_a_longer_one():
    """Checkpoints, weights and tokens of the first steps are those of the whole run; afterwards there is nothing."""
    sizes = ArithmeticSizes(digits=1, width=16, num_layers=1, num_steps=4, eval_every=2, num_prompts=2, num_eval=4)
    trainer = make_trainer(sizes, pareto.saw_weights(jnp.full(3, 1 / 3), decay=0.9))
    params = lm.init_params(jax.random.key(0), make_model(sizes).config)
    run = jax.jit(lambda num_steps: train_run(trainer, sizes, params, jax.random.key(1), num_steps))
    whole, part = run(4), run(2)
    for name in Trace._fields:  # two checkpoints (the start is one), two steps
        np.testing.assert_array_equal(getattr(part, name)[:2], getattr(whole, name)[:2])
    assert not np.any(part.points[2:]) and np.any(whole.points[2:]) and not np.any(part.weights[2:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"families": ("gpt",)}, "families='gpt': must be one of llama, qwen2, qwen3"),
        ({"operations": ("sines",)}, "operations='sines'"),
        ({"rules": ("saw",)}, "must read name:number"),
        ({"rules": ("best:1",)}, "unknown rule"),
        ({"rules": ("saw:0.9", "saw:0.5")}, "must name each rule once"),
        ({"num_repeats": 1}, "an interval needs two runs"),
    ],
)
def test_bad_tables_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FamiliesConfig(**values)


def test_the_last_number_may_be_the_answer_to_own_data(tmp_path):
    path = tmp_path / "four.parquet"
    table = {"prompt": ["a", "b", None, "c"], "answer": ["1,007", "\\frac{1}{2}", "4", "-3"]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    questions = load_task(OwnDataConfig(judge="last_number"), str(path))
    assert list(questions.columns["answer"]) == ["1007", "-3"] and len(questions.prompts) == 2
    assert questions.skipped == {"no prompt": [2], "answer is no number": [1]}
    texts = ["It is 7, no, 1,007.0", "3"]
    assert questions.accuracy(questions.prompts, texts, **questions.columns) == [1.0, 0.0]
    assert questions.accuracy(questions.prompts, ["none", "so -3."], **questions.columns) == [0.0, 1.0]
    boxed = load_task(OwnDataConfig(), str(path))  # as published: the last box
    assert boxed.accuracy(["a"], ["\\boxed{-3}"], answer=["-3"]) == [1.0] and len(boxed.prompts) == 3
    with pytest.raises(ValueError, match="judge='whole': must be usual, boxed or last_number with --data"):
        OwnDataConfig(data=str(path), judge="whole")
    with pytest.raises(ValueError, match="judge='whole': must be boxed or last_number for questions from a file"):
        parquet_task(path, judge="whole")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": ["x"]}), path)
    with pytest.raises(ValueError, match=r"no row has a prompt and an answer to judge.*answer is no number"):
        parquet_task(path, judge="last_number")


@pytest.fixture
def graded(tmp_path):
    path = tmp_path / "graded.parquet"
    table = {"prompt": ["a", "b", "c", "d"], "answer": ["1", "2", "3", "4"], "level": [1, 2, 2, 3],
             "worth": [0.1, 0.2, 0.6, 0.9]}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return str(path)


def test_rows_are_chosen_by_a_column_before_they_are_counted(graded):
    chosen = load_task(OwnDataConfig(data=graded, rows="level = 2| 3", num_questions=2), graded)
    assert list(chosen.columns["answer"]) == ["2", "3"] and len(chosen.prompts) == 2
    with pytest.raises(ValueError, match=r"rows='grade=1': no column 'grade'.*level"):
        load_task(OwnDataConfig(data=graded, rows="grade=1"), graded)
    with pytest.raises(ValueError, match=r"no question has one of these values.*Values of level: 1, 2, 3"):
        load_task(OwnDataConfig(data=graded, rows="level=7"), graded)
    with pytest.raises(ValueError, match=r"rows='level': is not column=value\|value"):
        load_task(OwnDataConfig(data=graded, rows="level"), graded)
    with pytest.raises(ValueError, match="rows='level=1': filters --data, which is empty"):
        load_task(OwnDataConfig(rows="level=1"), "")


def test_a_worked_example_stands_before_the_question_and_a_start_before_the_answer():
    config = OwnDataConfig(system="Be brief.", example_question="1+1?", example_answer="2", answer_start="So")
    tokenizer = lm.ByteTokenizer()
    text = tokenizer.decode(encode_prompt("2+2?", tokenizer, config))
    assert text == "Be brief.\n1+1?\n2\n2+2?\nSo"
    with pytest.raises(ValueError, match="question and answer of an example go together"):
        OwnDataConfig(example_answer="2")


def test_held_out_questions_are_answered_once_each(graded, tmp_path):
    """Three questions in batches of two: the place that is left over counts for nothing; every text has its start."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "def worth(prompts, completions, worth, **columns):\n    return worth\n"
        "def begun(prompts, completions, **columns):\n    return [float(c.startswith('So')) for c in completions]\n"
        "def failed(prompts, completions, **columns):\n    return [None for _ in completions]\n"
    )
    config = OwnDataConfig(
        data=graded, test_data=graded, num_test=3, rewards=str(rewards), objectives="worth,begun,failed",
        num_prompts=2, group_size=2, max_prompt=80, max_tokens=2, answer_start="So",
    )  # fmt: skip
    session = _Session(config, jax.random.key(0))
    found = session.evaluate(session.init())
    assert np.isclose(found["worth"], 0.3) and found["begun"] == 1 and "failed" not in found
    assert 0 < found["tokens"] <= 2 and 0 <= found["ended"] <= 1


def test_rules_are_named_as_their_papers_do():
    assert [rule_label(n) for n in ("saw", "mo_grpo", "hypervolume_gain")] == ["SAW", "MO-GRPO", "hypervolume gain"]
