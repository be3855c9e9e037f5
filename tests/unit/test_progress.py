"""Progress in plain lines and in bars, with a clock held by the test."""

from __future__ import annotations

import io

from rich.console import Console

from olapipe.progress import BarReporter, LineReporter, make_reporter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_few_seconds_with_rate_and_time_left() -> None:
    out, clock = io.StringIO(), Clock()
    reporter = LineReporter(out, every=5.0, clock=clock)
    reporter.begin({"depth": 1000, "gen": 1000}, {"depth": 0, "gen": 400})
    clock.now += 4
    reporter.update({"depth": 40})
    assert out.getvalue() == ""
    clock.now += 6
    reporter.update({"depth": 100})
    # 10 seconds: 100 images, 900 left at 10 per second; gen has not moved since it began
    assert out.getvalue() == "depth: 100/1000 images, 10.0 images/s, 1 min 30 s left; gen: 400/1000 images, starting\n"
    clock.now += 10
    reporter.update({"gen": 500}, {"gen": 3})
    assert (
        out.getvalue().splitlines()[1].endswith("gen: 500/1000 images, 3 of them failed, 5.0 images/s, 1 min 40 s left")
    )
    reporter.end()
    reporter.end()
    assert len(out.getvalue().splitlines()) == 3


def test_lines_escape_what_a_terminal_would_obey() -> None:
    out = io.StringIO()
    LineReporter(out).say("a\x1b[2Jb")
    assert out.getvalue() == "a\\x1b[2Jb\n"


def test_bars_show_counts_and_names_without_markup() -> None:
    out = io.StringIO()
    reporter = BarReporter(Console(file=out, force_terminal=True, width=120, color_system=None))
    reporter.say("[red]x[/red]")
    reporter.begin({"depth": 8}, {"depth": 2})
    reporter.update({"depth": 6}, {"depth": 1})
    reporter.end()
    assert "1 of them failed" in out.getvalue()
    assert "[red]x[/red]" in out.getvalue()
    assert "6/8" in out.getvalue()
    assert "images/s" in out.getvalue()


def test_a_pipe_gets_lines() -> None:
    assert isinstance(make_reporter(io.StringIO()), LineReporter)
