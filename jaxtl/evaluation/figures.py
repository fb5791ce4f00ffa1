"""Figures: one style, drawn once, as SVG for a page (its colours follow the page's) and as PNG.

Every function here takes plain values and returns a `Figure`; nothing is written. Text from data (class names) is
drawn as it stands: matplotlib escapes it, and reads no mathematics in it.
"""

import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtl.evaluation.metrics import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Told apart by people who see no red or no green, and at least 3:1 against a white and a dark page.
COLOURS = ("#3f7fd0", "#d9731a", "#1f9e77", "#9a6fd0", "#c9528b", "#7d858e", "#a8861b", "#2b98b5")
TRAINED, FROZEN = COLOURS[0], "#9aa3ad"
_INK = "#1b1f24"  # in a page: its text colour
_WIDTH, _HEIGHT = 4.8, 3.3  # inches: on a telephone a figure shrinks to three quarters, and can still be read
_DOTS = 150  # an inch of a PNG
_STYLE = {
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.6,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.0,
    "grid.alpha": 0.14,
    "grid.color": _INK,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text: it can be searched, and is read aloud
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
}
_MOST_CLASSES = 20  # of a confusion matrix, whose cells hold numbers
_MOST_BARS = 30
_MOST_POINTS = 400  # of a curve; more are averaged
_CUT = 20  # characters of a name


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure, ready to be shown.

    Attributes:
        name: of its file, without suffix.
        alt: what it shows, in words, for those who do not see it.
        caption: what to know to read it.
        svg: an `<svg>` element to put into a page; text in it is escaped.
        png: the same as PNG, on white.
        size: width and height of it, in pixels.
        wide: it must not be shrunk to the width of a telephone.
    """

    name: str
    alt: str
    caption: str
    svg: str
    png: bytes
    size: tuple[int, int]
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a diagram.

    Attributes:
        style: `points`: a marker at each value; `line`; `faint`: in the background of the curve before it, in its
            colour.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"


def lines(
    name: str,
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    caption: str,
    marked: tuple[float, float, str] | None = None,
) -> Figure:
    """Draws curves over a common axis; the vertical one is logarithmic where values span more than a factor of ten.

    Args:
        name, caption: see `Figure`.
        title: above the figure.
        curves: each with at least one value.
        x_label, y_label: of the axes, with units.
        marked: a point (x, y) that is circled, and what it is.
    """
    values = np.concatenate([np.asarray(curve.y, float) for curve in curves])
    log = bool((values > 0).all() and values.max() > 10 * values.min())

    def draw(canvas: "Canvas") -> None:
        axes = canvas.add_subplot()
        colour = -1
        for curve in curves:
            x, y = _thinned(curve.x, curve.y)
            colour += curve.style != "faint"
            again, number = divmod(colour, len(COLOURS))
            look: dict[str, Any] = {"color": COLOURS[number], "linestyle": ("-", "--", ":")[again % 3]}
            look |= {"points": {"marker": "o"}, "faint": {"alpha": 0.4, "linewidth": 1.0, "zorder": 1.5}}.get(
                curve.style, {}
            )
            if len(x) == 1:
                look["marker"] = "o"
            axes.plot(x, y, label=_short(curve.label, 40), **look)
        if marked:
            axes.plot(
                *marked[:2], "o", color=_INK, fillstyle="none", markersize=10, markeredgewidth=1.1, label=marked[2]
            )
        if max(max(curve.x) for curve in curves) >= 2:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if log:
            axes.set_yscale("log")
            _plain_log_ticks(axes)
        axes.set(title=title, xlabel=x_label, ylabel=y_label + (" (log scale)" if log else ""))
        if np.all(np.mod(np.concatenate([np.asarray(curve.x, float) for curve in curves]), 1) == 0):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=columns, borderaxespad=0, handlelength=1.6)

    named = [curve for curve in curves if curve.label]
    columns = 1 if max(len(curve.label) for curve in named) > 26 else 2  # or they would not fit beside each other
    height = _HEIGHT + 0.2 * (-(-len(named) // columns) - 1)
    last = "; ".join(f"{curve.label}: {curve.y[0]:.4g} at first, {curve.y[-1]:.4g} at last" for curve in named)
    return _drawn(name, draw, f"{title}, over {x_label}. {last}.", caption, height=height)


def intervals(
    name: str,
    title: str,
    estimates: Mapping[str, tuple[float, tuple[float, float] | None]],
    *,
    x_label: str,
    caption: str,
    reported: Mapping[str, float],
) -> Figure:
    """Draws one figure of several models: a point and its interval in each row, and what was reported beside them.

    Args:
        name, title, caption: see `Figure`.
        estimates: by model, the value and its interval, None where there is none.
        x_label: of the axis.
        reported: by model, where there is such a figure.
    """
    rows = {label: row for row, label in enumerate(estimates)}

    def draw(canvas: "Canvas") -> None:
        from matplotlib.transforms import ScaledTranslation

        axes = canvas.add_subplot()
        for label, (_, interval) in estimates.items():
            if interval:
                axes.plot(interval, [rows[label]] * 2, color=COLOURS[0], linewidth=3.5, alpha=0.45)
        values = [value for value, _ in estimates.values()]
        axes.plot(values, list(rows.values()), "o", color=COLOURS[0], label="these runs")
        theirs = [(value, rows[label]) for label, value in reported.items() if label in rows]
        if theirs:
            axes.plot(*zip(*theirs, strict=True), "D", color=COLOURS[1], fillstyle="none", label="reported")
            below = axes.transAxes + ScaledTranslation(0, -0.42, canvas.dpi_scale_trans)  # inches
            axes.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, ncols=2, borderaxespad=0)
        axes.set_yticks(list(rows.values()), [_short(label, 40) for label in rows])
        axes.set(title=title, xlabel=x_label, ylim=(len(rows) - 0.4, -0.6))

    alt = "; ".join(
        f"{label}: {value:.4g}"
        + (f", interval {interval[0]:.4g} to {interval[1]:.4g}" if interval else "")
        + (f", reported {reported[label]:.4g}" if label in reported else "")
        for label, (value, interval) in estimates.items()
    )
    return _drawn(name, draw, f"{title}. {alt}.", caption, width=_WIDTH + 1.2, height=1.3 + 0.24 * len(rows))


def stages(by_stage: Mapping[str, Mapping[str, int]]) -> Figure:
    """Draws the parameters of every stage, trained and frozen, as bars.

    Args:
        by_stage: stage -> {"trained": number, "frozen": number}, in the model's order.
    """
    names = list(by_stage)
    trained, frozen = ([by_stage[name][kind] for name in names] for kind in ("trained", "frozen"))
    total = sum(trained) + sum(frozen)

    def draw(canvas: "Canvas") -> None:
        axes = canvas.add_subplot()
        rows = np.arange(len(names))
        axes.barh(rows, trained, color=TRAINED, label="trained")
        axes.barh(rows, frozen, left=trained, color=FROZEN, label="frozen")
        largest = max(map(sum, zip(trained, frozen, strict=True)))
        for row, count in enumerate(map(sum, zip(trained, frozen, strict=True))):
            axes.text(count + largest * 0.015, row, _count(count), va="center", fontsize=8)
        axes.set_yticks(rows, [_short(name) for name in names])
        axes.set(
            title="Parameters by stage", xlabel="parameters", xlim=(0, largest * 1.16), ylim=(len(names) - 0.4, -0.6)
        )
        axes.xaxis.get_major_locator().set_params(nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: _count(value))
        axes.grid(visible=False, axis="y")
        canvas.legend(loc="outside lower center", ncols=2)

    learning = [name for name, count in zip(names, trained, strict=True) if count]
    alt = (
        f"Bars of the parameters of {len(names)} stages. Trained: {sum(trained):,} of {total:,}, in "
        f"{', '.join(learning[:8])}{' and others' if len(learning) > 8 else ''}."
    )
    share = percent(sum(trained) / max(total, 1))
    caption = f"{sum(trained):,} of {total:,} parameters were trained ({share}), the others stayed as they were."
    return _drawn("parameters", draw, alt, caption, height=1.2 + 0.21 * len(names))


def confusion(matrix: np.ndarray, class_names: Sequence[str], split: str, name: str = "confusion") -> Figure:
    """Draws a confusion matrix: in each cell the number of examples, and its share of the true class.

    Of more than 20 classes, those with most errors are shown, and the others together.

    Args:
        matrix: `[true class, predicted class]` int.
        class_names: names of the classes.
        split: of the examples, for the title.
        name: see `Figure`.
    """
    correct, total = int(np.trace(matrix)), int(matrix.sum())
    caption = "Each row is a true class: how many of its examples were taken for what, and what share that is."
    if len(class_names) > _MOST_CLASSES:
        matrix, names = _worst_classes(matrix, class_names, _MOST_CLASSES - 1)
        caption += (
            f" Of {len(class_names):,} classes, the {_MOST_CLASSES - 1} with the most errors are shown, and the others "
            "as one; confusions among these are not counted as errors here."
        )
    else:
        names = list(class_names)
    size = len(names)
    rates = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    def draw(canvas: "Canvas") -> None:
        axes = canvas.add_subplot()
        cells = np.zeros((size, size, 4))
        right = np.eye(size, dtype=bool)
        cells[..., :3] = np.where(right[..., None], _rgb(COLOURS[0]), _rgb(COLOURS[1]))
        cells[..., 3] = 0.72 * np.sqrt(rates)  # the root: a few errors among many examples are seen too
        axes.imshow(cells, aspect="equal", interpolation="nearest")
        font = 9.0 if size <= 5 else 7.5 if size <= 12 else 5.8
        for row, column in np.ndindex(size, size):
            if matrix[row, column]:
                text = f"{matrix[row, column]:,}\n{_rate(rates[row, column])}"
                axes.text(column, row, text, ha="center", va="center", fontsize=font, linespacing=1.15)
        shown = [_short(name) for name in names]
        slanted = max(map(len, shown)) > (4 if size > 5 else 9)  # or they would overlap
        axes.set_xticks(range(size), shown, rotation=45 if slanted else 0, ha="right" if slanted else "center")
        axes.set_yticks(range(size), shown)
        axes.tick_params(length=0)
        axes.set(title=f"Confusion matrix, {split}", xlabel="predicted class", ylabel="true class")
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(visible=False, which="major")
        axes.grid(visible=True, which="minor")
        axes.spines[:].set_visible(False)

    side = max(3.4, 1.5 + (0.42 if size > 5 else 0.65) * size)
    alt = f"Confusion matrix: {correct:,} of {total:,} examples on the diagonal, which is right."
    return _drawn(name, draw, alt, caption, width=side + 0.5, height=side, wide=size > 8)


def reliability(found: Calibration, split: str) -> Figure:
    """Draws a reliability diagram over a histogram of the confidences."""
    centres = (found.edges[:-1] + found.edges[1:]) / 2
    width = found.edges[1] - found.edges[0]
    full = found.counts > 0

    def draw(canvas: "Canvas") -> None:
        axes, below = canvas.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.9, linestyle=(0, (4, 3)), label="perfectly calibrated")
        axes.bar(centres[full], found.accuracy[full], width * 0.92, color=COLOURS[0], alpha=0.8, label="accuracy")
        axes.set(title=f"Calibration, {split}", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left", handlelength=1.4)
        below.bar(centres, found.counts, width * 0.92, color=FROZEN)
        below.set(xlabel="confidence: probability of the predicted class", ylabel="examples")
        below.yaxis.get_major_locator().set_params(integer=True, nbins=3)

    alt = (
        f"Reliability diagram: expected calibration error {found.error:.3f} over {int(found.counts.sum()):,} examples. "
        + "; ".join(
            f"confidence {c:.2f}: accuracy {a:.2f} of {n:,}"
            for c, a, n in zip(found.confidence[full], found.accuracy[full], found.counts[full], strict=True)
        )
        + "."
    )
    caption = (
        f"Expected calibration error (ECE) {found.error:.3f}: the difference between confidence and accuracy in each "
        f"of {len(found.counts)} equally wide bins, averaged by the number of examples in them (Guo et al. 2017). Bars "
        "below the dashed line: too confident."
    )
    return _drawn("calibration", draw, alt, caption, height=_HEIGHT + 1.0)


def class_counts(counts: Mapping[str, Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Draws how many examples of each class the splits have.

    Args:
        counts: split -> numbers by class.
        class_names: names of the classes. Of more than 30, all are drawn as a line, the most frequent ahead.
    """
    many = len(class_names) > _MOST_BARS
    order = np.argsort(-np.asarray(next(iter(counts.values()))), kind="stable")

    def draw(canvas: "Canvas") -> None:
        axes = canvas.add_subplot()
        if many:
            for split, numbers in counts.items():
                axes.plot(np.arange(1, len(order) + 1), np.asarray(numbers)[order], label=split, linewidth=1.2)
            axes.set(xlabel="class, the most frequent in training first", ylabel="examples")
            axes.set_ylim(bottom=0)
        else:
            rows, height = np.arange(len(class_names)), 0.8 / len(counts)
            for index, (split, numbers) in enumerate(counts.items()):
                axes.barh(rows + (index - (len(counts) - 1) / 2) * height, numbers, height * 0.94, label=split)
            axes.set_yticks(rows, [_short(name) for name in class_names])
            axes.set(xlabel="examples", ylim=(len(class_names) - 0.4, -0.6))
            axes.grid(visible=False, axis="y")
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title("Examples by class")
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.3, handlelength=1.0, columnspacing=1.0
        )

    parts = []
    for split, numbers in counts.items():
        least, most = int(np.argmin(numbers)), int(np.argmax(numbers))
        spread = f"{numbers[least]:,} of {class_names[least]} to {numbers[most]:,} of {class_names[most]}"
        same = f"{numbers[most]:,} of each class"
        parts.append(f"{split}: {sum(numbers):,} examples, {same if numbers[least] == numbers[most] else spread}")
    chance = max(numbers) / max(sum(numbers), 1)
    parts.append(f"answering {class_names[most]} always would be right for {percent(chance)} of the {split} examples")
    height = _HEIGHT if many else 1.1 + len(class_names) * max(0.24, 0.14 * len(counts))
    caption = "; ".join(parts) + "."
    return _drawn("classes", draw, f"Examples by class. {caption}", caption[0].upper() + caption[1:], height=height)


# --- drawing -----------------------------------------------------------------------------------------------


def _drawn(
    name: str,
    draw: Callable[["Canvas"], None],
    alt: str,
    caption: str,
    *,
    width: float = _WIDTH,
    height: float = _HEIGHT,
    wide: bool = False,
) -> Figure:
    """Returns what `draw` puts on an empty canvas."""
    import matplotlib  # takes half a second, and no other module needs it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Of characters that the font lacks, such as emoji, for which the PNG has a box; the page shows them.
        warnings.simplefilter("ignore", UserWarning)
        canvas = Canvas(figsize=(width, height))
        FigureCanvasAgg(canvas)
        draw(canvas)
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(png, format="png", dpi=_DOTS, facecolor="white", metadata={"Software": None})
        canvas.set_layout_engine("none")  # what it found stays
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    size = int(width * _DOTS), int(height * _DOTS)
    return Figure(name, alt, caption, _for_page(svg.getvalue(), width), png.getvalue(), size, wide)


def _for_page(svg: str, width: float) -> str:
    """Returns matplotlib's SVG document as an element of an HTML page, whose font and text colour it takes."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg).group()
    svg = (
        f'<svg {view} style="width: {width * 72 * 4 / 3:.0f}px" aria-hidden="true" focusable="false">'
        + svg[svg.index(">") + 1 :]
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return svg.replace(_INK, "currentColor").strip()


def _plain_log_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns a curve of at most so many points, each the mean of neighbours."""
    found = np.array([x, y], float)
    if found.shape[1] <= _MOST_POINTS:
        return found[0], found[1]
    parts = np.array_split(found, _MOST_POINTS, axis=1)
    means = np.array([part.mean(axis=1) for part in parts])
    return means[:, 0], means[:, 1]


def _worst_classes(matrix: np.ndarray, class_names: Sequence[str], count: int) -> tuple[np.ndarray, list[str]]:
    """Returns the matrix of the classes with most errors, in their order, with all others as the last one."""
    errors = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diagonal(matrix)
    worst = np.sort(np.argsort(-errors, kind="stable")[:count])
    place = np.full(len(class_names), count)
    place[worst] = np.arange(count)
    folded = np.zeros((count + 1, count + 1), matrix.dtype)
    np.add.at(folded, (place[:, None], place[None, :]), matrix)
    return folded, [*(class_names[index] for index in worst), f"{len(class_names) - count:,} others"]


def _short(name: str, most: int = _CUT) -> str:
    name = " ".join(name.split())
    return name if len(name) <= most else name[: most - 1] + "…"


def _count(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def percent(share: float) -> str:
    """Returns a share with as many digits as tell it from none and from all: `49.7%`, `0.0017%`, `99.995%`."""
    if share in (0, 1) or 0.001 <= share <= 0.999:
        return f"{share:.1%}"
    return f"{share * 100:.2g}%" if share < 0.5 else f"{share:.3%}"


def _rate(share: float) -> str:
    return f"{share:.0%}" if 0.01 <= share <= 0.99 or share in (0, 1) else f"{share:.1%}"


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
