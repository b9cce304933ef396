"""What a run found: a table for the terminal, a markdown report, a JSON file, a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .. import typed_json
from ..writing import output, write_text
from .harness import BACKWARD, BOTH, DIRECTIONS, FORWARD, OURS, TORCH, Ceilings, Result, geometric_mean

if TYPE_CHECKING:
    from .runner import Run

EXPLANATION = """\
A ratio is the peer's median time over ours, samples taken in turns in one process; above 1 is faster than the peer.
Each class shows the geometric mean over its shapes and the worst of them against torch. The share of the ceiling is the
least time that the bytes or the operations need at the rates above, over our time; over 100 % the data were in cache.
The spread is the interquartile range of the samples over their median.
Page faults are per call: where torch has them and we have not, part of the ratio is the allocator's, and the ratio to
`torch, huge pages` shows what is left without it."""
PLOT_FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Class:
    """The results of one class in one type and direction, summed up."""

    column: str
    label: str
    direction: str
    shapes: int
    ratio: dict[str, float]  # geometric mean over the shapes, by peer
    worst: float  # the smallest ratio against torch
    share_of_ceiling: float  # median over the shapes
    spread: dict[str, float]  # interquartile range over the median: the median over the shapes, by contender
    page_faults: dict[str, float]  # median over the shapes, by contender


def classes(results: Iterable[Result]) -> list[Class]:
    """The results grouped by class, type and direction, in the order in which they came. Wrong ones do not count."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        if result.ratio:
            groups.setdefault((result.column, f"{result.group}, {result.dtype}", result.direction), []).append(result)
    summed = []
    for (column, label, direction), members in groups.items():
        peers = [peer for peer in members[0].ratio if all(peer in member.ratio for member in members)]
        summed.append(
            Class(
                column=column,
                label=label,
                direction=direction,
                shapes=len(members),
                ratio={peer: geometric_mean(member.ratio[peer] for member in members) for peer in peers},
                worst=min(member.ratio[TORCH] for member in members),
                share_of_ceiling=statistics.median(member.share_of_ceiling or 0.0 for member in members),
                spread={
                    name: statistics.median(member.spread[name] for member in members)
                    for name in (OURS, TORCH)
                    if all(name in member.spread for member in members)
                },
                page_faults={
                    name: statistics.median(member.page_faults[name] for member in members) for name in (OURS, TORCH)
                },
            )
        )
    return summed


@dataclass(frozen=True, kw_only=True)
class Written:
    """What :func:`as_json` gives, but for the classes, which follow from the results."""

    environment: dict[str, Any]
    ceilings: Ceilings
    quick: bool
    seconds: float
    results: list[Result]

    def as_run(self) -> Run:
        """The run it is of."""
        from .runner import Run

        return Run(self.environment, self.ceilings, self.quick, self.results, self.seconds)


def as_json(run: Run) -> dict[str, Any]:
    """Everything, in values that JSON can hold."""
    return {
        "environment": run.environment,
        "ceilings": asdict(run.ceilings),
        "quick": run.quick,
        "seconds": run.seconds,
        "classes": [asdict(entry) for entry in classes(run.results)],
        "results": [asdict(result) for result in run.results],
    }


def write_json(run: Run, path: Path) -> None:
    """Every figure of the run."""
    write_text(path, json.dumps(as_json(run), indent=1) + "\n")


def read_json(path: Path) -> Run:
    """A run as :func:`write_json` wrote it.

    Raises:
        ValueError: the file holds something else; the message names the entry.
    """
    try:
        facts = typed_json.checked(typed_json.parse(path.read_bytes()), dict, "the file")
        known = {key: value for key, value in facts.items() if key != "classes"}
        run = typed_json.as_dataclass(Written, known, "the file", complete=False)
        if not circumstances(run.environment).isprintable():  # all that a report names must be there
            raise ValueError("environment must be printable")
        for number, result in enumerate(run.results):
            check_result(result, f"results[{number}]")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no benchmark run: {type(error).__name__}: {error}") from None
    return run.as_run()


def check_result(result: Result, name: str) -> None:
    """Checks that times can be compared.

    Raises:
        ValueError: one is missing or none that can be measured; the message names it.
    """
    for field in ("median", "minimum", "ratio", "spread", "page_faults"):
        for contender, value in getattr(result, field).items():
            if not 0 <= value < math.inf or (value == 0 and field in ("median", "minimum", "ratio")):
                raise ValueError(f"{name}.{field}.{contender} must be positive and finite, got {value}")
    if result.same and not (TORCH in result.ratio and OURS in result.median):
        raise ValueError(f"{name} has no ratio of {TORCH} or no median of {OURS}")


def merged(runs: Sequence[Run]) -> Run:
    """One run of several on the same machine: all results, and the best that the machine did in any of them."""
    rates: dict[str, float] = {}
    for run in runs:
        for name, rate in run.ceilings.arithmetic_rate.items():
            rates[name] = max(rate, rates.get(name, 0.0))
    ceilings = Ceilings(max(run.ceilings.copy_bytes_per_second for run in runs), rates)
    results = [result for run in runs for result in run.results]
    return replace(
        runs[-1],
        ceilings=ceilings,
        quick=any(run.quick for run in runs),
        results=results,
        seconds=sum(run.seconds for run in runs),
    )


def directions(run: Run) -> list[str]:
    """Those that the run has measured, in their order."""
    found = {result.direction for result in run.results if result.ratio}
    return [direction for direction in DIRECTIONS if direction in found]


def percent(share: float | None) -> str:
    """A spread; nothing where the run recorded none."""
    return "" if share is None else f"{share:.0%}"


def summary_table(run: Run) -> Table:
    """The classes' ratios: torch's time over ours, so that above one is faster than torch."""
    rate = ", ".join(f"{value / 1e9:,.0f} Gop/s {name}" for name, value in run.ceilings.arithmetic_rate.items())
    table = Table(
        title="Time of the peer over ours, geometric mean over the shapes of each class",
        caption=f"ceilings: copy {run.ceilings.copy_bytes_per_second / 1e9:.1f} GB/s, multiply-add {rate}",
        title_justify="left",
        caption_justify="left",
    )
    summed = {(entry.label, entry.direction): entry for entry in classes(run.results)}
    peers = list(dict.fromkeys(peer for entry in summed.values() for peer in entry.ratio))
    table.add_column("class", no_wrap=True)
    measured = directions(run)
    modes = " / ".join("both" if direction == BOTH else direction for direction in measured)
    for peer in peers:
        table.add_column(f"{peer}\n{modes}", justify="right")
    table.add_column("worst\nshape", justify="right")
    table.add_column("spread,\nours", justify="right")
    table.add_column("of the\nceiling", justify="right")
    for label in dict.fromkeys(label for label, _ in summed):
        entries = [summed[label, direction] for direction in measured if (label, direction) in summed]
        ratios = [" / ".join(f"{entry.ratio[peer]:.2f}x" for entry in entries if peer in entry.ratio) for peer in peers]
        shares = " / ".join(f"{entry.share_of_ceiling:.0%}" for entry in entries)
        spreads = " / ".join(percent(entry.spread.get(OURS)) for entry in entries)
        table.add_row(label, *ratios, f"{min(entry.worst for entry in entries):.2f}x", spreads, shares)
    return table


def markdown_table(headings: list[str], rows: Iterable[list[str]], left: int = 1) -> list[str]:
    """The first ``left`` columns to the left, figures to the right."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * left + "---:|" * (len(headings) - left)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def class_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of classes, a row for each class and type."""
    summed = {(entry.label, entry.direction): entry for entry in classes(run.results)}
    labels = list(dict.fromkeys(label for label, _ in summed))
    peers = list(dict.fromkeys(peer for entry in summed.values() for peer in entry.ratio))
    headings = ["class", "shapes"]
    measured = directions(run)
    for direction in measured:
        headings += [f"{direction}: {peer}" for peer in peers] + ["worst", "of ceiling", "page faults, ours / torch"]
    rows = []
    for label in labels:
        row = [label, str(max(summed[label, d].shapes for d in measured if (label, d) in summed))]
        for direction in measured:
            entry = summed.get((label, direction))
            if entry is None:
                row += [""] * (len(peers) + 3)
                continue
            row += [f"{entry.ratio[peer]:.2f}" if peer in entry.ratio else "" for peer in peers]
            row += [f"{entry.worst:.2f}", f"{entry.share_of_ceiling:.0%}"]
            row += [f"{entry.page_faults[OURS]:,.0f} / {entry.page_faults[TORCH]:,.0f}"]
        rows.append(row)
    return headings, rows


def machine(facts: dict[str, Any]) -> str:
    """What was measured on, from :func:`dlkernels.info.environment`."""
    if "gpu" in facts:
        return (
            f"{facts['gpu']} ({facts['multiprocessors']} multiprocessors, {facts['memory_bytes'] / 2**30:.0f} GiB), "
            f"CUDA {facts['cuda']}, cuDNN {facts['cudnn']}"
        )
    return f"{facts['processor']} ({facts['isa']}), {facts['threads']} threads of {facts['cores']} cores"


def circumstances(facts: dict[str, Any]) -> str:
    """What was measured, and on what."""
    return f"dlkernels {facts['dlkernels']}, PyTorch {facts['torch']}, Python {facts['python']}, {machine(facts)}."


def write_report(run: Run, path: Path) -> None:
    """The report at ``path`` (markdown), with every figure in a JSON file of the same name beside it."""
    rates = ", ".join(f"{value / 1e9:,.0f} Gop/s {name}" for name, value in run.ceilings.arithmetic_rate.items())
    lines = [
        "# dlkernels against PyTorch",
        "",
        circumstances(run.environment),
        f"Ceilings measured in this run: copy {run.ceilings.copy_bytes_per_second / 1e9:.1f} GB/s; "
        f"multiply-adds {rates}.",
        "",
        EXPLANATION,
        "",
        "## Classes",
        "",
        *markdown_table(*class_rows(run)),
        "",
        "## Shapes",
    ]
    if run.wrong:
        lines[-2:-2] = ["", "**Results that differ from PyTorch's, not timed:** " + "; ".join(run.wrong)]
    for column in dict.fromkeys(result.column for result in run.results):
        lines += ["", f"### {column}", ""]
        headings = [
            "shape",
            "type",
            "direction",
            "ours ms",
            "torch ms",
            "ratio",
            "minima",
            "spread, ours / torch",
            "GB/s",
            "Gop/s",
            "of ceiling",
        ]
        rows = []
        for result in run.results:
            if result.column != column or not result.ratio:
                continue
            ours = result.median[OURS]
            rows.append(
                [
                    f"{result.group}: {result.name}",
                    result.dtype,
                    result.direction,
                    milliseconds(ours),
                    milliseconds(result.median[TORCH]),
                    f"{result.ratio[TORCH]:.2f}",
                    f"{result.minimum[TORCH] / result.minimum[OURS]:.2f}",
                    " / ".join(percent(result.spread.get(name)) for name in (OURS, TORCH)),
                    f"{result.bytes / ours / 1e9:.1f}",
                    f"{result.operations / ours / 1e9:.0f}",
                    f"{result.share_of_ceiling:.0%}",
                ]
            )
        lines += markdown_table(headings, rows)
    write_text(path, "\n".join(lines) + "\n")
    write_json(run, path.with_suffix(".json"))


def write_plot(run: Run, path: Path) -> None:
    """A bar for each class and direction, on a logarithmic axis on which twice as fast mirrors half as fast.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summed = classes(run.results)
    labels = list(dict.fromkeys(entry.label for entry in summed))
    place = {label: index for index, label in enumerate(reversed(labels))}
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.34 * max(1, len(labels))), layout="constrained")
    colours = {FORWARD: "#2a6f97", BACKWARD: "#61a5c2", BOTH: "#f4a259"}
    measured = directions(run)
    thickness = 0.8 / max(1, len(measured))
    for index, direction in enumerate(measured):
        offset = 0.4 - (index + 0.5) * thickness
        members = [entry for entry in summed if entry.direction == direction]
        heights = [place[entry.label] + offset for entry in members]
        values = [entry.ratio[TORCH] for entry in members]
        # Bars start at one: the side shows who is faster, the length by how much.
        bars = {"height": 0.95 * thickness, "color": colours[direction], "label": direction, "zorder": 2}
        axes.barh(heights, [value - 1 for value in values], left=1, **bars)
        for height, value in zip(heights, values, strict=True):
            side = 4 if value >= 1 else -4
            axes.annotate(
                f"{value:.2f}x" if value < 10 else f"{value:.0f}x",
                (value, height),
                xytext=(side, 0),
                textcoords="offset points",
                va="center",
                ha="left" if value >= 1 else "right",
                fontsize=7.5,
                color="#444444",
            )
    smallest = min((entry.ratio[TORCH] for entry in summed), default=1.0)
    largest = max((entry.ratio[TORCH] for entry in summed), default=1.0)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.5, smallest / 1.35), max(2.0, largest * 1.35))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_yticks(list(place.values()), list(place), fontsize=9)
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.axvline(1, color="#222222", linewidth=1.2, zorder=3)
    axes.grid(axis="x", color="#e3e3e3", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_xlabel("PyTorch's time over ours (right of the line: dlkernels is faster)")
    facts = run.environment
    figure.suptitle(
        f"dlkernels {facts['dlkernels']} and PyTorch {facts['torch']}\n"
        f"{machine(facts)}; geometric mean over each class's shapes",
        fontsize=10,
        x=0.01,
        horizontalalignment="left",
    )
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    with output(path) as file:
        figure.savefig(file, dpi=160, format=path.suffix[1:])
    pyplot.close(figure)
