"""A message in a policy's choices, at a price: reward against rate against accuracy, in a grid and in text."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.coupling import byte_model
from experiments.together import priced_policies as priced
from experiments.together.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.envs.rate_grid import RateGridConfig, rate_grid, soft_policy
from jaxrl_suite.io import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_PROMPT = "# "  # a comment begins


@dataclasses.dataclass(frozen=True, kw_only=True)
class MessageAtAPriceConfig(Config):
    """Grid, text and prices."""

    layout: tuple[str, ...] = field(("S..", "...", "..G"), help="grid without noise: . # S G T")
    horizon: int = field(5, help="steps in the grid, at most 6: 4 ** horizon walks are enumerated")
    num_messages: int = field(16, help="messages in the grid, uniform")
    prices: tuple[float, ...] = field((0.01, 0.03, 0.1, 0.2, 0.3, 0.5), help="reward a bit, in the grid")
    temperatures: tuple[float, ...] = field((0.05, 0.1, 0.15, 0.2, 0.3, 0.4), help="of the entropy surrogate")
    num_steps: int = field(200, help="steps of Adam")
    step_size: float = field(0.05, help="of Adam")
    text_prices: tuple[float, ...] = field((0.8, 0.87, 0.93, 1.0, 1.15, 1.3), help="log-likelihood a bit, in text")
    num_characters: int = field(60, help="characters of a text")
    num_blocks: int = field(32, help="blocks of four bits that a text carries")
    num_texts: int = field(32, help="texts a price")
    num_files: int = field(40, help="source files that the character model is counted from")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.horizon <= 6, argument="horizon", value=self.horizon, rule="must be in 1..6")
        for name in ("num_steps", "num_characters", "num_blocks", "num_texts", "num_files"):
            check(getattr(self, name) > 0, argument=name, value=getattr(self, name), rule="must be positive")
        check(self.num_messages > 1, argument="num_messages", value=self.num_messages, rule="must be at least 2")
        for name in ("prices", "temperatures", "text_prices"):
            value = getattr(self, name)
            fits = len(value) > 0 and all(x > 0 for x in value)
            check(fits, argument=name, value=value, rule="must be one or more positive numbers")


def run(run: "Run") -> Result:
    """Trains in the grid, plans and writes in text, keeps what nothing else beats."""
    config = cast(MessageAtAPriceConfig, run.config)
    grid = run.stage("grid", lambda: _grid(config))
    text = run.stage("text", lambda: _text(config, run.key))
    fronts = run.stage("fronts", lambda: _fronts(grid, text))
    trained, soft = grid["trained"], grid["surrogate"]
    summary: dict[str, float | int | str | bool | None] = {
        "grid/largest_gain_at_equal_reward_bits": gain_at_equal_reward(trained[:, :2], soft[:, :2]),
        "grid/trained_on_the_front": f"{int(fronts['grid'][: len(trained)].sum())} of {len(trained)}",
        "grid/surrogate_on_the_front": f"{int(fronts['grid'][len(trained) :].sum())} of {len(soft)}",
        "grid/best_accuracy": float(trained[:, 2].max()),
        "text/largest_gain_at_equal_quality_bits": gain_at_equal_reward(text["exact_planned"], text["exact_plain"]),
        "text/planned_on_the_front": f"{int(fronts['text'][: len(text['planned'])].sum())} of {len(text['planned'])}",
        "text/received_as_sent": bool(text["agree"]),
    }
    own = int(np.argmin(np.abs(text["prices"] - 1)))
    summary["text/bits_per_character_near_price_1"] = float(text["planned"][own, 1])
    summary["text/accuracy_near_price_1"] = float(text["planned"][own, 2])
    arrays = {f"grid/{name}": value for name, value in grid.items()}
    arrays |= {f"text/{name}": value for name, value in text.items()}
    return Result(summary, arrays | {f"front/{name}": value for name, value in fronts.items()})


def gain_at_equal_reward(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest gain in the second column at the first one's value of one of ours, over a curve of theirs.

    The curve is what they reach at this reward or more, linear in between; points of ours beyond it do not count.
    """
    theirs = theirs[np.argsort(theirs[:, 0])]
    reach = np.maximum.accumulate(theirs[::-1, 1])[::-1]
    inside = (ours[:, 0] <= theirs[-1, 0]) & (ours[:, 0] >= theirs[0, 0])
    gains = ours[:, 1] - np.interp(ours[:, 0], theirs[:, 0], reach)
    return float(np.max(np.where(inside, gains, -np.inf)))


def _grid(config: MessageAtAPriceConfig) -> dict[str, np.ndarray]:
    """Points (reward, bits, accuracy) of policies trained at each price and of maximum-entropy policies."""
    grid = rate_grid(RateGridConfig(layout=config.layout, noise=0.0, horizon=config.horizon))
    successors = grid.successors[:, :, 0]
    temperatures = jnp.asarray(config.temperatures)
    plans = jax.vmap(lambda t: soft_policy(grid, t, horizon=config.horizon))(temperatures)
    middle = jnp.log(jnp.maximum(plans[len(plans) // 2], 1e-6))

    def value(policies):
        return priced.enumerate_by_scan(
            policies, successors, grid.entry_reward, grid.terminal, grid.start, num_messages=config.num_messages
        )

    train = jax.jit(lambda price: priced.climb(
        value, middle, price, num_steps=config.num_steps, step_size=config.step_size
    ))  # fmt: skip
    trained = [train(jnp.float32(price)) for price in config.prices]
    soft = jax.jit(lambda policies: jax.lax.map(value, policies))(plans)
    best = np.array([[game.mean_reward, game.information, game.accuracy] for game, _ in trained])
    return {
        "trained": best,
        "surrogate": np.stack([soft.mean_reward, soft.information, soft.accuracy], axis=1),
        "history": np.stack([np.asarray(history.information) for _, history in trained]),
        "prices": np.array(config.prices),
        "temperatures": np.array(config.temperatures),
    }


def _text(config: MessageAtAPriceConfig, key: jax.Array) -> dict[str, np.ndarray]:
    """Points (log2 p a character, bits a character, share decoded) of planned laws and of plain temperatures."""
    table = jnp.asarray(byte_model.train(config.num_files))
    first, second = byte_model.encode(_PROMPT)
    start = jnp.int32(first * byte_model.NUM_CHARACTERS + second)
    message_key, send_key, read_key = jax.random.split(key, 3)
    shape = (config.num_texts, config.num_blocks)
    messages = jax.random.randint(message_key, shape, 0, 16, jnp.int32)
    plan = jax.jit(lambda price: priced.values_ahead(table, price, config.num_characters))
    exact = jax.jit(lambda values, price: jnp.stack(priced.text_quality(table, values, price, start)))

    @jax.jit
    def channel(key, values, price, values_sent, texts, replay):
        return priced.write_texts(
            key, table, values, price, start, values_sent, texts, replay, block_size=16
        )  # fmt: skip

    blank = jnp.zeros((config.num_texts, config.num_characters), jnp.int32)
    points: dict[str, list] = {"planned": [], "plain": [], "exact_planned": []}
    samples, agree = [], True
    for row, number in enumerate(config.text_prices):
        price = jnp.float32(number)
        planned = plan(price)
        for column, (name, values) in enumerate((("planned", planned), ("plain", jnp.zeros_like(planned)))):
            # Both laws draw alike, so that they differ by the law alone.
            sent = channel(
                jax.random.clone(jax.random.fold_in(send_key, row)), values, price, messages, blank, jnp.array(False)
            )
            read = channel(
                jax.random.fold_in(read_key, 2 * row + column),
                values,
                price,
                jnp.zeros_like(messages),
                sent.texts,
                jnp.array(True),
            )
            agree = agree and bool(jnp.all(read.decoded == sent.decoded))
            bits = float(jnp.mean(read.bits)) / config.num_characters
            points[name].append([float(jnp.mean(sent.quality)), bits, float(jnp.mean(read.decoded == messages))])
            if name == "planned":
                points["exact_planned"].append(np.asarray(exact(values, price)))
                samples.append(byte_model.decode(np.asarray(sent.texts[0])))
    curve = np.geomspace(0.4 * min(config.text_prices), 1.2 * max(config.text_prices), 16).astype(np.float32)
    none = jnp.zeros((config.num_characters + 1, table.shape[0]))
    points["exact_plain"] = list(np.asarray(jax.jit(lambda t: jax.lax.map(lambda x: exact(none, x), t))(curve)))
    limit = 4 * config.num_blocks / config.num_characters
    return {
        **{name: np.array(rows) for name, rows in points.items()},
        "prices": np.array(config.text_prices),
        "samples": np.array([sample.encode("ascii", "replace").decode() for sample in samples]),
        "agree": np.array(agree),
        "limit": np.array(limit),
    }


def _fronts(grid: Mapping[str, np.ndarray], text: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Which points the archive of three objectives keeps."""
    walks = np.concatenate([grid["trained"], grid["surrogate"]])
    texts = np.concatenate([text["planned"], text["plain"]])
    return {
        "grid": priced.front_of(walks, (-1.01, -0.01, -0.01)),
        "text": priced.front_of(texts, (texts[:, 0].min() - 1.0, -0.01, -0.01)),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """The price of a message in the grid and in text; what the texts look like."""
    return {"price": _draw_fronts(result.arrays), "texts": _draw_texts(result.arrays)}


def _draw_fronts(arrays: Mapping[str, np.ndarray]) -> "Figure":
    figure, panels = plots.new_figure(13.5, 8.2, ncols=2, nrows=2)
    rows = (
        ("grid", "trained", "surrogate", "reward + price x information, by its gradient", "reward + entropy",
         ("mean reward of a walk", "bits about the message a walk", "share of messages decoded")),
        ("text", "planned", "plain", "planned for log-likelihood + price x bits", "plain temperature",
         ("log2-likelihood a character (bits)", "bits about the message a character", "share of the message decoded")),
    )  # fmt: skip
    for axes, (name, ours, theirs, our_label, their_label, labels) in zip(panels, rows, strict=True):
        kept, count = arrays[f"front/{name}"], len(arrays[f"{name}/{ours}"])
        series = ((theirs, their_label, kept[count:]), (ours, our_label, kept[:count]))
        for column in (1, 2):
            for index, (kind, label, mask) in enumerate(series):
                _draw_series(axes[column - 1], arrays[f"{name}/{kind}"], column, mask, index, label)
            axes[column - 1].set(xlabel=labels[0], ylabel=labels[column])
        axes[0].set_title(f"{'A grid' if name == 'grid' else 'Text'}: what is said", fontsize=11)
        axes[1].set_title("and what is understood (filled: on the front of all three)", fontsize=11)
        axes[0].legend(fontsize=9, loc="lower left")
    for index, kind in enumerate(("plain", "planned")):
        curve = arrays[f"text/exact_{kind}"]
        shown = curve[np.argsort(curve[:, 0])]
        low = arrays["text/planned"][:, 0].min() - 0.3
        shown = shown[shown[:, 0] > low]
        colour = plots.series_style(index)["color"]
        panels[1][0].plot(*shown.T, color=colour, linewidth=5, alpha=0.2, label=f"entropy of the law, {kind}")
    panels[1][0].axhline(float(arrays["text/limit"]), color="#999999", linewidth=1, linestyle=(0, (4, 2)),
                         label="the whole message")  # fmt: skip
    panels[1][0].legend(fontsize=9, loc="lower left")
    return figure


def _draw_series(axes, points: np.ndarray, column: int, kept: np.ndarray, index: int, label: str) -> None:
    """One family of policies; members of the front are filled."""
    order, style = np.argsort(points[:, 0]), plots.series_style(index)
    axes.plot(*points[order][:, [0, column]].T, **{**style, "marker": "", "linewidth": 1.4}, label=label)
    for member, face in ((True, style["color"]), (False, "white")):
        chosen = points[kept == member]
        marks = {"marker": style["marker"], "color": style["color"], "markerfacecolor": face, "markersize": 7}
        axes.plot(chosen[:, 0], chosen[:, column], linestyle="", **marks)


def _draw_texts(arrays: Mapping[str, np.ndarray]) -> "Figure":
    prices, points = arrays["text/prices"], arrays["text/planned"]
    figure, axes = plots.new_figure(6.2, 0.8 + 0.6 * len(prices), title="The same message at a rising price of a bit")
    axes.set_axis_off()
    for row, price in enumerate(prices):
        # Blanks are shown as dots, ends of lines as arrows: cold laws write little else.
        sample = str(arrays["text/samples"][row]).replace(" ", "\u00b7").replace("\n", "\u23ce")
        head = f"price {price:g}: {-points[row, 0]:.2f} bits of surprise and {points[row, 1]:.2f} bits said a character"
        lines: tuple[tuple[float, str, dict[str, Any]], ...] = (
            (0.25, head, {"fontsize": 9, "color": "#555555"}),
            (0.62, sample, {"fontsize": 10, "family": "monospace", "parse_math": False}),
        )
        for share, text, style in lines:
            axes.text(0.0, 1 - (row + share) / len(prices), text, va="center", transform=axes.transAxes, **style)
    return figure


STUDY = Study(
    name="message_at_a_price",
    summary="Policies paid for reward plus a price times what their choices say, in a grid and in text: reward against "
    "bits against decoding, and the front of all three.",
    config=MessageAtAPriceConfig,
    run=run,
    figures=figures,
    presets=PRESETS["message_at_a_price"],
    headline=(
        "grid/largest_gain_at_equal_reward_bits",
        "text/largest_gain_at_equal_quality_bits",
        "text/accuracy_near_price_1",
    ),
)
