import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe import (
    Folding,
    MoEConfig,
    check_folding,
    foldings,
    init_train_state,
    language_batch,
    loss_and_gradients,
)
from jaxrl_suite.moe.atoms import ordered_factorisations, refine
from jaxrl_suite.moe.folding import ATTENTION_AXES, EXPERT_AXES, KINDS
from tests.reference import moe_routing as reference


def degrees_of(folding, axes):
    return [getattr(folding, axis) for axis in axes]


@pytest.mark.parametrize("world", [1, 2, 6, 8, 12, 16])
def test_groups_equal_an_independent_enumeration(world):
    """Property 1: group lists, one group of each kind a rank, equal pipeline groups of both views."""
    for folding in foldings(world):
        for axes in (ATTENTION_AXES, EXPERT_AXES):
            view = (*axes, "pp")
            for index, kind in enumerate(view):
                groups = reference.groups(degrees_of(folding, view), index)
                assert sorted(folding.groups(kind)) == groups
                assert sorted(itertools.chain(*groups)) == list(range(world))
        assert folding.groups("pp") == [
            [stage * (world // folding.pp) + rank for stage in range(folding.pp)] for rank in range(world // folding.pp)
        ]


@pytest.mark.slow
def test_groups_of_every_world_up_to_64():
    """Property 1 in full; ``python -m pytest -m slow tests/moe/moe_folding_test.py``."""
    for world in range(1, 65):
        for folding in foldings(world):
            for axes in (ATTENTION_AXES, EXPERT_AXES):
                view = (*axes, "pp")
                for index, kind in enumerate(view):
                    assert sorted(folding.groups(kind)) == reference.groups(degrees_of(folding, view), index)


def test_all_146_mappings_of_eight_devices():
    """Every ordered factorisation of both views; powers of two always have a common refinement."""
    expected = sum(len(ordered_factorisations(8 // pp, 3)) ** 2 for pp in (1, 2, 4, 8))
    assert expected == 146 == len(foldings(8)) == len(set(foldings(8)))


@pytest.mark.parametrize("world", [8, 12, 36])
def test_atoms_reproduce_the_rank_digits(world):
    """Property 3: row-major index over the atoms of an axis is the rank's digit."""
    for folding in foldings(world):
        sizes = dict(zip(folding.atoms.names, folding.atoms.sizes))
        stage = world // folding.pp
        for rank in range(stage):
            place = dict(zip(folding.atoms.names, np.unravel_index(rank, folding.atoms.sizes) if sizes else ()))
            where = folding.coordinates(rank)
            for kind in (*ATTENTION_AXES, *EXPERT_AXES):
                index = 0
                for atom in folding.roles[kind]:
                    index = index * sizes[atom] + int(place[atom])
                assert index == where[kind]


def test_worked_example_of_the_paper():
    """The appendix figure: attention TP2 CP2 DP2, experts EP8; the dispatcher figure: ETP2 EP2 of four ranks."""
    folding = Folding.parse("attention=tp2.cp2.dp2 experts=etp1.ep8.edp1 pipeline=1")
    assert folding.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert folding.groups("cp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert folding.groups("dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert folding.groups("ep") == [list(range(8))]
    small = Folding.parse("attention=tp4 experts=etp2.ep2")
    assert small.groups("etp") == [[0, 1], [2, 3]]
    assert small.groups("ep") == [[0, 2], [1, 3]]


def test_the_papers_best_mixtral_mapping_is_allowed():
    """Differs: the paper's own listing (PP second) refuses TP2 EP8 ETP1 PP8 on 128 ranks; PP outermost works."""
    folding = Folding.parse("attention=tp2 experts=ep8 pipeline=8", 128)
    assert (folding.dp, folding.edp, folding.num_ranks) == (8, 2, 128)


@pytest.mark.parametrize(
    ("text", "devices", "degrees"),
    [
        ("attention=tp2.cp2.dp2 experts=ep8", None, (2, 2, 2, 1, 8, 1, 1)),
        ("attention=tp2 experts=ep8", None, (2, 1, 4, 1, 8, 1, 1)),
        ("experts=ep4.etp2 attention=tp2 pipeline=2", 16, (2, 1, 4, 2, 4, 1, 2)),
        ("attention=tp1", 8, (1, 1, 8, 1, 1, 8, 1)),
    ],
)
def test_parse_infers_data_degrees(text, devices, degrees):
    folding = Folding.parse(text, devices)
    assert tuple(getattr(folding, kind) for kind in KINDS) == degrees
    assert Folding.parse(str(folding)) == folding


@pytest.mark.parametrize(
    ("text", "devices", "words"),
    [
        ("attention=tp2.dp2 experts=ep8.edp1", None, ["2·1·2 = 4", "1·8·1 = 8", "Nearest that work", "tp2"]),
        ("attention=tp2.cp3 experts=etp3.ep2", None, ["no common refinement", "1, 2, 6", "1, 3, 6", "Nearest"]),
        ("attention=tp3", 8, ["3", "8", "Nearest"]),
        ("attention=tp2 experts=ep2 pipeline=3", 8, ["3", "must divide the 8 devices"]),
        ("attn=tp2", None, ["attn=tp2", "The form is"]),
        ("attention=tp0", None, ["tp0", "positive"]),
        ("attention=ep2", None, ["ep2", "tp, cp, dp"]),
        ("attention=tp2.tp2", None, ["tp2", "once"]),
        ("attention=tp2.dp2 experts=ep4.edp1", 8, ["takes 4 ranks, there are 8", "Nearest"]),
    ],
)
def test_bad_foldings_name_the_numbers_and_what_works(text, devices, words):
    """Property 2: messages with the offending numbers and the nearest foldings that work."""
    with pytest.raises(ValueError) as error:
        Folding.parse(text, devices)
    for word in words:
        assert word in str(error.value)


def test_nearest_foldings_in_messages_are_valid():
    with pytest.raises(ValueError) as error:
        Folding.parse("attention=tp2.cp3 experts=etp3.ep2")
    for text in str(error.value).split("Nearest that work: ")[1].rstrip(".").split("; "):
        assert Folding.parse(text).num_ranks == 6


@pytest.mark.parametrize(
    ("model", "folding", "batch", "words"),
    [
        ({"num_experts": 6}, "attention=dp4 experts=ep4", {}, ["num_experts=6", "ep=4"]),
        ({"num_experts": 8, "expert_width": 6}, "attention=dp4 experts=etp4", {}, ["expert width=6", "etp=4"]),
        ({"num_experts": 8, "num_heads": 4}, "attention=tp8 experts=ep8", {}, ["num_heads=4", "tp=8"]),
        ({"num_experts": 8}, "attention=cp2 experts=ep2", {"length": 6}, ["length=6", "2·tp·cp=4"]),
        ({"num_experts": 8}, "attention=dp4 experts=ep4", {"batch_size": 6}, ["batch_size=6", "dp·num_microbatches=4"]),
        ({"num_experts": 8, "num_layers": 3}, "experts=ep2 pipeline=2", {}, ["num_layers=3", "pp·virtual_stages=2"]),
        ({"num_experts": 8, "vocab_size": 255}, "attention=tp2 experts=ep2", {}, ["vocab_size=255", "tp=2"]),
    ],
)
def test_models_that_do_not_divide_are_refused(model, folding, batch, words):
    """Property 2: E % EP, f % ETP and the rest, with the numbers and what would work."""
    config = MoEConfig(model=LanguageModelConfig(**model))
    with pytest.raises(ValueError) as error:
        check_folding(config, Folding.parse(folding), **batch)
    for word in [*words, "Nearest that work"]:
        assert word in str(error.value)


def test_two_meshes_and_the_fine_mesh_are_one_layout():
    """A sharding over either logical mesh equals its atomic form, for all mappings of eight devices."""
    for folding in foldings(8):
        fine, attention, experts = folding.mesh(), folding.attention_mesh(), folding.expert_mesh()
        pairs = [
            (attention, PartitionSpec("dp", ("cp", "tp")), folding.spec("dp", ("cp", "tp"))),
            (attention, PartitionSpec("pp", "tp"), folding.spec("pp", "tp")),
            (experts, PartitionSpec("pp", "ep", None, "etp"), folding.spec("pp", "ep", None, "etp")),
            (experts, PartitionSpec(("edp", "ep", "etp")), folding.spec("tokens")),
        ]
        for mesh, spec, atomic in pairs:
            assert list(mesh.devices.flat) == list(fine.devices.flat)
            assert NamedSharding(mesh, spec).is_equivalent_to(NamedSharding(fine, atomic), 4)


@pytest.mark.parametrize("node", [2, 4, 8])
def test_node_crossings(node):
    """Property 19: groups that leave a node, against an enumeration."""
    for folding in foldings(8) + (Folding.parse("attention=tp2.cp2 experts=ep8 pipeline=2", 32),):
        report = folding.leaving_node(node)
        for kind in KINDS:
            crossing = [g for g in folding.groups(kind) if min(g) // node != max(g) // node]
            assert report[kind] == len(crossing)
    text = Folding.parse("attention=tp2.cp2.dp2 experts=ep8").describe(4)
    assert "rank" in text and "leave a node" in text and "ep" in text


def test_too_few_devices_say_what_to_do():
    with pytest.raises(ValueError, match="xla_force_host_platform_device_count"):
        Folding.parse("attention=tp2", 4096).mesh(jax.devices()[:1])


def test_what_is_no_folding_or_no_batch_is_named():
    """A text in place of a Folding, tokens in place of a Batch: said before anything is compiled."""
    config = MoEConfig(model=LanguageModelConfig(family="mixtral", width=32, ffn_width=32, num_experts=8))
    with pytest.raises(
        ValueError, match=r"folding='attention=tp2': must be a Folding. Write moe.Folding.parse\(text\)"
    ):
        init_train_state(jax.random.key(0), config, "attention=tp2")
    for devices in (8.0, 0):
        with pytest.raises(ValueError, match=f"num_devices={devices}: must be a whole number of at least 1"):
            Folding.parse("attention=tp2", devices)
    with pytest.raises(ValueError, match=r"batch='ArrayImpl': must be a Batch. Write moe.language_batch\(tokens\)"):
        loss_and_gradients({}, jnp.zeros((8, 33), jnp.int32), config, Folding())
    for tokens in (jnp.zeros((8, 33)), jnp.zeros(33, jnp.int32), jnp.zeros((8, 1), jnp.int32)):
        with pytest.raises(ValueError, match=r"tokens='(float32|int32)\[.*\]': must be integers \[B, T \+ 1\]"):
            language_batch(tokens)


def test_refinement_of_random_views():
    """A refinement exists exactly when the merged boundaries form a chain of divisors; its product is the world."""
    for a, b in itertools.product(ordered_factorisations(36, 3), repeat=2):
        atoms = refine(dict(zip(ATTENTION_AXES, a)), dict(zip(EXPERT_AXES, b)))
        cuts = sorted({1, a[0], a[0] * a[1], 36, b[0], b[0] * b[1]})
        chain = all(y % x == 0 for x, y in itertools.pairwise(cuts))
        assert (atoms is not None) == chain
        if atoms is not None:
            assert math.prod(atoms.sizes) == 36


def test_mixed_windows_are_refused():
    model = LanguageModelConfig(num_experts=8, sliding_window=4, first_window_layer=1)
    with pytest.raises(ValueError, match="first_window_layer=1"):
        check_folding(MoEConfig(model=model), Folding())
