"""Recomputation policies, bfloat16 gradients and long training on foldings."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxrl_suite import lm, moe
from jaxrl_suite.moe.cost_flops import jaxpr_flops
from jaxrl_suite.moe.kept_layers import empty_ring
from jaxrl_suite.moe.model import Layout, make_layer, rematerialised
from jaxrl_suite.moe.variance import vary
from jaxrl_suite.moe.verify import quick_compile, relative_errors

MODEL = lm.LanguageModelConfig(
    vocab_size=32,
    width=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    num_experts=4,
    expert_width=16,
    init_std=0.3,
)


@functools.cache
def params():
    return jax.jit(lambda: lm.init_params(jax.random.key(0), MODEL), compiler_options=quick_compile())()


def lowered_gradients(text, batch, **options):
    """The lowered gradient program of a folding and its parameters."""
    folding, config = moe.Folding.parse(text), moe.MoEConfig(model=MODEL, block_rows=16).replace(**options)
    state = moe.state_from_params(params(), config, folding)
    function = jax.jit(moe.loss_and_gradients, static_argnames=("config", "folding"))
    return function.lower(state.params, batch, config=config, folding=folding), state.params


def stack_of_layers(policy):
    """Gradients of four residual sparse layers on two ranks under a policy of recomputation, and their arguments."""
    folding = moe.Folding.parse("attention=dp2 experts=ep2")
    config = moe.MoEConfig(model=MODEL, remat=policy, dispatch="drop_pad", capacity_factor=2.0)
    axes = moe.LayerAxes(moe.ExpertAxes(folding.roles["ep"]))
    generator = np.random.default_rng(0)
    shapes = {"router": (16, 4), "gate": (4, 16, 16), "up": (4, 16, 16), "down": (4, 16, 16)}
    layers = {name: generator.normal(size=(4, *shape)).astype(np.float32) * 0.2 for name, shape in shapes.items()}
    x = generator.normal(size=(4, 64, 16)).astype(np.float32)

    def layer(x, params):
        own = {"router": params["router"], "experts": {name: params[name] for name in ("gate", "up", "down")}}
        return x + moe.moe_layer(own, x, config=config, axes=axes)[0], None

    def local(layers, x):
        layers = vary(layers, folding.atoms.names)
        y = jax.lax.scan(rematerialised(layer, policy), x, layers)[0]
        return jax.lax.psum(jnp.sum(jnp.sin(y)), folding.atoms.names)

    split, tokens = folding.spec(None, "ep"), folding.spec("dp")
    specs = {name: folding.spec() if name == "router" else split for name in layers}
    mapped = jax.shard_map(local, mesh=folding.mesh(), in_specs=(specs, tokens), out_specs=folding.spec())
    return jax.jit(jax.grad(mapped)), layers, x


def test_recomputation_saves_memory_and_repeats_no_exchange_unasked():
    """Property 29: values do not change, memory falls, and rows and their weights go out again only where asked for.

    They never come back a second time.
    """
    exchanges, memory, values = {}, {}, {}
    for policy in ("none", "elementwise", "experts", "full", "full_with_dispatch"):
        gradient, *arguments = stack_of_layers(policy)
        compiled = gradient.lower(*arguments).compile(quick_compile())
        exchanges[policy] = sum(item.kind == "all-to-all" for item in moe.audit(compiled))
        memory[policy] = compiled.memory_analysis().temp_size_in_bytes
        values[policy] = compiled(*arguments)
    assert exchanges.pop("full_with_dispatch") == 8
    assert set(exchanges.values()) == {6}, exchanges  # out and back, and weights out, forward and backward
    assert memory["none"] > memory["experts"] > memory["full"] >= memory["full_with_dispatch"], memory
    assert memory["none"] > memory["elementwise"] > memory["full"], memory
    for policy in ("elementwise", "experts", "full", "full_with_dispatch"):
        assert max(relative_errors(values[policy], values["none"]).values()) <= 1e-5


def stacks(jaxpr, shape):
    """How many stacks of a shape scans hand out."""
    inner = sum(stacks(body, shape) for equation in jaxpr.eqns for body in jaxprs_in_params(equation.params))
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    return inner + sum(variable.aval.shape == shape for equation in scans for variable in equation.outvars)


@pytest.mark.parametrize(("policy", "number"), [("elementwise", 1), ("full", 1), ("full_with_dispatch", 0)])
def test_rows_are_kept_on_their_way_out_alone(policy, number):
    """128 tokens a rank, two copies each, twice the even share: 512 rows of width 16 a layer; traced alone."""
    gradient, *arguments = stack_of_layers(policy)
    assert stacks(gradient.trace(*arguments).jaxpr.jaxpr, (4, 512, 16)) == number


def runs(jaxpr, kinds):
    """How often operations of some kinds run, the turns of scans counted."""
    total = Counter()
    for equation in jaxpr.eqns:
        total[equation.primitive.name] += equation.primitive.name in kinds
        inner = sum((runs(body, kinds) for body in jaxprs_in_params(equation.params)), Counter())
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        total.update({kind: turns * number for kind, number in inner.items()})
    return +total


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("attention=tp2.dp2 experts=etp2.ep2 pipeline=2", {"schedule": "1f1b", "pending": "all"}),
        ("attention=tp2.cp2 experts=ep4", {"dispatch": "padded", "capacity_factor": None, "context": "ring"}),
    ],
)
def test_elementwise_repeats_no_product_and_no_exchange(text, options):
    """Only gathers before column splits stand in the step more often than where everything is kept; traced alone."""
    model = MODEL.replace(shared_width=16)
    config = moe.MoEConfig(model=model, dispatch="drop_pad", capacity_factor=1.0, num_microbatches=4).replace(**options)
    folding = moe.Folding.parse(text)
    state = moe.init_train_state(jax.random.key(0), config, folding)
    batch = moe.language_batch(jnp.zeros((4 * folding.dp, 33), jnp.int32))
    flops, found = {}, {}
    for policy in ("none", "elementwise", "full"):
        function = jax.jit(moe.loss_and_gradients, static_argnames=("config", "folding"))
        jaxpr = function.trace(state.params, batch, config=config.replace(remat=policy), folding=folding).jaxpr.jaxpr
        flops[policy] = jaxpr_flops(jaxpr).total
        found[policy] = runs(jaxpr, ("all_to_all", "all_gather", "reduce_scatter", "ppermute"))
    assert flops["full"] > 1.2 * flops["none"] == 1.2 * flops["elementwise"]
    ticks = 5 if folding.pp > 1 else 4
    gathers = ticks * 2 * model.num_layers // folding.pp  # attention and the shared expert
    assert found["elementwise"] - found["none"] == Counter(all_gather=gathers), (found["elementwise"], found["none"])


def test_a_ring_holds_what_the_policy_names_and_nothing_else():
    """Neither weights nor the batch, which are at hand: shapes of a layer on 16 tokens of width 16, 2 x 8; not run."""
    batch = moe.language_batch(jnp.zeros((2, 9), jnp.int32))
    layers = jax.eval_shape(lambda: lm.init_params(jax.random.key(0), MODEL))["layers"]

    def kept(policy):
        config = moe.MoEConfig(model=MODEL, remat=policy, block_rows=16)
        layer = make_layer(batch, config=config, layout=Layout())
        x = jnp.zeros((2, 8, 16))
        ring = jax.eval_shape(lambda p: empty_ring(layer, p, x, batch, slots=3, mesh=())[0], layers)
        assert all(leaf.shape[:2] == (3, 4) for leaf in jax.tree.leaves(ring))
        return Counter(leaf.shape[2:] for leaf in ring.kept)

    mask = Counter([(2,), (2, 8)])  # tokens that count, of each sequence and each by itself
    assert kept("full_with_dispatch") - mask == Counter([(2, 8, 16)])
    stream, heads, filled = (2, 8, 16), (2, 8, 4, 4), (2, 16, 4, 4)
    gate, up = (96, 16), (6, 16, 16)  # rows, padded to blocks of 16; up block by block
    names = Counter({stream: 2, heads: 3})  # input and residual; q, k, v
    names += Counter({filled: 1, filled[:-1]: 1, gate: 1, up: 1})  # output of attention, normaliser: 16 rows a block
    assert kept("elementwise") - mask == names + Counter([(16, 4), (16, 2), (16, 2)])  # logits; experts, which are kept


def test_a_step_in_place_is_the_same_step_and_takes_the_state():
    config, folding = moe.MoEConfig(model=MODEL, block_rows=16), moe.Folding.parse("attention=tp2.dp2 experts=ep4")
    state = moe.state_from_params(params(), config, folding)
    batch = moe.language_batch(jax.random.randint(jax.random.key(1), (4, 9), 0, 32))
    kept, metrics = moe.train_step(state, batch)
    given = jax.tree.map(jnp.copy, state)
    new, same_metrics = moe.train_step_in_place(given, batch)
    jax.tree.map(np.testing.assert_array_equal, (kept, metrics), (new, same_metrics))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_bfloat16_gradients_of_a_folding():
    """bfloat16 compute, float32 weights and gradients: as far from float32 as on one device, and not equal to it.

    ``python -m pytest -m slow tests/multidevice/moe_training_test.py``; that sums are in float32 is tested by default.
    """
    batch = moe.language_batch(jax.random.randint(jax.random.key(1), (4, 9), 0, 32))
    narrow = MODEL.replace(compute_dtype="bfloat16")
    gradients = {}
    for name, text, model in (
        ("folded", "attention=tp2.dp2 experts=ep4", narrow),
        ("one", "attention=dp1", narrow),
        ("exact", "attention=dp1", MODEL),
    ):
        lowered, placed = lowered_gradients(text, batch, model=model)
        gradients[name] = lm.flatten(lowered.compile(quick_compile())(placed, batch)[0])

    def distance(a, b):
        pairs = [(np.asarray(gradients[a][path]), np.asarray(gradients[b][path])) for path in gradients[a]]
        assert all(x.dtype == y.dtype == np.float32 for x, y in pairs)
        return float(np.sqrt(sum(((x - y) ** 2).sum() for x, y in pairs) / sum((y**2).sum() for _, y in pairs)))

    assert 1e-4 < distance("one", "exact") < 0.2
    assert distance("folded", "exact") < 1.3 * distance("one", "exact")


ZERO = [
    ("attention=dp2 experts=edp2 pipeline=2", "1f1b"),
    ("attention=dp2 experts=edp2 pipeline=2", "gpipe"),
    ("attention=dp2 experts=edp2", "gpipe"),
]


def lowered_narrow(text, schedule, sharding):
    """Four micro-batches of bfloat16 products with float32 weights: batch, lowered gradients and parameters."""
    batch = moe.language_batch(jax.random.randint(jax.random.key(1), (8, 9), 0, 32))
    model = MODEL.replace(compute_dtype="bfloat16")
    return batch, *lowered_gradients(text, batch, model=model, num_microbatches=4, schedule=schedule, sharding=sharding)


@pytest.mark.parametrize(
    ("text", "schedule"), [ZERO[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in ZERO[1:])]
)
def test_matrices_travel_in_the_dtype_of_their_products(text, schedule):
    """ZeRO-1 in bfloat16: 2 bytes a number of a matrix are gathered, 4 of anything else and of every gradient.

    Read from the lowered program, since a CPU sends bfloat16 as float32; nothing is compiled.
    """
    program = lowered_narrow(text, schedule, "zero1")[1].as_text()
    sizes = {"all_gather": Counter(), "reduce_scatter": Counter()}
    for kind, found in sizes.items():
        for shape, dtype in re.findall(rf'"stablehlo.{kind}".*?-> tensor<([\dx]+)x(\w+)>', program, re.DOTALL):
            found[dtype] += math.prod(map(int, shape.split("x")))
    stages = 2 if "pipeline" in text else 1
    matrices = 4 * (4 * 16 * 16 + 3 * 4 * 16 * 16) // stages
    others = 32 * 16 + 16 + 4 * (2 * 16 + 16 * 4) // stages  # embedding, norms, routers
    assert sizes["all_gather"] == {"bf16": matrices, "f32": others}
    assert sizes["reduce_scatter"] == {"f32": (matrices + others) // 2}
    sums = [line for line in program.splitlines() if "stablehlo.add" in line and "x4x16x16x" in line]
    assert sums and all("x4x16x16xf32>" in line for line in sums)  # of experts' gradients over micro-batches


@pytest.mark.slow
@pytest.mark.parametrize(("text", "schedule"), ZERO)
def test_weights_cast_before_the_gather_change_no_gradient(text, schedule):
    """Against whole weights that are cast where they are used; a sum over micro-batches in bfloat16 would show.

    ``python -m pytest -m slow tests/multidevice/moe_training_test.py``
    """
    found = {}
    for sharding in ("none", "zero1"):
        batch, lowered, placed = lowered_narrow(text, schedule, sharding)
        found[sharding] = lowered.compile(quick_compile())(placed, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(found[sharding][0])} == {np.dtype(np.float32)}
    assert max(relative_errors(found["zero1"][0], found["none"][0]).values()) <= 1e-5
    assert float(found["zero1"][1].loss) == pytest.approx(float(found["none"][1].loss), rel=1e-6)


@pytest.mark.slow
def test_two_hundred_steps_on_a_synthetic_mixture():
    """Property 31: a small model learns a mixture of two cyclic languages; folded and unfolded losses coincide.

    ``python -m pytest -m slow tests/multidevice/moe_training_test.py``
    """
    model, curves = MODEL.replace(num_layers=2), []
    config = moe.MoEConfig(model=model, block_rows=16, balance="global")
    hparams = moe.HParams(learning_rate=3e-3, balance_coef=0.01)

    def tokens(step):
        kind, start = jax.random.randint(jax.random.fold_in(jax.random.key(5), step), (2, 8, 1), 0, 16)
        place = jnp.arange(17)
        return jnp.where(kind % 2 == 0, (start + place) % 16, 16 + (start + 3 * place) % 16)

    for text in ("attention=dp1 experts=ep1", "attention=tp2.dp2 experts=ep4"):
        state, losses = moe.init_train_state(jax.random.key(3), config, moe.Folding.parse(text)), []
        for step in range(200):
            state, metrics = moe.train_step(state, moe.language_batch(tokens(step)), hparams=hparams)
            losses.append(float(metrics["loss/nats"]))
        curves.append(np.array(losses))
    assert curves[0][-1] < 0.5 < 3 < curves[0][0]
    assert np.abs(curves[1] / curves[0] - 1).max() <= 1e-4
