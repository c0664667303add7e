"""Trains a model of your own on questions of your own, with several rewards and weights that may change."""

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.alignment.presets import PRESETS
from experiments.alignment.questions import Questions, load_task
from experiments.alignment.rules import RULES, make_rule
from experiments.common.study import Result, Study
from jaxrl_suite import alignment, lm, pareto
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnDataConfig(Config):
    """What is trained, on what, and how."""

    model: str = field("", help="Hugging Face folder or GGUF file; empty: a tiny random byte model, to try things out")
    data: str = field("", help="parquet file with questions and answers; empty: the reasoning-gym task below")
    prompt_column: str = field("prompt", help="column of the questions, dots for nested columns")
    answer_column: str = field("reward_model.ground_truth", help="column of the answers; 'answer' is tried too")
    task: str = field("chain_sum", help="generator of reasoning-gym, used without --data")
    task_settings: str = field("", help="settings of that generator, for example max_terms=2,max_digits=1")
    judge: Literal["usual", "whole", "boxed", "last_number"] = field(
        "usual", help="what of a completion is its answer; usual: the whole with --task, the last box with --data"
    )
    rows: str = field("", help="only rows of the files whose column has one of the values: level=Level 1|Level 2")
    num_questions: int = field(256, help="questions at most")
    test_data: str = field("", help="parquet file of held-out questions, answered before and after the training")
    num_test: int = field(32, help="held-out questions, group_size answers each")
    system: str = field("", help="system turn before every question; the model's own if empty")
    example_question: str = field("", help="question of a worked example before every question; none if empty")
    example_answer: str = field("", help="its answer, in the form that is wanted")
    answer_start: str = field("", help="what every answer begins with; counts as part of it for the rewards")
    objectives: str = field("accuracy,conciseness,clarity", help="objectives, comma-separated, in this order")
    rewards: str = field("", help="Python file with functions f(prompts, completions, **columns) named like objectives")
    weights: str = field("influence", help="weight rule: " + ", ".join(RULES))
    base_weights: tuple[float, ...] = field((), help="initial or fixed weights; equal if empty")
    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = field("grpo", help="how advantages are estimated")
    combine: Literal["reward", "advantage", "gdpo", "mo_grpo"] = field("reward", help="how objectives are joined")
    gain_on: Literal["reward", "advantage", "lr"] = field("advantage", help="where the hypervolume gain acts")
    num_steps: int = field(40, help="rollouts")
    num_prompts: int = field(8, help="questions a rollout")
    group_size: int = field(8, help="completions a question")
    num_minibatches: int = field(1, help="optimiser steps a rollout")
    num_microbatches: int = field(1, help="pieces that are differentiated one after another: less memory, same result")
    max_prompt: int = field(256, help="longest prompt in tokens; longer ones are left out and counted")
    max_tokens: int = field(128, help="longest completion in tokens")
    temperature: float = field(1.0, help="of sampling")
    learning_rate: float = field(1e-5, help="of AdamW")
    schedule: Literal["constant", "polynomial"] = field(
        "constant", help="of the learning rate; polynomial is the paper's"
    )
    mu: float = field(1e-4, help="regulariser of the influence rule; its exponent scale is learning_rate / mu")
    kl_coefficient: float = field(0.0, help="penalty on the divergence from the initial model; 0 is off")
    clip: float = field(0.2, help="the likelihood ratio is clipped to 1 +- this; 100 is off")
    kl_in_influence: bool = field(False, help="include the penalty in the gradients of the influence (published: True)")
    influence_clip: float | None = field(None, help="norm to which those gradients are clipped (published: 1.0)")
    influence_paths: tuple[str, ...] = field((), help="parameters that count in the influence; all if empty")
    influence_layers: tuple[int, ...] = field((), help="first and last layer that count in the influence (10,25)")
    entropy_coefficient: float = field(0.0, help="factor on the entropy bonus; 0 is off")
    lora_rank: int = field(0, help="rank of the trained differences; 0 trains everything")
    reward_seconds: float = field(60.0, help="a reward function that takes longer for a batch is given up")
    save: bool = field(False, help="write the trained model to WORKDIR/model")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.names
        check(len(names) > 0 and len(set(names)) == len(names), argument="objectives", value=self.objectives,
              rule="must name at least one objective, none twice")  # fmt: skip
        check(self.weights in RULES, argument="weights", value=self.weights, rule="unknown weight rule",
              remedy=f"Rules: {', '.join(RULES)}")  # fmt: skip
        count = len(self.base_weights)
        check(count in (0, len(names)), argument="base_weights", value=self.base_weights,
              rule=f"must be one number for each of the {len(names)} objectives")  # fmt: skip
        on_simplex = min(self.base_weights, default=1) >= 0 and math.isclose(sum(self.base_weights), 1, abs_tol=1e-6)
        check(not count or on_simplex, argument="base_weights", value=self.base_weights,
              rule="must be non-negative and sum to one", remedy="Divide them by their sum")  # fmt: skip
        check(bool(self.example_question) == bool(self.example_answer), argument="example_answer",
              value=self.example_answer, rule="question and answer of an example go together")  # fmt: skip
        check(not (self.data and self.judge == "whole"), argument="judge", value=self.judge,
              rule="must be usual, boxed or last_number with --data")  # fmt: skip
        for name in ("num_steps", "num_prompts", "group_size", "max_prompt", "max_tokens", "num_test"):
            check(getattr(self, name) > 0, argument=name, value=getattr(self, name), rule="must be positive")

    @property
    def names(self) -> list[str]:
        """Names of the objectives."""
        return [name.strip() for name in self.objectives.split(",") if name.strip()]


def _load_model(config: OwnDataConfig) -> tuple[lm.LanguageModel, Any, Any]:
    if config.model:
        loaded = lm.load_pretrained(config.model)
        check(loaded.tokenizer is not None, argument="model", value=config.model, rule="has no tokenizer")
        return loaded.model, loaded.params, loaded.tokenizer
    tokenizer = lm.ByteTokenizer()
    shape = lm.LanguageModelConfig(vocab_size=tokenizer.vocab_size)
    return lm.LanguageModel(shape), lm.init_params(jax.random.key(0), shape), tokenizer


def _load_rewards(path: str, names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Functions of a Python file whose names are objectives."""
    if not path:
        return {}
    check(Path(path).is_file(), argument="rewards", value=path, rule="no such file")
    spec = importlib.util.spec_from_file_location("user_rewards", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: getattr(module, name) for name in names if callable(getattr(module, name, None))}
    check(bool(found), argument="rewards", value=path, rule=f"defines no function named {' or '.join(names)}")
    return found


class _Session:
    """Model, questions and compiled functions of a run."""

    def __init__(self, config: OwnDataConfig, key: Array) -> None:
        self.config = config
        task = load_task(config, config.data)
        check(not config.test_data or Path(config.test_data).is_file(), argument="test_data", value=config.test_data,
              rule="no such file")  # fmt: skip
        known = {"accuracy": task.accuracy, "clarity": alignment.clarity}
        known["corrected_clarity"] = alignment.corrected_clarity
        self.functions: dict[str, Callable[..., Any]] = {**known, **_load_rewards(config.rewards, config.names)}
        unknown = [name for name in config.names if name not in (*self.functions, "conciseness")]
        check(not unknown, argument="objectives", value=unknown, rule="no reward of that name",
              remedy="Define it in --rewards FILE.py")  # fmt: skip
        self.model, self.params, self.tokenizer = _load_model(config)
        self.questions = Questions(task, self.tokenizer, config)
        self.data_key, self.init_key, lora_key = jax.random.split(key, 3)
        count = len(config.names)
        base = jnp.asarray(config.base_weights) if config.base_weights else jnp.full((count,), 1 / count)
        schedule: Any = config.learning_rate
        if config.schedule == "polynomial":
            schedule = optax.polynomial_schedule(config.learning_rate, 0.0, 1.03, config.num_steps)
        clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
        kl_kind = ("k2" if config.estimator == "reinforce" else "k3") if config.kl_coefficient > 0 else "none"
        lora = lm.LoraConfig(rank=config.lora_rank) if config.lora_rank else None
        self.trained = lm.init_lora(lora_key, self.params, lora) if lora else self.params
        self.trainer = alignment.Trainer(
            policy=lm.policy(self.model, temperature=config.temperature),
            config=alignment.TrainerConfig(
                estimator=config.estimator, group_size=config.group_size, num_minibatches=config.num_minibatches,
                combine=config.combine, gain_on=config.gain_on, kl_in_influence=config.kl_in_influence,
                influence_clip=config.influence_clip, influence_paths=config.influence_paths,
                influence_layers=config.influence_layers, num_microbatches=config.num_microbatches,
            ),
            loss=alignment.LossConfig(clip_low=min(config.clip, 1.0), clip_high=config.clip,
                                      dual_clip=max(3.0, config.clip), kl_kind=kl_kind),
            rule=make_rule(config.weights, base, rate=config.learning_rate / config.mu, num_steps=config.num_steps),
            optimizer=clipped,
            sampling=lm.Sampling(max_tokens=config.max_tokens, temperature=config.temperature,
                                 stop_tokens=tuple(self.tokenizer.stop_tokens), pad_token=self.tokenizer.pad_token),
            assemble=(lambda lora_params, base: lm.apply_lora(base, lora_params, lora)) if lora else lambda p, _: p,
            merge=jax.jit(lambda lora_params, base: lm.merge_lora(base, lora_params, lora)) if lora else None,
            early=lm.early_gradient(self.model, temperature=config.temperature),
        )  # fmt: skip
        self.keep_reference = kl_kind != "none" or lora is not None
        self.hparams = alignment.TrainerHParams(config.kl_coefficient, config.entropy_coefficient)
        self._update = jax.jit(lambda state, *rollout, objectives, laws: alignment.update(
            self.trainer, state, *rollout, hparams=self.hparams, objectives=objectives, laws=laws))  # fmt: skip

    def init(self) -> alignment.TrainerState:
        """State before the first step."""
        reference = self.params if self.keep_reference else None
        return alignment.init_trainer(
            self.init_key, self.trainer, self.trained, num_objectives=len(self.config.names), reference=reference
        )

    def advance(self, state: Any, start: int, num_steps: int) -> tuple[Any, dict[str, np.ndarray]]:
        """Several steps with rewards on the host."""
        rows = []
        for step in range(start, start + num_steps):
            state, row = self._step(state, step)
            rows.append(row)
        return state, {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _step(self, state: Any, step: int) -> tuple[Any, dict[str, np.ndarray]]:
        prompts, mask, chosen = self.questions.batch(self.data_key, step)
        generation, laws = alignment.rollout_with_laws(self.trainer, state, prompts, mask, hparams=self.hparams)
        scores = self._score(self.questions, generation, chosen, state)
        grouped = (len(self.config.names), len(chosen), self.config.group_size)
        rewards, scored = scores.rewards.reshape(grouped), scores.mask.reshape(grouped)
        lengths = np.asarray(generation.mask).sum(1)
        # NaN where a reward failed for the whole batch: the weights then stay, and the step is on no front.
        values = np.where(scored.any((1, 2)), rewards.sum((1, 2)) / np.maximum(scored.sum((1, 2)), 1), np.nan)
        for index, name in enumerate(self.config.names):
            if name == "conciseness":  # fronts are about length itself, in units of the window
                values[index] = 1 - lengths.mean() / self.config.max_tokens
        state, metrics = self._update(
            state, prompts, mask, generation, rewards, scored, objectives=jnp.asarray(values, jnp.float32), laws=laws
        )
        for name, message in scores.messages.items():
            log.warning("step %d, reward %s: %s", step, name, message)
        return state, self._row(metrics, scores, values)

    def evaluate(self, state: Any) -> dict[str, float]:
        """Means of the rewards, length in tokens and share that ended, on the held-out questions."""
        questions = Questions(load_task(self.config, self.config.test_data), self.tokenizer, self.config)
        number = min(self.config.num_test, len(questions.encoded))
        state = state._replace(key=jax.random.fold_in(self.data_key, 0))
        rewards, lengths, ended = [], [], []
        for first in range(0, number, self.config.num_prompts):
            chosen = [i % number for i in range(first, first + self.config.num_prompts)]  # one shape, one program
            real = slice(0, min(self.config.num_prompts, number - first) * self.config.group_size)
            state = state._replace(step=jnp.int32(first))
            generation = alignment.rollout(self.trainer, state, *questions.padded(chosen))
            scores = self._score(questions, generation, chosen, state)
            rewards.append(np.where(scores.mask, scores.rewards, np.nan)[:, real])
            tokens, mask = np.asarray(generation.tokens)[real], np.asarray(generation.mask)[real]
            lengths.append(mask.sum(1))
            ended.append((np.isin(tokens, self.trainer.sampling.stop_tokens) & mask).any(1))
        by_name = zip(self.config.names, np.concatenate(rewards, axis=1), strict=True)
        means = {name: float(np.mean(row[~np.isnan(row)])) for name, row in by_name if not np.isnan(row).all()}
        return {**means, "tokens": float(np.concatenate(lengths).mean()), "ended": float(np.concatenate(ended).mean())}

    def _score(self, questions: Questions, generation: Any, chosen: Sequence[int], state: Any) -> alignment.Scores:
        size, start = self.config.group_size, self.config.answer_start
        tokens, real = np.asarray(generation.tokens), np.asarray(generation.mask)
        texts = [start + self.tokenizer.decode(row[keep].tolist()) for row, keep in zip(tokens, real, strict=True)]
        which = [questions.kept[i] for i in chosen for _ in range(size)]
        columns = {name: [column[i] for i in which] for name, column in questions.task.columns.items()}
        lengths = alignment.update_running_mean(state.lengths, jnp.sum(generation.mask, axis=1))
        mean_length = float(lengths.mean)

        def conciseness(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
            count = lambda text: len(self.tokenizer.encode(text))  # noqa: E731
            return alignment.conciseness(prompts, completions, mean_length=mean_length, count_tokens=count)

        functions = {**{"conciseness": conciseness}, **self.functions}
        prompts = [questions.task.prompts[i] for i in which]
        return alignment.score(
            {name: functions[name] for name in self.config.names}, prompts, texts, columns,
            timeout=self.config.reward_seconds,
        )  # fmt: skip

    def _row(self, metrics: alignment.Metrics, scores: alignment.Scores, values: np.ndarray) -> dict[str, np.ndarray]:
        row = {}
        for index, name in enumerate(self.config.names):
            row[f"reward/{name}/mean"] = np.asarray(metrics.reward_mean[index])
            row[f"reward/{name}/std"] = np.asarray(metrics.reward_std[index])
            row[f"reward/{name}/weighted"] = np.asarray(metrics.weighted_mean[index])
            row[f"objective/{name}"] = np.asarray(values[index])
            row[f"weight/{name}"] = np.asarray(metrics.weights[index])
            row[f"influence/{name}"] = np.asarray(metrics.influence[index])
            row[f"groups/{name}/constant_share"] = np.asarray(metrics.constant_groups[index])
            faults = scores.faults[name]
            row[f"faults/{name}/completions"] = np.asarray(float(sum(faults.values())))
        for name, unit in (("gain", "factor"), ("length_mean", "tokens"), ("truncated", "share"), ("loss", "value"),
                           ("kl", "nats"), ("clipped", "share"), ("ratio_error", "mean"), ("entropy", "nats"),
                           ("gradient_norm", "l2"), ("update_norm", "l2")):  # fmt: skip
            row[f"train/{name}_{unit}"] = np.asarray(getattr(metrics, name))
        return row

    def export(self, state: Any, folder: Path) -> None:
        """Writes the trained model as a Hugging Face folder."""
        params = state.params
        if self.config.lora_rank:
            params = lm.merge_lora(self.params, params, lm.LoraConfig(rank=self.config.lora_rank))
        lm.save_pretrained(folder, lm.Pretrained(self.model, params, self.model.config, self.tokenizer), overwrite=True)


def run(run: "Run") -> Result:
    """Trains, and keeps the front of what the batches showed."""
    config = run.config
    assert isinstance(config, OwnDataConfig)
    session = _Session(config, run.keys[0])
    tests = {}
    if config.test_data:
        tests["before"] = run.stage("test_before", lambda: session.evaluate(session.init()))
    state = run.loop("train", init=session.init, advance=session.advance, num_steps=config.num_steps)
    if config.test_data:
        tests["after"] = run.stage("test_after", lambda: session.evaluate(state))
    if config.save:
        session.export(state, run.workdir / "model")
    names = config.names
    points = np.stack([run.series(f"objective/{name}") for name in names], axis=1)
    weights = np.stack([run.series(f"weight/{name}") for name in names], axis=1)
    rewards = np.stack([run.series(f"reward/{name}/mean") for name in names], axis=1)
    faults = sum(run.series(f"faults/{name}/completions").sum() for name in names)
    known = np.isfinite(points).all(axis=1)
    front = np.asarray(pareto.non_dominated(jnp.asarray(points), jnp.asarray(known)))
    summary: dict[str, float | int | str | bool | None] = {}
    tenth = max(1, len(points) // 10)
    for index, name in enumerate(names):
        there = points[np.isfinite(points[:, index]), index]
        summary[f"objective/{name}/first"] = float(there[:tenth].mean()) if len(there) else None
        summary[f"objective/{name}/last"] = float(there[-tenth:].mean()) if len(there) else None
        summary[f"weight/{name}/last"] = float(weights[-1, index])
    for when, means in tests.items():
        summary |= {f"test/{name}/{when}": float(value) for name, value in means.items()}
    summary["front/points"] = int(front.sum())
    summary["front/hypervolume_above_0"] = float(
        pareto.hypervolume(jnp.asarray(points), jnp.zeros(len(names)), mask=jnp.asarray(known))
    )
    summary["steps/without_a_value"] = int((~known).sum())
    summary["questions/used"] = len(session.questions.encoded)
    for reason, count in session.questions.skipped.items():
        summary[f"questions/{reason.replace(' ', '_')}"] = count
    summary["faults/completions"] = int(faults)
    arrays = {"points": points, "weights": weights, "rewards": rewards, "front": front, "names": np.array(names)}
    return Result(summary, arrays)


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Objectives and weights over the run; the front in its first two objectives."""
    from jaxrl_suite.io.plots import new_figure, series_style

    arrays = result.arrays
    names, steps = [str(name) for name in arrays["names"]], np.arange(1, len(arrays["points"]) + 1)
    figure, axes = new_figure(10.4, 3.8, ncols=2)
    for index, name in enumerate(names):
        style = {**series_style(index), "marker": ""}
        axes[0].plot(steps, arrays["points"][:, index], label=name, **style)
        axes[1].plot(steps, arrays["weights"][:, index], label=name, **style)
    axes[0].set(title="objectives (batch means)", xlabel="rollout (steps)", ylabel="mean score", ylim=(-0.02, 1.02))
    axes[1].set(title="weights", xlabel="rollout (steps)", ylabel="weight (share)", ylim=(-0.02, 1.02))
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend()
    drawn = {"training": figure}
    if len(names) > 1:
        figure, ax = new_figure(5.6, 4.2)
        x, y = arrays["points"][:, 0], arrays["points"][:, 1]
        ax.plot(x, y, **{**series_style(0), "linestyle": "none"}, alpha=0.35, label="every step")
        keep = arrays["front"].astype(bool)
        ax.plot(x[keep], y[keep], **{**series_style(1), "linestyle": "none"}, label="not dominated")
        ax.set(xlabel=f"{names[0]} (batch mean)", ylabel=f"{names[1]} (batch mean)", title="front of the run")
        ax.legend()
        drawn["front"] = figure
    return drawn


STUDY = Study(
    name="own_data",
    summary="Trains a model on your questions with several rewards: objectives, weights and front of the run.",
    config=OwnDataConfig,
    run=run,
    figures=figures,
    presets=PRESETS["own_data"],
    headline=("front/points", "front/hypervolume_above_0", "faults/completions"),
    extras={"reasoning_gym": "experiments"},
)
