"""Counts, bytes, time and memory of a training step against numbers worked by hand and the groups themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cluster.abstract_step import abstract_batch, abstract_state
from jaxrl_suite.lm import named_config, num_parameters
from jaxrl_suite.moe.config import MoEConfig
from jaxrl_suite.moe.cost_fit import PAPER_CONSTANTS, fit, leave_out, predict, rank_correlation
from jaxrl_suite.moe.cost_flops import count_flops
from jaxrl_suite.moe.cost_memory import MemoryConstants, device_memory, memory, memory_counts, static_bytes
from jaxrl_suite.moe.cost_model import (
    RECOMPUTE,
    Workload,
    device_work,
    num_microbatches,
    parameter_counts,
    token_flops,
)
from jaxrl_suite.moe.cost_time import Constants, StepTime, counts_of, model_flops_utilisation, stack_counts, step_time
from jaxrl_suite.moe.cost_traffic import (
    degree_of,
    layer_bytes,
    link_bytes,
    local_peers,
    step_traffic,
    stride_of,
    traffic,
)
from jaxrl_suite.moe.folding import KINDS, Folding, foldings
from jaxrl_suite.moe.hardware import Hardware, named_hardware
from jaxrl_suite.moe.train import loss_and_gradients

MIXTRAL, QWEN, FINE, LLAMA = map(
    named_config, ("mixtral-8x22b", "qwen2-57b-a14b", "mixtral-8x22b-g8t8", "llama3-8x70b")
)
FOLDED = {
    "mixtral": (MIXTRAL, Folding.parse("attention=tp2 experts=ep8 pipeline=8", 128)),
    "qwen": (QWEN, Folding.parse("attention=tp2 experts=ep4 pipeline=4", 64)),
    "fine": (FINE, Folding.parse("attention=tp4 experts=ep8 pipeline=8", 128)),
    "llama": (LLAMA, Folding.parse("attention=tp8 experts=ep8 pipeline=16", 256)),
}


@pytest.mark.parametrize(
    ("model", "total", "active", "causal", "full"),
    [
        (MIXTRAL, 140.6, 39.2, 2.42e11, 2.51e11),
        (FINE, 140.6, 22.3, 1.41e11, 1.49e11),
        (QWEN, 57.4, 14.2, 8.47e10, 8.72e10),
        (LLAMA, 465.2, 126.9, 7.71e11, 7.88e11),
    ],
    ids=["mixtral", "fine", "qwen", "llama"],
)
def test_parameters_and_flops_are_those_of_the_table(model, total, active, causal, full):
    counts = parameter_counts(model)
    assert counts.total == num_parameters(model)
    assert counts.total / 1e9 == pytest.approx(total, abs=0.05)
    assert counts.active / 1e9 == pytest.approx(active, abs=0.05)
    assert token_flops(model, 4096).train == pytest.approx(causal, rel=0.003)
    assert token_flops(model, 4096, causal=False).train == pytest.approx(full, rel=0.003)


def test_flops_at_long_context_depend_on_the_convention():
    assert token_flops(MIXTRAL, 131072).train == pytest.approx(5.04e11, rel=0.002)
    assert token_flops(MIXTRAL, 131072, causal=False).train == pytest.approx(7.75e11, rel=0.002)


def test_flops_of_a_token_by_hand():
    model = named_config("mixtral-8x7b", num_layers=1, width=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn_width=16)
    flops = token_flops(model, 10)
    assert flops.projections == 2 * 8 * (8 + 2 * 4) + 2 * 8 * 8
    assert flops.attention == 2 * 10 * 8 and token_flops(model, 10, causal=False).attention == 4 * 10 * 8
    assert flops.router == 2 * 8 * 8 and flops.experts == 6 * 2 * 8 * 16 and flops.head == 2 * 8 * 32000


@pytest.mark.parametrize(
    ("name", "tp", "ep", "etp_if_unfolded"),
    [("mixtral", 50, 88, 101), ("qwen", 29, 176, 235), ("fine", 75, 176, 604), ("llama", 117, 29, None)],
)
def test_bytes_of_a_layer_are_those_of_the_specification(name, tp, ep, etp_if_unfolded):
    """Section 5.2: megabytes of a layer's forward pass under the folded mappings, and what ETP = TP would add."""
    model, folding = FOLDED[name]
    sent = layer_bytes(model, folding, Workload())
    assert sent["tp"] / 1e6 == pytest.approx(tp, abs=0.6) and sent["ep"] / 1e6 == pytest.approx(ep, abs=0.6)
    assert sent["etp"] == 0
    etp = 2 if name == "llama" else folding.tp
    unfolded = folding.replace(etp=etp, ep=1, edp=folding.tp * folding.dp // etp)
    added = layer_bytes(model, unfolded, Workload())["etp"] / 1e6
    assert added == pytest.approx(etp_if_unfolded or (etp - 1) * 33.55, rel=0.01)


def test_etp_moves_n_times_the_bytes_of_ep():
    for n in (2, 4, 8):
        ep = layer_bytes(MIXTRAL, Folding(dp=8, ep=n, edp=8 // n), Workload())["ep"]
        etp = layer_bytes(MIXTRAL, Folding(dp=8, etp=n, edp=8 // n), Workload())["etp"]
        assert etp / ep == pytest.approx(n)


def test_strides_are_those_of_the_groups():
    for folding in [*foldings(8), *foldings(12)[::7]]:
        for kind in KINDS:
            group = folding.groups(kind)[0]
            assert len(group) == degree_of(folding, kind)
            if len(group) > 1:
                assert group[1] - group[0] == stride_of(folding, kind)


def test_locality_equals_an_enumeration_of_nodes():
    """Peers in a node, and whether a group leaves it, against the groups of every folding of 32 ranks."""
    for folding in foldings(32)[::5]:
        leaving = folding.leaving_node(8)
        for kind in KINDS:
            degree = degree_of(folding, kind)
            if degree == 1:
                continue
            peers = local_peers(degree, stride_of(folding, kind), 8)
            together = {sum(r // 8 == group[0] // 8 for r in group) for group in folding.groups(kind)}
            assert together == {peers}
            assert (leaving[kind] == len(folding.groups(kind))) == (peers < degree)


def test_collectives_by_hand():
    assert link_bytes("exchange", 8.0, 8, 8) == (7.0, 0.0)
    assert link_bytes("exchange", 8.0, 8, 1) == (0.0, 7.0)
    assert link_bytes("gather", 8.0, 8, 1) == (0.0, 7.0)  # alone in its node: everything comes from outside
    assert link_bytes("gather", 8.0, 8, 4) == (7.0, 1.0)
    assert link_bytes("ring", 8.0, 8, 4) == (7.0, 7.0)  # the rank at the border passes all on
    assert link_bytes("ring", 8.0, 8, 8) == (7.0, 0.0)


def test_exchange_leaves_the_node_when_experts_are_not_folded():
    folding = FOLDED["mixtral"][1]
    inside, outside = traffic(MIXTRAL, folding, Workload()), traffic(MIXTRAL, folding, Workload(), expert_stride=2)
    assert inside.ep.network == 0 and outside.ep.network > 0
    assert inside.ep.node == pytest.approx(outside.ep.node + outside.ep.network)


def test_traffic_of_a_step_by_hand():
    """ZeRO-1 sends (D-1)/D of its weights six bytes each, once; an exchange runs in every layer and micro-batch."""
    model, folding = FOLDED["mixtral"]
    moved = step_traffic(traffic(model, folding, Workload()), folding, Workload())
    experts = parameter_counts(model).experts / 64
    assert moved["expert_gradients"] == pytest.approx((0.0, experts * 6 / 2))  # pairs 8 ranks apart
    per_layer = layer_bytes(model, folding, Workload())["ep"]
    assert moved["ep"].node == pytest.approx(2 * 7 * 32 * per_layer)
    assert num_microbatches(folding, Workload()) == 32


@pytest.mark.parametrize(("name", "gigabytes"), [("mixtral", 27.9), ("qwen", 35.3), ("fine", 26.9), ("llama", 43.6)])
def test_static_memory_is_that_of_the_specification(name, gigabytes):
    model, folding = FOLDED[name]
    assert static_bytes(model, folding) / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_memory_falls_with_recomputation_and_adds_up():
    model, folding = FOLDED["mixtral"]
    held = [device_memory(model, folding, Workload(recompute=level)) for level in RECOMPUTE]
    totals = [float(m.total) for m in held]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4
    assert held[0].total == pytest.approx(sum(held[0]))
    more = device_memory(model, folding, Workload(weigh_output=True))
    assert more.activations > held[0].activations


def test_memory_by_hand():
    """One layer, one stage, no parallelism: every number kept for the backward pass, counted."""
    model = named_config("mixtral-8x7b", num_layers=1, width=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn_width=16)
    counts = memory_counts(model, Folding(), Workload(sequence=10, global_batch=1))
    attention = 10 * (8 + 8 + 2 * 8 + 2 * 4)  # input, norm, queries and output, keys and values
    routed = 10 * (8 + 8) + 20 * (8 + 3 * 16)  # input, norm, rows, gate, up, product
    assert counts.activations == attention + routed
    assert counts.weights == counts.shards == parameter_counts(model).total and counts.resident == 0
    assert counts.logits == 10 * 32000
    held = memory(counts, MemoryConstants(), fsdp=False)
    assert held.optimizer == 12 * counts.weights and held.activations == 2 * counts.activations


def test_fsdp_splits_weights_and_keeps_one_array_whole():
    folding = Folding.parse("attention=tp2 experts=ep8", 128)
    zero, fsdp = (device_memory(MIXTRAL, folding, Workload(sharding=kind)) for kind in ("zero1", "fsdp"))
    assert fsdp.optimizer == zero.optimizer and fsdp.weights < zero.weights
    shard = parameter_counts(MIXTRAL).experts / 8 + parameter_counts(MIXTRAL).dense / 2
    split = parameter_counts(MIXTRAL).total / 128
    assert fsdp.gradients == pytest.approx(2 * shard + 4 * split, rel=0.03)


def counts(name="mixtral", **changes):
    model, folding = FOLDED[name]
    return counts_of(model, folding, Workload(**changes))


def test_time_parts_add_up_and_are_positive():
    seconds = step_time(counts(), PAPER_CONSTANTS, Hardware())
    assert seconds.total == pytest.approx(sum(seconds)) and min(seconds) >= 0
    mfu = model_flops_utilisation(counts(), seconds.total, Hardware())
    assert 0.4 < mfu < 0.6


def test_context_parallelism_adds_the_merge_of_partial_results():
    """2 bytes read, 4 read and 4 written of outputs, and of the gradients of queries, keys and values; once a layer."""
    model, folding = FOLDED["mixtral"]
    split = folding.replace(tp=1, cp=2)
    work = counts_of(model, split, Workload()).work
    elements = 4096 / 2 * 128 * (48 + 48 + 2 * 8)  # tokens of a rank, head size, outputs and gradients of heads
    assert work.merge_bytes == pytest.approx(10 * elements * 56 / 8) and counts().work.merge_bytes == 0
    added = [
        step_time(counts_of(model, split, Workload()), PAPER_CONSTANTS._replace(cp_merges=merges), Hardware())
        for merges in (0.0, 3.0)
    ]
    rate = Hardware().memory_bandwidth * PAPER_CONSTANTS.memory
    assert added[1].cp - added[0].cp == pytest.approx(3 * 32 * work.merge_bytes / rate)


def test_recomputation_costs_time():
    times = [step_time(counts(recompute=level), PAPER_CONSTANTS, Hardware()).total for level in RECOMPUTE]
    assert times == sorted(times) and times[3] < 4 / 3 * times[0]


def test_only_the_bubble_grows_when_micro_batches_shrink():
    """With PP stages the bubble is (PP - 1) / v micro-batches, whatever their number."""
    few, many = (step_time(counts(global_batch=batch), PAPER_CONSTANTS, Hardware()) for batch in (256, 1024))
    assert few.bubble == pytest.approx(many.bubble) and few.gradients == pytest.approx(many.gradients)
    assert many.experts == pytest.approx(4 * few.experts)


def test_time_is_monotone_in_every_rate():
    """Property 30: no faster machine is predicted to be slower, on any mapping of 64 devices that divides."""
    usable = [f for f in foldings(64) if 64 % f.ep == 0 and 28 % f.pp == 0 and 28 % f.tp == 0 and 256 % f.dp == 0]
    tables = [stack_counts([counts_of(QWEN, f, Workload(sharding=s)) for f in usable[::3]]) for s in ("zero1", "fsdp")]
    for table in tables:
        base = step_time(table, PAPER_CONSTANTS, Hardware()).total
        for rate in ("peak_flops", "memory_bandwidth", "node_bandwidth", "network_bandwidth"):
            for factor in (1.1, 4.0):
                faster = Hardware().replace(**{rate: factor * getattr(Hardware(), rate)})
                assert np.all(step_time(table, PAPER_CONSTANTS, faster).total <= base * (1 + 1e-12)), rate
        assert np.any(step_time(table, PAPER_CONSTANTS, Hardware(network_bandwidth=60e9)).total < base)


def test_jax_and_numpy_agree_and_gradients_are_right(x64):
    """Time is a pure function of the constants: gradient against central differences, jit against plain."""
    table = stack_counts([counts(), counts("qwen", sharding="fsdp"), counts("llama"), counts("fine")])

    def total(constants):
        return jnp.log(jnp.asarray(step_time(table, constants, Hardware()).total)).sum()

    constants = Constants(*(jnp.asarray(value, jnp.float64) for value in PAPER_CONSTANTS))
    plain = np.log(step_time(table, PAPER_CONSTANTS, Hardware()).total).sum()
    value, gradient = jax.jit(jax.value_and_grad(total))(constants)
    np.testing.assert_allclose(value, plain, rtol=1e-12)
    for name, slope in gradient._asdict().items():
        step = 1e-6 * getattr(PAPER_CONSTANTS, name)
        ends = [
            np.log(
                step_time(
                    table, PAPER_CONSTANTS._replace(**{name: getattr(PAPER_CONSTANTS, name) + sign * step}), Hardware()
                ).total
            ).sum()
            for sign in (-1, 1)
        ]
        np.testing.assert_allclose(slope, (ends[1] - ends[0]) / (2 * step), rtol=1e-4, atol=1e-8, err_msg=name)


def test_memory_is_differentiable(key):
    numbers = memory_counts(MIXTRAL, FOLDED["mixtral"][1], Workload())
    slope = jax.grad(lambda c: memory(numbers, c, fsdp=False).total)(
        MemoryConstants(*map(jnp.float32, MemoryConstants()))
    )
    np.testing.assert_allclose(slope.optimizer, numbers.shards, rtol=1e-6)


def test_time_is_strict_about_types_and_ranks():
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        with jax.numpy_dtype_promotion("strict"):
            seconds = step_time(counts(), Constants(*map(jnp.float32, PAPER_CONSTANTS)), Hardware())
    finally:
        jax.config.update("jax_numpy_rank_promotion", before)
    assert isinstance(seconds, StepTime)


def test_a_fit_recovers_constants_from_its_own_predictions():
    """Sixteen exact rows: predictions come back, and the constants that they determine."""
    truth = PAPER_CONSTANTS._replace(gemm=0.6, network=0.7, interleave=1.5)
    rows = [counts(name, global_batch=batch, sharding="zero1") for name in FOLDED for batch in (64, 256, 1024, 4096)]
    table = stack_counts(rows)
    found = fit(table, predict(table, truth, Hardware()), Hardware(), prior=PAPER_CONSTANTS)
    assert found.converged and found.errors.max() < 0.02
    assert abs(found.constants.gemm / truth.gemm - 1) < abs(PAPER_CONSTANTS.gemm / truth.gemm - 1) / 2


def test_a_label_is_not_predicted_from_itself():
    table = stack_counts([counts("mixtral"), counts("qwen"), counts("llama")])
    measured = np.array([0.49, 0.39, 0.05])
    other = np.array([0.49, 0.39, 0.60])
    labels = ["a", "b", "c"]
    (first, _), (second, _) = (leave_out(table, values, labels, Hardware()) for values in (measured, other))
    assert first[2] == second[2] and first[0] != second[0]


@pytest.mark.parametrize("measured", [[0.0], [-0.1], [49.3], [np.nan]])
def test_fit_refuses_what_is_no_fraction(measured):
    with pytest.raises(ValueError, match="an MFU is a fraction"):
        fit(stack_counts([counts()]), np.array(measured), Hardware())


def test_rank_correlation():
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 5.0, 9.0])) == pytest.approx(1)
    assert rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([9.0, 5.0, 2.0])) == pytest.approx(-1)


def test_flops_of_a_scan_are_counted_as_often_as_it_runs():
    """XLA's own analysis counts the body of a loop once."""

    def power(x):
        return jax.lax.scan(lambda y, _: (y @ x, None), x, length=7)[0]

    x = jnp.ones((16, 16))
    assert count_flops(power, x).total == 7 * 2 * 16**3
    compiled = jax.jit(power).lower(x).compile().cost_analysis()
    assert compiled["flops"] < 3 * 2 * 16**3


def test_flops_of_products_by_hand():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert count_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b).total == 2 * 3 * 4 * 5 * 6
    sizes = jnp.array([2, 2])
    assert count_flops(jax.lax.ragged_dot, a[0], jnp.ones((2, 5, 6)), sizes).total == 2 * 4 * 5 * 6
    square = jnp.ones((4, 4))
    loss = jax.checkpoint(lambda y: jnp.sin(y @ y).sum())
    assert count_flops(jax.grad(loss), square).total == 4 * 2 * 4**3  # forward, again, and two of the backward pass
    kernel, image = jnp.ones((3, 3, 2, 8)), jnp.ones((1, 10, 10, 2))
    numbers = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers)  # noqa: E731
    assert count_flops(convolve, image, kernel).total == 2 * 100 * 8 * 9 * 2
    either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x)  # noqa: E731
    assert count_flops(either, square).total == 2 * 4**3
    forever = count_flops(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ y, x), square)
    assert forever[:2] == (2 * 4**3, 1)


def test_flops_of_the_train_step_are_those_of_the_model():
    """Traced, not run: products of the real gradients against the formula, for one device and for eight."""
    model = named_config(
        "mixtral-8x7b", num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_width=96, vocab_size=128
    )
    for text in ("", "attention=tp2.dp4 experts=ep8"):
        folding = Folding.parse(text)
        config = MoEConfig(model=model, dispatch="drop_pad", capacity_factor=1.0)
        params, batch = abstract_state(config, folding).params, abstract_batch(folding, 8, 256)
        gradients = functools.partial(loss_and_gradients, config=config, folding=folding)
        found = count_flops(gradients, params, batch)
        needed = token_flops(model, 256, causal=False).train * 256 * 8
        assert 0.8 < found.total / needed < 1.25, (text, found.total / needed)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"hardware='v100': unknown\. Known: h100"):
        named_hardware("v100")
    with pytest.raises(ValueError, match=r"Hardware.memory_bytes=0.0: must be positive"):
        Hardware(memory_bytes=0.0)
    with pytest.raises(ValueError, match="sequence=0: must be positive"):
        Workload(sequence=0)
    with pytest.raises(ValueError, match="a model with experts is needed"):
        device_work(named_config("llama-3-8b"), Folding(), Workload())
