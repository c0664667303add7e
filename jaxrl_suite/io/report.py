"""A report of several studies: one self-contained HTML page, and a table for the terminal."""

import dataclasses
import html
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxrl_suite.extras import require
from jaxrl_suite.io import files, plots

Status = Literal["finished", "failed", "skipped"]
_SHOWN_NUMBERS = 24  # of a section; more are folded away
_MARKS = {"finished": "✓", "failed": "✗", "skipped": "–"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One study of a report.

    Attributes:
        title: for example "coupling / letters".
        summary: what it shows, in a sentence.
        command: the exact command that repeats it.
        status: finished, failed or skipped.
        seconds: wall time, None if it did not run.
        figures: caption -> matplotlib Figure, or a ``data:`` address made by :func:`plots.figure_to_data_uri`.
        numbers: metric path with its unit -> number, text, bool or None.
        error: what went wrong, the last lines of a traceback for instance.
        headline: the numbers that belong into the tables of contents, at most four.
    """

    title: str
    summary: str
    command: str
    status: Status = "finished"
    seconds: float | None = None
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None
    headline: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.status not in _MARKS:
            raise ValueError(f"status={self.status!r}: must be one of {', '.join(_MARKS)}.")


_UNITS = {
    "seconds": "s",
    "bits": "bit",
    "nats": "nat",
    "bytes": "B",
    "percent": "%",
    "tokens_per_second": "tokens/s",
    "steps_per_second": "steps/s",
    "bits_per_token": "bit/token",
    "nats_per_token": "nat/token",
    "bits_per_byte": "bit/byte",
    "bits_per_symbol": "bit/symbol",
}


def split_unit(path: str) -> tuple[str, str]:
    """Readable name and unit of a metric path.

    >>> split_unit("coupling/rate_bits")
    ('coupling / rate', 'bit')
    >>> split_unit("reward/mean")
    ('reward / mean', '')
    """
    for ending, unit in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
        stem = path.removesuffix(ending)
        if stem != path and (not stem or stem[-1] in "_/"):
            path = stem.rstrip("_/") or ending
            return path.replace("/", " / ").replace("_", " "), unit
    return path.replace("/", " / ").replace("_", " "), ""


def format_number(value: Any) -> str:
    """Four significant digits, thousands apart, words for truth values and for what is missing.

    >>> format_number(12345.678), format_number(0.00001234), format_number(None), format_number(True)
    ('12,346', '1.234e-05', '–', 'yes')
    """
    if value is None:
        return "–"
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _scaled(value: Any, unit: str) -> tuple[Any, str]:
    """Bytes in the multiple that reads best, other units as they are."""
    if unit == "B" and isinstance(value, int | float):
        for larger in ("kB", "MB", "GB", "TB"):
            if abs(value) < 1000:
                break
            value, unit = value / 1000, larger
    return value, unit


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _headline(section: Section) -> str:
    if section.status == "failed":
        lines = [line for line in (section.error or "").strip().splitlines() if line.strip()]
        return lines[-1].strip()[:160] if lines else "no message"
    parts = []
    for path in section.headline:
        if path in section.numbers:
            # The title names family and study already.
            name, unit = split_unit("/".join(word for word in path.split("/") if word not in section.title.split()))
            value, unit = _scaled(section.numbers[path], unit)
            name = name.replace(" / ", " ")
            parts.append(f"{name} {format_number(value)}{' ' + unit if unit else ''}")
    return ", ".join(parts)


# --- the page --------------------------------------------------------------------------------------------------------


def write_report(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    *,
    intro: str = "",
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one HTML page that needs nothing else: pictures inlined, no network, light and dark.

    Args:
        path: the file, by custom report.html.
        title: of the page.
        sections: in the order of the page.
        intro: a paragraph or two, separated by empty lines, under the title.
        environment: what :func:`profiling.environment` says, shown at the end.

    Returns:
        The path.

    Raises:
        FileError: the file cannot be written.
    """
    anchors = [f"section-{number}" for number, _ in enumerate(sections, start=1)]
    body = [f"<h1>{_text(title)}</h1>"]
    body += [f'<p class="intro">{_text(part)}</p>' for part in intro.split("\n\n") if part.strip()]
    body.append(_contents(sections, anchors))
    body += [_section(section, anchor) for section, anchor in zip(sections, anchors)]
    if environment:
        body.append(_environment(environment))
    page = _PAGE.replace("{{title}}", _text(title)).replace("{{style}}", _CSS).replace("{{script}}", _SCRIPT)
    return files.atomic_write(path, page.replace("{{body}}", "\n".join(body)))


def _text(value: Any) -> str:
    return html.escape(str(value))


def _contents(sections: Sequence[Section], anchors: Sequence[str]) -> str:
    rows = [
        f'<tr><td><a href="#{anchor}">{_text(section.title)}</a></td><td>{_badge(section.status)}</td>'
        f'<td class="number">{_duration(section.seconds)}</td><td>{_text(_headline(section))}</td></tr>'
        for section, anchor in zip(sections, anchors)
    ]
    total = _duration(sum(section.seconds or 0.0 for section in sections))
    counts = [(status, sum(section.status == status for section in sections)) for status in _MARKS]
    caption = ", ".join(f"{count} {status}" for status, count in counts if count)
    return (
        '<div class="wide"><table class="contents"><thead><tr><th>Study</th><th>Status</th><th class="number">Time</th>'
        f"<th>Result</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="small">{len(sections)} studies: {caption or "none"}. {total} in all.</p>'
    )


def _badge(status: str) -> str:
    return f'<span class="badge {status}">{_MARKS[status]} {status}</span>'


def _section(section: Section, anchor: str) -> str:
    parts = [
        f'<section id="{anchor}"><h2>{_text(section.title)} {_badge(section.status)}</h2>',
        f"<p>{_text(section.summary)}</p>",
    ]
    if section.error:
        parts.append(f'<pre class="error">{_text(section.error.strip())}</pre>')
    pictures = [_figure(caption, figure) for caption, figure in section.figures.items()]
    numbers = _numbers(section.numbers) if section.numbers else ""
    many = len(section.numbers) > _SHOWN_NUMBERS
    if many:  # a long table would bury the sections that follow
        numbers = f"<details><summary>All {len(section.numbers)} numbers</summary>{numbers}</details>"
    if len(pictures) == 1 and numbers and not many and 'class="broad"' not in pictures[0]:
        parts.append(f'<div class="beside">{pictures[0]}{numbers}</div>')  # one figure leaves room for the numbers
    else:
        parts += ['<div class="figures">', *pictures, "</div>", numbers]
    # A word of the command is not broken, so that an option stays readable.
    words = " ".join(f"<span>{_text(word)}</span>" for word in section.command.split(" "))
    parts.append(
        '<div class="command"><button type="button" aria-label="Copy the command">Copy</button>'
        f"<pre><code>{words}</code></pre></div>"
    )
    if section.seconds is not None:
        parts.append(f'<p class="small">Took {_duration(section.seconds)}.</p>')
    return "".join(parts) + "</section>"


def _figure(caption: str, figure: Any) -> str:
    source = figure if isinstance(figure, str) else plots.figure_to_data_uri(figure)
    words = _text(caption.replace("_", " "))
    try:
        width, height = plots.data_uri_size(source)
    except ValueError:
        raise ValueError(f"figures[{caption!r}]={source!r:.40}: must be a Figure or a data:image/ address.") from None
    shape = ' class="broad"' if width > 1.9 * height else ""  # two or more panels side by side: the page's whole width
    return f'<figure{shape}><img src="{_text(source)}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def _numbers(numbers: Mapping[str, Any]) -> str:
    rows = []
    for path, value in numbers.items():
        name, unit = split_unit(path)
        value, unit = _scaled(value, unit)
        text = format_number(value)
        kind = "number" if len(text) <= 14 else "words"  # a sentence reads from the left
        rows.append(
            f'<tr title="{_text(path)}"><td>{_text(name)}</td>'
            f'<td class="{kind}">{_text(text)}</td><td class="unit">{_text(unit)}</td></tr>'
        )
    return (
        '<table class="numbers"><thead><tr><th>Quantity</th><th class="number">Value</th><th>Unit</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _environment(environment: Mapping[str, Any]) -> str:
    rows = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
        elif isinstance(value, list | tuple):
            value = " ".join(map(str, value))
        rows.append(f"<tr><td>{_text(name)}</td><td>{_text('–' if value is None else value)}</td></tr>")
    return f'<section><h2>Where this ran</h2><table class="numbers">{"".join(rows)}</table></section>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>{{style}}</style>
</head>
<body>
<main>
{{body}}
</main>
<script>{{script}}</script>
</body>
</html>
"""

_CSS = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6670; --paper: #ffffff; --panel: #f4f6f8; --line: #dde2e7;
  --link: #0060a0; --good: #006b4f; --bad: #b03a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5af; --paper: #15191d; --panel: #1f252b;
  --line: #343c44; --link: #6cb8f0; --good: #4cc9a0; --bad: #ff8a50; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .5rem; display: flex; gap: .75rem; align-items: baseline;
  flex-wrap: wrap; }
p { margin: 0 0 .9rem; max-width: 46rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
section { border-top: 1px solid var(--line); margin-top: 2.25rem; padding-top: 1.75rem; }
.intro { font-size: 1.05rem; }
.small { color: var(--soft); font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .94rem; margin: .75rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1.1rem .35rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
table.contents { width: 100%; }
.contents td:last-child { min-width: 16rem; }
.contents td:nth-child(-n+3), .contents th { white-space: nowrap; overflow-wrap: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.unit { color: var(--soft); }
.badge { font-size: .82rem; font-weight: 600; white-space: nowrap; }
.finished { color: var(--good); } .failed { color: var(--bad); } .skipped { color: var(--soft); }
.figures, .beside { display: flex; flex-wrap: wrap; gap: 1.25rem 2rem; margin: 1rem 0; align-items: flex-start; }
figure { margin: 0; flex: 1 1 24rem; max-width: min(100%, 46rem); }
.beside figure { flex-grow: 3; } .beside table { flex: 1 1 17rem; margin: 0; }
figure.broad { flex-basis: 100%; max-width: 100%; }
figure img { display: block; width: 100%; max-width: 60rem; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
summary { color: var(--link); cursor: pointer; margin: .5rem 0; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .35rem; }
pre { margin: 0; overflow-x: auto; background: var(--panel); border-radius: 6px; padding: .8rem 1rem; font-size: .86rem;
  line-height: 1.45; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.error { border-left: 4px solid var(--bad); white-space: pre-wrap; margin: .75rem 0 1rem; }
.command { position: relative; margin: .75rem 0; }
.command pre { padding-right: 5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
code span { white-space: nowrap; }
button { position: absolute; right: .5rem; top: .5rem; font: inherit; font-size: .8rem; padding: .15rem .6rem;
  color: var(--ink); background: var(--paper); border: 1px solid var(--line); border-radius: 4px; cursor: pointer; }
@media print { code span { white-space: nowrap; }
button { display: none; } section { break-inside: avoid; } }
"""

_SCRIPT = """
for (const button of document.querySelectorAll(".command button")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(code); button.textContent = "Selected"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
"""


# --- the terminal ----------------------------------------------------------------------------------------------------


def terminal_table(sections: Sequence[Section]) -> None:
    """Prints the table of contents to standard output: by rich on a terminal, as plain columns elsewhere."""
    rows = [(section.title, section.status, _duration(section.seconds), _headline(section)) for section in sections]
    if not sys.stdout.isatty():
        head = ("study", "status", "time", "result")
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(3)]
        for row in [head, *rows]:
            cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2]), row[3]]
            sys.stdout.write("  ".join(cells).rstrip() + "\n")
        sys.stdout.flush()
        return
    table = require("rich.table", "experiments").Table(box=require("rich.box", "experiments").SIMPLE_HEAD)
    for name, justify in (("study", "left"), ("status", "left"), ("time", "right"), ("result", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    styles = {"finished": "green", "failed": "bold red", "skipped": "dim"}
    cell = require("rich.text", "experiments").Text  # text, not markup: brackets in a message stay
    for title, status, seconds, result in rows:
        table.add_row(cell(title), cell(f"{_MARKS[status]} {status}", styles[status]), seconds, cell(result))
    require("rich.console", "experiments").Console().print(table)
