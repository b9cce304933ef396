"""What a step of the recipe has found: a sentence, and curves to see it by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = tuple[Sequence[float], Sequence[float]]  # x and y


@dataclass(frozen=True)
class Panel:
    """Curves over one quantity."""

    x: str
    y: str
    series: Mapping[str, Series]  # by the curve's name
    log_x: bool = False
    log_y: bool = False
    points: bool = False  # rather than lines
    level: tuple[str, float] | None = None  # the name of a horizontal line, and where it is
    highest: float | None = None  # what is above is not shown


@dataclass(frozen=True)
class Verdict:
    """What one step has found."""

    step: int  # from 1
    title: str
    passed: bool  # whether there is anything to repair before the next step
    finding: str
    panels: tuple[Panel, ...] = ()
    chosen: dict[str, float] = field(default_factory=dict)  # the settings that later steps go on with

    def __str__(self) -> str:
        return f"{self.step}. {self.title}: {'passed' if self.passed else 'FAILED'}. {self.finding}"


def draw_verdict(verdict: Verdict) -> Figure:
    """A figure with the verdict above and its panels side by side."""
    from matplotlib.figure import Figure

    count = max(1, len(verdict.panels))
    figure = Figure(figsize=(5.5 * count, 4.4), layout="constrained")
    figure.suptitle(str(verdict), fontsize=10, wrap=True, color="black" if verdict.passed else "tab:red")
    for axis, panel in zip(figure.subplots(1, count, squeeze=False)[0], verdict.panels, strict=True):
        for name, (x, y) in panel.series.items():
            few = panel.points or len(x) < 20
            axis.plot(x, y, label=name, marker="o" if few else None, linestyle="none" if panel.points else "-")
        if panel.level is not None:
            name, height = panel.level
            axis.axhline(height, color="grey", linestyle="--", linewidth=1, label=name)
        axis.set(xlabel=panel.x, ylabel=panel.y)
        axis.set_xscale("log" if panel.log_x else "linear")
        axis.set_yscale("log" if panel.log_y else "linear")
        if panel.log_x:  # within one decade every tick between has a long name
            axis.tick_params("x", which="both", labelsize=8, rotation=45)
        if panel.highest is not None:
            axis.set_ylim(top=panel.highest)
        axis.grid(alpha=0.3)
        if len(panel.series) > 1 or panel.level is not None:
            axis.legend(fontsize=8)
    return figure
