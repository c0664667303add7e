"""Verifiable tasks: generators of the reasoning-gym package by name, and questions from a parquet file.

Both become a :class:`Task`: prompts, columns for the reward functions, and the accuracy that belongs to them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxrl_suite.alignment import text_rewards
from jaxrl_suite.config import check

INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."


Judge = Literal["whole", "boxed", "last_number"]
_FIND: dict[str, Callable[[str], str | None]] = {
    "whole": str.strip,
    "boxed": text_rewards.last_boxed,
    "last_number": text_rewards.last_number,
}


class Task(NamedTuple):
    """Questions with what is needed to judge answers.

    Attributes:
        prompts: one question each: a text, or a list of chat turns ``{"role", "content"}``.
        columns: name -> one entry a question, handed to every reward function.
        accuracy: the reward that judges correctness.
        skipped: reason -> rows of the file that were left out.
    """

    prompts: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]
    accuracy: Callable[..., Sequence[float | None]]
    skipped: Mapping[str, Sequence[int]]


def reasoning_gym_task(
    name: str, *, num_questions: int, seed: int = 0, judge: Judge = "whole", **settings: Any
) -> Task:
    """Questions of a reasoning-gym generator, deterministic in the seed.

    Args:
        name: of the generator, for example "chain_sum" or "gcd".
        num_questions: how many.
        seed: of the generator.
        judge: what of a completion is the answer: "whole", "boxed" (a box is asked for, and the last one counts) or
            "last_number" (for models that answer in sentences).
        **settings: difficulty settings of the generator.

    Returns:
        The task; accuracy is the generator's own ``score_answer``, which may give partial credit.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: there is no generator of that name, or it refuses the settings.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(
            "Reasoning tasks need reasoning-gym. Remedy: python -m pip install 'jaxrl-suite[experiments]'"
        ) from error
    check(name in DATASETS, argument="task", value=name, rule=f"no such generator among {len(DATASETS)}",
          remedy="See reasoning_gym.factory.DATASETS, for example chain_sum, gcd, number_sorting")  # fmt: skip
    check(judge in _FIND, argument="judge", value=judge, rule=f"must be one of {', '.join(_FIND)}")
    find = _FIND[judge]
    check(num_questions > 0, argument="num_questions", value=num_questions, rule="must be positive")
    try:
        dataset = reasoning_gym.create_dataset(name, size=num_questions, seed=seed, **settings)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"task={name!r}: the generator refuses {settings!r}: {error}.") from error
    entries = [dataset[i] for i in range(num_questions)]

    def accuracy(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        del prompts
        scores: list[float | None] = []
        for text, entry in zip(completions, columns["entry"], strict=True):
            answer = find(text)
            scores.append(0.0 if answer is None else float(dataset.score_answer(answer, entry)))
        return scores

    ask = f" {INSTRUCTION}" if judge == "boxed" else ""
    prompts = [entry["question"] + ask for entry in entries]
    return Task(prompts, {"entry": entries, "answer": [entry["answer"] for entry in entries]}, accuracy, {})


def _cell(row: Mapping[str, Any], path: str) -> Any:
    """A value by a dotted path through nested columns."""
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def parquet_task(
    path: str | Path,
    *,
    prompt_column: str = "prompt",
    answer_column: str = "reward_model.ground_truth",
    max_questions: int | None = None,
    boxed: bool = True,
    judge: Literal["boxed", "last_number"] = "boxed",
) -> Task:
    """Questions from a parquet file: the paper's MATH splits, or one's own.

    A prompt is a text (which then gets the instruction to box the answer) or a list of chat turns. Rows without a
    prompt or an answer that can be judged are left out and listed in ``skipped``. All other columns are handed to the
    reward functions.

    Args:
        path: the file.
        prompt_column: name, dots for nested columns.
        answer_column: name, dots for nested columns; "answer" is tried if it does not exist.
        max_questions: only the first ones; all by default.
        boxed: add the instruction to prompts that are texts.
        judge: what of a completion is the answer: "boxed" (the last box, as published) or "last_number" (for models
            that never box); then answers that are no number are left out.

    Returns:
        The task; accuracy compares what is judged with the answer.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: the file, a column or every single row is missing.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow. Remedy: python -m pip install 'jaxrl-suite[experiments]'"
        ) from error
    check(judge in ("boxed", "last_number"), argument="judge", value=judge,
          rule="must be boxed or last_number for questions from a file")  # fmt: skip
    path = Path(path)
    check(path.is_file(), argument="data", value=str(path), rule="no such file")
    try:
        table = parquet.read_table(path)
    except Exception as error:
        raise ValueError(f"data={str(path)!r}: is not a parquet file ({error}).") from error
    names = table.column_names
    if answer_column.split(".")[0] not in names and "answer" in names:
        answer_column = "answer"
    for argument, column in (("prompt_column", prompt_column), ("answer_column", answer_column)):
        check(column.split(".")[0] in names, argument=argument, value=column, rule=f"{path.name} has no such column",
              remedy=f"Its columns: {', '.join(names)}")  # fmt: skip
    prompts, answers, rows = [], [], []
    skipped: dict[str, list[int]] = {}
    for number, row in enumerate(table.slice(0, max_questions).to_pylist()):
        prompt, answer = _cell(row, prompt_column), _cell(row, answer_column)
        if not prompt or answer is None or str(answer).strip() == "":
            skipped.setdefault("no prompt" if not prompt else "no answer", []).append(number)
            continue
        answer = str(answer)
        if judge == "last_number":
            answer = answer.replace(",", "")
            if text_rewards.last_number(answer) != answer:
                skipped.setdefault("answer is no number", []).append(number)
                continue
        if isinstance(prompt, str):
            prompt = f"{prompt} {INSTRUCTION}" if boxed else prompt
        prompts.append(prompt)
        answers.append(answer)
        rows.append(row)
    check(bool(prompts), argument="data", value=str(path), rule="no row has a prompt and an answer to judge",
          remedy=f"Rows left out: { {reason: len(which) for reason, which in skipped.items()} }")  # fmt: skip
    reserved = {"prompts", "completions", "prompt", "completion", "answer"}
    extra = {name: [row[name] for row in rows] for name in names if name not in reserved}
    accuracy = text_rewards.accuracy if judge == "boxed" else _number_accuracy
    return Task(prompts, {**extra, "answer": answers}, accuracy, skipped)


def _number_accuracy(
    prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """1 where the last number of a completion is the answer."""
    del prompts, columns
    given = [text_rewards.last_number(text) for text in completions]
    return [float(g is not None and float(g) == float(a)) for g, a in zip(given, answer, strict=True)]
