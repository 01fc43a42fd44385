"""Pictures of a training: curves and heat maps, drawn with matplotlib and without its global state of figures.

A figure is drawn once and given out twice: as PNG, and as an SVG whose colours are CSS variables and whose letters
are text, so that a page can show it in light and dark. The same numbers give the same bytes. This module knows
nothing of models.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, float]]

NAMES = {
    "loss": "Loss",
    "reconstruction": "Reconstruction",
    "alignment": "Alignment",
    "repeat": "Repeated texts",
    "margin": "Margin",
    "contrastive": "Contrastive",
    "learning_rate": "Learning rate",
    "validation_cosine": "Cosine to the teacher",
    "validation_recall_at_1": "Recall@1",
    "validation_reconstruction": "Reconstruction, held out",
    "before": "Before",
    "after": "After",
    "teacher": "Teacher",
}
"""What people read for the keys of a history and of the similarities."""

TERMS = ("loss", "reconstruction", "alignment", "repeat", "margin", "contrastive")
"""Keys of the loss and of what it is the sum of."""

COLOURS = {
    "ink": ("#1b2230", "#e9edf3"),
    "muted": ("#586273", "#a3aebd"),
    "grid": ("#e3e7ed", "#2b333f"),
    "blue": ("#0072b2", "#5cb8f0"),
    "orange": ("#b54800", "#ff9b54"),
    "green": ("#00805c", "#3ecf9f"),
    "purple": ("#a3478a", "#e59ccb"),
    "brown": ("#7a6200", "#e0c64b"),
}
"""By name: in light and in dark."""

COLOUR_MAP = "viridis"

_LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "echo-integrations",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": _LIGHT["ink"],
    "axes.labelcolor": _LIGHT["muted"],
    "axes.edgecolor": _LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LIGHT["grid"],
    "text.color": _LIGHT["ink"],
    "xtick.color": _LIGHT["muted"],
    "ytick.color": _LIGHT["muted"],
    "ytick.minor.size": 0,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_TINTS = {
    "loss": "blue",
    "reconstruction": "orange",
    "alignment": "green",
    "repeat": "ink",
    "margin": "purple",
    "contrastive": "brown",
}
_NO_METADATA: Any = {"Software": None}
_NO_SVG_METADATA: Any = {"Creator": None, "Date": None, "Format": None, "Type": None}
_BINS = 300  # of a faint raw line, each drawn by its lowest and highest value
_FEW = 30  # points that are marked one by one


@contextmanager
def style() -> Iterator[None]:
    """Draw and save within this: the pictures do not depend on the user's matplotlib settings, which come back.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the report needs matplotlib:\npip install "echo-integrations[train]"') from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams  # whose names and types differ between versions
        settings.update(_STYLE)
        yield


def series(history: History, key: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The steps and finite values of one key, in order of the steps; of values of one step the last.

    Example:
        >>> series([{"step": 2, "loss": 1.5}, {"step": 1, "loss": 3.0}, {"step": 3, "loss": float("nan")}], "loss")
        (array([1, 2]), array([3. , 1.5]))
    """
    found = {int(row["step"]): float(row[key]) for row in history if row.get(key) is not None}
    steps = sorted(step for step, value in found.items() if math.isfinite(value))
    return np.array(steps, dtype=np.int64), np.array([found[step] for step in steps], dtype=np.float64)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) means of the at most n / 40 values before and after each.

    At the start as few after as before, so that nothing lags where a curve falls steeply.

    Example:
        >>> smooth(np.arange(100.0) % 2)[[0, 1, 50, 99]].round(2)
        array([0.  , 0.33, 0.4 , 0.67])
    """
    count = len(values)
    place = np.arange(count)
    before = np.minimum(count // 40, place)
    after = np.minimum(before, count - 1 - place)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray((sums[place + after + 1] - sums[place - before]) / (before + after + 1))


def extremes(values: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """Places of the lowest and highest value of each of ``bins`` stretches: all of them where there are few.

    Example:
        >>> extremes(np.array([0.0, 5.0, 1.0, 2.0, 9.0, 3.0]), bins=1)
        array([0, 4])
    """
    if len(values) <= 2 * bins:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), bins)
    return np.unique([pick(values[part]) + part[0] for part in stretches for pick in (np.argmin, np.argmax)])


def validation_keys(history: History) -> list[str]:
    """Keys of what was measured on held-out queries and has a finite value, in order of appearance."""
    keys = dict.fromkeys(key for row in history for key in row if key.startswith("validation_"))
    return [key for key in keys if len(series(history, key)[0])]


def name(key: str) -> str:
    """What people read for a key.

    Example:
        >>> name("validation_recall_at_1"), name("validation_mean_rank")
        ('Recall@1', 'Mean rank')
    """
    text = NAMES.get(key) or key.removeprefix("validation_").replace("_", " ").capitalize()
    return text.encode(errors="replace").decode()


def value(key: str, amount: float) -> str:
    """A value as people read it, by its key.

    Example:
        >>> value("validation_recall_at_1", 0.125), value("validation_cosine", -0.0001), value("loss", 2.5)
        ('12.5%', '0.000', '2.50')
    """
    if not math.isfinite(amount):
        return "–"
    if "recall" in key:
        return f"{amount:.1%}"
    return cosine(amount) if "cosine" in key else number(amount, zeros=True)


def best(key: str, values: NDArray[np.float64]) -> int:
    """Place of the best value: the lowest of losses, the highest of everything else."""
    lower = any(term in key for term in TERMS)
    return int(np.argmin(values) if lower else np.argmax(values))


def loss_figure(history: History) -> Figure | None:
    """A panel for the loss and for each of its terms, smoothed over faint raw lines, and the learning rate below.

    None without a finite loss. A panel's scale is logarithmic where it spans more than a factor of 20.
    """
    curves = {term: points for term in TERMS if len((points := series(history, term))[0])}
    if not curves:
        return None
    rate, rates = series(history, "learning_rate")
    ratios = [1.0] * len(curves) + [0.45] * bool(len(rate))
    figure, axes = _panels(ratios, height=0.6 + 1.3 * sum(ratios))
    for axis, (term, (steps, values)) in zip(axes, curves.items(), strict=False):
        colour = _LIGHT[_TINTS[term]]
        if len(values) > _FEW:
            places = extremes(values, _BINS)
            axis.plot(steps[places], values[places], color=colour, alpha=0.3, linewidth=0.7)
        axis.plot(steps, smooth(values), color=colour, **_markers(values))
        axis.set_title(name(term))
        if values.min() > 0 and values.max() / values.min() > 20:
            _log_scale(axis, decades=math.log10(values.max() / values.min()))
    if len(rate):
        axes[-1].plot(rate, rates, color=_LIGHT["muted"], linewidth=1.3, **(_markers(rates) if len(rates) == 1 else {}))
        axes[-1].set_title(name("learning_rate"))
        highest = float(rates.max()) or 1.0
        axes[-1].set_ylim(0, 1.2 * highest)
        axes[-1].set_yticks([0, highest], ["0", number(highest)])
    return figure


def validation_figure(history: History) -> Figure | None:
    """A panel for each thing measured on held-out queries, its best value written beside it; None without any."""
    keys = validation_keys(history)
    if not keys:
        return None
    figure, axes = _panels([1.0] * len(keys), height=0.5 + 2.1 * len(keys))
    for axis, key, tint in zip(axes, keys, list(_TINTS.values()) * len(keys), strict=False):
        steps, values = series(history, key)
        colour, place = _LIGHT[tint], best(key, values)
        axis.plot(steps, values, color=colour, **_markers(values))
        axis.plot(steps[place], values[place], "o", color=colour, markersize=7.5, markerfacecolor="none")
        said = f"best {value(key, values[place])} at step {steps[place]:,}"
        axis.set_title(said, loc="right", fontsize=8.5, color=_LIGHT["muted"])
        axis.set_title(name(key))
        axis.margins(y=0.1)
        if "recall" in key:
            axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return figure


def similarity_figure(similarities: Mapping[str, NDArray[np.float32]], cells: int) -> Figure:
    """Heat maps with one scale of colours, side by side, and below each the means on and off its diagonal.

    The first ``cells`` rows and columns are shown; the means are of all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 + 2.4 * len(similarities), 2.9), layout="constrained")
    axes = figure.subplots(1, len(similarities), squeeze=False)[0]
    low, high = bounds(matrix[:cells, :cells] for matrix in similarities.values())
    for axis, (key, matrix) in zip(axes, similarities.items(), strict=True):
        image = axis.imshow(matrix[:cells, :cells], cmap=COLOUR_MAP, vmin=low, vmax=high, interpolation="nearest")
        agreement = Agreement.of(matrix)
        axis.set_title(name(key))
        axis.set_xlabel(f"own {cosine(agreement.own)}, others {cosine(agreement.others)}", fontsize=8.5)
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("held-out queries")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, aspect=25)
    bar.outline.set_visible(False)
    bar.ax.set_title("cosine", fontsize=8.5, color=_LIGHT["muted"], loc="center")
    return figure


@dataclass(frozen=True)
class Agreement:
    """What a matrix of cosines, queries x responses, says: ``own`` and ``others`` are means on and off its diagonal.

    ``first`` is the share of queries that no other response is as near to as their own. NaN where there is nothing.

    Example:
        >>> Agreement.of(np.array([[0.9, 0.1], [0.6, 0.5]], dtype=np.float32)).first
        0.5
    """

    own: float
    others: float
    first: float

    @staticmethod
    def of(matrix: NDArray[np.float32]) -> Agreement:
        """Of an (n, n) matrix."""
        exact = matrix.astype(np.float64)
        own = np.diagonal(exact)
        others = exact[~np.eye(len(exact), dtype=bool)].reshape(len(exact), -1)
        if not len(exact) or not others.size:
            return Agreement(float(own.mean()) if len(own) else math.nan, math.nan, math.nan)
        return Agreement(float(own.mean()), float(others.mean()), float((own > others.max(axis=1)).mean()))


def bounds(matrices: Iterable[NDArray[np.float32]]) -> tuple[float, float]:
    """The lowest and highest finite value of all, 0 and 1 without any."""
    finite = [matrix[np.isfinite(matrix)] for matrix in matrices]
    values = np.concatenate([np.ravel(part) for part in finite])
    return (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)


def heat_map(matrix: NDArray[np.float32], low: float, high: float) -> bytes:
    """A PNG of one pixel per cell, coloured from ``low`` to ``high``, transparent where a cell is not finite."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    share = (matrix.astype(np.float64) - low) / ((high - low) or 1.0)
    file = io.BytesIO()
    imsave(file, colormaps[COLOUR_MAP](np.ma.masked_invalid(share)), format="png", metadata=_NO_METADATA)
    return file.getvalue()


def colour_stops() -> list[str]:
    """Colours from low to high, for a scale beside `heat_map`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[COLOUR_MAP](share)) for share in np.linspace(0, 1, 9)]


def png(figure: Figure) -> bytes:
    """The figure as PNG on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, facecolor="white", metadata=_NO_METADATA)
    return file.getvalue()


def svg(figure: Figure, label: str, prefix: str) -> str:
    """The figure as an SVG element for a page that defines the colours.

    Args:
        figure: drawn here.
        label: what it shows, for those who do not see it.
        prefix: of the element's ids, one for each figure of a page.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", facecolor="none", metadata={**_NO_SVG_METADATA})
    text = file.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    for colour, light in _LIGHT.items():
        body = body.replace(light, f"var(--{colour})")
    return f'<svg role="img" aria-label="{escape(label)}" {box[0] if box else ""}>{body}'


def number(value: float, *, zeros: bool = False) -> str:
    """Three digits of a number; ``zeros`` keeps those at the end.

    Example:
        >>> number(0.7), number(0.7, zeros=True), number(999.9), number(12345.0), number(0.0003), number(math.nan)
        ('0.7', '0.700', '1,000', '12,345', '3e-4', '–')
    """
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.001:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return (f"{value:#.3g}" if zeros else f"{value:.3g}").removesuffix(".")


def cosine(value: float) -> str:
    """A cosine to three decimals, without a sign before zero."""
    return f"{round(value, 3) + 0.0:.3f}" if math.isfinite(value) else "–"


def _panels(ratios: list[float], *, height: float) -> tuple[Figure, list[Axes]]:
    """Panels above each other over one axis of steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    for axis in axes:
        axis.grid(visible=False, axis="x")
    return figure, list(axes)


def _markers(values: NDArray[np.float64]) -> dict[str, Any]:
    """Where there are few points, they are marked; a line of one could not be seen."""
    return {"marker": "o", "markersize": 4} if len(values) <= _FEW else {}


def _log_scale(axis: Axes, decades: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())
