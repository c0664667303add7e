"""Accuracy, conciseness and clarity of a small model on sums: weight rules against fixed weights at equal compute."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.alignment import arithmetic_task as task
from experiments.alignment.presets import PRESETS
from experiments.alignment.rules import RULES, make_rule
from experiments.common.study import Result, Study
from jaxrl_suite import alignment, lm
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.pareto import archive_insert, init_archive, non_dominated
from jaxrl_suite.types import Array, Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

OBJECTIVES = ("accuracy", "conciseness", "clarity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig(Config):
    """Sizes of model and runs, and what is compared."""

    rules: tuple[str, ...] = field(
        ("fixed", "influence", "hypervolume_gain", "hypervolume_gradient", "tchebycheff", "saw"),
        help="weight rules, of " + ", ".join(RULES),
    )
    base_weights: tuple[float, ...] = field((0.334, 0.333, 0.333), help="initial or fixed weights of the objectives")
    estimator: str = field("grpo", help="grpo, dr_grpo, rloo or reinforce")
    width: int = field(64, help="width of the model")
    num_layers: int = field(2, help="layers of the model")
    model_seed: int = field(0, help="seed of the supervised start, which all runs share")
    supervised_steps: int = field(600, help="steps of supervised training on traces of varying length")
    num_steps: int = field(120, help="rollouts of each run")
    num_prompts: int = field(32, help="sums a rollout")
    group_size: int = field(8, help="completions a sum")
    eval_every: int = field(10, help="rollouts between two evaluations")
    num_eval: int = field(256, help="sums of an evaluation, sampled once each")
    rate: float = field(0.5, help="exponent scale eta / mu of the influence rule")
    learning_rate: float = field(3e-4, help="of Adam in the rollouts")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.rules:
            check(name in RULES, argument="rules", value=name, rule="unknown rule", remedy=f"Rules: {', '.join(RULES)}")
        check(self.num_steps % self.eval_every == 0, argument="eval_every", value=self.eval_every,
              rule=f"must divide num_steps={self.num_steps}")  # fmt: skip


def _model(config: ArithmeticConfig) -> lm.LanguageModel:
    return lm.LanguageModel(lm.LanguageModelConfig(
        vocab_size=task.VOCABULARY, width=config.width, num_layers=config.num_layers, num_heads=4, num_kv_heads=2,
        head_dim=16, ffn_width=2 * config.width,
    ))  # fmt: skip


def _policy(model: lm.LanguageModel) -> Policy:
    plain = lm.policy(model)

    def generate(*arguments: Any) -> Any:
        return plain.generate(*arguments, loop="scan", unrolled=False)

    return Policy(plain.log_probs, generate)


def _pretrain(key: Array, config: ArithmeticConfig) -> dict[str, np.ndarray]:
    """A model that adds correctly and shows its work at any length."""
    model = _model(config)
    init_key, data_key = jax.random.split(key)
    params = lm.init_params(init_key, model.config)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, config.supervised_steps))

    def step(carry: tuple[Any, Any], t: Array) -> tuple[tuple[Any, Any], Array]:
        params, state = carry
        batch = task.supervised_batch(jax.random.fold_in(data_key, t), 128)
        loss, gradient = jax.value_and_grad(lm.supervised_loss)(params, batch, config=model.config)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    train = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(config.supervised_steps)))
    (params, _), losses = train((params, optimizer.init(params)))
    return {**{f"params/{k}": np.asarray(v) for k, v in lm.flatten(params).items()}, "losses": np.asarray(losses)}


def _trainer(config: ArithmeticConfig, name: str) -> alignment.Trainer:
    weights = jnp.asarray(config.base_weights)
    estimator: Any = config.estimator
    return alignment.Trainer(
        policy=_policy(_model(config)),
        config=alignment.TrainerConfig(
            estimator=estimator, group_size=config.group_size, combine="gdpo" if name == "gdpo" else "reward"
        ),
        loss=alignment.LossConfig(kl_kind="none"),
        rule=make_rule(name, weights / jnp.sum(weights), rate=config.rate, num_steps=config.num_steps),
        optimizer=optax.adam(config.learning_rate),
        sampling=lm.Sampling(max_tokens=task.COMPLETION_LENGTH, stop_tokens=(task.STOP,), pad_token=task.PAD),
    )


def _evaluate(trainer: alignment.Trainer, config: ArithmeticConfig, params: Any, key: Array) -> Array:
    """Objectives [3] in [0, 1]: accuracy, 1 - length / longest, clarity; one sample for each sum."""
    prompt_key, sample_key = jax.random.split(key)
    prompts, mask = task.draw_prompts(prompt_key, config.num_eval)
    ids = jnp.arange(config.num_eval, dtype=jnp.int32)
    generation = trainer.policy.generate(sample_key, params, prompts, mask, ids, trainer.sampling)
    correct, length, clear = task.objectives_of(prompts, generation.tokens, generation.mask)
    return jnp.stack([jnp.mean(correct), 1 - jnp.mean(length) / task.COMPLETION_LENGTH, jnp.mean(clear)])


def _evaluate_start(config: ArithmeticConfig, params: Any, keys: Array) -> dict[str, np.ndarray]:
    """The point from which all rules start, by the evaluation of each seed."""
    trainer = _trainer(config, "fixed")
    evaluate = jax.jit(jax.vmap(lambda key: _evaluate(trainer, config, params, jax.random.split(key, 3)[2])))
    return {"points": np.asarray(evaluate(keys))}


def _train(config: ArithmeticConfig, name: str, params: Any, keys: Array, starts: np.ndarray) -> dict[str, np.ndarray]:
    """One rule, all seeds in one compiled call; the archive holds the evaluated checkpoints."""
    trainer = _trainer(config, name)
    rounds = config.num_steps // config.eval_every

    def one(key: Array, first: Array) -> dict[str, Array]:
        state_key, prompt_key, eval_key = jax.random.split(key, 3)
        state = alignment.init_trainer(state_key, trainer, params, num_objectives=3)

        def step(state: Any, _: None) -> tuple[Any, alignment.Metrics]:
            prompts, mask = task.draw_prompts(jax.random.fold_in(prompt_key, state.step), config.num_prompts)
            repeated = jnp.repeat(prompts, config.group_size, axis=0)

            def reward(_: Any, generation: Any, lengths: Any) -> Array:
                return task.rewards_of(repeated, generation.tokens, generation.mask, lengths)

            return alignment.trainer_step(trainer, state, prompts, mask, reward)

        def block(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Any]:
            state, archive = carry
            state, metrics = jax.lax.scan(step, state, length=config.eval_every)
            point = _evaluate(trainer, config, state.params, eval_key)
            archive, gain, _overflow = archive_insert(archive, point, label=state.step)
            return (state, archive), (point, gain, metrics.weights, metrics.reward_mean)

        archive, gain, _ = archive_insert(init_archive(rounds + 1, jnp.zeros(3)), first)
        (_, archive), (points, gains, weights, rewards) = jax.lax.scan(block, (state, archive), length=rounds)
        return {
            "points": jnp.concatenate([first[None], points]),
            "hypervolume": jnp.cumsum(jnp.concatenate([gain[None], gains])),
            "weights": weights.reshape(-1, 3),
            "rewards": rewards.reshape(-1, 3),
        }

    results = jax.jit(jax.vmap(one))(keys, jnp.asarray(starts))
    return {path: np.asarray(value) for path, value in results.items()}


def run(run: "Run") -> Result:
    """Supervised traces first, then one run for each rule and seed from the same start."""
    config = run.config
    assert isinstance(config, ArithmeticConfig)
    trained = run.stage("supervised", lambda: _pretrain(jax.random.key(config.model_seed), config))
    leaves = {name.removeprefix("params/"): jnp.asarray(v) for name, v in trained.items() if name != "losses"}
    params = lm.unflatten(leaves)
    summary: dict[str, float | int | str | bool | None] = {"supervised/loss_nats": float(trained["losses"][-1])}
    arrays: dict[str, np.ndarray] = {"rules": np.array(config.rules), "eval_every": np.array(config.eval_every)}
    starts = run.stage("start", lambda: _evaluate_start(config, params, run.keys))["points"]
    for name in run.progress(config.rules, "weight rules"):
        found = run.stage(f"rule_{name}", lambda name=name: _train(config, name, params, run.keys, starts))
        arrays.update({f"{name}/{key}": value for key, value in found.items()})
        final = found["points"][:, -1].mean(0)
        summary[f"{name}/archive_hypervolume"] = float(found["hypervolume"][:, -1].mean())
        summary[f"{name}/final_hypervolume"] = float(np.prod(found["points"][:, -1], axis=1).mean())
        for index, objective in enumerate(OBJECTIVES):
            summary[f"{name}/final_{objective}"] = float(final[index])
    return Result(summary, arrays)


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Hypervolume over rollouts; objectives of the checkpoints; weights over time."""
    return {"hypervolume": _draw_hypervolume(result.arrays), "weights": _draw_weights(result.arrays)}


def _draw_hypervolume(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    figure, axes = new_figure(10.4, 4.2, ncols=2)
    for index, rule in enumerate(map(str, arrays["rules"])):
        values, points = arrays[f"{rule}/hypervolume"], arrays[f"{rule}/points"]
        steps = np.arange(values.shape[1]) * int(arrays["eval_every"])
        style = series_style(index)
        axes[0].plot(steps, values.mean(0), label=rule.replace("_", " "), **{**style, "marker": ""})
        if len(values) > 1:
            axes[0].fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.12, linewidth=0)
        flat = points.reshape(-1, 3)
        keep = np.asarray(non_dominated(jnp.asarray(flat)))
        lengths = task.COMPLETION_LENGTH * (1 - flat[keep, 1])
        axes[1].plot(lengths, flat[keep, 0], label=rule.replace("_", " "), **{**style, "linestyle": "none"})
    axes[0].set(xlabel="rollouts (steps)", ylabel="hypervolume of the archive (share of the unit cube)",
                title="archive of checkpoints, mean and range of seeds")  # fmt: skip
    axes[1].set(
        xlabel="length (tokens)", ylabel="accuracy (share)", title="checkpoints that none dominates (3 objectives)"
    )
    axes[0].legend(fontsize=9)
    return figure


def _draw_weights(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    rules = [str(rule) for rule in arrays["rules"]]
    figure, axes = new_figure(3.2 * max(2, len(rules)), 3.2, ncols=max(2, len(rules)))
    for ax, rule in zip(axes, rules, strict=False):
        for index, objective in enumerate(OBJECTIVES):
            ax.plot(
                arrays[f"{rule}/weights"].mean(0)[:, index], label=objective, **{**series_style(index), "marker": ""}
            )
        ax.set(title=rule.replace("_", " "), xlabel="rollouts (steps)", ylabel="weight (share)", ylim=(-0.02, 1.02))
    axes[0].legend(fontsize=8)
    return figure


STUDY = Study(
    name="arithmetic",
    summary="Accuracy, conciseness and clarity on sums: weight rules against fixed weights at equal compute.",
    config=ArithmeticConfig,
    run=run,
    figures=figures,
    presets=PRESETS["arithmetic"],
    headline=("influence/archive_hypervolume", "influence/final_hypervolume"),
    extras={"matplotlib": "experiments"},
)
