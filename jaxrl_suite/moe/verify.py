"""Verification of one folding for one model, on virtual devices, before a cluster is paid for.

The oracle is the decoder of ``lm`` with its own dropless experts on one device: no mesh, no dispatcher, no hooks.
Inputs are drawn until no routing decision is closer than 1e-4, since rounding may turn closer ones either way.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite import lm
from jaxrl_suite.config import check
from jaxrl_suite.lm.feed_forward import sparse_feed_forward
from jaxrl_suite.moe.audit import Collective, audit
from jaxrl_suite.moe.config import HParams, MoEConfig, check_folding, dropless
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.layer import RouterSums, moe_layer
from jaxrl_suite.moe.model import Batch, language_batch, make_layout
from jaxrl_suite.moe.partition import logical_axes
from jaxrl_suite.moe.train import apply_gradients, init_moments, loss_and_gradients, state_from_params
from jaxrl_suite.types import Array, Params, PRNGKey

GRADIENT_BOUND = 1e-5  # per tensor, largest difference over largest gradient
STEPS_BOUND = 1e-4  # relative, of the loss of each step
GAP = 1e-4  # smallest difference between a chosen and a rejected router logit


class Check(NamedTuple):
    """One verified property: measured value against its bound."""

    name: str
    properties: str
    passed: bool
    value: float
    bound: float
    note: str = ""


class Report(NamedTuple):
    """Outcome of :func:`verify`."""

    folding: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [f"{self.folding}: {'all checks passed' if self.passed else 'FAILED'}"]
        for item in self.checks:
            mark = "ok  " if item.passed else "FAIL"
            bound = f"{item.value:.3g} (bound {item.bound:.3g})"
            lines.append(f"  {mark}  {item.name:<44} {bound:<28} {item.note}".rstrip())
        return "\n".join(lines)


class Problem(NamedTuple):
    """Parameters and a batch whose routing is decided clearly, with what the oracle makes of them."""

    params: Params
    batch: Batch
    gap: float
    loss: float
    gradients: Params


def shrink(model: lm.LanguageModelConfig, folding: Folding) -> lm.LanguageModelConfig:
    """A small model with the conventions of a large one that still divides under the folding."""
    heads = max(8, folding.tp)
    experts = max(model.num_experts and 8, folding.ep) if model.num_experts else 0
    groups = model.router_groups if model.router_groups > 1 and experts % model.router_groups == 0 else 1
    return model.replace(
        vocab_size=max(64, folding.tp),
        width=32,
        num_layers=8 if 8 % folding.pp == 0 else folding.pp,
        num_heads=heads,
        num_kv_heads=heads if model.num_kv_heads == model.num_heads else max(1, heads // 2),
        head_dim=4,
        ffn_width=max(16, folding.tp, folding.etp),
        num_experts=experts,
        experts_per_token=min(model.experts_per_token, 2),
        expert_width=max(16, folding.etp) if model.num_experts else 0,
        shared_width=max(16, folding.tp) if model.shared_width else 0,
        router_groups=groups,
        router_top_groups=min(model.router_top_groups, groups),
        sliding_window=None,
        param_dtype="float32",
        compute_dtype="param",
        init_std=0.2,
    )


def make_problem(key: PRNGKey, config: MoEConfig, batch_size: int, length: int, *, tries: int = 64) -> Problem:
    """Draws parameters and tokens until routing is clear, and runs the oracle on them.

    Raises:
        ValueError: no draw was clear enough.
    """
    model = config.model
    oracle, init = _oracle(model), jax.jit(lambda k: lm.init_params(k, model), compiler_options=quick_compile())
    for attempt in range(tries):
        params_key, tokens_key = jax.random.split(jax.random.fold_in(key, attempt))
        params = init(params_key)
        batch = language_batch(jax.random.randint(tokens_key, (batch_size, length + 1), 0, model.vocab_size))
        (loss, gap), gradients = oracle(params, batch)
        if float(gap) >= GAP:
            return Problem(params, batch, float(gap), float(loss), gradients)
    raise ValueError(f"tries={tries}: no inputs without routing ties closer than {GAP}. Use fewer tokens or layers.")


def verify(
    config: MoEConfig,
    folding: Folding,
    *,
    key: PRNGKey | None = None,
    problem: Problem | None = None,
    num_steps: int = 10,
    modes: tuple[str, ...] = ("drop_pad", "padded", "allgather", "emulated"),
) -> Report:
    """Checks a model on a folding against one device, and its compiled communication against the declared groups.

    Args:
        config: model and options; verified as dropless float32, whatever capacity it asks for. Use :func:`shrink` first
            for a model that does not fit.
        folding: degrees; needs as many (virtual) devices as it has ranks.
        key: consumed; a fixed one by default.
        problem: inputs to use instead of drawing some, for sweeps over many foldings.
        num_steps: optimiser steps of the trajectory check; 0 skips it.
        modes: dispatchers compared on one layer; () skips it.

    Returns:
        The report; ``print`` it.

    Raises:
        ValueError: model and folding do not fit, or there are too few devices.
    """
    config = dropless(config)
    check_folding(config, folding)
    folding.mesh()
    size, length = smallest_batch(config, folding)
    if problem is None:
        problem = make_problem(jax.random.key(0) if key is None else key, config, size, length)
    compiled, state = compile_gradients(config, folding, problem)
    checks = _gradient_checks(compiled, state.params, config, folding, problem)
    if num_steps:
        checks += _step_checks(compiled, state, problem, num_steps)
    checks += communication_checks(audit(compiled), config, folding)
    if config.model.num_experts:
        checks += [_layer_check(mode, config, folding, problem) for mode in modes]
    return Report(str(folding), tuple(checks))


def smallest_batch(config: MoEConfig, folding: Folding) -> tuple[int, int]:
    """Sequences and tokens of a sequence of the smallest batch that divides."""
    return folding.dp * config.num_microbatches, max(4, 2 * folding.cp * folding.tp)


def compile_gradients(config: MoEConfig, folding: Folding, problem: Problem) -> tuple[Any, Any]:
    """The compiled gradient program, and a state that holds the problem's parameters on the folding."""
    state = state_from_params(problem.params, config, folding)
    function = jax.jit(loss_and_gradients, static_argnames=("config", "folding"))
    return function.lower(state.params, problem.batch, config=config, folding=folding).compile(quick_compile()), state


def quick_compile() -> dict[str, Any]:
    """Compiler options that halve the compile time on a CPU; the collectives stay the same."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def relative_errors(ours: Params, theirs: Params) -> dict[str, float]:
    """Per tensor: largest difference over largest entry."""
    a, b = lm.flatten(ours), lm.flatten(theirs)
    errors = {}
    for path, expected in b.items():
        expected, got = np.asarray(expected, np.float64), np.asarray(a[path], np.float64)
        scale = np.abs(expected).max()
        errors[path] = float(np.abs(got - expected).max() / scale) if scale > 0 else float(np.abs(got).max())
    return errors


@functools.lru_cache(maxsize=8)
def _oracle(model: lm.LanguageModelConfig) -> Any:
    """``(params, batch) -> ((loss, smallest routing gap), gradients)`` on one device."""

    def loss(params: Params, batch: Batch) -> tuple[Array, Array]:
        options = {"config": model, "positions": batch.positions, "segments": batch.segments}
        x, aux = lm.forward(params, batch.inputs, **options)
        logits = lm.head(params, x, config=model)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
        mask = batch.mask.astype(log_probs.dtype)
        gap = jnp.asarray(jnp.inf, log_probs.dtype)
        if model.num_experts > model.experts_per_token:
            best = jax.lax.top_k(aux.logits, model.experts_per_token + 1)[0]
            gap = jnp.min(best[..., -2] - best[..., -1])
        return -jnp.sum(log_probs * mask) / jnp.maximum(jnp.sum(mask), 1), gap

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick_compile())


def _gradient_checks(
    compiled: Any, params: Params, config: MoEConfig, folding: Folding, problem: Problem
) -> list[Check]:
    gradients, parts = compiled(params, problem.batch)
    errors = relative_errors(gradients, problem.gradients)
    worst = max(errors, key=lambda path: errors[path])
    loss_error = abs(float(parts.loss) - problem.loss) / abs(problem.loss)
    checks = [
        Check("loss equals one device", "4, 5, 7", loss_error <= 1e-5, loss_error, 1e-5),
        Check(
            "every gradient equals one device",
            "5",
            errors[worst] <= GRADIENT_BOUND,
            errors[worst],
            GRADIENT_BOUND,
            worst,
        ),
    ]
    if config.model.num_experts:
        copies = problem.batch.inputs.size * config.model.experts_per_token * config.model.num_layers
        lost = abs(float(parts.sent) - copies) + float(parts.dropped) + float(parts.overflow)
        routed = abs(float(jnp.sum(parts.counts)) - copies)
        checks.append(Check("every token copy is sent once", "9", lost + routed == 0, lost + routed, 0.0))
    del folding
    return checks


def _step_checks(compiled: Any, state: Any, problem: Problem, num_steps: int) -> list[Check]:
    hparams = HParams()
    update = jax.jit(apply_gradients, compiler_options=quick_compile())
    oracle, update_oracle = _oracle(state.config.model), _oracle_update(hparams)
    params, moments = state.params, state.moments
    reference, reference_moments = problem.params, init_moments(problem.params)
    worst_loss = worst_norm = 0.0
    for _ in range(num_steps):
        gradients, parts = compiled(params, problem.batch)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        params, moments, norm = update(params, moments, gradients, parts.counts, hparams)
        params = jax.device_put(params, shardings)
        (loss, _), gradients = oracle(reference, problem.batch)
        reference, reference_moments, expected = update_oracle(
            reference, reference_moments, gradients, np.asarray(parts.counts)
        )
        worst_loss = max(worst_loss, abs(float(parts.loss) - float(loss)) / abs(float(loss)))
        worst_norm = max(worst_norm, abs(float(norm) - float(expected)) / float(expected)) if _ == 0 else worst_norm
    return [
        Check(f"loss of {num_steps} optimizer steps", "6", worst_loss <= STEPS_BOUND, worst_loss, STEPS_BOUND),
        Check("global gradient norm", "6", worst_norm <= 1e-6, worst_norm, 1e-6),
    ]


@functools.lru_cache(maxsize=8)
def _oracle_update(hparams: HParams) -> Any:
    return jax.jit(lambda p, m, g, c: apply_gradients(p, m, g, c, hparams), compiler_options=quick_compile())


def communication_checks(collectives: list[Collective], config: MoEConfig, folding: Folding) -> list[Check]:
    """Groups and frequency of the collectives of a compiled gradient program (properties 16 and 17)."""

    def groups(kind: str) -> tuple[tuple[int, ...], ...]:
        return tuple(sorted(tuple(sorted(group)) for group in folding.groups(kind)))

    def wrong(items: list[Collective], allowed: set) -> int:
        return sum(item.groups not in allowed for item in items)

    # A circular pipeline re-orders its layers outside of the manual program, by whatever XLA chooses.
    exchanges = [c for c in collectives if c.kind == "all-to-all" and "shard_map" in c.scope]
    checks = [
        Check(
            "all-to-all only over ep groups",
            "16",
            wrong(exchanges, {groups("ep")}) == 0,
            wrong(exchanges, {groups("ep")}),
            0,
        )
    ]
    inside = [c for c in collectives if c.kind in ("all-gather", "reduce-scatter") and c.loops]
    allowed = {groups("tp"), groups("etp"), groups("cp")}
    if config.dispatch == "padded" and config.sharding != "fsdp":
        bad = wrong(inside, allowed)
        checks.append(Check("gathers and scatters only over tp, etp, cp", "16", bad == 0, bad, 0))
    expert = [c for c in collectives if c.kind in ("all-reduce", "reduce-scatter") and c.groups == groups("edp")]
    large = _expert_bytes(config, folding)
    sums = [c for c in expert if c.num_bytes >= large]
    if folding.edp > 1 and config.model.num_experts and config.sharding != "fsdp":
        in_loops = sum(bool(c.loops) for c in sums)
        ok = len(sums) >= 1 and in_loops == 0
        checks.append(
            Check("expert gradients: over edp, once a step", "17", ok, in_loops, 0, f"{len(sums)} reductions")
        )
    size = {
        (item.kind, item.groups): item for item in collectives if item.kind == "all-reduce" and item.num_bytes > 4096
    }
    repeated = sum(bool(item.loops) for item in size.values()) if config.sharding != "fsdp" else 0
    checks.append(Check("no large reduction inside a loop", "17", repeated == 0, repeated, 0))
    return checks


def _expert_bytes(config: MoEConfig, folding: Folding) -> int:
    model = config.model
    one = model.width * model.routed_width * model.num_experts * model.num_layers
    return 4 * one // (folding.ep * folding.etp * folding.pp)


def _layer_check(mode: str, config: MoEConfig, folding: Folding, problem: Problem) -> Check:
    """One sparse layer, forward and backward, under a dispatcher against the oracle's layer."""
    model = config.model
    factor = model.num_experts / model.experts_per_token if mode == "drop_pad" else None
    config = config.replace(dispatch=mode, capacity_factor=factor)
    params = jax.tree.map(lambda leaf: leaf[0], problem.params["layers"]["feed_forward"])
    size, length = problem.batch.inputs.shape
    x = jax.random.normal(jax.random.key(1), (size, length, model.width))
    cotangent = jax.random.normal(jax.random.key(2), x.shape)
    y, pullback = jax.vjp(lambda p, v: sparse_feed_forward(model)(p, v)[0], params, x)
    ours = jax.jit(
        lambda p, v, g: _with_gradient(lambda a, b: sharded_layer(a, b, config, folding)[0], p, v, g),
        compiler_options=quick_compile(),
    )
    values = jax.tree.map(np.asarray, ours(params, x, cotangent))
    error = max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
        for a, b in zip(jax.tree.leaves(values), jax.tree.leaves((y, pullback(cotangent))), strict=True)
    )
    return Check(f"layer with {mode} equals one device", "4, 12, 15", error <= 2e-5, error, 2e-5)


def _with_gradient(function: Any, params: Params, x: Array, cotangent: Array) -> tuple[Array, Any]:
    y, pullback = jax.vjp(function, params, x)
    return y, pullback(cotangent)


def sharded_layer(params: Params, x: Array, config: MoEConfig, folding: Folding) -> tuple[Array, RouterSums]:
    """:func:`moe_layer` on global arrays: params of one layer, x [B, T, D].

    Returns:
        y [B, T, D], and the sums of each rank stacked along the first axis.
    """
    check(config.model.num_experts > 0, argument="num_experts", value=0, rule="the model has no sparse layer")
    layout = make_layout(config, folding)
    specs = lm.unflatten(
        {
            path: folding.spec(*logical_axes(f"layers/feed_forward/{path}", config.model, folding.tp)[1:])
            for path in lm.flatten(params)
        }
    )
    tokens, ranks = folding.spec("dp", ("cp", "tp")), folding.spec("tokens")

    def local(params: Params, x: Array) -> tuple[Array, RouterSums]:
        y, sums = moe_layer(params, x, config=config, axes=layout.layer)
        return y, jax.tree.map(lambda leaf: leaf[None], sums)

    mapped = jax.shard_map(local, mesh=folding.mesh(), in_specs=(specs, tokens), out_specs=(tokens, ranks))
    return mapped(params, x)


__all__ = ["Check", "Problem", "Report", "make_problem", "sharded_layer", "shrink", "verify"]
