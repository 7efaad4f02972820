# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that refers to nothing outside itself, and is well-formed XML too."""

import base64
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from nova_dmigrate.report.columns import Column, columns_of
from nova_dmigrate.report.comparison import GAINS, LOSSES, Comparison
from nova_dmigrate.report.picture import Picture
from nova_dmigrate.report.runs import DMIGRATE, Group, Run, grouped

# Even if a text got in unescaped, the browser would load and run nothing
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; vertical-align: bottom; }
thead th { border-bottom: 2px solid #222; }
th:first-child, td:first-child { text-align: left; }
tr.group th { text-align: left; padding-top: 1rem; border-bottom: 1px solid #999; }
tr.dmigrate { background: #e3f4ee; } tr.trouble { color: #a33c00; font-weight: 600; }
figure { margin: 0 0 1.5rem; } img { max-width: 100%; height: auto; }
figcaption, .legend { color: #555; font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0 0 .3rem 1.5rem; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and lines below it."""

    title: str
    lines: tuple[str, ...]


def page(
    title: str,
    runs: Sequence[Run],
    machine: Mapping[str, Any],
    comparison: Comparison,
    pictures: Sequence[Picture],
    sections: Sequence[Section] = (),
) -> str:
    """The whole page.

    :param runs: checked ones.
    """
    body = [
        f"<h1>{_text(title)}</h1>",
        *(_section(each) for each in sections),
        *_table(runs),
        _section(Section(GAINS, comparison.gains)),
        _section(Section(LOSSES, comparison.losses)),
        *(_figure(picture) for picture in pictures),
        *_machine(machine),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"/>',
            f'<meta http-equiv="Content-Security-Policy" content="{_text(_POLICY)}"/>',
            '<meta name="viewport" content="width=device-width"/>',
            f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
            *filter(None, body),
            "</body></html>\n",
        ]
    )


def _section(section: Section) -> str:
    if not section.lines:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in section.lines)
    return f"<h2>{_text(section.title)}</h2><ul>{items}</ul>"


def _table(runs: Sequence[Run]) -> Iterable[str]:
    columns = columns_of(runs)
    heads = "".join(f"<th>{'<br/>'.join(map(_text, column.head))}</th>" for column in columns)
    yield '<h2>The runs</h2><div class="scroll"><table>'
    yield f"<thead><tr><th>mode</th>{heads}</tr></thead><tbody>"
    for group in grouped(runs):
        yield f'<tr class="group"><th colspan="{len(columns) + 1}">{_text(group.title)}</th></tr>'
        yield from _rows(group, columns)
    yield "</tbody></table></div>"
    meanings = (f"<dt>{_text(' '.join(c.head))}</dt><dd>{_text(c.meaning)}</dd>" for c in columns)
    yield f'<details class="legend"><summary>The columns</summary><dl>{"".join(meanings)}</dl>'
    yield "<p>MB are 10<sup>6</sup> bytes.</p></details>"


def _rows(group: Group, columns: Sequence[Column]) -> Iterable[str]:
    for name, run in zip(group.names(), group.runs, strict=True):
        classes = ["dmigrate"] if run["mode"] == DMIGRATE else []
        if _in_trouble(run):
            classes.append("trouble")
        cells = "".join(f"<td>{_text(column.text(run))}</td>" for column in columns)
        yield f'<tr class="{" ".join(classes)}"><td>{_text(name)}</td>{cells}</tr>'


def _in_trouble(run: Run) -> bool:
    # It is no trouble of an ordinary migration that it has not used volumes
    without = run["mode"] == DMIGRATE and run["fallback_reason"] is not None
    damaged = bool(run["lost_commits"]) or run["check_ok"] is False
    return without or damaged or not run["completed"]


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    description = _text(picture.description)
    return (
        f"<h2>{_text(picture.title)}</h2><figure>"
        f'<img alt="{description}" src="data:image/png;base64,{data}"/>'
        f"<figcaption>{description}</figcaption></figure>"
    )


def _machine(machine: Mapping[str, Any]) -> Iterable[str]:
    if machine:
        facts = "".join(
            f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in machine.items()
        )
        yield f"<h2>The machine</h2><dl>{facts}</dl>"


def _text(value: object) -> str:
    """A value as text, escaped, without the control characters that XML does not allow."""
    return escape("".join(c if c.isprintable() else " " for c in str(value)))
