import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.study import Result
from experiments.moe import bytes_moved, drop_rate, load_balance, text_folding, upcycled
from jaxrl_suite import moe
from jaxrl_suite.moe.audit import Collective
from tests.reference import moe_routing as reference


def test_drops_in_parts_follow_the_rule_of_each_part():
    generator = np.random.default_rng(0)
    experts = np.stack([generator.permutation(4)[:2] for _ in range(24)]).astype(np.int32)
    weights = generator.random((24, 2)).astype(np.float32)
    for policy in drop_rate.POLICIES:
        keep = drop_rate.keep_in_parts(experts, weights, (3, 8), 4, jnp.int32(2), policy, 2)
        for part in range(2):
            rows = np.arange(24).reshape(3, 2, 4)[:, part].reshape(-1)
            expected = reference.keep_by_capacity(experts[rows], weights[rows], 4, 2, policy)
            np.testing.assert_array_equal(np.asarray(keep)[rows], expected)


def test_bytes_predicted_for_a_folding_by_hand():
    """TP 2, DP 2, EP 4 with 4 x 8 tokens of width 16: 8 tokens a rank, 2 copies, four bytes."""
    config = bytes_moved.BytesMovedConfig(
        foldings="attention=tp2.dp2 experts=ep4", batch_size=4, length=8, num_microbatches=1, num_layers=3, width=16
    )
    sent = bytes_moved.predicted_bytes(bytes_moved.options_of(config), config.parsed[0], 4, 8)
    rows = 8 * 16 * 4  # bytes of one rank's activations
    assert sent["ep"] == 3 * 4 * 3 / 4 * 2 * rows
    assert sent["tp"] == 3 * 4 * rows + 4 * rows
    assert sent["etp"] == sent["cp"] == sent["pp"] == 0
    dense = 3 * (16 * 16 + 2 * 16 * 8 + 16 * 16) + 2 * 256 * 16  # split over tp, copied over dp; experts have one copy
    norms = 3 * (2 * 16 + 16 * 8) + 16  # and routers: on every rank
    assert sent["gradients"] == pytest.approx(4 * (2 * 1 / 2 * dense / 2 + 2 * 3 / 4 * norms))


def test_collectives_are_counted_by_what_they_serve():
    folding = moe.Folding.parse("attention=tp2.dp2 experts=etp2.ep2")
    pairs, halves = ((0, 1), (2, 3)), ((0, 2), (1, 3))

    def one(kind, groups, scope, runs=1, loops=("loop",)):
        return Collective("", kind, groups, 1000, runs, loops, scope)

    sent = bytes_moved.counted_bytes(
        [
            one("all-to-all", halves, "dispatch", runs=3),
            one("all-gather", pairs, "while/dispatch"),
            one("reduce-scatter", pairs, "while/body"),
            one("all-reduce", halves, "", loops=()),
        ],
        folding,
    )
    assert sent == {"tp": 500, "cp": 0, "ep": 1500, "etp": 500, "pp": 0, "gradients": 1000}


def test_balancing_rules_differ_only_where_they_should():
    config = load_balance.LoadBalanceConfig()
    values = {"learning_rate": 0.1, "balance_coef": 0.2, "z_coef": 0.3, "bias_rate": 0.4}
    options = {rule: load_balance.options_of(rule, config) for rule in load_balance.RULES}
    assert len({options[rule] for rule in ("none", "global", "z", "bias")}) == 1  # one compiled program
    assert {options[rule].balance for rule in ("batch", "sequence")} == {"batch", "sequence"}
    weights = {rule: load_balance.weights_of(rule, values)[3:] for rule in load_balance.RULES}
    on, off = (0.2, 0.0, 0.0), (0.0, 0.0, 0.0)
    assert weights == {
        "none": off, "batch": on, "sequence": on, "global": on, "z": (0.0, 0.3, 0.0), "bias": (0.0, 0.0, 0.4)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (load_balance.LoadBalanceConfig, {"rules": "none, entropy"}, "none, batch, sequence"),
        (load_balance.LoadBalanceConfig, {"folding": "attention=tp2.cp3 experts=etp3.ep2"}, "Nearest that work"),
        (drop_rate.DropRateConfig, {"ranks": 7}, "must divide length=128"),
        (drop_rate.DropRateConfig, {"factors": "1, 0"}, "must be positive"),
        (
            bytes_moved.BytesMovedConfig,
            {"foldings": "attention=dp3 experts=ep3"},
            "num_experts=8 does not divide by ep=3",
        ),
        (bytes_moved.BytesMovedConfig, {"foldings": " ; "}, "at least one"),
        (upcycled.UpcycledConfig, {"granularity": 4}, "experts_per_token=2"),
        (text_folding.TextFoldingConfig, {"expert_precision": "int8"}, "compute or float8"),
    ],
)
def test_bad_settings_of_studies_are_refused(config, changes, words):
    with pytest.raises(ValueError, match=words):
        config(**changes)


def test_figures_of_the_studies_draw():
    """On made-up results of the right shapes: what is drawn does not depend on the sizes of a preset."""
    generator = np.random.default_rng(0)
    rules = np.array(list(load_balance.RULES))
    results = {
        load_balance: {
            "rules": rules, "bits_per_byte": generator.random((6, 20)), "max_over_mean": generator.random((6, 20)) + 1,
            "shares": generator.random((6, 2, 8)),
        },
        drop_rate: {
            "factors": np.array([0.5, 1.0, 2.0]), "kinds": np.array(["probs rank", "position sequence"]),
            "copies": generator.random((2, 3)), "weight": generator.random((2, 3)), "loss": generator.random((2, 3)),
            "dropless": np.array(0.5), "by_row": generator.random((2, 3, 4)),
        },
        bytes_moved: {
            "counted": generator.random((2, 6)), "predicted": generator.random((2, 6)),
            "names": np.array([str(moe.Folding()), "attention=tp2.cp1.dp1 experts=etp1.ep2.edp1 pipeline=2"]),
        },
        upcycled: {
            "tokens_of_a_step": np.array(8),
            **{f"{kind}/steps": np.array([0, 5]) for kind in upcycled.KINDS},
            **{f"{kind}/held_out_nats": np.array([2.0, 1.0]) for kind in upcycled.KINDS},
            **{f"{kind}/loss_nats": generator.random(5) for kind in upcycled.KINDS},
        },
    }  # fmt: skip
    for study, arrays in results.items():
        (figure,) = study.figures(Result({}, arrays)).values()
        assert all(axes.get_xlabel() and axes.has_data() for axes in figure.axes)
    assert {field.name for field in dataclasses.fields(text_folding.TextFoldingConfig)} >= {"num_ranks"}
