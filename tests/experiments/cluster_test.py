"""The published tables, the gate of the planner, and the command that plans."""

import json

import numpy as np
import pytest

from experiments.cluster import plan as command
from experiments.cluster.models import MODELS, PAPER_NAMES
from experiments.cluster.paper_fit import (
    bubble_check,
    disagreements,
    fit_paper,
    leave_one_model_out,
    paper_choices,
    workload_of,
)
from experiments.cluster.paper_tables import METHODS, all_rows, table_3, table_4, table_5
from experiments.cluster.plan_report import beyond_published, difference
from experiments.cluster.predicted_mfu import as_run
from jaxrl_suite.moe.cost_fit import PAPER_CONSTANTS, fit, predict, rank_correlation, select_rows
from jaxrl_suite.moe.cost_memory import FRAMEWORK, device_memory
from jaxrl_suite.moe.cost_model import RECOMPUTE, Workload
from jaxrl_suite.moe.cost_step import TRAIN_STEP, step_memory
from jaxrl_suite.moe.hardware import Hardware
from jaxrl_suite.moe.planner import plan, unfolded
from jaxrl_suite.moe.planner import predict as predict_one


@pytest.fixture(scope="module")
def fitted():
    return fit_paper()


@pytest.fixture(scope="module")
def left_out(fitted):
    return leave_one_model_out(fitted[0])[0]


def columns(rows):
    tables, methods = np.array([r.table for r in rows.rows]), np.array([r.method for r in rows.rows])
    return tables, np.array(rows.models), np.char.startswith(methods, "MCore")


def test_tables_have_the_published_numbers_of_rows():
    assert len(table_3()) == 20 and sum(row.mfu_percent is None for row in table_3()) == 2
    assert len(table_4()) == 61 and len(table_5()) == 8
    for row in all_rows():
        assert row.folding.num_ranks == row.num_devices
        assert row.folding.etp in ((1,) if "folding" in row.method else (row.folding.tp,))


def test_default_constants_are_those_of_the_fit(fitted):
    _, found = fitted
    assert found.converged
    np.testing.assert_allclose(np.array(found.constants), np.array(PAPER_CONSTANTS), rtol=2e-3)


def test_joint_fit(fitted):
    """Section 5.5: 4.3, 3.3 and 5.2 % mean error with rank correlations 0.99, 0.985 and 0.93 on 58 rows.

    Here all 87 numeric rows and the four choices of the search count, baselines of table 4 included.
    """
    rows, found = fitted
    tables, _, _ = columns(rows)
    for table, error, correlation in ((3, 0.045, 0.99), (4, 0.045, 0.985), (5, 0.02, 0.93)):
        chosen = tables == table
        assert found.errors[chosen].mean() < error, table
        assert rank_correlation(found.predicted[chosen], rows.measured[chosen]) > correlation, table


def test_a_fit_to_table_3_predicts_tables_4_and_5(fitted):
    """Section 5.5: 3.8 % on table 3; held out 4.9 % and 0.96 on 32 rows of table 4, 14 % and 0.57 on table 5."""
    rows, _ = fitted
    tables, _, core = columns(rows)
    found = fit(select_rows(rows.counts, tables == 3), rows.measured[tables == 3], Hardware())
    predicted = predict(rows.counts, found.constants, Hardware())
    error = np.abs(predicted / rows.measured - 1)
    assert error[tables == 3].mean() < 0.038
    for chosen, limit, correlation in (((tables == 4) & core, 0.049, 0.96), (tables == 5, 0.14, 0.57)):
        assert error[chosen].mean() < limit
        assert rank_correlation(predicted[chosen], rows.measured[chosen]) > correlation


@pytest.mark.parametrize("model", list(PAPER_NAMES))
def test_gate_a_model_left_out_is_predicted_within_8_percent(fitted, left_out, model):
    """Property 30 and section 5.5: fitted on three models, all rows of the fourth in tables 3 and 4."""
    rows, _ = fitted
    tables, models, _ = columns(rows)
    chosen = (models == model) & (tables < 5)
    assert np.abs(left_out[chosen] / rows.measured[chosen] - 1).mean() <= 0.08
    assert rank_correlation(left_out[chosen], rows.measured[chosen]) > 0.94


def test_gate_order_of_methods(fitted, left_out):
    """Property 30: methods of a left-out model in the right order, pairs closer than 5 % aside.

    All of table 3. Of table 4 one pair is turned: at 1,024 GPUs 8.6 and 8.1 % are predicted as 7.9 and 8.1 %.
    """
    wrong = disagreements(fitted[0], left_out)
    assert [(a.table, a.model, a.num_devices, a.method, b.method) for a, b in wrong] == [
        (4, "mixtral-8x22b-g8t8", 1024, "FSDP+EP", "TP+EP+DP")
    ]


def test_out_of_memory_rows_are_flagged():
    """Property 30: the two rows of table 3 without a number fit at no recomputation; 17 of the others fit.

    The row that is wrongly flagged is Qwen2 with FSDP, 9 % above the limit.
    """
    for row in table_3():
        if row.mfu_percent is None:
            held = [
                device_memory(MODELS[row.model], row.folding, workload_of(row, recompute=r)).total for r in RECOMPUTE
            ]
            assert min(held) > 80e9, row
    flagged = [(row.model, row.method) for row in table_3() if row.mfu_percent is not None and not as_run(row).fits]
    assert flagged == [("qwen2-57b-a14b", "FSDP")]


def test_long_context_rows_fit():
    assert all(predict_one(MODELS[row.model], row.folding, workload_of(row)).fits for row in table_5())


def test_published_folded_mappings_beat_their_unfolded_form():
    """Property 30 on the published rows: never slower, never more bytes between nodes, EP or weights kept."""
    compared = 0
    for row in all_rows():
        if "folding" not in row.method:
            continue
        folded = predict_one(MODELS[row.model], row.folding, workload_of(row))
        for keep in ("ep", "memory"):
            partner = unfolded(row.folding, keep=keep)
            if partner is None:
                continue
            other = predict_one(MODELS[row.model], partner, workload_of(row))
            assert folded.seconds.total <= other.seconds.total, (row, partner)
            compared += 1
    assert compared > 20


def test_search_of_the_paper_is_reproduced():
    """The paper's folded mapping of each model among all that fit: first 1 %, and first four with its own settings.

    Its own settings are CP = 1 at 4,096 tokens, nothing recomputed, weights at the output of experts; there it is
    within 4 % of the best. Among all it is so for Mixtral and Qwen2; Llama3 is 4.1 % from a mapping with CP = 8, and
    G8T8 6.0 % from TP = 2, which with weights at the output of experts does not fit.
    """
    limits = {"mixtral-8x22b": 1.0001, "qwen2-57b-a14b": 1.04, "mixtral-8x22b-g8t8": 1.062, "llama3-8x70b": 1.043}
    for row in table_3():
        if row.method != METHODS[-1]:
            continue
        model = MODELS[row.model]
        everything = plan(model, row.num_devices, workload_of(row)).fitting
        (place,) = [i for i, c in enumerate(everything) if (c.folding, c.workload.sharding) == (row.folding, "zero1")]
        behind = everything[place].seconds.total / everything[0].seconds.total
        assert place < 0.01 * len(everything), row
        assert behind < limits[row.model], row
        if row.model == "mixtral-8x22b-g8t8":
            best = everything[0]
            assert device_memory(model, best.folding, best.workload.replace(weigh_output=True)).total > 80e9
        step = workload_of(row, weigh_output=True)
        searched = plan(model, row.num_devices, step, recompute="none", shardings=("zero1",)).fitting
        own = [c for c in searched if c.folding.cp == 1]
        (place,) = [i for i, c in enumerate(own) if c.folding == row.folding]
        assert place < 4 and own[place].seconds.total < 1.04 * own[0].seconds.total, row


COMPILED = {  # GB of a device, python -m experiments.cluster.compile_table
    (3, "mixtral-8x22b", "FSDP", 128): 35.1,
    (3, "mixtral-8x22b", "TP+EP+DP", 128): 64.9,
    (3, "mixtral-8x22b", "MCore with folding", 128): 35.3,
    (3, "qwen2-57b-a14b", "FSDP", 64): 35.9,
    (3, "qwen2-57b-a14b", "MCore with folding", 64): 45.3,
    (3, "mixtral-8x22b-g8t8", "FSDP+EP", 128): 52.2,
    (3, "mixtral-8x22b-g8t8", "MCore", 128): 26.6,
    (3, "mixtral-8x22b-g8t8", "MCore with folding", 128): 31.9,
    (3, "llama3-8x70b", "TP+EP+DP", 256): 104.6,
    (3, "llama3-8x70b", "MCore with folding", 256): 53.1,
    (4, "qwen2-57b-a14b", "FSDP+EP", 1024): 15.8,
}
ELEMENTWISE = {  # with --remat=elementwise --pending=all
    (3, "mixtral-8x22b", "MCore with folding", 128): 77.8,
    (3, "qwen2-57b-a14b", "MCore with folding", 64): 70.7,
    (3, "mixtral-8x22b-g8t8", "MCore with folding", 128): 53.9,
    (3, "llama3-8x70b", "MCore with folding", 256): 78.2,
}


@pytest.mark.parametrize(("level", "rows"), [("full", COMPILED), ("activation", ELEMENTWISE)])
def test_memory_of_the_train_step_is_what_compilers_say(level, rows):
    """Within 12 % where FSDP splits weights, 6 % elsewhere; what no policy of the step says is refused."""
    published = {(row.table, row.model, row.method, row.num_devices): row for row in all_rows()}
    for key, compiled in rows.items():
        row = published[key]
        held = step_memory(MODELS[row.model], row.folding, workload_of(row, recompute=level)).total
        assert held == pytest.approx(compiled * 1e9, rel=0.12 if "FSDP" in row.method else 0.06), (key, held)


def test_memory_of_the_train_step_is_known_for_two_levels():
    row = all_rows()[0]
    with pytest.raises(ValueError, match="recompute"):
        step_memory(MODELS[row.model], row.folding, workload_of(row))


def test_plan_takes_the_programs_memory(capsys):
    """Where weights multiply the output of experts, the mapping that G8T8 would prefer does not fit as it is."""
    flags = ["--model=mixtral-8x22b-g8t8", "--gpus=128", "--sharding=zero1", "--recompute=none", "--top=1", "--json"]
    asked = "--folding=attention=tp2.dp8 experts=ep8.edp2 pipeline=8"
    fits = []
    for more in ([], ["--weigh_output"]):
        code, text = run(capsys, *flags, asked, *more)
        assert code == 0
        fits.append(json.loads(text)["asked"]["fits"])
    assert fits == [True, False]


def test_the_papers_mappings_with_the_memory_of_the_train_step():
    """All fit 80e9 bytes, and the 85.0e9 that XLA has for an H100, with nothing expensive repeated.

    Each is among the first four and within 4 % of the best. G8T8's would be 5.8 % behind TP = 2, which fits too
    (compiled: 79.7 GB), if our 1F1B were interleaved as the paper's framework is: with TP = 4 twice as many
    micro-batches fill a pipeline.
    """
    for limit in (84_978_434_048, 80e9):
        hardware = Hardware(memory_bytes=limit)
        for row in table_3():
            if row.method != METHODS[-1]:
                continue
            found = plan(
                MODELS[row.model], row.num_devices, workload_of(row), hardware=hardware, memory_model=TRAIN_STEP
            )
            (place,) = [
                i for i, c in enumerate(found.fitting) if (c.folding, c.workload.sharding) == (row.folding, "zero1")
            ]
            own, best = found.fitting[place], found.fitting[0]
            assert own.workload.recompute == "activation" and place < 4, row
            assert own.seconds.total < 1.03 * best.seconds.total, row


def test_a_pipeline_that_is_not_interleaved_waits_longer():
    """(PP - 1) / m of the micro-batches, whatever the fitted constants say of interleaving."""
    row = next(row for row in table_3() if row.method == METHODS[-1])
    step = workload_of(row, recompute="full")
    plain, framework = (
        predict_one(MODELS[row.model], row.folding, step, memory_model=memory_model).seconds
        for memory_model in (TRAIN_STEP, FRAMEWORK)
    )
    busy = plain.total - plain.bubble - plain.gradients
    num_microbatches = row.global_batch // row.folding.dp
    assert plain.bubble == pytest.approx(busy * (row.folding.pp - 1) / num_microbatches)
    assert framework.bubble == pytest.approx(plain.bubble / PAPER_CONSTANTS.interleave)


def test_plan_by_the_memory_of_the_train_step(capsys):
    flags = ["--model=mixtral-8x22b", "--gpus=128", "--train_step", "--top=1"]
    code, text = run(capsys, *flags, "--memory_gb=85", "--json", "--folding=attention=dp64 experts=ep8.edp8 pipeline=2")
    found = json.loads(text)
    assert code == 0 and found["candidates"][0]["folding"].startswith("attention=tp4.cp1.dp4 experts=etp1.ep8.edp2")
    assert found["candidates"][0]["memory_bytes"]["total"] == pytest.approx(52.1e9, rel=0.01)
    asked = found["asked"]
    assert not asked["fits"] and asked["recompute"] == "full"
    assert any("PP=4" in line for line in asked["explanation"])
    with pytest.raises(SystemExit):
        run(capsys, *flags, "--recompute=none")
    assert "--recompute=none: the memory of the train step is known for activation, full only" in (
        capsys.readouterr().err
    )


def test_choices_leave_the_chosen_mapping_close_to_the_best():
    choices = paper_choices()
    assert [choice.label for choice in choices] == list(PAPER_NAMES)
    assert all(len(choice.alternatives.work.expert_rows) >= 3 for choice in choices)


@pytest.mark.parametrize(
    ("model", "method", "low", "high"),
    [
        ("mixtral-8x22b", "MCore", 0.40, 0.48),
        ("mixtral-8x22b", "MCore with folding", 0.40, 0.48),
        ("qwen2-57b-a14b", "MCore", 0.54, 0.65),
        ("qwen2-57b-a14b", "MCore with folding", 0.54, 0.65),
        ("llama3-8x70b", "MCore", 0.25, 0.65),
        ("llama3-8x70b", "MCore with folding", 0.25, 0.65),
        ("mixtral-8x22b-g8t8", "MCore", 0.90, 1.4),
        ("mixtral-8x22b-g8t8", "MCore with folding", 0.90, 1.4),
    ],
)
def test_strong_scaling_is_mostly_fewer_micro_batches(model, method, low, high):
    """Section 5.5, bubble alone: one parameter u in MFU ~ 1 / (1 + u (PP - 1) / m) draws each curve of table 4."""
    u, error = bubble_check(model, method)
    assert low <= u <= high and error < 0.035


def run(capsys, *arguments):
    code = command.main(arguments)
    return code, capsys.readouterr().out


def test_plan_answers_a_new_user(capsys):
    """I have 64 H100s and Qwen2-57B-A14B at 32K, what do I launch?"""
    code, text = run(capsys, "--model=qwen2-57b-a14b", "--gpus=64", "--sequence=32768", "--global_batch=128", "--top=2")
    assert code == 0
    for words in (
        "1,596 foldings",
        "rank  attention",
        "Time:",
        "Groups:",
        "Memory:",
        'To launch the first: --folding="',
    ):
        assert words in text, words
    assert "\x1b" not in text and "│" not in text, "plain off a terminal"


def test_plan_compares_a_named_folding_and_writes_json(capsys):
    arguments = ["--model=mixtral-8x7b", "--gpus=16", "--global_batch=64", "--top=1"]
    code, text = run(capsys, *arguments, "--folding=attention=tp4 experts=etp4.ep2")
    assert code == 0 and "slower than the best; it spends more on " in text
    code, text = run(capsys, *arguments, "--json", "--folding=attention=tp4 experts=etp4.ep2")
    found = json.loads(text)
    assert code == 0 and found["candidates"][0]["fits"] and len(found["candidates"]) == 1
    best, asked = found["candidates"][0], found["asked"]
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert asked["folding"].startswith("attention=tp4") and asked["step_seconds"] > best["step_seconds"]


def test_plan_says_what_rests_on_no_published_row():
    """CP > 1 is published from 16,384 tokens on; a ranking led by it below that says so, and what leads without."""
    model = MODELS["llama3-8x70b"]
    fitting = plan(model, 256, Workload(global_batch=256)).fitting
    plain = next(candidate for candidate in fitting if candidate.folding.cp == 1)
    assert fitting[0].folding.cp > 1
    text = beyond_published(fitting)
    assert "below 16,384 tokens" in text and f"{fitting.index(plain) + 1}. {plain.folding}, " in text
    gap = plain.seconds.tp - fitting[0].seconds.tp
    assert gap > 0 and f"tensor-parallel traffic ({gap:+.2f} s)" in text.partition(" and less on ")[0]
    assert beyond_published(fitting, measured=4096) == "" and beyond_published([plain, fitting[0]]) == ""
    assert difference(plain, plain) == "it takes the same."


def test_plan_refits_to_measured_rows(capsys, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "model,gpus,sequence,global_batch,folding,mfu_percent\n"
        "mixtral-8x7b,16,4096,64,attention=tp4 experts=etp4.ep2,20\n"
        "mixtral-8x7b,16,4096,64,attention=tp2 experts=ep8,25\n"
    )
    arguments = ["--model=mixtral-8x7b", "--gpus=16", "--global_batch=64", "--top=1"]
    code, text = run(capsys, *arguments, f"--csv={path}")
    assert code == 0 and "Constants refitted to 2 rows" in text
    _, plain = run(capsys, *arguments)
    assert "refitted" not in plain and text.splitlines()[3] != plain.splitlines()[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model=mixtral-9x22b --gpus=64", "--model=mixtral-9x22b: unknown. Did you mean mixtral-8x22b?"),
        ("--model=mixtral-8x22b --gpus=13", "Nearest numbers of devices that work: 8, 14, 16."),
        ("--model=mixtral-8x22b --gpus=4", "does not fit. The folding that needs least"),
        ("--model=mixtral-8x22b --gpus=0", "--gpus=0: must be between 1 and 8192."),
        ("--model=mixtral-8x22b", "--gpus is missing. Example:"),
        ("--gpus=8", "--model is missing. Example:"),
        ("--model=mixtral-8x22b --gpu=8", "--gpu=8 is no flag of plan. Did you mean --gpus?"),
        ("--model=mixtral-8x22b --gpus=many", "--gpus: invalid int value: 'many'"),
        ("--model=mixtral-8x22b --gpus=64 --sequence=0", "sequence=0: must be positive."),
        ("--model=mixtral-8x22b --gpus=64 --top=0", "--top=0: must be at least 1."),
        ("--model=mixtral-8x22b --gpus=64 --hardware=v100", "hardware='v100': unknown. Known: h100"),
        ("--model=mixtral-8x22b --gpus=64 --csv=/no/file.csv", "--csv=/no/file.csv: no such file."),
        ("--model=mixtral-8x7b --gpus=16 --global_batch=64 --folding=tp2", "folding='tp2': cannot be read."),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments.split())
    text = capsys.readouterr().err
    assert ended.value.code == 2 and text.startswith("error: ") and message in text and text.count("\n") == 1, text


def test_a_model_that_does_not_fit_says_by_how_much_and_where_it_would(capsys):
    with pytest.raises(SystemExit):
        command.main(["--model=mixtral-8x7b", "--gpus=4", "--global_batch=64"])
    text = capsys.readouterr().err
    assert "GB too much" in text and "devices hold it" in text


def test_a_wrong_row_is_named(capsys, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("model,gpus,sequence,global_batch,folding,step_seconds\nmixtral-8x7b,16,4096,64,attention=tp5,2\n")
    with pytest.raises(SystemExit):
        command.main(["--model=mixtral-8x7b", "--gpus=16", f"--csv={path}"])
    assert "rows.csv line 2, folding='attention=tp5'" in capsys.readouterr().err
