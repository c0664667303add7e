"""Questions of a run on own data: read, chosen by a column, encoded, and dealt in batches."""

import ast
import logging
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.alignment.tasks import Task, parquet_task, reasoning_gym_task
from jaxrl_suite.config import check
from jaxrl_suite.types import Array

if TYPE_CHECKING:
    from experiments.alignment.own_data import OwnDataConfig

log = logging.getLogger(__name__)


def load_task(config: "OwnDataConfig", data: str) -> Task:
    """Questions of a parquet file that pass the filter of rows; of a reasoning-gym generator without a file."""
    if data:
        task = parquet_task(data, prompt_column=config.prompt_column, answer_column=config.answer_column,
                            judge="last_number" if config.judge == "last_number" else "boxed")  # fmt: skip
        return _first(_chosen(task, config.rows), config.num_questions)
    check(not config.rows, argument="rows", value=config.rows, rule="filters --data, which is empty",
          remedy="Add --data=FILE.parquet")  # fmt: skip
    judge = "whole" if config.judge == "usual" else config.judge
    return reasoning_gym_task(
        config.task, num_questions=config.num_questions, judge=judge, **_settings(config.task_settings)
    )


def _chosen(task: Task, rows: str) -> Task:
    """The questions whose column has one of the values of ``column=value|value``; all without it."""
    if not rows:
        return task
    column, equals, values = (part.strip() for part in rows.partition("="))
    check(bool(equals), argument="rows", value=rows, rule="is not column=value|value",
          remedy=f"Columns: {', '.join(task.columns)}")  # fmt: skip
    check(column in task.columns, argument="rows", value=rows, rule=f"no column {column!r}",
          remedy=f"Columns: {', '.join(task.columns)}")  # fmt: skip
    wanted = {value.strip() for value in values.split("|")}
    keep = [i for i, value in enumerate(task.columns[column]) if str(value) in wanted]
    found = sorted({str(value) for value in task.columns[column]})[:8]
    check(bool(keep), argument="rows", value=rows, rule="no question has one of these values",
          remedy=f"Values of {column}: {', '.join(found)}")  # fmt: skip
    return _pick(task, keep)


def _first(task: Task, count: int) -> Task:
    return _pick(task, list(range(min(count, len(task.prompts)))))


def _pick(task: Task, which: list[int]) -> Task:
    columns = {name: [column[i] for i in which] for name, column in task.columns.items()}
    return task._replace(prompts=[task.prompts[i] for i in which], columns=columns)


def _settings(text: str) -> dict[str, Any]:
    """``name=value`` pairs, separated by commas; values are numbers, true, false, or words."""
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        check(bool(equals) and name.isidentifier(), argument="task_settings", value=part, rule="is not name=value",
              remedy="Separate pairs by commas: max_terms=2,max_digits=1")  # fmt: skip
        check(name not in ("name", "num_questions", "judge", "size"), argument="task_settings", value=part,
              rule="is set by --task, --num_questions or --judge")  # fmt: skip
        try:
            settings[name] = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def encode_prompt(prompt: Any, tokenizer: Any, config: "OwnDataConfig") -> list[int]:
    """Tokens of a prompt, a text or chat turns, behind system turn and worked example, before the answer's start."""
    turns = [{"role": "system", "content": config.system}] if config.system else []
    if config.example_question:
        turns.append({"role": "user", "content": config.example_question})
        turns.append({"role": "assistant", "content": config.example_answer})
    turns.extend(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])
    return _tokens(turns, tokenizer) + (tokenizer.encode(config.answer_start) if config.answer_start else [])


def _tokens(turns: list[Any], tokenizer: Any) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.chat(turns)
    return tokenizer.encode("\n".join(turn["content"] for turn in turns) + "\n", special=True)


class Questions:
    """Encoded questions that fit the window, and where they came from."""

    def __init__(self, task: Task, tokenizer: Any, config: "OwnDataConfig") -> None:
        encoded = [encode_prompt(prompt, tokenizer, config) for prompt in task.prompts]
        self.kept = [i for i, tokens in enumerate(encoded) if 0 < len(tokens) <= config.max_prompt]
        self.skipped = {reason: len(rows) for reason, rows in task.skipped.items()}
        self.skipped["prompt too long"] = len(encoded) - len(self.kept)
        check(bool(self.kept), argument="max_prompt", value=config.max_prompt, rule="every prompt is longer",
              remedy=f"The shortest has {min(map(len, encoded))} tokens")  # fmt: skip
        for reason, count in self.skipped.items():
            if count:
                log.warning("%d of the questions are left out: %s", count, reason)
        self.task, self.tokenizer, self.config = task, tokenizer, config
        self.encoded = [encoded[i] for i in self.kept]

    def batch(self, key: Array, step: int) -> tuple[Array, Array, list[int]]:
        """Questions of a step: every epoch is a permutation of its own."""
        size, number = self.config.num_prompts, len(self.encoded)
        places = np.arange(step * size, (step + 1) * size)
        order = {
            e: np.asarray(jax.random.permutation(jax.random.fold_in(key, e), number)) for e in set(places // number)
        }
        chosen = [int(order[place // number][place % number]) for place in places]
        return (*self.padded(chosen), chosen)

    def padded(self, chosen: list[int]) -> tuple[Array, Array]:
        """Prompts [B, max_prompt] of the chosen questions, padded in front, and their mask."""
        tokens = np.full((len(chosen), self.config.max_prompt), self.tokenizer.pad_token, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, which in enumerate(chosen):
            tokens[row, -len(self.encoded[which]) :] = self.encoded[which]
            mask[row, -len(self.encoded[which]) :] = True
        return jnp.asarray(tokens), jnp.asarray(mask)
