"""The report: one page that needs nothing else, whole even when a study failed, and a table for the terminal."""

import html.parser
import os
import re
import sys

import pytest

from jaxrl_suite.io import plots, report
from jaxrl_suite.io.report import Section


class Page(html.parser.HTMLParser):
    """What a browser would find: tags that close, addresses, anchors, text."""

    VOID = ("meta", "img", "br", "link", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.anchors, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        self.anchors += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def sections():
    figure, axes = plots.new_figure(3, 2)
    axes.plot([0, 1])
    wide, _ = plots.new_figure(6, 2)
    return [
        Section(
            title="coupling / letters",
            summary="Information against rate <&>.",
            command='python -m experiments.coupling.launch --study=letters --note="a<b"',
            seconds=75.0,
            figures={"information_against_rate": figure, "given": plots.figure_to_data_uri(wide)},
            numbers={
                "coupling/rate_bits": 1.23456,
                "count": 12345,
                "done": True,
                "memory/peak_bytes": 3.2e9,
                "no": None,
            },
            headline=("coupling/rate_bits", "absent"),
        ),
        Section(
            title="moe / folding",
            summary="Fails.",
            command="python -m x",
            status="failed",
            seconds=2.0,
            error="Traceback:\n  line <1>\nValueError: [red]bad[/red] & ugly\n",
        ),
        Section(title="pareto / front", summary="Not run.", command="python -m y", status="skipped"),
        Section(title="one", summary="One figure.", command="z", figures={"f": wide}, numbers={"a": 1.0}),
    ]


def test_page_is_self_contained_and_whole(tmp_path, sections):
    path = report.write_report(
        tmp_path / "runs" / "report.html",
        "The <tour>",
        sections,
        intro="First & foremost.\n\nSecond.",
        environment={"commit": None, "versions": {"jax": "1", "none": None}, "argv": ["a", "b"]},
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for address in page.addresses:  # no network, no neighbours
        assert address.startswith(("data:image/", "#")), address
    assert not re.search(r"@import|url\(|<link|fetch\(|XMLHttp", text)
    assert [address[1:] for address in page.addresses if address[0] == "#"] == page.anchors
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3 and images[0]["alt"] == "information against rate"
    for piece in (
        "The <tour>",
        "First & foremost.",
        "Information against rate <&>.",
        '--note="a<b"',
        "4 studies: 2 finished, 1 failed, 1 skipped. 1 min 17 s in all.",
        "rate 1.235 bit",
        "ValueError: [red]bad[/red] & ugly",
        "12,345",
        "3.2",
        "GB",
        "jax 1",
    ):
        assert piece in page.text, piece
    assert "none None" not in page.text and "prefers-color-scheme: dark" in text


def test_command_survives_copying(tmp_path, sections):
    text = report.write_report(tmp_path / "r.html", "t", sections).read_text()
    blocks = re.findall(r"<pre><code>(.*?)</code></pre>", text)
    plain = [html.unescape(re.sub(r"<[^>]*>", "", block)) for block in blocks]
    assert plain == [section.command for section in sections]


def test_no_sections(tmp_path):
    Page(report.write_report(tmp_path / "r.html", "t", []).read_text())


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"status='ok': must be one of finished, failed, skipped"):
        Section(title="", summary="", command="", status="ok")
    outside = Section(title="", summary="", command="", figures={"f": "https://example.org/x.png"})
    with pytest.raises(ValueError, match=r"figures\['f'\]='https.*must be a Figure or a data:image"):
        report.write_report(tmp_path / "r.html", "t", [outside])
    assert not (tmp_path / "r.html").exists()


def test_many_numbers_are_folded_away(tmp_path):
    numbers = {f"value_{index}": index for index in range(25)}
    for count, folded in ((24, False), (25, True)):
        part = Section(title="a / b", summary="", command="c", numbers=dict(list(numbers.items())[:count]))
        text = report.write_report(tmp_path / "r.html", "t", [part]).read_text(encoding="utf-8")
        assert ("<summary>All 25 numbers</summary>" in text) == folded
        assert f"value {count - 1}" in text


UNITS = {
    "coupling/rate_bits": ("coupling / rate", "bit"),
    "time/step_seconds": ("time / step", "s"),
    "loss/nats_per_token": ("loss", "nat/token"),
    "lm/tokens_per_second": ("lm", "tokens/s"),
    "seconds": ("seconds", "s"),
    "rabbits": ("rabbits", ""),
    "reward/accuracy/mean": ("reward / accuracy / mean", ""),
}


@pytest.mark.parametrize("path", UNITS)
def test_units(path):
    assert report.split_unit(path) == UNITS[path]


@pytest.mark.parametrize(
    "value, text",
    [
        (0.5, "0.5"),
        (1234.5678, "1235"),
        (1e20, "1e+20"),
        (-12345.6, "-12,346"),
        (7, "7"),
        ("NaN", "NaN"),
        (False, "no"),
    ],
)
def test_numbers_read_well(value, text):
    assert report.format_number(value) == text


def test_plain_table(sections, capsys):
    report.terminal_table(sections)
    assert capsys.readouterr().out == (
        "study               status          time  result\n"
        "coupling / letters  finished  1 min 15 s  rate 1.235 bit\n"
        "moe / folding       failed         2.0 s  ValueError: [red]bad[/red] & ugly\n"
        "pareto / front      skipped            –\n"
        "one                 finished           –\n"
    )


def test_rich_table_on_a_terminal(sections, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    report.terminal_table(sections)
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "✗ failed" in out and "[red]bad[/red]" in out and out.count(os.linesep) >= 6
