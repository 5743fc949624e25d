"""Every figure of the suite, drawn from result files alone: no model is loaded, nothing is measured.

    python plots.py results/chat_layers
    python plots.py results/chat_layers --train_logs runs/layer3/train_log.jsonl runs/layer7/train_log.jsonl

Reads `results.csv` in the given folder and the training logs (by default those beside the checkpoints that the table
names), and writes `plots/<figure>.png` (300 dpi) and `.pdf`. A panel whose numbers are missing is left out, and a
line says so.
"""

from __future__ import annotations

import argparse
import io
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from command_line import UserError, run

COLUMN_INCHES, PAGE_INCHES = 3.5, 7.0  # one and two columns of a paper
POINTS_PER_INCH = 72
GREY = "#666666"
MAX_LABELS_WITH_STAGE = 12  # with more points than this, the stage moves from the labels to a legend
LOG_RANGE = 30  # an axis whose largest value exceeds its smallest by this factor is logarithmic
LABEL_GAP = 9.5  # points between the centres of two labels in a margin
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 7.5, "axes.labelsize": 8, "axes.titlesize": 8,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.axisbelow": True, "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.5,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4.5,
    "legend.frameon": False, "figure.dpi": 300, "savefig.dpi": 300, "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Look:
    """Colour (Okabe-Ito) and marker of one line; the text beside it is a darker tone, for contrast on white."""

    color: str
    marker: str

    @property
    def text_color(self) -> tuple[float, ...]:
        return tuple(0.75 * part for part in mpl.colors.to_rgb(self.color))


STAGES = {
    "untuned": Look("#E69F00", "^"),
    "head": Look("#0072B2", "o"),
    "last_block": Look("#D55E00", "s"),
    "head+last_block": Look("#009E73", "D"),
    "exit_block": Look("#CC79A7", "v"),
    "target": Look("#000000", "*"),
}
RUN_LOOKS = [STAGES[stage] for stage in ("head", "last_block", "head+last_block", "untuned", "exit_block", "target")]


# ---- tables ----

def read_results(path: Path) -> pd.DataFrame:
    """The rows of a results.csv by layer and step, infinite numbers as missing. Raises UserError with the remedy."""
    try:
        table = pd.read_csv(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the output folder of evaluate_checkpoints.py") from error
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise UserError(f"{path}: not a table ({error}); run evaluate_checkpoints.py again") from error
    missing = [column for column in ("kind", "target_layer") if column not in table]
    if missing or table.empty:
        raise UserError(f"{path}: no {' and no '.join(missing) or 'rows'}; give the output folder of evaluate_checkpoints.py")
    unknown = sorted(set(table["kind"]) - set(STAGES))
    if unknown:
        raise UserError(f"{path}: unknown kind {unknown[0]!r}; known kinds: {', '.join(STAGES)}")
    optional = [column for column in ("checkpoint", "step") if column not in table]
    table = table.reindex(columns=[*table.columns, *optional]).replace([np.inf, -np.inf], np.nan)
    return table.sort_values(["target_layer", "step"], kind="stable", ignore_index=True)


def read_train_log(path: Path) -> pd.DataFrame:
    """The rows of a train_log.jsonl by step; a torn last line is left out. Raises UserError with the remedy."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = pd.read_json(io.StringIO(text[: text.rfind("\n") + 1]), lines=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the train_log.jsonl of a run") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON lines ({error}); mend or delete the broken line") from error
    return rows.sort_values("step", kind="stable") if "step" in rows else pd.DataFrame({"step": []})


def train_logs_of(table: pd.DataFrame) -> list[Path]:
    """The training logs that lie beside the checkpoints of `table`."""
    folders = {Path(checkpoint).parent: None for checkpoint in table["checkpoint"].dropna()}
    return [folder / "train_log.jsonl" for folder in folders if (folder / "train_log.jsonl").exists()]


def dataset_names(table: pd.DataFrame) -> list[str]:
    return [column.removesuffix("_kl") for column in table if column.endswith("_kl")]


def numbered_columns(table: pd.DataFrame, prefix: str) -> list[str]:
    """Columns `<prefix><number>` in the order of their numbers."""
    columns = [column for column in table if re.fullmatch(re.escape(prefix) + r"\d+", column)]
    return sorted(columns, key=lambda column: int(column.removeprefix(prefix)))


def rows_with(table: pd.DataFrame, columns: list[str], panel: str) -> pd.DataFrame:
    """Rows that have a number in all of `columns`; a printed line names the panel where none or not all drafts do."""
    absent = [column for column in columns if column not in table]
    rows = table[:0] if absent or not columns else table.dropna(subset=columns)
    lacking = int((table["kind"] != "target").sum() - (rows["kind"] != "target").sum())
    if rows.empty:
        print(f"plots: {panel}: left out, no numbers in {', '.join(absent or columns) or 'such columns'}")
    elif lacking:
        print(f"plots: {panel}: {lacking} drafts left out, without {' or '.join(columns)}")
    return rows


def last_of_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per layer: the one with the most training steps, which a line through layers passes."""
    return rows.groupby("target_layer").tail(1)


def by_stage(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(stage, its rows) in the order of STAGES."""
    return [(stage, rows[rows["kind"] == stage]) for stage in STAGES if (rows["kind"] == stage).any()]


def interval_lengths(rows: pd.DataFrame, column: str) -> np.ndarray:
    """(2, rows) distances from the value down and up to the ends of its 95 % interval; NaN where there is none."""
    ends = rows.reindex(columns=[f"{column}_ci_low", f"{column}_ci_high"]).to_numpy(float).T
    lengths = (ends - rows[column].to_numpy(float)) * np.array([[-1.0], [1.0]])
    return np.where(lengths < 0, 0.0, lengths)


def warn_without_interval(rows: pd.DataFrame, column: str, panel: str) -> None:
    if np.isnan(interval_lengths(rows, column)).all():
        print(f"plots: {panel}: drawn without intervals, no numbers in {column}_ci_low and {column}_ci_high")


def pareto_front(rows: pd.DataFrame, cost: str, gain: str) -> pd.DataFrame:
    """The rows that no other row beats in both: least `cost`, greatest `gain`; in rising order of both."""
    ordered = rows.sort_values([cost, gain], ascending=[True, False], kind="stable")
    return ordered[ordered[gain] > ordered[gain].cummax().shift(fill_value=-np.inf)]


def settings_line(table: pd.DataFrame) -> str:
    """How drafts were verified, for a figure's head: "γ = 4, rejection, temperature 1"."""
    names = {"gamma": "γ = {}", "verification": "{}", "temperature": "temperature {}", "top_p": "top-p {}", "top_k": "top-k {}"}
    parts = []
    for column, text in names.items():
        values = table[column].dropna().unique() if column in table else []
        shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        parts += [text.format(" / ".join(shown))] if shown else []
    return ", ".join(parts)


# ---- figures and axes ----

def panel_grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in at most `columns` columns, each row `height` inches high."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(COLUMN_INCHES if columns == 1 else PAGE_INCHES, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def head_line(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=7, color=GREY)


def layer_axis(axis: Axes, layers: Iterable[int]) -> None:
    """An x axis of exit layers: whole numbers only, the evaluated ones where they fit."""
    layers = sorted(set(layers))
    axis.set_xlabel("exit layer ℓ (0-based)")
    axis.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axis.xaxis.set_major_locator(FixedLocator(layers) if len(layers) <= 9 else MaxNLocator(8, integer=True))


def scale_axis(axis: Axes, name: str, values: pd.Series) -> None:
    """Make axis `name` ("x" or "y") logarithmic where `values` span it; linear near 0 where some are (almost) 0."""
    if values.max() <= LOG_RANGE * values.min():
        return
    set_scale, which = getattr(axis, f"set_{name}scale"), getattr(axis, f"{name}axis")
    if values.min() < 1e-3:
        set_scale("symlog", linthresh=1e-2)
    else:
        set_scale("log")
        which.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 300 * values.min() else (1,)))
    which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    which.set_minor_locator(NullLocator())


def draw_layers(axis: Axes, rows: pd.DataFrame, column: str, *, interval: bool = False) -> dict[str, float]:
    """Layer against `column`, a line with markers per stage; returns each stage's value at its last layer."""
    stages = by_stage(rows)
    ends = {}
    for index, (stage, points) in enumerate(stages):
        look = STAGES[stage]
        dodge = 0.1 * (index - (len(stages) - 1) / 2) if interval else 0.0  # so that intervals stay apart
        line = last_of_layer(points)
        axis.plot(line["target_layer"] + dodge, line[column], color=look.color)
        lengths = interval_lengths(points, column) if interval else None
        axis.errorbar(points["target_layer"] + dodge, points[column], yerr=lengths, fmt=look.marker, color=look.color, elinewidth=0.8, capsize=1.5)
        ends[stage] = line[column].iloc[-1]
    layer_axis(axis, rows["target_layer"])
    return ends


# ---- labels ----

def label_ends(figure: Figure, labels: dict[Axes, list[tuple[str, float, Look]]]) -> None:
    """Write (text, y, look) beside the right edge of each axes at the height of its line's end, moved apart."""
    texts = {axis: [_end_label(axis, *label) for label in labels[axis]] for axis in labels}
    settle(figure)
    for axis, pairs in texts.items():
        box = axis.get_window_extent()
        gap = LABEL_GAP * figure.dpi / POINTS_PER_INCH
        heights = spread([axis.transData.transform((0, text.get_position()[1]))[1] for text, _ in pairs], gap, box.y0, box.y1)
        for (text, marker), height in zip(pairs, heights, strict=True):
            share = (height - box.y0) / box.height
            text.set(y=share, transform=axis.transAxes)
            marker.set(ydata=[share])


def _end_label(axis: Axes, text: str, y: float, look: Look) -> tuple[Text, Line2D]:
    label = axis.text(1.09, y, text, color=look.text_color, va="center", transform=axis.get_yaxis_transform())
    marker = Line2D([1.04], [0.5], color=look.color, marker=look.marker, transform=axis.transAxes, clip_on=False)
    axis.add_artist(marker)
    return label, marker


def spread(centres: list[float], gap: float, low: float, high: float) -> list[float]:
    """`centres` moved as little as needed to lie `gap` apart, in the same order, from `low` upwards to `high`."""
    order = np.argsort(centres, kind="stable")
    placed = np.array(centres, float)[order]
    for index in range(len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap if index else low)
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], placed[index + 1] - gap if index + 1 < len(placed) else high)
    return placed[np.argsort(order)].tolist()


def label_points(axis: Axes, rows: pd.DataFrame, columns: tuple[str, str], texts: list[str]) -> None:
    """Write `texts` beside the points of `rows`: for each point, from the top down, the nearest free place.

    A place is free when it lies within the axes and touches no label, marker, interval or line. A label that finds
    none is left out, with a printed line. Needs a settled figure.
    """
    values = rows[list(columns)].to_numpy(float)
    points = axis.transData.transform(values)
    taken = drawn_boxes(axis)
    for index in np.lexsort((points[:, 0], -points[:, 1])):
        look = STAGES[rows["kind"].iloc[index]]
        arrow = {"arrowstyle": "-", "color": look.color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        label = axis.annotate(
            texts[index], values[index], xytext=(0, 0), textcoords="offset points", fontsize=7, color=look.text_color, gid="label", arrowprops=arrow,
        )
        if not _place_label(label, points[index], axis.get_window_extent(), taken):
            print(f"plots: no free place for the label {texts[index]!r}")
            label.remove()


def _place_label(label: Annotation, point: np.ndarray, frame: Bbox, taken: list[Bbox]) -> bool:
    """Move `label` to the free place nearest to `point` and add its box to `taken`; False where there is none."""
    pixels = label.figure.dpi / POINTS_PER_INCH
    size = Text.get_window_extent(label).size
    for distance, angle in itertools.product((5, 8, 12, 17, 23, 30, 40, 55, 75, 100), range(0, 360, 45)):
        direction = np.round([np.cos(np.radians(angle)), np.sin(np.radians(angle))], 6)
        corner = point + distance * pixels * direction + size * (np.sign(direction) - 1) / 2
        box = Bbox.from_bounds(*corner, *size)
        inside = (box.min >= frame.min).all() and (box.max <= frame.max).all()
        if inside and not box.count_overlaps(taken):
            label.set_position((corner - point) / pixels)
            label.arrow_patch.set_visible(distance > 8)
            taken.append(box.padded(pixels))
            return True
    return False


def drawn_boxes(axis: Axes) -> list[Bbox]:
    """Boxes in pixels along all lines, markers, intervals and texts that `axis` shows."""
    pixels = axis.figure.dpi / POINTS_PER_INCH
    boxes = [text.get_window_extent() for text in axis.texts]
    for line in axis.lines:
        vertices = line.get_transform().transform_path(line.get_path()).vertices
        boxes += [Bbox([vertex, vertex]).padded(2.5 * pixels) for vertex in vertices if line.get_marker() != "None"]
        boxes += _boxes_along(vertices, pixels) if line.get_linestyle() != "None" else []
    for bars in axis.collections:
        for path in bars.get_paths():
            boxes += _boxes_along(bars.get_transform().transform_path(path).vertices, pixels)
    return boxes


def _boxes_along(vertices: np.ndarray, pixels: float) -> list[Bbox]:
    boxes = []
    for start, end in itertools.pairwise(vertices[np.isfinite(vertices).all(axis=1)]):
        count = max(2, int(np.hypot(*(end - start)) / (2 * pixels)))
        boxes += [Bbox([place, place]).padded(pixels) for place in np.linspace(start, end, count)]
    return boxes


def settle(figure: Figure) -> None:
    """Lay the figure out once and for all, so that labels can be placed in pixels."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def stage_legend(figure: Figure, stages: Iterable[str]) -> None:
    """A row of stages below the figure, for panels that have no room for direct labels."""
    keys = [Line2D([], [], color=STAGES[stage].color, marker=STAGES[stage].marker, linestyle="none", label=stage) for stage in stages]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), handletextpad=0.2, columnspacing=1.2)


# ---- the figures: each takes the table and returns a Figure, or None where it has no panel ----

def quality_by_layer(table: pd.DataFrame) -> Figure | None:
    """A row of panels per quality data set: layer against KL to the target, perplexity and top-1 accuracy."""
    drafts = table[table["kind"] != "target"]  # the target's KL to itself is 0 by definition: no measurement
    measures = {"kl": ("KL(p‖q) to the target (nats/token)", drafts), "ppl": ("perplexity", table), "top1": ("top-1 accuracy (%)", table)}
    rows_of_panels = []
    for dataset in dataset_names(table):
        panels = [(f"{dataset}_{name}", label, rows) for name, (label, rows) in measures.items()]
        panels = [(column, label, rows_with(rows, [column], f"quality_by_layer {column}")) for column, label, rows in panels]
        rows_of_panels += [[(dataset, *panel) for panel in panels if not panel[-1].empty]]
    return layer_figure(rows_of_panels, draw_quality)


def draw_quality(axis: Axes, dataset: str, column: str, rows: pd.DataFrame) -> dict[str, float]:
    ends = draw_layers(axis, rows, column)
    if column.endswith("_top1"):
        axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    else:
        scale_axis(axis, "y", rows[column])
    axis.set_title(dataset)
    return ends
