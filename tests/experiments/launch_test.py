"""Command lines: flags, presets, help, and one clear line for what cannot be."""

import importlib.util
import re

import pytest
from absl import flags

from experiments.common import launch as launch_module
from experiments.common.flags import Settings, UsageError, help_text, parse_flags, read_flags
from experiments.common.launch import prepare_jax
from experiments.common.study import Study, all_studies, families, load_study, study_names
from tests.experiments.sample_study import STUDY


def test_flags_take_the_types_of_their_fields():
    settings, given = parse_flags(
        STUDY,
        "--preset=smoke --seed=3 --num_steps=9 --kind=uniform --widths=4,5 --limit=2.5 --rate=1,2 --resume".split(),
    )
    assert settings.seed == 3 and settings.preset == "smoke" and settings.resume
    assert given == {"num_steps": 9, "kind": "uniform", "widths": (4, 5), "limit": 2.5, "rate": (1.0, 2.0)}
    config, hparams = STUDY.configure("smoke", given)
    assert config.num_steps == 9 and hparams.rate.tolist() == [1.0, 2.0]
    assert parse_flags(STUDY, ["--limit=none"])[1] == {"limit": None}


def test_a_preset_gives_way_to_flags():
    assert STUDY.configure("smoke", {})[0].num_steps == 6
    assert STUDY.configure("smoke", {"num_steps": 2})[0].num_steps == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_stepz=3", "Unknown command line flag 'num_stepz'. Did you mean: num_steps"),
        ("--num_steps=many", "--num_steps=many: must be a whole number"),
        ("--rate=fast", "--rate=fast: must be a number, or a comma list of numbers"),
        ("--kind=square", "value should be one of <normal|uniform>"),
        ("--x64=perhaps", "--x64=perhaps: must be true or false"),
        ("smoke", "'smoke' is not a flag: write --name=value"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UsageError) as caught:
        parse_flags(STUDY, [flags])
    assert message in str(caught.value)


def run_launcher(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        launch_module.launch_study("sample", STUDY, arguments)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_bad_usage_is_one_line_and_exit_code_2(capsys, tmp_path):
    assert "preset='huge': sample has smoke, default" in run_launcher(capsys, "--preset=huge")
    assert "num_steps=0: must be positive" in run_launcher(capsys, "--num_steps=0")
    assert "--num_seeds=0: must be at least 1" in run_launcher(capsys, "--num_seeds=0")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in run_launcher(capsys, f"--workdir={tmp_path}/file/x", "--preset=smoke")


def test_corrupt_files_are_named_and_kept(capsys, tmp_path):
    workdir = tmp_path / "run"
    launch_module.launch_study("sample", STUDY, [f"--workdir={workdir}", "--preset=smoke"])
    capsys.readouterr()
    (workdir / "config.json").write_text('{"family": "sam')
    message = run_launcher(capsys, f"--workdir={workdir}", "--preset=smoke", "--resume")
    assert "config.json" in message and (workdir / "config.json").read_text() == '{"family": "sam'


def test_unknown_study_lists_those_there_are(capsys):
    for arguments in (["--study=nope"], []):
        with pytest.raises(SystemExit) as ended:
            launch_module.launch("coupling", arguments)
        assert ended.value.code == 2 and study_names("coupling")[0] in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch):
    study = Study(**{**vars(STUDY), "extras": {"no_such_module": "experiments"}})
    with pytest.raises(UsageError, match=r'needs no_such_module. Install it: .*"jaxrl-suite\[experiments\]"'):
        launch_module.prepare_jax(study, parse_flags(study, [])[0])


@pytest.mark.parametrize("raised", [RuntimeError, AssertionError])
def test_devices_that_are_not_here_are_one_line(monkeypatch, raised):
    def devices():
        raise raised

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(launch_module.jax, "devices", devices)
    with pytest.raises(UsageError, match="JAX_PLATFORMS=cuda: JAX finds no such device"):
        launch_module.prepare_jax(STUDY, Settings())


def test_help_shows_every_flag_with_its_text():
    short, full = help_text("sample", STUDY, full=False), help_text("sample", STUDY, full=True)
    assert "--num_steps  steps of the walk (default 12)" in short
    assert "--rate  scale of a step (default 1.0)" in short
    assert "Presets: smoke (under a minute), default (minutes)" in short
    assert "--checkpoint_every  steps between checkpoints" in full
    assert max(map(len, full.splitlines())) <= 100


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in families() for name in study_names(family)])
def test_every_study_is_complete(family, name):
    study = load_study(family, name)
    assert study.summary and {"smoke", "default"} <= set(study.presets)
    for preset in study.presets:
        study.configure(preset, {})
    for line in help_text(family, study, full=False).splitlines():
        assert not line.rstrip().endswith("hyperparameter") and len(line) <= 120


def test_every_family_has_a_study_in_the_tour():
    shown = {family for family, study in all_studies() if study.tour}
    assert {"reward_free", "moe", "pareto", "coupling"} <= shown


def test_commands_that_are_no_study_read_flags_like_one(capsys):
    """Help in every form ends with 0; an unknown flag and a stray word are one line and end with 2."""
    values = flags.FlagValues()
    flags.DEFINE_integer("num_steps", 7, "how many", flag_values=values)
    assert read_flags(values, ["prog", "--helpshort"], "Does it.") == 0
    assert "Does it." in (text := capsys.readouterr().out) and "--num_steps  how many (default 7)" in text
    assert read_flags(values, ["prog", "--steps=3"], "Does it.") == read_flags(values, ["prog", "word"], "") == 2
    unknown, stray = capsys.readouterr().err.splitlines()
    assert unknown.startswith("error: Unknown command line flag 'steps'") and stray.startswith("error: 'word'")
    assert re.search(r"[.?] Run with --helpshort", unknown)
    assert read_flags(values, ["prog", "--num_steps=3"], "Does it.") is None and values.num_steps == 3


def test_a_missing_plotting_package_stops_every_study_at_once(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    for _, study in all_studies():
        with pytest.raises(UsageError, match="matplotlib"):
            prepare_jax(study, Settings())
