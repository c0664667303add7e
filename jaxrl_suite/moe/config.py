"""What a user chooses about sparse layers and the train step, apart from the folding."""

import dataclasses
from typing import Literal, NamedTuple

from jaxrl_suite.config import Config, check, field
from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.capacity import DropPolicy
from jaxrl_suite.moe.dispatch import Mode
from jaxrl_suite.moe.folding import Folding, nearest_foldings
from jaxrl_suite.moe.folding import foldings as all_foldings

Remat = Literal["none", "norms", "full", "full_with_dispatch", "elementwise", "experts", "attention"]


class HParams(NamedTuple):
    """Traced hyperparameters of the train step.

    learning_rate: step of AdamW.
    weight_decay: decoupled decay of matrices.
    clip_norm: largest global gradient norm; 0 for no clipping.
    balance_coef: weight of the balancing loss chosen by the configuration.
    z_coef: weight of the router z-loss.
    bias_rate: step of the loss-free balancing bias (needs a model with a router bias).
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    balance_coef: float = 0.0
    z_coef: float = 0.0
    bias_rate: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(Config):
    """A mixture-of-experts model and how its train step runs; static under jit.

    The model comes from ``lm`` and knows nothing of devices; where the arrays lie is the folding's affair.
    """

    model: LanguageModelConfig = field(LanguageModelConfig(num_experts=8), help="shape of the decoder")
    dispatch: Mode = field("padded", help="how copies of tokens reach their experts")
    capacity_factor: float | None = field(None, help="slots of an expert over its even share; None for dropless")
    drop_policy: DropPolicy = field("probs", help="which copies an overfull expert keeps")
    drop_scope: Literal["rank", "sequence"] = field("rank", help="tokens that a capacity is decided over")
    buffer_factor: float | None = field(None, help="'padded': rows to a peer over the even share; None never overflows")
    balance: Literal["none", "batch", "sequence", "global"] = field("none", help="scope of the balancing loss")
    block_rows: int = field(0, help="rows of one block of an expert; 0 for 16 on a CPU, elsewhere a quarter of a share")
    expert_precision: Literal["compute", "float8"] = field(
        "compute", help="operands of the experts' products: the compute dtype, or blockwise scaled float8 (e4m3)"
    )
    num_microbatches: int = field(1, help="micro-batches of one step on each data rank")
    schedule: Literal["gpipe", "1f1b"] = field("gpipe", help="pipeline schedule")
    pending: Literal["inputs", "all"] = field(
        "inputs",
        help="what 1F1B keeps of micro-batches that wait: inputs of layers (remat full) or stages, or as remat",
    )
    virtual_stages: int = field(1, help="rounds of the circular pipeline; 1 for none")
    context: Literal["all_gather", "ring"] = field("all_gather", help="how context ranks see each other's keys")
    zigzag: bool = field(True, help="context rank r owns chunks r and 2·CP-1-r of a sequence, to balance causal work")
    sharding: Literal["none", "zero1", "fsdp"] = field("none", help="what is split over the data ranks")
    remat: Remat = field(
        "none",
        help="what the backward pass recomputes; norms: norms and sums alone, the fastest on a CPU; elementwise: no "
        "product and no exchange; full sends tokens out again under 1F1B, see pending",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.dispatch != "drop_pad" or self.capacity_factor is not None,
            argument="capacity_factor",
            value=self.capacity_factor,
            rule="dispatch='drop_pad' needs a capacity factor",
            remedy="A factor of E / k or more drops nothing",
        )
        check(self.block_rows >= 0, argument="block_rows", value=self.block_rows, rule="must not be negative")
        for name in ("num_microbatches", "virtual_stages"):
            check(getattr(self, name) >= 1, argument=name, value=getattr(self, name), rule="must be at least 1")
        for name in ("capacity_factor", "buffer_factor"):
            value = getattr(self, name)
            check(value is None or value > 0, argument=name, value=value, rule="must be positive")
        check(
            self.schedule == "gpipe" or self.virtual_stages == 1,
            argument="virtual_stages",
            value=self.virtual_stages,
            rule="the 1f1b schedule has one round",
            remedy="Use schedule='gpipe' for a circular pipeline",
        )


def dropless(config: MoEConfig) -> MoEConfig:
    """The same model without a capacity, so that its result does not depend on the folding."""
    dispatch = "padded" if config.dispatch == "drop_pad" else config.dispatch
    return config.replace(capacity_factor=None, buffer_factor=None, dispatch=dispatch)


def check_folding(
    config: MoEConfig, folding: Folding, *, batch_size: int | None = None, length: int | None = None
) -> None:
    """Checks that a model (and batch) can be laid out on a folding.

    Args:
        config: model and step.
        folding: degrees.
        batch_size: sequences of a global batch, if known.
        length: tokens of a sequence, if known.

    Raises:
        ValueError: something does not divide; one message with the numbers and the nearest foldings that work.
    """
    rule, remedy = "must be a Folding", "Write moe.Folding.parse(text)"
    check(isinstance(folding, Folding), argument="folding", value=folding, rule=rule, remedy=remedy)
    problems = _problems(config, folding, batch_size, length)
    if problems:
        others = [f for f in all_foldings(folding.num_ranks) if not _problems(config, f, batch_size, length)]
        degrees = {name: getattr(folding, name) for name in ("tp", "cp", "dp", "etp", "ep", "edp", "pp")}
        nearest = "; ".join(map(str, nearest_foldings(degrees, others))) or "none for this model and number of ranks"
        raise ValueError(f"folding={str(folding)!r}: {', '.join(problems)}. Nearest that work: {nearest}.")


def _problems(config: MoEConfig, folding: Folding, batch_size: int | None, length: int | None) -> list[str]:
    model, problems = config.model, []

    def divide(what: str, number: int, by: str, degree: int) -> None:
        if number % degree:
            problems.append(f"{what}={number} does not divide by {by}={degree}")

    if model.num_experts:
        divide("num_experts", model.num_experts, "ep", folding.ep)
        divide("expert width", model.routed_width, "etp", folding.etp)
    else:
        divide("ffn_width", model.ffn_width, "tp", folding.tp)
    if model.shared_width:
        divide("shared_width", model.shared_width, "tp", folding.tp)
    divide("num_heads", model.num_heads, "tp", folding.tp)
    if folding.tp % model.num_kv_heads:
        divide("num_kv_heads", model.num_kv_heads, "tp", folding.tp)
    if len(set(model.layer_windows)) > 1:
        problems.append(f"first_window_layer={model.first_window_layer}: all layers must have the same window")
    divide("vocab_size", model.vocab_size, "tp", folding.tp)
    divide("num_layers", model.num_layers, "pp·virtual_stages", folding.pp * config.virtual_stages)
    if length is not None:
        twice = 2 if config.zigzag and folding.cp > 1 else 1
        divide("length", length, f"{'2·' if twice > 1 else ''}tp·cp", twice * folding.tp * folding.cp)
    if batch_size is not None:
        divide("batch_size", batch_size, "dp·num_microbatches", folding.dp * config.num_microbatches)
    if config.virtual_stages > 1:
        divide("num_microbatches", config.num_microbatches, "pp", folding.pp)
    return problems
