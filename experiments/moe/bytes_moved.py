"""Bytes that one device sends under each folding: the planner's formula against the compiled program."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.run import Run
from experiments.common.study import Result, Study
from experiments.moe.byte_model import byte_mixture
from experiments.moe.presets import PRESETS
from jaxrl_suite import lm, moe
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.io import plots
from jaxrl_suite.moe.audit import Collective
from jaxrl_suite.moe.cost_model import Workload
from jaxrl_suite.moe.cost_traffic import layer_bytes
from jaxrl_suite.moe.partition import placements
from jaxrl_suite.moe.pipeline import num_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("tp", "cp", "ep", "etp", "pp", "gradients")
NAMES = {
    "tp": "tensor and sequence (TP)",
    "cp": "context (CP)",
    "ep": "experts (EP)",
    "etp": "inside experts (ETP)",
    "pp": "pipeline (PP)",
    "gradients": "gradients (DP, EDP)",
}
FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytesMovedConfig(Config):
    """Model, batch and foldings."""

    foldings: str = field(
        "attention=dp8 experts=ep8; attention=dp8 experts=etp8; attention=tp2.dp4 experts=ep8; "
        "attention=tp2.dp4 experts=etp2.ep4; attention=tp2.cp2.dp2 experts=ep8; "
        "attention=tp4.dp2 experts=ep4.edp2; attention=tp2.dp2 experts=ep4 pipeline=2",
        help="foldings to compile, separated by semicolons",
    )
    batch_size: int = field(16, help="sequences of a step")
    length: int = field(128, help="tokens of a sequence")
    num_microbatches: int = field(2, help="micro-batches of a step on each data rank")
    num_layers: int = field(4, help="blocks of the model")
    width: int = field(64, help="width of the model")
    num_experts: int = field(8, help="experts of a layer")
    capacity_factor: float = field(1.0, help="slots of an expert over its even share")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.parsed), argument="foldings", value=self.foldings, rule="must name at least one folding")
        for folding in self.parsed:
            moe.check_folding(options_of(self), folding, batch_size=self.batch_size, length=self.length)

    @property
    def parsed(self) -> list[moe.Folding]:
        """The foldings, in the order given."""
        return [moe.Folding.parse(part) for part in self.foldings.split(";") if part.strip()]


def options_of(config: Any) -> moe.MoEConfig:
    """Model and step; the dispatcher with a fixed number of slots, whose bytes the formula gives exactly."""
    model = byte_mixture(config, num_heads=8, head_dim=config.width // 8, tied_head=False)
    return moe.MoEConfig(
        model=model,
        dispatch="drop_pad",
        capacity_factor=config.capacity_factor,
        num_microbatches=config.num_microbatches,
        block_rows=32,
    )


def predicted_bytes(options: moe.MoEConfig, folding: moe.Folding, batch_size: int, length: int) -> dict[str, float]:
    """Bytes that one device sends in a gradient program by kind, from the planner's formula.

    The formula counts two bytes a number, here they are four, and the backward pass mirrors the forward pass. It has no
    term for the vocabulary: embedding and head gather and scatter once each. In a pipeline every tick runs every stage.
    """
    model, number = options.model, options.num_microbatches
    rows = batch_size // (folding.dp * number)
    workload = Workload(sequence=length, global_batch=batch_size, micro_batch=rows)
    workload = workload.replace(capacity_factor=options.capacity_factor)
    forward = layer_bytes(model, folding, workload)
    ticks = num_ticks(number, folding.pp) if folding.pp > 1 else number
    runs = ticks * model.num_layers / folding.pp
    both = FLOAT32 / 2 * 2  # four bytes for two, forward and backward
    sent = {kind: both * forward[kind] * runs for kind in ("tp", "cp", "ep", "etp")}
    tokens = rows * length / folding.cp / folding.tp
    vocabulary = 2 * 2 * (folding.tp - 1) * tokens * model.width * FLOAT32  # embedding and head, forward and backward
    if folding.pp > 1:  # the embedding in every tick, the head once a micro-batch and again for its backward pass
        vocabulary *= (ticks + 1.5 * number) / (2 * number)
    sent["tp"] += vocabulary * number
    sent["pp"] = both * forward["pp"] * ticks if folding.pp > 1 else 0.0
    sent["gradients"] = _gradient_bytes(options, folding)
    return sent


def _gradient_bytes(options: moe.MoEConfig, folding: moe.Folding) -> float:
    """All-reduces of the gradients: each array over the axes along which it is not split, ``2 (n - 1) / n`` bytes."""
    sizes = dict(zip(("pp", *folding.atoms.names), (folding.pp, *folding.atoms.sizes)))
    total = 0.0
    shapes = lm.parameter_shapes(options.model)
    for path, place in placements(options, folding).items():
        used = {name for entry in place.compute for name in (entry if isinstance(entry, tuple) else (entry,)) if name}
        split = np.prod([sizes[name] for name in used], initial=1.0)
        copies = np.prod([size for name, size in sizes.items() if name not in used], initial=1.0)
        total += 2 * (copies - 1) / copies * np.prod(shapes[path]) / split * FLOAT32
    return float(total)


def counted_bytes(found: list[Collective], folding: moe.Folding) -> dict[str, float]:
    """Bytes that one device sends by kind, from the collectives of the compiled program."""
    sent = dict.fromkeys(KINDS, 0.0)
    for item in found:
        sent[_kind_of(item, folding)] += item.wire_bytes() * (item.runs or 1)
    return sent


def _kind_of(item: Collective, folding: moe.Folding) -> str:
    groups = {kind: tuple(sorted(tuple(sorted(g)) for g in folding.groups(kind))) for kind in ("tp", "cp", "etp")}
    if item.kind == "collective-permute":
        return "pp" if folding.pp > 1 and _crosses_stages(item, folding) else "cp"
    if item.kind == "all-to-all":
        return "ep"
    if item.kind == "all-reduce":
        return "tp" if item.loops and item.groups == groups["tp"] else "gradients"
    if "dispatch" in item.scope:
        return "etp" if item.groups == groups["etp"] else "ep"
    return "cp" if item.groups == groups["cp"] else "tp"


def _crosses_stages(item: Collective, folding: moe.Folding) -> bool:
    stage = folding.num_ranks // folding.pp
    return any(a // stage != b // stage for a, b in item.groups)


def compile_step(options: moe.MoEConfig, folding: moe.Folding, batch_size: int, length: int) -> Any:
    """The compiled gradient program of a folding, from shapes alone."""
    from jaxrl_suite.moe.partition import stored_shardings
    from jaxrl_suite.moe.verify import quick_compile

    shapes = lm.unflatten(lm.parameter_shapes(options.model))
    shardings = stored_shardings(options, folding)
    params = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),
        shapes,
        shardings,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    batch = jax.eval_shape(lambda: moe.language_batch(jnp.zeros((batch_size, length + 1), jnp.int32)))
    function = jax.jit(moe.loss_and_gradients, static_argnames=("config", "folding"))
    return function.lower(params, batch, config=options, folding=folding).compile(quick_compile())


def run(run: Run) -> Result:
    """Compiles the gradient program of every folding and counts what it sends."""
    config: Any = run.config
    options, foldings = options_of(config), config.parsed

    def one(folding: moe.Folding) -> dict[str, float]:
        compiled = compile_step(options, folding, config.batch_size, config.length)
        return counted_bytes(moe.audit(compiled), folding)

    counted = [run.stage(f"folding_{index}", lambda f=folding: one(f)) for index, folding in enumerate(foldings)]
    counted = np.array([[float(row[kind]) for kind in KINDS] for row in counted])
    predicted = [predicted_bytes(options, folding, config.batch_size, config.length) for folding in foldings]
    predicted = np.array([[row[kind] for kind in KINDS] for row in predicted])
    apart = np.abs(counted - predicted) / np.maximum(predicted, predicted.sum(axis=1, keepdims=True) * 1e-3)
    totals = counted.sum(axis=1)
    summary: dict[str, Any] = {
        "bytes_moved/num_foldings": len(foldings),
        "bytes_moved/ep_equals_formula": bool(np.all(counted[:, KINDS.index("ep")] == predicted[:, KINDS.index("ep")])),
        "bytes_moved/etp_equals_formula": bool(
            np.all(counted[:, KINDS.index("etp")] == predicted[:, KINDS.index("etp")])
        ),
        "bytes_moved/largest_relative_error_of_a_total": float(np.abs(totals / predicted.sum(axis=1) - 1).max()),
    }
    for index, kind in enumerate(KINDS):
        summary[f"bytes_moved/{kind}/largest_relative_error"] = float(apart[:, index].max())
    for folding, total in zip(foldings, totals, strict=True):
        summary[f"bytes_moved/{folding}/megabytes"] = float(total / 1e6)
    names = np.array([str(folding) for folding in foldings])
    return Result(summary, {"counted": counted, "predicted": predicted, "names": names})


def figures(result: Result) -> "dict[str, Figure]":
    """Two bars a folding: predicted (pale) and counted."""
    counted, predicted = result.arrays["counted"] / 1e6, result.arrays["predicted"] / 1e6
    names = [_short(str(name)) for name in result.arrays["names"]]
    figure, axes = plots.new_figure(
        8.5, 1.6 + 0.62 * len(names), title="Bytes that one device sends in a step: formula and compiled program"
    )
    colours, place = plots.colours(), np.arange(len(names))
    for values, offset, alpha in ((predicted, -0.2, 0.45), (counted, 0.2, 1.0)):
        left = np.zeros(len(names))
        for index, kind in enumerate(KINDS):
            label = NAMES[kind] if alpha == 1.0 else None
            axes.barh(place + offset, values[:, index], 0.36, left=left, color=colours[index], alpha=alpha, label=label)
            left += values[:, index]
        for y, x in zip(place + offset, left, strict=True):
            text = f" {x:.2f} " + ("counted" if alpha == 1.0 else "formula")
            axes.text(x, y, text, va="center", fontsize=8)
    axes.set_yticks(place, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(counted.sum(axis=1).max(), predicted.sum(axis=1).max()))
    axes.set_xlabel("sent by one device in one step (MB, float32)")
    figure.legend(fontsize=8, frameon=False, ncols=3, loc="outside lower center")
    return {"bytes_moved": figure}


def _short(name: str) -> str:
    parts = []
    for part in name.split(" "):
        section, _, degrees = part.partition("=")
        if section == "pipeline":
            parts.append(f"pipeline {degrees}" if degrees != "1" else "")
            continue
        kept = [degree for degree in degrees.split(".") if degree.lstrip("abcdefghijklmnopqrstuvwxyz") != "1"]
        parts.append(f"{section} {'.'.join(kept)}")
    return "\n".join(part for part in parts if part)


STUDY = Study(
    name="bytes_moved",
    summary="Bytes that one device sends in a step under each folding, by the planner's formula and counted in the "
    "compiled program.",
    config=BytesMovedConfig,
    run=run,
    figures=figures,
    presets=PRESETS["bytes_moved"],
    headline=("bytes_moved/ep_equals_formula", "bytes_moved/largest_relative_error_of_a_total"),
    num_cpu_devices=8,
)
