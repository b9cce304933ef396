"""Two runs against each other: what became slower or faster between them, measured on the same machine or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from .harness import OURS, TORCH, Result
from .report import percent

if TYPE_CHECKING:
    from .runner import Run


@dataclass(frozen=True)
class Change:
    """How one case's time changed from the first run to the second: 0.1 is a tenth slower, -0.1 a tenth faster."""

    case: str
    relative: float  # of our time over torch's in the same run, which another machine changes least
    ours: float  # of our median alone
    spread: float | None  # the larger interquartile range of our samples over their median


@dataclass
class Comparison:
    """The cases of two runs, matched by class, shape, type and direction."""

    changes: list[Change] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # in the second run another result than torch's, so not timed

    def slower(self, threshold: float) -> list[Change]:
        """The cases that lost more than ``threshold`` against torch."""
        return [change for change in self.changes if change.relative > threshold]


def by_case(results: Iterable[Result]) -> dict[str, Result]:
    """The results by what identifies them in any run."""
    return {f"{r.group}, {r.dtype}: {r.name}, {r.direction}": r for r in results}


def compare(first: Run, second: Run) -> Comparison:
    """What changed from ``first`` to ``second``."""
    before, after = by_case(first.results), by_case(second.results)
    found = Comparison(
        only_first=[case for case in before if case not in after],
        only_second=[case for case in after if case not in before],
        wrong=[case for case, result in after.items() if not result.same],
    )
    for case, old in before.items():
        new = after.get(case)
        if new is not None and old.same and new.same:
            change = Change(
                case,
                relative=old.ratio[TORCH] / new.ratio[TORCH] - 1,
                ours=new.median[OURS] / old.median[OURS] - 1,
                spread=max((run.spread[OURS] for run in (old, new) if OURS in run.spread), default=None),
            )
            found.changes.append(change)
    return found


def comparison_table(found: Comparison, threshold: float) -> Table:
    """A row for each case of both runs; colour marks what passed the threshold, either way."""
    table = Table(
        title="Change from the first run to the second; above zero is slower",
        caption="relative: our time over torch's in the same run; spread: of our samples, the larger of the two runs'",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("case")
    for heading in ("relative", "our median", "spread"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in found.changes:
        style = "red" if change.relative > threshold else "green" if change.relative < -threshold else None
        cells = (f"{change.relative:+.1%}", f"{change.ours:+.1%}", percent(change.spread))
        table.add_row(Text(change.case), *cells, style=style)
    return table
