# SPDX-License-Identifier: Apache-2.0
"""The live display of a migration: a block that is redrawn in a terminal, lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nova_dmigrate.migration.progress import Progress

_MIB = 1 << 20
_PAGE = 4096
#: Seconds between two lines, unless the phase changes.
_LINE_INTERVAL = 5.0

Callback = Callable[[Progress], None]


@contextlib.contextmanager
def shown(title: str, stream: TextIO, quiet: bool) -> Iterator[Callback]:
    """Show progress on ``stream`` as long as the context lasts; gives the callback for it.

    :param title: what goes on.
    :param quiet: show nothing.
    """
    console = Console(file=stream, highlight=False, soft_wrap=True)
    if quiet:
        yield lambda progress: None
    elif console.is_terminal:
        # What a terminal shows last stays there, as a record of how the migration went
        with Live(block(title, Progress("")), console=console, redirect_stdout=False) as live:
            yield lambda progress: live.update(block(title, progress))
    else:
        yield _Lines(title, stream).tell


class _Lines:
    """Tells from time to time, and whenever another phase begins."""

    def __init__(self, title: str, stream: TextIO) -> None:
        self._title = title
        self._stream = stream
        self._phase: str | None = None
        self._told = 0.0

    def tell(self, progress: Progress) -> None:
        """Write a line if it is time."""
        if progress.phase == self._phase and progress.elapsed < self._told + _LINE_INTERVAL:
            return
        self._phase, self._told = progress.phase, progress.elapsed
        print(f"{self._title}: {line(progress)}", file=self._stream, flush=True)


def line(progress: Progress) -> str:
    """Progress in one line."""
    parts = [
        f"{progress.elapsed:.0f} s",
        progress.phase,
        f"network {_mib(progress.wire_bytes)} ({_mib(progress.network_rate)}/s)",
        f"volume {_mib(progress.volume_bytes)} ({_mib(progress.volume_rate)}/s)",
    ]
    if progress.remaining_bytes is not None:
        parts.append(f"remaining {_mib(progress.remaining_bytes)}")
    parts.append(f"misses {progress.misses}")
    return ", ".join(parts)


def block(title: str, progress: Progress) -> Group:
    """Progress as some lines of a terminal."""
    minutes, seconds = divmod(int(progress.elapsed), 60)
    head = Table.grid(padding=(0, 2))
    head.add_row(Text(title, style="bold"), Text(progress.phase), f"{minutes:02}:{seconds:02}")
    paths = Table.grid(padding=(0, 2))
    for _ in range(3):
        paths.add_column(justify="right")
    for name, amount, rate in (
        ("network", progress.wire_bytes, progress.network_rate),
        ("volume", progress.volume_bytes, progress.volume_rate),
    ):
        paths.add_row(name, _mib(amount), f"{_mib(rate)}/s")
    return Group(head, _bar(progress), paths, Text(_details(progress), style="dim"))


def _bar(progress: Progress) -> Table:
    bar = Table.grid(padding=(0, 2))
    if progress.remaining_bytes is None or not progress.ram_bytes:
        bar.add_row(ProgressBar(total=1, completed=0, width=40), "")
        return bar
    done = max(0, progress.ram_bytes - progress.remaining_bytes)
    bar.add_row(
        ProgressBar(total=progress.ram_bytes, completed=done, width=40),
        f"remaining {_mib(progress.remaining_bytes)} of {_mib(progress.ram_bytes)}",
    )
    return bar


def _details(progress: Progress) -> str:
    parts = [
        f"misses {progress.misses}",
        f"unresolved {progress.unresolved}",
        f"mapped {_mib(progress.mapped_pages * _PAGE)}",
        f"passes {progress.passes}",
    ]
    if progress.max_downtime_ms is not None:
        parts.append(f"downtime limit {progress.max_downtime_ms} ms")
    return "  ".join(parts)


def _mib(amount: float) -> str:
    return f"{amount / _MIB:.1f} MiB"
