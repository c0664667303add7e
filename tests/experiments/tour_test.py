"""The tour: what it runs, what it writes, and what it does when a study fails or is finished already."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments.common.flags import UsageError
from experiments.common.study import Study
from experiments.tour import tour
from tests.experiments.sample_study import STUDY

ROOT = Path(__file__).resolve().parent.parent.parent


class Page(HTMLParser):
    """Collects what a browser would fetch, and the pictures."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.pictures = [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        address = found.get("src") or (found.get("href") if tag == "link" else None)
        if address and not address.startswith("data:"):
            self.fetched.append(address)
        self.pictures += tag in ("img", "svg")


def variant(name, **changes):
    return Study(**{**vars(STUDY), "name": name, **changes})


@pytest.fixture
def sample_tour(monkeypatch):
    good = variant("good", tour=True)
    broken = variant("broken", tour=True, presets={**STUDY.presets, "smoke": {"num_steps": 6}})
    other = variant("other")
    monkeypatch.setattr(tour, "all_studies", lambda: [("sample", broken), ("sample", good), ("more", other)])
    monkeypatch.setattr(tour, "module_of", lambda family: "tests.experiments.sample_study")
    monkeypatch.setenv("XLA_FLAGS", "")
    command = tour.command_of

    def failing(family, study, preset, seed):
        return command(family, study, preset, seed) + (["--fail=loop"] if study.name == "broken" else [])

    monkeypatch.setattr(tour, "command_of", failing)


@pytest.mark.subprocess
def test_a_failed_study_is_shown_and_the_others_still_run(sample_tour, tmp_path, capsys):
    assert tour.main(["--preset=smoke", "--jobs=2", f"--workdir={tmp_path / 'tour'}"]) == 1
    printed = capsys.readouterr().out
    assert "FloatingPointError: asked to fail" in printed and "finished" in printed
    assert "[1/2] sample/broken failed in" in printed and "[2/2] sample/good done in" in printed
    text = (tmp_path / "tour" / "report.html").read_text()
    page = Page(text)
    assert not page.fetched and page.pictures >= 1
    assert "asked to fail" in text and "--study=good" in text and "--preset=smoke" in text

    # A second time, with --resume: the finished study is left alone, the failed one is tried again.
    finished = tmp_path / "tour" / "sample" / "good" / "summary.json"
    before = finished.stat().st_mtime_ns
    assert tour.main(["--preset=smoke", f"--workdir={tmp_path / 'tour'}", "--resume"]) == 1
    assert finished.stat().st_mtime_ns == before and "kept in" in capsys.readouterr().out

    kept = json.loads(finished.read_text())
    assert tour.main(["--preset=smoke", f"--workdir={tmp_path / 'tour'}"]) == 2
    assert "the folder is not empty. Add --resume" in capsys.readouterr().err
    assert json.loads(finished.read_text()) == kept


def test_selection(sample_tour):
    studies = tour.all_studies()

    def names(**options):
        return [f"{family}/{study.name}" for family, study in tour.select(studies, **options)]

    assert names() == ["sample/broken", "sample/good"]
    assert names(everything=True) == ["sample/broken", "sample/good", "more/other"]
    assert names(only="more") == ["more/other"]  # a family without a study in the default tour shows what it has
    assert names(only="sample/good,more/other") == ["sample/good", "more/other"]
    with pytest.raises(UsageError, match=r"--only=moe: no such family or study. Known: more, sample, sample/broken"):
        names(only="moe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=huge"], "--preset=huge: broken has smoke, default."),
        (["--jobs=0"], "--jobs=0: must be at least 1."),
        (["--only=nothing"], "no such family or study"),
        (["--workdir={folder}/file/tour"], "cannot be written"),
        (["--workdir={folder}/letters", "--resume"], "holds no tour to resume"),
    ],
)
def test_bad_usage(sample_tour, tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("keep me")
    assert tour.main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["letter.txt"]


@pytest.mark.slow
@pytest.mark.subprocess
def test_an_interrupted_tour_leaves_no_process_and_goes_on(tmp_path):
    """Control-C while two studies run: code 130, one line that says how to go on, which does."""
    environment = {**os.environ, "XLA_FLAGS": "", "SAMPLE_PAUSE": "60"}
    workdir = tmp_path / "tour"
    words = [sys.executable, "-m", "tests.experiments.sample_tour", "--preset=smoke", f"--workdir={workdir}"]
    process = subprocess.Popen(
        [*words, "--jobs=2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    running = [workdir / "sample" / name / "stages" / "widths.npz" for name in ("one", "two")]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.strip() == f"interrupted: --workdir={workdir} --resume continues"
    assert "[3/3]" not in printed  # what waits does not start
    for name in ("one", "two"):  # nobody holds a folder any more
        with (workdir / "sample" / name / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    environment["SAMPLE_PAUSE"] = "0"
    again = subprocess.run([*words, "--jobs=3", "--resume"], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done in") == 3 and (workdir / "report.html").exists()
