"""A picture sent by balancing a pole: 256 pixels in the pushes of a cart-pole that does what it always does."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.study import Result, Study
from experiments.coupling.presets import PRESETS
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.coupling.factored_games import FactoredGame, play_factored
from jaxrl_suite.envs import code_cart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.common.run import Run

_NAMES = ("face", "ring", "arrow", "waves")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageGameConfig(Config):
    """Pictures, policies and noise."""

    size: int = field(16, help="pixels a side")
    block_bits: int = field(8, help="bits of a block of the message")
    horizon: int = field(500, help="steps of an episode, 0.02 s each")
    temperatures: tuple[float, ...] = field((0.05, 0.1, 0.2, 0.3, 0.5, 1.0), help="temperatures of the policy")
    noises: tuple[float, ...] = field((0.0, 0.02, 0.05), help="probabilities that a push goes the wrong way")
    copies: int = field(8, help="episodes of each of the four pictures a point")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.size >= 8, argument="size", value=self.size, rule="must be at least 8")
        check(1 <= self.block_bits <= 10, argument="block_bits", value=self.block_bits, rule="must be in 1..10")
        fits = self.size**2 % self.block_bits == 0
        check(fits, argument="block_bits", value=self.block_bits, rule="must divide the number of pixels")
        fits = all(0 <= noise < 0.5 for noise in self.noises)
        check(fits, argument="noises", value=self.noises, rule="must be in [0, 0.5)")
        check(self.copies > 0, argument="copies", value=self.copies, rule="must be positive")


def pictures(size: int) -> np.ndarray:
    """Four black and white pictures, bool [4, size, size]."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    radius = np.hypot(x, y)
    eyes = np.hypot(np.abs(x) - 0.35, y + 0.3) < 0.17
    mouth = (np.abs(np.hypot(x, y - 0.05) - 0.5) < 0.12) & (y > 0.2)
    face = (np.abs(radius - 0.88) < 0.12) | eyes | mouth
    ring = np.abs(radius - 0.6) < 0.22
    arrow = (np.abs(y) < 0.2) & (x < 0.3) | (np.abs(y) < 0.85 - x) & (x > 0.1)
    waves = np.sin(6 * x + 3 * np.sin(3 * y)) > 0
    return np.stack([face, ring, arrow, waves])


def to_blocks(images: np.ndarray, bits: int, mask: np.ndarray) -> np.ndarray:
    """Pixels, whitened by a shared random mask, as blocks of ``bits`` bits: int32 [E, W]."""
    whitened = (images ^ mask).reshape(len(images), -1, bits)
    return (whitened << np.arange(bits)).sum(-1).astype(np.int32)


def to_images(blocks: np.ndarray, bits: int, mask: np.ndarray) -> np.ndarray:
    """Inverse of :func:`to_blocks`, bool [..., size, size]."""
    pixels = (blocks[..., None] >> np.arange(bits)) & 1
    return pixels.reshape(*blocks.shape[:-1], *mask.shape).astype(bool) ^ mask


def run(run: "Run") -> Result:
    """Every temperature without noise, then every noise at the third temperature or the last."""
    config = cast(ImageGameConfig, run.config)
    arrays = run.stage("play", lambda: _play(run, config))
    clean = slice(0, len(config.temperatures))
    summary: dict[str, float | int | str | bool | None] = {"image/bits": config.size**2}
    whole = arrays["right_pixels"] == 1
    for index, temperature in enumerate(config.temperatures):
        summary[f"temperature_{temperature:g}/steps"] = float(arrays["steps"][index].mean())
        summary[f"temperature_{temperature:g}/images_without_error"] = float(whole[index].mean())
    summary["image/best_share_without_error"] = float(whole[clean].mean(1).max())
    for index, noise in enumerate(config.noises):
        row = len(config.temperatures) + index
        summary[f"noise_{noise:g}/right_pixels"] = float(arrays["right_pixels"][row].mean())
        summary[f"noise_{noise:g}/right_pixels_uncorrected"] = float(arrays["right_uncorrected"][index].mean())
    return Result(summary, arrays)


def _play(run: "Run", config: ImageGameConfig) -> dict[str, np.ndarray]:
    cart = code_cart.code_cart(code_cart.CodeCartConfig())
    game = FactoredGame(code_cart.reset, code_cart.policy, code_cart.next_state, code_cart.failed)
    mask_key, play_key = jax.random.split(run.key)
    mask = np.asarray(jax.random.bernoulli(mask_key, 0.5, (config.size, config.size)))
    images = np.repeat(pictures(config.size), config.copies, axis=0)
    blocks = jnp.asarray(to_blocks(images, config.block_bits, mask))

    def play(key, temperature, flip, message, replay=None):
        channel = jnp.array([[1 - flip, flip], [flip, 1 - flip]])
        params = cart.replace(temperature=jnp.asarray(temperature))
        options = {"num_values": 1 << config.block_bits, "horizon": config.horizon}
        return play_factored(key, game, params, message, channel=channel, replay=replay, **options)

    middle = config.temperatures[min(2, len(config.temperatures) - 1)]
    points = [(t, 0.0) for t in config.temperatures] + [(middle, noise) for noise in config.noises]
    found: dict[str, list] = {
        "right_pixels": [],
        "steps": [],
        "uncertainty": [],
        "entropy": [],
        "right_uncorrected": [],
    }
    shown = None
    for number, (temperature, noise) in enumerate(run.progress(points, "points")):
        episodes = play(jax.random.fold_in(play_key, number), temperature, noise, blocks)
        decoded = to_images(np.asarray(episodes.decoded), config.block_bits, mask)
        found["right_pixels"].append((decoded == images).mean((1, 2)))
        found["steps"].append(np.asarray(episodes.recording.lengths))
        found["uncertainty"].append(np.asarray(episodes.uncertainty))
        found["entropy"].append(np.asarray(episodes.action_entropy))
        if number >= len(config.temperatures):  # the same recording, read by a receiver who ignores the noise
            naive = play(play_key, temperature, 0.0, jnp.zeros_like(blocks), episodes.recording)
            right = to_images(np.asarray(naive.decoded), config.block_bits, mask) == images
            found["right_uncorrected"].append(right.mean((1, 2)))
        elif temperature == middle:
            guesses = np.asarray(episodes.guesses[:: config.copies])
            times = np.linspace(0, config.horizon - 1, 6).astype(int)
            known = np.asarray(episodes.recording.states[:: config.copies, :, 2])
            shown = (to_images(guesses[:, times], config.block_bits, mask), times, known)
    assert shown is not None  # the middle temperature is one of them
    arrays = {name: np.array(values) for name, values in found.items()}
    return arrays | {
        "decoded": shown[0],
        "times": shown[1],
        "angles": shown[2],
        "images": pictures(config.size),
        "temperatures": np.array(config.temperatures),
        "noises": np.array(config.noises),
        "middle": np.array(middle),
    }


def figures(result: Result) -> Mapping[str, "Figure"]:
    """Pictures as they come through; what each temperature costs and says; noise."""
    return {"pictures": _draw_pictures(result.arrays), "tradeoff": _draw_tradeoff(result.arrays)}


def _draw_pictures(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure

    times = arrays["times"]
    figure, panels = new_figure(1.7 * (len(times) + 1), 7.4, ncols=len(times) + 1, nrows=4)
    for row, axes_of_row in enumerate(panels):
        shown = [*arrays["decoded"][row], arrays["images"][row]]
        titles = [*(f"after {(time + 1) * 0.02:.1f} s" for time in times), "sent"]
        for axes, image, title in zip(axes_of_row, shown, titles, strict=True):
            axes.imshow(image, cmap="binary", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            if row == 0:
                axes.set_title(title, fontsize=10)
        axes_of_row[0].set_ylabel(_NAMES[row])
    figure.suptitle("What an onlooker with the key reads from the pushes of one cart-pole a row", fontsize=12)
    return figure


def _draw_tradeoff(arrays: Mapping[str, np.ndarray]) -> "Figure":
    from jaxrl_suite.io.plots import new_figure, series_style

    count = len(arrays["temperatures"])
    figure, (left, right) = new_figure(11.0, 4.4, ncols=2)
    seconds = np.arange(1, arrays["uncertainty"].shape[2] + 1) * 0.02
    for index, temperature in enumerate(arrays["temperatures"]):
        upright = arrays["steps"][index].mean() * 0.02
        label = f"temperature {temperature:g}, upright for {upright:.1f} s"
        style = {**series_style(index), "marker": None}
        left.plot(seconds, arrays["uncertainty"][index].mean(0), label=label, **style)
    left.set(xlabel="time (s)", ylabel="bits of the picture still unknown, mean", ylim=(0, None))
    left.legend(fontsize=8)
    noises = arrays["noises"]
    for index, (name, label) in enumerate(
        (("right_pixels", "belief that knows the noise"), ("right_uncorrected", "belief that ignores it"))
    ):
        values = arrays[name][count:] if name == "right_pixels" else arrays[name]
        half = 1.96 * values.std(1) / np.sqrt(values.shape[1])
        right.errorbar(noises, values.mean(1), half, label=label, **series_style(index))
    right.axhline(0.5, color="#888888", linestyle=":", label="guessing")
    right.set(xlabel="probability that a push goes the wrong way", ylabel="share of right pixels", ylim=(0.45, 1.02))
    right.set_title(f"temperature {float(arrays['middle']):g}", fontsize=11)
    right.legend(fontsize=9)
    return figure


STUDY = Study(
    name="image_game",
    summary="A picture of 256 pixels in the pushes that balance a pole, at no cost to the balance.",
    config=ImageGameConfig,
    run=run,
    figures=figures,
    presets=PRESETS["image_game"],
    headline=("image/bits", "image/best_share_without_error"),
)
