"""Kernels that no contract list holds: other sizes choose other kernels, and some want keys, models or devices."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite import alignment, coupling, lm, moe, pareto
from jaxrl_suite import reward_free as rf
from jaxrl_suite.coupling.arimec import arimec_symbol
from jaxrl_suite.coupling.games import CodingGame, play, step_code
from jaxrl_suite.coupling.iterative import fimec_symbol
from jaxrl_suite.coupling.prefix_tree import prefix_tree
from jaxrl_suite.mdp import LinearMixtureMDP, soft_maximum
from jaxrl_suite.moe.fp8 import fp8_matmul, quantize
from jaxrl_suite.moe.grouped import grouped_matmul
from jaxrl_suite.types import SequenceLaw

Item = tuple[str, Callable[..., Any], Callable[[Any], Any]]
F32, I32, BOOL = jnp.float32, jnp.int32, jnp.bool_


def shapes(*items: Any) -> Callable[[Any], Any]:
    """An example by shapes, with a dtype where it is not float32: numbers between 0 and 1, zeros of other dtypes."""

    def example(key: Any) -> tuple[Any, ...]:
        pairs = [item if item and isinstance(item[0], tuple) else (item, F32) for item in items]
        keys = jax.random.split(key, len(pairs))
        return tuple(
            jax.random.uniform(k, shape, dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.zeros(shape, dtype)
            for k, (shape, dtype) in zip(keys, pairs, strict=True)
        )

    return example


def keyed(example: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any], Any]:
    """Puts the key itself before the arguments of another example."""
    return lambda key: (key, *example(key))


def kernels_by_hand() -> Iterator[Item]:
    """(name, function, example) of everything that runs on one device."""
    yield from _couplings()
    yield from _reward_free()
    yield from _pareto()
    yield from _language_model()
    yield from _experts()


def _couplings() -> Iterator[Item]:
    greedy = coupling.greedy_coupling
    yield "coupling.greedy_coupling[small, 512 x 4 batch]", jax.vmap(greedy), shapes((8, 512), (8, 4))
    yield "coupling.greedy_coupling[rank rounds, 512 x 512]", greedy, shapes((512,), (512,))
    yield "coupling.greedy_coupling[plain, 64 x 48]", lambda p, q: greedy(p, q, kernel="plain"), shapes((64,), (48,))
    yield "coupling.greedy_coupling[zero]", lambda p, q: greedy(p, q, rule="zero"), shapes((16,), (12,))
    counts = shapes(((64,), I32), ((64,), I32))
    yield "coupling.greedy_coupling[integer counts]", greedy, counts
    yield "coupling.integer_masses", coupling.integer_masses, shapes((64,))
    yield "coupling.greedy_coupling_multi[4 x 32]", coupling.greedy_coupling_multi, shapes((4, 32))
    yield "coupling.coupling_bounds_multi", coupling.coupling_bounds_multi, shapes((4, 32))
    yield "coupling.ebim_greedy[4096]", lambda p: coupling.ebim_greedy(p, 3.0), shapes((4096,))
    yield "coupling.ebim_exact", lambda p: coupling.ebim_exact(p, 1.0), shapes((6,))
    yield "coupling.mecb[search]", lambda p, q: coupling.mecb(p, q, 2.0), shapes((32,), (16,))
    yield "coupling.quantize_uniform", lambda p: coupling.quantize_uniform(p, 2.0), shapes((32,))
    yield "coupling.quantize_lpt", lambda p: coupling.quantize_lpt(p, 2.0), shapes((32,))
    yield "coupling.sharpen_coupling", coupling.sharpen_coupling, shapes((8, 8))
    yield "coupling.step_code", lambda b, p: step_code(b, p, jnp.asarray(1.7, F32)), shapes((64,), (4,))
    step = shapes((4, 16), ((4,), I32), ((32,), I32), ((), I32), ((), BOOL))
    yield "coupling.fimec_symbol", fimec_symbol, keyed(step)
    yield "coupling.arimec_symbol", _arimec, keyed(shapes(((6,), I32), ((32,), I32), ((), I32), ((), BOOL)))
    yield "coupling.play", _play, keyed(shapes((5, 3), ((12,), I32)))


def _arimec(key: Any, message: Any, counts: Any, symbol: Any, replay: Any) -> Any:
    """Messages of a law without memory, read from a table."""

    def init(params: Any, prompts: Any, mask: Any) -> Any:
        return {"logits": jnp.broadcast_to(params, (prompts.shape[0], *params.shape))}

    def step(params: Any, state: Any, token: Any) -> Any:
        return state, jnp.broadcast_to(params, (token.shape[0], *params.shape))

    law, table = SequenceLaw(init, step, lambda state: state["logits"]), jnp.linspace(0.0, 1.0, 8, dtype=F32)
    tree = prefix_tree(law, table, jnp.zeros((1,), I32), length=6, capacity=16)
    return arimec_symbol(key, tree, message, counts, symbol, replay, law=law, params=table)


def _play(key: Any, policy: Any, messages: Any) -> Any:
    """A walk on five states that ends in the last."""
    game = CodingGame(
        jax.nn.softmax(policy),
        lambda key, state, action: jnp.clip(state + action - 1, 0, 4),
        jnp.zeros(5, F32),
        jnp.arange(5) == 4,
        jnp.int32(0),
    )
    return play(key, game, messages, 1.5, num_messages=16, horizon=8, num_lanes=4)


def _reward_free() -> Iterator[Item]:
    data = shapes((256, 8), (256,), (256,), (), (8,))
    yield "reward_free.weighted_ridge[256 x 8]", rf.weighted_ridge, data
    yield "reward_free.explore, plan, certificate", _explore_and_plan, lambda key: (key,)
    yield "mdp.soft_maximum", lambda q: soft_maximum(q, jnp.asarray(0.3, F32))[0], shapes((6, 4))


def _explore_and_plan(key: Any) -> Any:
    mdp_key, run_key = jax.random.split(key)
    kernels = jax.nn.softmax(jax.random.normal(mdp_key, (4, 2, 3, 4), F32))
    mdp = _mixture(kernels)
    config = rf.ExplorerConfig(horizon=3, num_episodes=3, num_moments=2, ascent_steps=2, num_starts=2)
    found = rf.explore(run_key, mdp, config)
    rewards = jnp.full((2, 3, 4, 2), 0.1, F32)
    return rf.plan(found, rewards), rf.certificate(mdp, config, rf.HParams(), found)


def _mixture(kernels: Any) -> Any:
    states, actions, number = kernels.shape[:3]
    return LinearMixtureMDP(
        features=jnp.swapaxes(kernels, 2, 3),
        successors=jnp.broadcast_to(jnp.arange(states, dtype=I32), (states, actions, states)),
        theta=jnp.full(number, 1 / number, F32),
        nominal=jnp.full(number, 1 / number, F32),
        start=jnp.int32(0),
        norm_bound=jnp.asarray(1.0, F32),
        center_bound=jnp.asarray(0.9, F32),
    )


def _pareto() -> Iterator[Item]:
    for number, objectives in ((64, 2), (64, 3), (16, 4)):
        points = shapes((number, objectives), (objectives,))
        name = f"pareto.hypervolume[{number} points, {objectives}]"
        yield name, pareto.hypervolume, points
        yield f"{name} gradient", jax.grad(pareto.hypervolume), points
    for name in cast(tuple[Any, ...], pareto.AGGREGATORS):
        yield f"pareto.aggregate[{name}, 4]", functools.partial(pareto.aggregate, rule=name), shapes((4, 4))
    yield "pareto.project_simplex", pareto.project_simplex, shapes((8,))
    yield "pareto.igd_plus", pareto.igd_plus, shapes((16, 3), (32, 3))
    mask = shapes((2, 4), ((8, 6), BOOL))
    yield (
        "alignment.reinforce_baseline_advantages",
        lambda r, m: alignment.reinforce_baseline_advantages(r, m),
        mask,
    )
    yield "alignment.remax_advantages", alignment.remax_advantages, shapes((12,), ())


_MODEL = lm.LanguageModelConfig(
    vocab_size=512, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_width=128
)
_SPARSE = _MODEL.replace(num_experts=4, experts_per_token=2, expert_width=64)


def _params(config: Any, rest: Callable[[Any], tuple[Any, ...]]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda key: (lm.init_params(key, config), *rest(key))


def _language_model() -> Iterator[Item]:
    tokens = shapes(((2, 256), I32))
    for kind, config in (("dense", _MODEL), ("sparse", _SPARSE)):
        yield f"lm.apply[{kind}, 256 tokens]", lambda p, t, c=config: lm.apply(p, t, config=c), _params(config, tokens)
        loss = _loss(config)
        yield f"lm.supervised_loss[{kind}] gradient", jax.grad(loss), _params(config, shapes(((2, 256), I32), (2, 256)))
    half = _MODEL.replace(compute_dtype="bfloat16")
    yield (
        "lm.supervised_loss[bfloat16] gradient",
        jax.grad(_loss(half)),
        _params(half, shapes(((2, 256), I32), (2, 256))),
    )
    yield "lm.log_probs", lambda p, t: lm.token_log_probs(lm.LanguageModel(_MODEL), p, t), _params(_MODEL, tokens)
    prompts = shapes(((2, 8), I32), ((2, 8), BOOL))
    cut = lm.Sampling(max_tokens=8, top_k=40, top_p=0.9, min_p=0.01, temperature=0.7, stop_tokens=(3,))
    for name, sampling in (("while, all truncations", cut), ("greedy", lm.Sampling(max_tokens=8, greedy=True))):
        yield f"lm.generate[{name}]", _generate(sampling, "while"), keyed(_params(_MODEL, prompts))
    yield "lm.generate[scan]", _generate(lm.Sampling(max_tokens=8), "scan"), keyed(_params(_MODEL, prompts))
    yield "lm.draw", lambda key, x: lm.draw(jax.random.split(key, 4), x), keyed(shapes((4, 512)))


def _loss(config: Any) -> Callable[..., Any]:
    return lambda p, t, w: lm.supervised_loss(p, lm.SupervisedBatch(t, w), config=config)


def _generate(sampling: Any, loop: Any) -> Callable[..., Any]:
    model, ids = lm.LanguageModel(_MODEL), np.arange(2, dtype=np.int32)

    def run(key: Any, params: Any, prompts: Any, mask: Any) -> Any:
        return lm.generate(key, model, params, prompts, mask, row_ids=ids, sampling=sampling, loop=loop)

    return run


def _experts() -> Iterator[Item]:
    yield "moe.fp8.quantize[1 x 128]", quantize, shapes((64, 256))
    yield "moe.fp8.quantize[128 x 128]", lambda x: quantize(x, (128, 128)), shapes((256, 256))
    yield "moe.fp8.fp8_matmul", fp8_matmul, shapes((64, 256), (256, 128))
    for backend in ("blocks", "ragged_dot"):
        yield f"moe.grouped_matmul[{backend}] gradient", jax.grad(_grouped(backend), argnums=(0, 1)), _groups


def _groups(key: Any) -> tuple[Any, ...]:
    """Rows, matrices and sizes of four groups, one of them empty, at which GPUs use kernels of their own."""
    rows, weights = shapes((256, 64), (4, 64, 32))(key)
    return rows, weights, jnp.array([100, 0, 56, 70], I32)


def _grouped(backend: Any) -> Callable[..., Any]:
    return lambda rows, weights, sizes: jnp.sum(grouped_matmul(rows, weights, sizes, backend=backend) ** 2)


def distributed_kernels() -> list[tuple[str, Callable[[str, Sequence[Any]], Any]]]:
    """(name, compile) of what runs over eight devices besides the train step."""
    return [
        ("moe.policy.log_probs[tp2 cp2, ep8]", lambda platform, devices: _compile_policy("log_probs", devices)),
        ("moe.policy.generate[tp2 cp2, ep8]", lambda platform, devices: _compile_policy("generate", devices)),
    ]


def _compile_policy(kind: str, devices: Sequence[Any]) -> None:
    from experiments.cluster.abstract_step import abstract_state

    folding = moe.Folding.parse("attention=tp2.cp2 experts=ep8", 8)
    config = moe.MoEConfig(model=_MODEL.replace(num_experts=8, experts_per_token=2, expert_width=64))
    params, policy = abstract_state(config, folding).params, moe.policy(config, folding)
    place = jax.sharding.NamedSharding(folding.mesh(), jax.sharding.PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    if kind == "log_probs":
        jax.jit(policy.log_probs).lower(params, array((4, 32), I32)).compile()
        return
    key = jax.eval_shape(lambda: jax.random.key(0))
    sampling = lm.Sampling(max_tokens=8)
    run = jax.jit(lambda key, p, t, m, rows: policy.generate(key, p, t, m, rows, sampling))
    rows = (array((4, 8), I32), array((4, 8), BOOL), array((4,), I32))
    run.lower(array(key.shape, key.dtype), params, *rows).compile()
