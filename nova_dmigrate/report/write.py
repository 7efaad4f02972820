# SPDX-License-Identifier: Apache-2.0
"""The files of a report."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nova_dmigrate import exception
from nova_dmigrate.report import html
from nova_dmigrate.report.comparison import compare
from nova_dmigrate.report.picture import Picture
from nova_dmigrate.report.runs import Run, checked, without_series


@dataclasses.dataclass(frozen=True)
class ReportFiles:
    """The files that `write_report` has written.

    :ivar json: ``report.json``.
    :ivar html: ``report.html``, which holds the plots as well.
    :ivar pngs: the plots.
    """

    json: Path
    html: Path
    pngs: tuple[Path, ...]


def write_report(
    runs: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
    directory: Path,
    title: str = "Live migration of a database VM",
    sections: Sequence[html.Section] = (),
) -> ReportFiles:
    """Write ``report.json``, ``report.html`` and the plots.

    :param runs: as in ``report.json``, with ``series`` where there are any; see ``runs``.
    :param machine: what is known of the machine: texts and numbers by name.
    :param directory: is made if there is none; files of an earlier report are replaced.
    :param sections: what there is to say besides.
    :raises ReportError: a run is none, matplotlib is missing, or a file cannot be written.
    """
    valid = checked(runs)
    pictures = draw(valid)
    kept = {"machine": dict(machine), "runs": [without_series(run) for run in valid]}
    pngs = tuple(directory / f"{picture.name}.png" for picture in pictures)
    files = ReportFiles(directory / "report.json", directory / "report.html", pngs)
    try:
        text = json.dumps(kept, indent=2, allow_nan=False) + "\n"
        directory.mkdir(parents=True, exist_ok=True)
        write_file(files.json, text.encode())
        write_file(files.html, page(valid, machine, pictures, title, sections).encode())
        for path, picture in zip(pngs, pictures, strict=True):
            write_file(path, picture.png)
    except (TypeError, ValueError) as error:
        raise exception.ReportError(reason=f"what is said of the machine: {error}") from error
    except OSError as error:
        raise exception.ReportError(reason=f"{directory} cannot be written: {error}") from error
    return files


def write_html(
    runs: Sequence[Mapping[str, Any]],
    machine: Mapping[str, Any],
    path: Path,
    title: str,
    sections: Sequence[html.Section] = (),
) -> None:
    """Write one HTML file, which holds everything.

    :param sections: what there is to say besides.
    :raises ReportError: as for `write_report`.
    """
    valid = checked(runs)
    text = page(valid, machine, draw(valid), title, sections)
    try:
        write_file(path, text.encode())
    except OSError as error:
        raise exception.ReportError(reason=f"{path} cannot be written: {error}") from error


def draw(runs: Sequence[Run]) -> tuple[Picture, ...]:
    """The plots of checked runs.

    :raises ReportError: matplotlib is missing.
    """
    try:
        from nova_dmigrate.report import plots
    except ImportError as error:
        raise exception.ReportError(
            reason=f"plots need matplotlib, the extra 'report': {error}"
        ) from error
    return plots.draw(runs)


def page(
    runs: Sequence[Run],
    machine: Mapping[str, Any],
    pictures: Sequence[Picture],
    title: str,
    sections: Sequence[html.Section] = (),
) -> str:
    """The HTML of checked runs."""
    return html.page(title, runs, machine, compare(runs), pictures, sections)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that whoever sees it sees all of it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
