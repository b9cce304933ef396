"""Draws the figures of docs/kernels.md: ``python tools/figures.py`` writes docs/figures/*.svg, the same every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"

INK, LINE = "#222222", "#666666"
COLD, PALE, WARM, HOT = "#ffffff", "#dbe9f6", "#9ec5e8", "#2f78b7"  # not touched, at rest, in cache, in use
ACCENT = "#e07b39"


def box(
    axes: Axes, x: float, y: float, width: float, height: float, color: str = COLD, text: str = "", size: float = 9
) -> None:
    """A rectangle with its text in the middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=LINE, linewidth=0.8))
    ink = COLD if color == HOT else INK
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=ink)


def grid(axes: Axes, x: float, y: float, rows: int, columns: int, color: Callable[[int, int], str]) -> None:
    """Unit squares; row 0 is the uppermost."""
    for row in range(rows):
        for column in range(columns):
            box(axes, x + column, y + rows - 1 - row, 1, 1, color(row, column))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.2})


def text(axes: Axes, x: float, y: float, words: str, size: float = 9, align: str = "center") -> None:
    axes.text(x, y, words, ha=align, va="center", fontsize=size, color=INK)


def product(axes: Axes) -> None:
    """The register block of the micro-kernel with AVX-512: six rows of A times a panel of B of four vectors."""
    grid(axes, 0, 0, 6, 3, lambda row, column: ACCENT if column == 1 else PALE)
    for vector in range(4):
        for row in range(3):
            box(axes, 5 + 3 * vector, 9 - row, 3, 1, ACCENT if row == 1 else PALE, "vector", 7)
        for row in range(6):
            box(axes, 5 + 3 * vector, 5 - row, 3, 1, WARM)
    text(axes, 1.5, 7.2, "6 rows of A,\neach a pointer")
    text(axes, 11, 10.9, "a panel of B, packed once")
    text(axes, 11, -0.9, "24 vectors of sums, in registers for the whole depth")
    text(
        axes,
        17.6,
        8.5,
        "a step along the depth loads\n4 vectors, broadcasts an element\nof each of 6 rows, and does\n24 multiply-adds",
        align="left",
    )
    arrow(axes, (4.5, 10), (4.5, 7))


def taps(axes: Axes) -> None:
    """A convolution as a sum over shifts of one window."""
    grid(axes, 0, 0, 6, 8, lambda row, column: WARM if row < 4 and column < 6 else PALE)
    for index, (row, column) in enumerate([(0, 0), (1, 1), (2, 2)]):
        left, top = 13 + 10.5 * index, 5
        grid(
            axes,
            left,
            top - 5,
            6,
            8,
            lambda r, c, row=row, column=column: (
                HOT if (r, c) == (row + 1, column + 2) else WARM if 0 <= r - row < 4 and 0 <= c - column < 6 else PALE
            ),
        )
        text(axes, left + 4, -1, f"tap ({row}, {column}): W{row}{column}")
        text(axes, left - 1.2, 3, "+" if index else "=", 14)
    text(axes, 4, -1.5, "window of 4 x 6 outputs,\nC channels deep")
    text(
        axes,
        22,
        7.2,
        "each tap reads the same window from another place: pointers to rows move by one offset, nothing is copied",
    )


def winograd(axes: Axes) -> None:
    """The tile of 2 x 4 outputs and what it costs."""
    grid(axes, 0, 0, 4, 6, lambda row, column: WARM if 1 <= row <= 2 and 1 <= column <= 4 else PALE)
    text(axes, 3, -1, "window of 4 x 6 inputs, 2 x 4 outputs")
    arrow(axes, (6.4, 2), (9.4, 2))
    text(axes, 7.9, 3, "transform")
    grid(axes, 9.8, 0, 4, 6, lambda row, column: HOT)
    text(axes, 12.8, -1, "24 points, one product\nover channels at each")
    arrow(axes, (16.2, 2), (19.2, 2))
    text(axes, 17.7, 3, "transform\nback")
    grid(axes, 19.6, 1, 2, 4, lambda row, column: WARM)
    text(axes, 21.6, -1, "8 outputs: 24 multiplications a pair\nof channels in place of 8 x 9 = 72")


def batch_norm(axes: Axes) -> None:
    """Chunks of a channel, their statistics, and how they are merged."""
    for chunk in range(6):
        box(axes, 4 * chunk, 6, 3.6, 1.4, PALE, f"chunk {chunk + 1}")
        arrow(axes, (4 * chunk + 1.8, 5.9), (4 * chunk + 1.8, 4.7))
        box(axes, 4 * chunk, 3.2, 3.6, 1.4, WARM, "mean, sum of\nsquares about it", 6.5)
        arrow(axes, (4 * chunk + 1.8, 3.1), (11.8 + 0.5 * (chunk - 2.5), 1.6))
    box(axes, 7.8, 0, 8, 1.5, HOT, "merged in double, in order")
    text(axes, 11.8, 8.2, "elements of one channel: the same chunks in both layouts and for any number of threads")


def lstm(axes: Axes) -> None:
    """A team of threads over the steps."""
    for step in range(3):
        left = 9 * step
        for member in range(4):
            box(axes, left, 6 - 2 * member, 5, 1.6, WARM if member else HOT, f"units of thread {member + 1}")
            arrow(axes, (left + 5.1, 6.8 - 2 * member), (left + 6.4, 6.8 - 2 * member))
        box(axes, left + 6.5, 0, 1, 7.6, ACCENT)
        axes.text(left + 7, 3.8, "all meet: h is complete", rotation=90, ha="center", va="center", fontsize=8)
        arrow(axes, (left + 7.6, 3.8), (left + 8.9, 3.8))
        text(axes, left + 2.5, 8.4, f"step {step + 1}")
    text(
        axes,
        12.5,
        -1,
        "a thread keeps the weights of its units, all four gates, in its second-level cache for every step",
    )


def linear_cross_entropy(axes: Axes) -> None:
    """The logits that exist, beside those that never do."""
    grid(axes, 0, 0, 5, 12, lambda row, column: HOT if row == 2 and column == 4 else COLD)
    grid(axes, 0, 6, 2, 12, lambda row, column: WARM if column == 4 else PALE)
    grid(axes, -3, 0, 5, 2, lambda row, column: WARM if row == 2 else PALE)
    text(axes, 6, 8.6, "weight W: classes")
    text(axes, -2, 5.6, "rows h")
    text(axes, 0, -0.9, "logits, rows x classes: one tile exists at a time", align="left")
    for row in range(5):
        box(axes, 13, 4 - row, 4.5, 1, WARM if row == 2 else PALE, "maximum, sum" if row == 2 else "")
    text(axes, 15.2, 5.6, "all that is kept of a row")
    arrow(axes, (12.1, 2.5), (12.9, 2.5))


def attention(axes: Axes) -> None:
    """Blocks of scores, and what is carried from one to the next."""

    def color(row: int, column: int) -> str:
        if column > row:
            return COLD
        return HOT if (row, column) == (3, 2) else WARM if row == 3 and column < 2 else PALE

    grid(axes, 0, 0, 6, 6, color)
    for row in range(6):
        for column in range(row + 1, 6):
            text(axes, column + 0.5, 5.5 - row, "·", 10)
    text(axes, 3, 6.8, "keys, in blocks")
    axes.text(-0.6, 3, "queries, in blocks", rotation=90, ha="center", va="center", fontsize=9)
    text(axes, 3, -0.9, "under a causal mask the blocks\nwith a point are never read")
    arrow(axes, (6.3, 2.5), (8.3, 2.5))
    box(axes, 8.5, 4.2, 8.5, 1.2, HOT, "scores of one block, in cache")
    box(axes, 8.5, 2.6, 8.5, 1.2, WARM, "row maximum m, sum l")
    box(axes, 8.5, 1.0, 8.5, 1.2, WARM, "output so far")
    text(
        axes,
        17.4,
        3.2,
        "a larger maximum m' multiplies\nl and the output by exp(m - m'),\nthen the block adds its share",
        align="left",
    )


def split(axes: Axes) -> None:
    """A float32 as three bfloat16, and the products that are kept."""
    for index, name in enumerate(("high", "middle", "low")):
        box(axes, 3 * index, 5, 3, 1.2, (HOT, WARM, PALE)[index], f"{name}: 8 bits")
    text(axes, 4.5, 7.1, "24 bits of significand of a float32")
    names = "hml"
    for row in range(3):
        for column in range(3):
            kept = row + column <= 2
            color = (HOT, WARM, PALE)[row + column] if kept else COLD
            box(axes, 12 + 1.6 * column, 4.6 - 1.6 * row, 1.6, 1.6, color, names[row] + names[column] if kept else "")
    text(axes, 14.4, 7.1, "a product: six of nine terms are kept")


FIGURES: dict[Callable[[Axes], None], tuple[float, float]] = {  # drawing: width and height in inches
    product: (7.2, 4.4),
    taps: (9, 2.6),
    winograd: (8, 2.4),
    batch_norm: (8, 3),
    lstm: (8.4, 3),
    linear_cross_entropy: (7.2, 3.2),
    attention: (8, 3.2),
    split: (7, 2.9),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    pyplot.rcParams.update({"svg.hashsalt": "dlkernels", "svg.fonttype": "path", "font.family": "DejaVu Sans"})
    for draw, size in FIGURES.items():
        figure, axes = pyplot.subplots(figsize=size)
        draw(axes)
        axes.set_aspect("equal")
        axes.autoscale_view()
        axes.axis("off")
        figure.savefig(FOLDER / f"{draw.__name__}.svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
