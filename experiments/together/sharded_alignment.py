"""Aligning a sharded mixture of experts: the same training on one device and folded over eight, step by step."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from experiments.alignment import arithmetic_run
from experiments.alignment import arithmetic_task as task
from experiments.common.study import Result, Study
from experiments.together import sharded_policy
from experiments.together.presets import PRESETS
from jaxrl_suite import alignment, lm, moe
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.io import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_SIDES = ("one", "folded")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardedAlignmentConfig(Config):
    """Model, folding and length of the run."""

    folding: str = field("attention=tp2.dp4 experts=ep8", help="parallel degrees over eight devices")
    model: str = field("", help="folder or GGUF file of a dense model to upcycle, SmolLM2 say; a small one if empty")
    num_experts: int = field(8, help="experts of a layer, copies of the dense feed-forward")
    experts_per_token: int = field(2, help="experts a token visits")
    digits: int = field(1, help="digits of each summand, 1 or 2")
    width: int = field(32, help="width of the small model")
    num_layers: int = field(2, help="layers of the small model")
    supervised_steps: int = field(400, help="steps of supervised training of the small dense model")
    num_steps: int = field(20, help="rollouts")
    num_prompts: int = field(16, help="sums a rollout")
    group_size: int = field(8, help="completions a sum")
    max_tokens: int = field(24, help="longest completion of a pretrained model, in tokens")
    learning_rate: float = field(3e-4, help="of Adam")
    rate: float = field(0.3, help="exponent scale of the influence weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.digits in (1, 2), argument="digits", value=self.digits, rule="must be 1 or 2")
        for name, least in (("num_steps", 1), ("num_prompts", 1), ("group_size", 2), ("num_experts", 2),
                            ("experts_per_token", 1), ("supervised_steps", 1), ("max_tokens", 1)):  # fmt: skip
            value = getattr(self, name)
            check(value >= least, argument=name, value=value, rule=f"must be at least {least}")
        rule = f"must not exceed num_experts={self.num_experts}"
        value = self.experts_per_token
        check(value <= self.num_experts, argument="experts_per_token", value=value, rule=rule)
        check(self.learning_rate > 0, argument="learning_rate", value=self.learning_rate, rule="must be positive")


def run(run: "Run") -> Result:
    """Trains on one device, then folded, on the same prompts and draws."""
    config = cast(ShardedAlignmentConfig, run.config)
    folding = moe.Folding.parse(config.folding, 8)
    folding.mesh()  # too few devices are an error before anything is trained
    params, model, prompts_of, rewards, sampling = _policy(run, config, folding)
    trained = {}
    for name in _SIDES:
        side = sharded_policy.make_side(
            model, folding if name == "folded" else None, rewards, sampling, group_size=config.group_size,
            learning_rate=config.learning_rate, rate=config.rate, host=bool(config.model),
        )  # fmt: skip
        trained[name] = _train(run, config, name, side, params, prompts_of).params  # without the moments
    moved = run.stage("reshard", lambda: _reshard(trained["folded"], model, folding))
    rows = {name: {key: run.series(f"{name}/{key}") for key in _NAMES} for name in _SIDES}
    one, folded = rows["one"], rows["folded"]
    same = one["tokens/checksum"] == folded["tokens/checksum"]
    differences = {key: np.abs(folded[key] - one[key]) / (np.abs(one[key]) if "norm" in key else 1) for key in one}
    difference = {
        "weights": np.max([differences[f"weight/{name}"] for name in sharded_policy.OBJECTIVES], axis=0),
        "rewards": np.max([differences[f"reward/{name}"] for name in sharded_policy.OBJECTIVES], axis=0),
        "entropy": differences["entropy_nats"],
        "gradient norm": differences["gradient_norm"],
        "loss": differences["loss"],
    }
    gap = _gap(trained["one"], trained["folded"])
    tail = max(1, config.num_steps // 5)
    summary: dict[str, float | int | str | bool | None] = {"policy/num_parameters": lm.num_parameters(model)}
    for name in sharded_policy.OBJECTIVES:
        summary[f"reward/{name}_first"] = float(one[f"reward/{name}"][:tail].mean())
        summary[f"reward/{name}_last"] = float(one[f"reward/{name}"][-tail:].mean())
        summary[f"weight/{name}_last"] = float(one[f"weight/{name}"][-1])
    summary["identical/steps_with_equal_tokens"] = f"{int(same.sum())} of {config.num_steps}"
    before = int(same.sum()) if same.all() else int(np.argmin(same))
    until = max(1, before)
    summary |= {
        f"identical/largest_difference_{key.replace(' ', '_')}_until_a_token_differs": float(values[:until].max())
        for key, values in difference.items()
    }
    summary |= {f"identical/largest_difference_{k.replace(' ', '_')}": float(v.max()) for k, v in difference.items()}
    summary["identical/largest_relative_difference_of_final_parameters"] = gap
    summary["reshard/bits_kept"] = bool(moved["identical"])
    summary["reshard/moved_share"] = float(moved["moved_share"])
    summary["reshard/seconds"] = float(moved["seconds"])
    for name in _SIDES:
        summary[f"time/{name}_step_seconds"] = float(np.median(rows[name]["seconds"]))
    arrays = {f"{name}/{key}": value for name in _SIDES for key, value in rows[name].items()}
    arrays |= {f"difference/{key}": value for key, value in difference.items()}
    return Result(summary, arrays | {"same": same, "folding": np.array(config.folding)})


def _policy(run: "Run", config: ShardedAlignmentConfig, folding: moe.Folding) -> tuple[Any, Any, Any, Any, Any]:
    """Parameters and shape of the mixture, prompts of a step, rewards, sampling."""
    key = jax.random.fold_in(run.key, 1)
    if config.model:
        from experiments.together import pretrained_sums

        return pretrained_sums.policy_of(config, key, folding)
    sizes = arithmetic_run.ArithmeticSizes(
        digits=config.digits, width=config.width, num_layers=config.num_layers,
        supervised_steps=config.supervised_steps,
    )  # fmt: skip
    dense = arithmetic_run.make_model(sizes).config
    shape = sharded_policy.upcycled_config(
        dense, num_experts=config.num_experts, experts_per_token=config.experts_per_token
    )
    sharded_policy.check_model(shape, folding)  # before anything is trained
    start = arithmetic_run.start_params(run.stage("supervised", lambda: arithmetic_run.supervised_start(sizes)))
    params, model = sharded_policy.upcycled(
        key, start, dense, num_experts=config.num_experts, experts_per_token=config.experts_per_token
    )

    def prompts_of(step: int) -> tuple[jax.Array, jax.Array]:
        return task.draw_prompts(jax.random.fold_in(key, 1 + step), config.num_prompts, digits=config.digits)

    sampling = lm.Sampling(max_tokens=task.COMPLETION_LENGTH, stop_tokens=(task.STOP,), pad_token=task.PAD)
    return params, model, prompts_of, sharded_policy.task_rewards, sampling


def _train(
    run: "Run", config: Any, name: str, side: sharded_policy.Side, params: Any, prompts_of: Any
) -> alignment.TrainerState:
    def init() -> alignment.TrainerState:
        key = jax.random.clone(run.key)  # the same draws on both sides
        return side.place(alignment.init_trainer(key, side.trainer, params, num_objectives=3))

    def advance(state: alignment.TrainerState, start: int, num_steps: int) -> tuple[Any, dict[str, np.ndarray]]:
        rows = []
        for number in range(start, start + num_steps):
            prompts, mask = prompts_of(number)
            began = time.perf_counter()
            state, generation, metrics = side.step(state, prompts, mask)
            rows.append(_row(generation, metrics) | {"seconds": time.perf_counter() - began})
        return state, {f"{name}/{key}": np.array([row[key] for row in rows]) for key in rows[0]}

    return run.loop(name, init=init, advance=advance, num_steps=config.num_steps)


def _row(generation: Any, metrics: alignment.Metrics) -> dict[str, float]:
    tokens = np.asarray(generation.tokens, np.int64)
    places = np.arange(1, tokens.size + 1, dtype=np.int64).reshape(tokens.shape)
    row = {"tokens/checksum": float((tokens * places).sum() % 16_777_213)}
    for index, name in enumerate(sharded_policy.OBJECTIVES):
        row[f"reward/{name}"] = float(metrics.reward_mean[index])
        row[f"weight/{name}"] = float(metrics.weights[index])
    row |= {"entropy_nats": float(metrics.entropy), "gradient_norm": float(metrics.gradient_norm)}
    return row | {"loss": float(metrics.loss)}


_NAMES = (
    "tokens/checksum",
    *(f"{kind}/{name}" for name in sharded_policy.OBJECTIVES for kind in ("reward", "weight")),
    *("entropy_nats", "gradient_norm", "loss", "seconds"),
)


def _reshard(params: Any, model: lm.LanguageModelConfig, folding: moe.Folding) -> dict[str, Any]:
    return sharded_policy.reshard(params, model, folding)._asdict()


def _gap(one: Any, folded: Any) -> float:
    """Largest difference of a parameter array, relative to its largest entry."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(folded), strict=True)
    gaps = [np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(a)).max(), 1e-12) for a, b in pairs]
    return float(max(gaps))


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Rewards and weights on top of each other, and what differs."""
    arrays = result.arrays
    figure, panels = plots.new_figure(
        13.5, 4.4, ncols=3, title="One trainer, one device or eight: " + str(arrays["folding"])
    )
    steps = np.arange(1, len(arrays["same"]) + 1)
    every = max(1, len(steps) // 10)
    for axes, kind, label in ((panels[0], "reward", "mean reward of a rollout"), (panels[1], "weight", "weight")):
        for index, name in enumerate(sharded_policy.OBJECTIVES):
            style = plots.series_style(index)
            axes.plot(steps, arrays[f"one/{kind}/{name}"], color=style["color"], linewidth=6, alpha=0.3)
            axes.plot(
                steps, arrays[f"folded/{kind}/{name}"], label=name, **{**style, "linewidth": 1.2, "markevery": every}
            )
        axes.set(xlabel="rollout", ylabel=label)
        axes.set_title("thick: one device, thin: folded over eight", fontsize=11)
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    for index, name in enumerate(("weights", "entropy", "gradient norm", "loss")):
        style = {**plots.series_style(3 + index), "linewidth": 1.2, "markevery": every}
        unit = " (relative)" if "norm" in name else ""
        panels[2].plot(steps, np.maximum(arrays[f"difference/{name}"], 1e-9), label=name + unit, **style)
    panels[2].axhline(np.finfo(np.float32).eps, color="#444444", linestyle=":", linewidth=1)
    panels[2].annotate("float32 rounding", (steps[-1], np.finfo(np.float32).eps), ha="right", va="bottom", fontsize=9)
    panels[2].set(yscale="log", xlabel="rollout", ylabel="|folded - one device| (1e-9 stands for none)")
    equal = int(arrays["same"].sum())
    panels[2].set_title(f"the same tokens in {equal} of {len(steps)} rollouts", fontsize=11)
    panels[2].legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True)
    return {"sharded_alignment": figure}


STUDY = Study(
    name="sharded_alignment",
    summary="GRPO with influence weights trains an upcycled mixture of experts on one device and folded over eight: "
    "the same tokens, weights and rewards; parameters move between the layouts of training and decoding.",
    config=ShardedAlignmentConfig,
    run=run,
    figures=figures,
    presets=PRESETS["sharded_alignment"],
    headline=(
        "identical/steps_with_equal_tokens",
        "identical/largest_difference_weights_until_a_token_differs",
        "reshard/bits_kept",
    ),
    num_cpu_devices=8,
)
