"""Every figure of the suite, drawn from result files alone: no model is loaded, nothing is measured.

    python plots.py results/chat_layers
    python plots.py results/chat_layers --train_logs runs/layer3/train_log.jsonl runs/layer7/train_log.jsonl

Reads `results.csv` in the given folder and the training logs (by default those beside the checkpoints that the table
names), or, where benchmark_torch_compile.py wrote it, `step_times.json`. Writes `plots/<figure>.png` (300 dpi) and `.pdf`.
A panel whose numbers are missing is left out, and a line says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from command_line import UserError, run

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import ScaledTranslation, Transform

from results import read_jsonl

COLUMN_INCHES, WIDE_INCHES, PAGE_INCHES = 3.5, 5.0, 7.0  # one, one and a half and two columns of a paper
POINTS_PER_INCH = 72
GREY = "#666666"
MAX_LABELS_WITH_STAGE = 9  # with more points than this, the stage moves from the labels to a legend
LOG_RANGE = 30  # an axis whose largest value exceeds its smallest by this factor is logarithmic
LABEL_GAP = 9.5  # points between the centres of two labels in a margin
CLEARER = 1.5  # points that a label lies nearer to its own point than to another
MAX_POINTS_IN_COLUMN = 5  # a figure of more labelled points is wider than a column
MAX_END_LABELS = 12  # as many as fit beside a panel
FEWEST_RANKED = 4  # drafts; a rank correlation of fewer says nothing
NUM_RESAMPLES, INTERVAL = 2000, (2.5, 97.5)  # metrics.py's, which needs torch
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 7.5, "axes.labelsize": 8, "axes.titlesize": 8,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.axisbelow": True, "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.5,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4.5,
    "legend.frameon": False, "figure.dpi": 300, "savefig.dpi": 300, "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Look:
    """Marker and colour of one line, and the colour of the text beside it."""

    color: str
    marker: str
    ink: tuple[float, float, float]

    def shaded(self, share: float) -> Look:
        """The same look in a tone between light (`share` 0) and full (1)."""
        strength = 0.3 + 0.7 * share
        return replace(self, color=mpl.colors.to_hex([1 - strength * (1 - part) for part in mpl.colors.to_rgb(self.color)]))


def _look(color: str, marker: str) -> Look:
    """Text is written in a darker tone of `color`, for contrast on white."""
    return Look(color, marker, tuple(0.75 * part for part in mpl.colors.to_rgb(color)))


STAGES = {  # colours of Okabe and Ito, which colour-blind readers can tell apart
    "untuned": _look("#E69F00", "^"),
    "head": _look("#0072B2", "o"),
    "last_block": _look("#D55E00", "s"),
    "head+last_block": _look("#009E73", "D"),
    "target": _look("#000000", "*"),
}
RUN_LOOKS = [*(STAGES[stage] for stage in ("head", "last_block", "head+last_block", "untuned", "target")), _look("#CC79A7", "v")]


# ---- tables ----

def read_results(path: Path) -> pd.DataFrame:
    """The rows of a results.csv by layer and step, infinite numbers as missing. Raises UserError with the remedy."""
    try:
        table = pd.read_csv(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the output folder of evaluate_checkpoints.py") from error
    except ValueError as error:  # pandas' errors for an empty or broken file are ValueErrors
        raise UserError(f"{path}: not a table ({error}); run evaluate_checkpoints.py again") from error
    empty = [column for column in ("kind", "target_layer") if column not in table or table[column].isna().any()]
    if empty or not len(table):
        raise UserError(f"{path}: rows without {' and '.join(empty) or 'number'}; give the output folder of evaluate_checkpoints.py")
    unknown = sorted(set(table["kind"]) - set(STAGES))
    if unknown:
        raise UserError(f"{path}: unknown kind {unknown[0]!r}; known kinds: {', '.join(STAGES)}")
    optional = [column for column in ("checkpoint", "step") if column not in table]
    table = table.reindex(columns=[*table.columns, *optional]).replace([np.inf, -np.inf], np.nan)
    return table.sort_values(["target_layer", "step"], kind="stable", ignore_index=True)


def read_train_log(path: Path) -> pd.DataFrame:
    """The rows of a train_log.jsonl by step; a torn last line is left out. Raises UserError with the remedy."""
    if not path.exists():
        raise UserError(f"{path}: no such file; give the train_log.jsonl of a run")
    rows = pd.DataFrame(read_jsonl(path))
    return rows.sort_values("step", kind="stable") if "step" in rows else pd.DataFrame({"step": []})


def train_logs_of(table: pd.DataFrame) -> list[Path]:
    """The training logs that lie beside the checkpoints of `table`'s trained rows."""
    trained = table[~table["kind"].isin(["target", "untuned"])]
    folders = dict.fromkeys(Path(checkpoint).parent for checkpoint in trained["checkpoint"].dropna())
    return [folder / "train_log.jsonl" for folder in folders if (folder / "train_log.jsonl").exists()]


def dataset_names(table: pd.DataFrame, figure_name: str) -> list[str]:
    """Names of the quality data sets; a printed line names the figure that has none."""
    names = [column.removesuffix("_kl") for column in table if column.endswith("_kl")]
    if not names:
        print(f"plots: {figure_name}: left out, no column <data set>_kl")
    return names


def numbered_columns(table: pd.DataFrame, prefix: str) -> list[str]:
    """Columns `<prefix><number>` in the order of their numbers."""
    columns = [column for column in table if re.fullmatch(re.escape(prefix) + r"\d+", column)]
    return sorted(columns, key=lambda column: int(column.removeprefix(prefix)))


def rows_with(table: pd.DataFrame, columns: list[str], panel: str) -> pd.DataFrame:
    """Rows that have a number in all of `columns`; a printed line names the panel where none or not all drafts do."""
    absent = [column for column in columns if column not in table]
    rows = table[:0] if absent or not columns else table.dropna(subset=columns)
    lacking = len(drafts_of(table)) - len(drafts_of(rows))
    if rows.empty:
        print(f"plots: {panel}: left out, no numbers in {', '.join(absent or columns) or 'such columns'}")
    elif lacking:
        print(f"plots: {panel}: {lacking} drafts left out, without {' or '.join(columns)}")
    return rows


def drafts_of(table: pd.DataFrame) -> pd.DataFrame:
    """The rows without the target, which as a draft of itself has KL 0 and every token accepted by construction."""
    return table[table["kind"] != "target"]


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
    lengths[:, np.isnan(lengths).any(axis=0)] = np.nan  # half an interval is none
    return np.where(lengths < 0, 0.0, lengths)


def interval_note(rows: pd.DataFrame, column: str, panel: str) -> str:
    """What a figure's head says of the intervals of `column`; nothing, and a printed line, where there are none."""
    if not np.isnan(interval_lengths(rows, column)).all():
        return "bars: 95 % intervals"
    print(f"plots: {panel}: drawn without intervals, no numbers in {column}_ci_low and {column}_ci_high")
    return ""


def pareto_front(rows: pd.DataFrame, cost: str, gain: str) -> pd.DataFrame:
    """The rows that no other row beats in both: least `cost`, greatest `gain`; in rising order of both."""
    ordered = rows.sort_values([cost, gain], ascending=[True, False], kind="stable")
    return ordered[ordered[gain] > ordered[gain].cummax().shift(fill_value=-np.inf)]


def settings_line(table: pd.DataFrame, note: str = "") -> str:
    """How drafts were verified and a note, for a figure's head: "γ = 4, rejection, temperature 1; bars: ..."."""
    names = {"gamma": "γ = {}", "verification": "{}", "temperature": "temperature {}", "top_p": "top-p {}", "top_k": "top-k {}"}
    without_effect = {"top_p": 1, "top_k": 0}
    parts = []
    for column, text in names.items():
        values = table[column].dropna().unique().tolist() if column in table else []
        if values and values != [without_effect.get(column)]:
            parts.append(text.format(" / ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)))
    return "; ".join(filter(None, [", ".join(parts), note]))


# ---- figures and axes ----

def panel_grid(counts: list[int], height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure with one row of panels per count, each row `height` inches high; returns its axes row by row."""
    columns = max(counts)
    figure = Figure(figsize=(COLUMN_INCHES if columns == 1 else PAGE_INCHES, len(counts) * height), layout="constrained")
    axes = figure.subplots(len(counts), columns, squeeze=False)
    for axis in itertools.chain.from_iterable(row[count:] for row, count in zip(axes, counts, strict=True)):
        axis.remove()
    return figure, [list(row[:count]) for row, count in zip(axes, counts, strict=True)]


def row_counts(count: int, most: int) -> list[int]:
    """Lengths of even rows of at most `most` panels: 6 in rows of 4 -> [3, 3], 7 -> [4, 3]."""
    columns = -(-count // -(-count // most))
    return [min(columns, count - first) for first in range(0, count, columns)]


def head_line(figure: Figure, text: str) -> None:
    """A grey line at the head of a figure that is not laid out yet."""
    characters = int(20 * figure.get_figwidth())
    figure.suptitle(textwrap.fill(text, characters), x=0.01, ha="left", fontsize=7, color=GREY)


def layer_axis(axis: Axes, layers: Iterable[int]) -> None:
    """An x axis of exit layers: whole numbers only, the evaluated ones where they fit."""
    layers = sorted(set(layers))
    axis.set_xlabel("exit layer ℓ (0-based)")
    axis.set_xlim(layers[0] - 0.6, layers[-1] + 0.6)
    axis.xaxis.set_major_locator(ticker.FixedLocator(layers) if len(layers) <= 9 else ticker.MaxNLocator(8, integer=True))


def scale_axis(axis: Axes, name: str, values: pd.Series, log_range: float = LOG_RANGE) -> None:
    """Make axis `name` ("x" or "y") logarithmic where `values` span `log_range`; linear near 0 where some are (almost) 0."""
    if values.max() <= log_range * values.min():
        return
    set_scale, which = getattr(axis, f"set_{name}scale"), getattr(axis, f"{name}axis")
    if values.min() < 1e-3:
        set_scale("symlog", linthresh=1e-2)
    else:
        set_scale("log")
        which.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if values.max() < 300 * values.min() else (1,)))
    which.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    which.set_minor_locator(ticker.NullLocator())


def label_y(axis: Axes, label: str) -> None:
    """Name the y axis; shares are written as percentages where the label says "(%)"."""
    axis.set_ylabel(label)
    if label.endswith("(%)"):
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda share, _: f"{round(100 * share, 6):g}"))


# ---- labels ----

def label_ends(figure: Figure, labels: dict[Axes, list[tuple[str, float, Look]]]) -> None:
    """Write (text, y, look) beside the right edge of each axes at the height of its line's end, moved apart."""
    texts = {axis: [_end_label(axis, *label) for label in labels[axis]] for axis in labels}
    settle(figure)
    for axis, pairs in texts.items():
        box = axis.get_window_extent()
        gap = LABEL_GAP * pixels_per_point(figure)
        heights = spread([axis.transData.transform((0, text.get_position()[1]))[1] for text, _ in pairs], gap, box.y0, box.y1)
        for (text, marker), height in zip(pairs, heights, strict=True):
            share = (height - box.y0) / box.height
            text.set(y=share, transform=beside(axis, 18))
            marker.set(ydata=[share])


def _end_label(axis: Axes, text: str, y: float, look: Look) -> tuple[Text, Line2D]:
    label = axis.text(1, y, text, color=look.ink, va="center", transform=beside(axis, 18, axis.get_yaxis_transform()))
    marker = Line2D([1], [0.5], color=look.color, marker=look.marker, transform=beside(axis, 12), clip_on=False)
    axis.add_artist(marker)
    return label, marker


def beside(axis: Axes, points: float, transform: Transform | None = None) -> Transform:
    """`transform` (by default that of the axes' shares), moved `points` to the right."""
    return (transform or axis.transAxes) + ScaledTranslation(points / POINTS_PER_INCH, 0, axis.figure.dpi_scale_trans)


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

    Labels that find no free place are left out, with a printed line. Needs a settled figure.
    """
    values = rows[list(columns)].to_numpy(float)
    points = axis.transData.transform(values)
    pixels, obstacles, lines, left_out = pixels_per_point(axis.figure), drawn_boxes(axis), np.empty((0, 4)), []
    for index in np.lexsort((points[:, 0], -points[:, 1])):
        look = STAGES[rows["kind"].iloc[index]]
        style = {"fontsize": 7, "color": look.ink, "va": "bottom", "gid": "label"}
        label = axis.annotate(texts[index], values[index], textcoords="offset points", xytext=(0, 0), **style)
        others = np.delete(points, index, axis=0)
        place = free_place(points[index], label.get_window_extent().size, axis, others=others, obstacles=obstacles, lines=lines)
        label.remove()
        if place is None:
            left_out.append(texts[index])
            continue
        box, anchor, leader = place
        arrow = {"arrowstyle": "-", "color": look.color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2, "relpos": anchor} if len(leader) else None
        axis.annotate(texts[index], values[index], textcoords="offset points", xytext=(box[:2] - points[index]) / pixels, arrowprops=arrow, **style)
        lines = np.vstack([lines, leader, box + pixels * np.array([-1, -1, 1, 1])])
        obstacles = np.vstack([obstacles, lines])
    if left_out:
        print(f"plots: {len(left_out)} of {len(texts)} points without a label, for want of room: {', '.join(left_out)}")


def free_place(
    point: np.ndarray, size: np.ndarray, axis: Axes, *, others: np.ndarray, obstacles: np.ndarray, lines: np.ndarray,
) -> tuple[np.ndarray, tuple[float, float], np.ndarray] | None:
    """The nearest place around `point` (2,) for a text of `size` (2,), in pixels; None where there is none.

    A place is free when it lies within the axes and touches none of the boxes `obstacles` (n, 4). One farther off
    than 8 points gets a leader, which may touch none of `lines` (n, 4), the labels and leaders placed before, and no
    marker at `others` (n, 2); one without must lie clearly nearer to `point` than to those. Returns the place (4,), its
    corner nearest to the point (as shares of its size) and boxes (n, 4) along the leader.
    """
    pixels, frame = pixels_per_point(axis.figure), axis.get_window_extent()
    crossed = np.vstack([lines, around(others, 2.5 * pixels)])
    for distance, angle in itertools.product((5, 8, 12, 16, 20, 25, 30, 37, 45), range(0, 360, 15)):
        direction = np.round([np.cos(np.radians(angle)), np.sin(np.radians(angle))], 6)
        near = point + distance * pixels * direction
        anchor = (1 - np.sign(direction)) / 2
        low = near - size * anchor
        box = np.concatenate([low, low + size])
        leader = along([point + 6 * pixels * direction, near], pixels) if distance > 8 else np.empty((0, 4))
        inside = (box[:2] >= frame.min).all() and (box[2:] <= frame.max).all()
        nearest = len(leader) > 0 or (gaps(box, others) > (distance + CLEARER) * pixels).all()
        if inside and nearest and not touch(box[None], obstacles) and not touch(leader, crossed):
            return box, tuple(anchor), leader
    return None


def gaps(box: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distances (n,) from `box` (4,) to `points` (n, 2)."""
    return np.hypot(*np.maximum(0, np.maximum(box[:2] - points, points - box[2:])).T)


def touch(boxes: np.ndarray, others: np.ndarray) -> bool:
    """Whether any of `boxes` (m, 4) overlaps any of `others` (n, 4); a box is left, bottom, right, top."""
    apart = (boxes[:, None, :2] >= others[None, :, 2:]) | (boxes[:, None, 2:] <= others[None, :, :2])  # (m, n, 2)
    return bool((~apart.any(axis=-1)).any())


def drawn_boxes(axis: Axes) -> np.ndarray:
    """Boxes (n, 4), in pixels, around all lines, markers, intervals and texts that `axis` shows."""
    pixels = pixels_per_point(axis.figure)
    boxes = [text.get_window_extent().extents[None] for text in axis.texts]
    for line in axis.lines:
        vertices = line.get_transform().transform_path(line.get_path()).vertices
        if line.get_marker() != "None":
            boxes.append(around(vertices, 2.5 * pixels))
        if line.get_linestyle() != "None":
            boxes.append(along(vertices, pixels))
    for bars in axis.collections:
        boxes += [along(bars.get_transform().transform_path(path).vertices, pixels) for path in bars.get_paths()]
    return np.vstack(boxes)


def around(places: np.ndarray, radius: float) -> np.ndarray:
    """Boxes (n, 4) that reach `radius` around `places` (n, 2)."""
    return np.hstack([places - radius, places + radius])


def along(vertices: Sequence[np.ndarray], radius: float) -> np.ndarray:
    """Boxes (n, 4) that reach `radius` around the line through `vertices` (m, 2)."""
    pieces = [np.empty((0, 2))]
    for start, end in itertools.pairwise(vertices):
        if np.isfinite([start, end]).all():
            pieces.append(np.linspace(start, end, 2 + int(np.hypot(*(end - start)) / (2 * radius))))
    return around(np.vstack(pieces), radius)


def pixels_per_point(figure: Figure) -> float:
    return figure.dpi / POINTS_PER_INCH


def settle(figure: Figure) -> None:
    """Lay the figure out once and for all, so that labels can be placed in pixels."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def stage_legend(figure: Figure, stages: Iterable[str]) -> None:
    """A row of stages below the figure, for panels that have no room for direct labels."""
    keys = [Line2D([], [], color=STAGES[stage].color, marker=STAGES[stage].marker, linestyle="none", label=stage) for stage in stages]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), handletextpad=0.2, columnspacing=1.2)


# ---- figures with the layer on the x axis ----

@dataclass(frozen=True)
class Panel:
    """One column of the table against the layer."""

    column: str
    label: str
    rows: pd.DataFrame
    title: str = ""
    wide_range: bool = False


def quality_by_layer(table: pd.DataFrame) -> Figure | None:
    """A row of panels per quality data set: layer against KL to the target, perplexity and top-1 accuracy of the text."""
    grid = []
    for dataset in dataset_names(table, "quality_by_layer"):
        panels = [
            Panel(f"{dataset}_kl", "KL(p‖q) (nats/token)", drafts_of(table), dataset, wide_range=True),
            Panel(f"{dataset}_ppl", "perplexity", table, dataset, wide_range=True),
            Panel(f"{dataset}_top1", "top-1 accuracy (%)", table, dataset),
        ]
        grid.append(panels_with_numbers(panels, "quality_by_layer"))
    return layer_figure(grid, draw_quality, "")


def acceptance_by_layer(table: pd.DataFrame) -> Figure | None:
    """Layer against accepted tokens per round, accept rate per tested token and TV, with 95 % bootstrap intervals."""
    panels = panels_with_numbers([
        Panel("spec_mean_accepted", "accepted tokens per round", table),
        Panel("spec_token_accept_rate", "accept rate per token (%)", table),
        Panel("spec_tv", "TV distance of p and q", table),
    ], "acceptance_by_layer")
    notes = [interval_note(panel.rows, panel.column, "acceptance_by_layer") for panel in panels]
    return layer_figure([panels], draw_acceptance, settings_line(table, max(notes, default="")))


def panels_with_numbers(panels: list[Panel], figure_name: str) -> list[Panel]:
    """Each panel with those of its rows that have a number; without the panels that have none."""
    panels = [replace(panel, rows=rows_with(panel.rows, [panel.column], figure_name)) for panel in panels]
    return [panel for panel in panels if not panel.rows.empty]


def layer_figure(grid: list[list[Panel]], draw: Callable[[Axes, Panel], dict[str, float]], head: str) -> Figure | None:
    """One row of panels per row of `grid`; stages are named beside the last panel where all of them end there."""
    grid = [panels for panels in grid if panels]
    if not grid:
        return None
    figure, axes = panel_grid([len(panels) for panels in grid], 2.1)
    head_line(figure, head)
    labels = {}
    for row, panels in zip(axes, grid, strict=True):
        ends = [draw(axis, panel) for axis, panel in zip(row, panels, strict=True)]
        labels[row[-1]] = [(stage, y, STAGES[stage]) for stage, y in ends[-1].items()]
    stages = [stage for stage in STAGES if any(stage in set(panel.rows["kind"]) for panel in itertools.chain(*grid))]
    if all(len(named) == len(stages) for named in labels.values()):
        label_ends(figure, labels)
    else:
        stage_legend(figure, stages)
    return figure


def draw_quality(axis: Axes, panel: Panel) -> dict[str, float]:
    for value in panel.rows.loc[panel.rows["kind"] == "target", panel.column]:
        axis.axhline(value, color=STAGES["target"].color, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
    if panel.wide_range:
        scale_axis(axis, "y", panel.rows[panel.column])
    return draw_layers(axis, panel)


def draw_acceptance(axis: Axes, panel: Panel) -> dict[str, float]:
    ends = draw_layers(axis, panel, interval=True)
    axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])  # so that markers at 0 are whole
    return ends


def draw_layers(axis: Axes, panel: Panel, *, interval: bool = False) -> dict[str, float]:
    """A line with markers per stage, through the last row of each layer; returns each stage's value at its last layer."""
    stages, ends = by_stage(panel.rows), {}
    for index, (stage, rows) in enumerate(stages):
        look, last = STAGES[stage], last_of_layer(rows)
        dodge = 0.1 * (index - (len(stages) - 1) / 2) if interval else 0.0  # so that intervals stay apart
        axis.plot(last["target_layer"] + dodge, last[panel.column], color=look.color)
        draw_points(axis, rows, (rows["target_layer"] + dodge, panel.column), interval=interval)
        ends[stage] = last[panel.column].iloc[-1]
    layer_axis(axis, panel.rows["target_layer"])
    label_y(axis, panel.label)
    axis.set_title(panel.title)
    return ends


def draw_points(axis: Axes, rows: pd.DataFrame, at: tuple[pd.Series, str], *, interval: bool) -> None:
    """Markers of one stage's `rows` at (x values, y column), with the 95 % interval of y where asked for."""
    look = STAGES[rows["kind"].iloc[0]]
    lengths = interval_lengths(rows, at[1]) if interval else None
    size = {"markersize": 2.5} if len(rows) > 16 else {}  # so that markers of a deep model stay apart
    axis.errorbar(at[0], rows[at[1]], yerr=lengths, fmt=look.marker, color=look.color, elinewidth=0.8, capsize=1.5, **size)


# ---- figures with one point per draft ----

MEASURED_TAU = "spec_tokens_per_call"


def speedup_vs_quality(table: pd.DataFrame) -> Figure | None:
    """KL to the target against measured speedup, a panel per quality data set, with the Pareto front."""
    columns = [f"{dataset}_kl" for dataset in dataset_names(table, "speedup_vs_quality")]
    return point_figure(drafts_of(table), columns, draw_pareto, "speedup_vs_quality")


def predicted_speedup(table: pd.DataFrame) -> Figure | None:
    """Predicted against measured speedup, with the line where both are equal."""
    return point_figure(table, ["spec_predicted_speedup"], draw_predicted, "predicted_speedup")


def point_figure(
    table: pd.DataFrame, x_columns: list[str], draw: Callable[[Axes, pd.DataFrame, str], None], name: str,
) -> Figure | None:
    """A panel per x column with measured speedup on the y axis: one labelled point with its interval per draft."""
    panels = [(column, rows_with(table, [column, "spec_speedup"], name)) for column in x_columns]
    panels = [(column, rows) for column, rows in panels if not rows.empty]
    if not panels:
        return None
    with_stage = max(len(rows) for _, rows in panels) <= MAX_LABELS_WITH_STAGE
    figure, axes = panel_grid(row_counts(len(panels), 2), 3.1)
    if len(panels) == 1 and len(panels[0][1]) > MAX_POINTS_IN_COLUMN:
        figure.set_size_inches(WIDE_INCHES, 4)
    for axis, (column, rows) in zip(itertools.chain(*axes), panels, strict=True):
        for _, points in by_stage(rows):
            draw_points(axis, points, (points[column], "spec_speedup"), interval=True)
        draw(axis, rows, column)
    head_line(figure, settings_line(table, interval_note(panels[0][1], "spec_speedup", name)))
    if not with_stage:
        stage_legend(figure, [stage for stage, _ in by_stage(pd.concat([rows for _, rows in panels]))])
    settle(figure)
    for axis, (column, rows) in zip(itertools.chain(*axes), panels, strict=True):
        label_points(axis, rows, (column, "spec_speedup"), point_names(rows, with_stage=with_stage))
    return figure


def point_names(rows: pd.DataFrame, *, with_stage: bool) -> list[str]:
    """"ℓ3 head" for each row, or "ℓ3"; with the step where a layer and stage has several rows. The target is "target"."""
    places = zip(rows["target_layer"], rows["kind"], strict=True)
    names = ["target" if stage == "target" else f"ℓ{layer} {stage}" if with_stage else f"ℓ{layer}" for layer, stage in places]
    repeated = rows.duplicated(["target_layer", "kind"], keep=False) & rows["step"].notna()
    return [f"{name} @{step:g}" if again else name for name, step, again in zip(names, rows["step"], repeated, strict=True)]


def draw_pareto(axis: Axes, rows: pd.DataFrame, column: str) -> None:
    """Axes, the line of vanilla decoding, and the front: the best speedup that is reached up to each KL."""
    scale_axis(axis, "x", rows[column])
    axis.margins(0.12)
    axis.axhline(1, color="black", linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
    left, right = axis.get_xlim()
    front = pareto_front(rows, column, "spec_speedup")
    best = front["spec_speedup"].tolist()
    axis.plot([*front[column], right], [*best, best[-1]], color=GREY, linewidth=0.9, drawstyle="steps-post", zorder=1)
    axis.set(xlim=(left, right), xlabel=f"KL(p‖q) on {column.removesuffix('_kl')} (nats/token)", ylabel="measured speedup over vanilla (×)")
    upper, lower = ("Pareto front", "vanilla") if best[-1] > 1 else ("vanilla", "Pareto front")
    place = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "fontsize": 7, "color": GREY}
    axis.annotate(upper, (1, max(1, best[-1])), xytext=(-2, 2), va="bottom", **place)
    axis.annotate(lower, (1, min(1, best[-1])), xytext=(-2, -2), va="top", **place)


def draw_predicted(axis: Axes, rows: pd.DataFrame, column: str) -> None:
    """Equal axes and the line on which measured and predicted speedup agree."""
    values = rows.reindex(columns=[column, "spec_speedup", "spec_speedup_ci_low", "spec_speedup_ci_high"])
    low, high = values.min(axis=None), values.max(axis=None)
    room = 0.08 * (high - low) + 0.02
    limits = (low - room, high + room)
    axis.axline((1, 1), slope=1, color="black", linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
    axis.set(xlim=limits, ylim=limits, aspect="equal", xlabel="predicted speedup over vanilla (×)", ylabel="measured speedup over vanilla (×)")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(ticker.MaxNLocator(8, steps=[1, 2, 5, 10]))
    axis.set_title("dashed: measured = predicted", fontsize=7, color=GREY)


def potential_vs_tokens_per_call(table: pd.DataFrame) -> Figure | None:
    """Per quality data set, what promises a good draft against what it gave: KL and overlap against measured tokens per call."""
    grid = [ranked_panels(drafts_of(table), dataset) for dataset in dataset_names(table, "potential_vs_tokens_per_call")]
    grid = [panels for panels in grid if panels]
    if not grid:
        return None
    figure, axes = panel_grid([len(panels) for panels in grid], 3.1)
    pairs = list(zip(itertools.chain(*axes), itertools.chain(*grid), strict=True))
    for axis, panel in pairs:
        draw_potential(axis, panel)
    every = pd.concat([panel.rows for _, panel in pairs])
    note = interval_note(every, MEASURED_TAU, "potential_vs_tokens_per_call")
    head_line(figure, settings_line(table, "; ".join(filter(None, [note, "ρ: Spearman's, with its 95 % interval over drafts"]))))
    stage_legend(figure, [stage for stage, _ in by_stage(every)])
    settle(figure)
    for axis, panel in pairs:
        label_points(axis, panel.rows, (panel.column, MEASURED_TAU), point_names(panel.rows, with_stage=False))
    return figure


def ranked_panels(drafts: pd.DataFrame, dataset: str) -> list[Panel]:
    """KL and overlap on `dataset`, each with the drafts that have it and a measured τ; a printed line where those are too few."""
    panels = [Panel(f"{dataset}_kl", f"KL(p‖q) on {dataset} (nats/token)", drafts, "KL", wide_range=True),
              Panel(f"{dataset}_overlap", f"Σ min(p, q) on {dataset}, temperature 1", drafts, "overlap")]
    found = []
    for panel in panels:
        rows = rows_with(drafts, [panel.column, MEASURED_TAU], "potential_vs_tokens_per_call")
        if 0 < len(rows) < FEWEST_RANKED:
            print(f"plots: potential_vs_tokens_per_call: {panel.column} left out, {len(rows)} drafts are too few to rank")
        found += [replace(panel, rows=rows)] if len(rows) >= FEWEST_RANKED else []
    return found


def draw_potential(axis: Axes, panel: Panel) -> None:
    """Measured τ with its interval, a marker per draft, and the rank correlation in the title."""
    for _, points in by_stage(panel.rows):
        draw_points(axis, points, (points[panel.column], MEASURED_TAU), interval=True)
    if panel.wide_range:
        scale_axis(axis, "x", panel.rows[panel.column], log_range=1)
    axis.margins(0.12)
    axis.set(xlabel=panel.label, ylabel="tokens per target call τ")
    found = rank_correlation(panel.rows[panel.column], panel.rows[MEASURED_TAU])
    text = "no ρ, as not both vary" if found is None else "ρ = {:.2f} [{:.2f}, {:.2f}]".format(*found).replace("-", "−")
    axis.set_title(f"{panel.title}: {text}")


def rank_correlation(x: pd.Series, y: pd.Series, seed: int = 0) -> tuple[float, float, float] | None:
    """Spearman's ρ (equal values rank at their mean), and its bootstrap interval over pairs; None where x or y does not vary.

    Resamples in which one of them does not vary do not count.
    """
    if min(x.nunique(), y.nunique()) < 2:
        return None
    count = len(x)
    pick = np.vstack([np.arange(count), np.random.default_rng(seed).integers(0, count, (NUM_RESAMPLES, count))])
    x_ranks, y_ranks = (pd.DataFrame(values.to_numpy(float)[pick]).rank(axis=1) for values in (x, y))
    rho = x_ranks.corrwith(y_ranks, axis=1)
    low, high = np.nanpercentile(rho[1:], INTERVAL)
    return rho[0], low, high


# ---- small multiples of rounds ----

def acceptance_histograms(table: pd.DataFrame) -> Figure | None:
    """A panel per layer: the share of rounds in which 0, 1, ... γ drafted tokens were accepted, stages side by side."""
    columns = numbered_columns(table, "spec_accepted_hist_")
    rows = rows_with(drafts_of(table), columns[:1], "acceptance_histograms")
    rows = rows[rows[columns].sum(axis=1) > 0]
    if rows.empty:
        return None
    layers = sorted(rows["target_layer"].unique())
    counts = row_counts(len(layers), 4)
    figure, axes = panel_grid(counts, 1.3 + 0.7 / len(counts))
    stages = [stage for stage, _ in by_stage(rows)]
    for axis, layer in zip(itertools.chain(*axes), layers, strict=True):
        draw_histograms(axis, rows[rows["target_layer"] == layer], columns, stages)
        axis.set_title(f"ℓ = {layer}")
    join_axes(axes, "accepted tokens per round", "rounds (%)")
    head_line(figure, settings_line(rows))
    stage_legend(figure, stages)
    return figure


def draw_histograms(axis: Axes, rows: pd.DataFrame, columns: list[str], stages: list[str]) -> None:
    """Bars per number of accepted tokens, tipped by the stage's marker; where a stage has several rows, its last."""
    width = 0.8 / len(stages)
    for stage, points in by_stage(rows):
        look, counts = STAGES[stage], points[columns].iloc[-1].dropna().to_numpy(float)
        places = np.arange(len(counts)) + width * (stages.index(stage) - (len(stages) - 1) / 2)
        axis.bar(places, counts / counts.sum(), width=0.85 * width, color=look.color)
        tip = {"color": look.color, "markersize": 3.5, "markeredgecolor": "white", "markeredgewidth": 0.4}  # the bar's end stays visible
        axis.plot(places[counts > 0], counts[counts > 0] / counts.sum(), look.marker, **tip)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(9, integer=True))
    axis.grid(visible=False, axis="x")


def acceptance_by_position(table: pd.DataFrame) -> Figure | None:
    """A panel per stage, a line per draft: accept rate at draft position 1..γ among the rounds that reach it."""
    columns = numbered_columns(table, "spec_accept_at_")
    stages = by_stage(rows_with(drafts_of(table), columns[:1], "acceptance_by_position"))
    if not stages:
        return None
    figure, axes = panel_grid(row_counts(len(stages), 3), 2.2)
    labels = {}
    for axis, (stage, rows) in zip(itertools.chain(*axes), stages, strict=True):
        labels[axis] = draw_positions(axis, rows, columns)
        axis.set_title(stage, color=STAGES[stage].ink)
    join_axes(axes, "draft position", "accept rate where reached (%)")
    head_line(figure, settings_line(pd.concat([rows for _, rows in stages])))
    label_ends(figure, labels)
    return figure


def draw_positions(axis: Axes, rows: pd.DataFrame, columns: list[str]) -> list[tuple[str, float, Look]]:
    """A line per row, darker for later layers; returns labels of the lines' ends, of every second, third, ... of many."""
    labels, layers = [], sorted(rows["target_layer"].unique())
    for (_, row), name in zip(rows.iterrows(), point_names(rows, with_stage=False), strict=True):
        rates = row[columns].astype(float).dropna()
        look = STAGES[row["kind"]].shaded((layers.index(row["target_layer"]) + 1) / len(layers))
        axis.plot([int(column.rpartition("_")[2]) for column in rates.index], rates, color=look.color, marker=look.marker)
        labels.append((name, rates.iloc[-1], look))
    axis.xaxis.set_major_locator(ticker.MaxNLocator(9, integer=True))
    return labels[:: -max(1, -(-len(labels) // MAX_END_LABELS))]


def join_axes(axes: list[list[Axes]], x_label: str, y_label: str) -> None:
    """One scale for all panels, the y axis from 0; labels at the left and at the lowest panel of each column."""
    panels = list(itertools.chain(*axes))
    x_limits, top = [axis.get_xlim() for axis in panels], max(axis.get_ylim()[1] for axis in panels)
    for axis in panels:
        axis.set(xlim=(min(low for low, _ in x_limits), max(high for _, high in x_limits)), ylim=(-0.02 * top, 1.02 * top))
        label_y(axis, y_label)
    for row, following in itertools.zip_longest(axes, axes[1:], fillvalue=[]):
        for axis in row[1:]:
            axis.set_ylabel("")
            axis.tick_params(labelleft=False)
        for axis in row[len(following):]:
            axis.set_xlabel(x_label)


# ---- training ----

LOG_COLUMNS = {  # panel title and unit of y
    "loss": ("training loss", "per token"),
    "validation_loss": ("validation loss", "nats/token"),
    "validation_kl": ("validation KL(p‖q)", "nats/token"),
    "validation_ce": ("validation cross-entropy", "nats/token"),
    "validation_overlap": ("validation overlap", "Σ min(p, q)"),
    "validation_top1": ("validation top-1 accuracy", "tokens (%)"),
    "validation_agreement": ("validation top-1 agreement", "tokens (%)"),
}
NOT_DRAWN = {"validation_ppl"}  # exp of the cross-entropy


def training_curves(logs: list[Path]) -> Figure | None:
    """A panel for the training loss and one per validation figure, a line per run."""
    runs = {name: read_train_log(path) for name, path in zip(run_names(logs), logs, strict=True)}
    found = {column for log in runs.values() for column in log if column == "loss" or column.startswith("validation_")} - NOT_DRAWN
    columns = [column for column in LOG_COLUMNS if column in found] + sorted(found - set(LOG_COLUMNS))
    if not columns:
        print("plots: training_curves: left out, no training log with a loss")
        return None
    figure, axes = panel_grid(row_counts(len(columns), 3), 2.1)
    looks = dict(zip(runs, itertools.cycle(RUN_LOOKS)))
    for axis, column in zip(itertools.chain(*axes), columns, strict=True):
        for name, log in runs.items():
            draw_run(axis, log, column, looks[name])
        title, unit = LOG_COLUMNS.get(column, (column.replace("_", " "), ""))
        axis.set(xlabel="optimizer step", title=title)
        label_y(axis, unit)
    keys = [Line2D([], [], color=look.color, marker=look.marker, label=name) for name, look in looks.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=2 if len(keys) > 1 else 1)
    return figure


def run_names(logs: list[Path]) -> list[str]:
    """The folder of each log, by its whole path where two folders have one name."""
    names = [path.parent.name for path in logs]
    return [name if names.count(name) == 1 else str(path.parent) for name, path in zip(names, logs, strict=True)]


def draw_run(axis: Axes, log: pd.DataFrame, column: str, look: Look) -> None:
    """One run's `column` by step; a resumed run's repeated steps once. The noisy training loss gets a running mean."""
    if column not in log:
        return
    rows = log.dropna(subset=[column]).drop_duplicates("step", keep="last")
    if column.startswith("validation_"):
        axis.plot(rows["step"], rows[column], color=look.color, marker=look.marker)
        return
    axis.plot(rows["step"], rows[column], color=look.color, linewidth=0.5, alpha=0.35)
    smooth = rows[column].rolling(max(1, len(rows) // 20), center=True, min_periods=1).mean()
    axis.plot(rows["step"], smooth, color=look.color)


# ---- step times ----

STEP_TIMES = "step_times.json"  # made by benchmark_torch_compile.py
STEP_LOOKS = {
    "transformers": _look("#000000", "*"),
    "transformers static": _look("#999999", "v"),
    "transformers+compile default": _look("#E69F00", "^"),
    "transformers+compile reduce-overhead": _look("#D55E00", "s"),
    "transformers+compile max-autotune": _look("#CC79A7", "v"),
    "transformers+compile max-autotune-no-cudagraphs": _look("#F0E442", "^"),
    "engine": _look("#0072B2", "o"),
    "engine torch": _look("#56B4E9", "D"),
    "engine+graph": _look("#009E73", "D"),
}


def read_step_times(path: Path) -> pd.DataFrame:
    """The rows of a step_times.json that have a time. Raises UserError with the remedy."""
    try:
        rows = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: no step times ({error}); give the output folder of benchmark_torch_compile.py") from error
    rows = rows.reindex(columns=[*rows.columns, *{"ms_per_step"} - set(rows)]).dropna(subset=["ms_per_step"])
    unknown = sorted(set(rows.get("implementation", [])) - set(STEP_LOOKS))
    if unknown:
        raise UserError(f"{path}: unknown implementation {unknown[0]!r}; known: {', '.join(STEP_LOOKS)}")
    return rows


def step_times(rows: pd.DataFrame) -> Figure | None:
    """A row of panels per variant, a column per context: tokens of a step against its ms, a line per implementation."""
    if rows.empty:
        print("plots: step_times: left out, no row with ms_per_step")
        return None
    names, contexts = list(rows["variant"].unique()), sorted(rows["context"].unique())
    figure, axes = panel_grid([len(contexts)] * len(names), 2.1)
    for axis, (name, context) in zip(itertools.chain(*axes), itertools.product(names, contexts), strict=True):
        draw_steps(axis, rows[(rows["variant"] == name) & (rows["context"] == context)])
        axis.set_title(f"{name}, context {context}")
    first = rows.iloc[0]
    head_line(figure, f"{first['model']}, {first['dtype']}, {first['device']}; bars: quartiles; dashed: reading weights, keys and values at the measured bandwidth")
    drawn = [implementation for implementation in STEP_LOOKS if implementation in set(rows["implementation"])]
    keys = [Line2D([], [], color=STEP_LOOKS[key].color, marker=STEP_LOOKS[key].marker, label=key) for key in drawn]
    figure.legend(handles=keys, loc="outside lower center", ncols=2 if len(contexts) > 1 else 1)
    return figure


def draw_steps(axis: Axes, rows: pd.DataFrame) -> None:
    """Lines with quartiles, and the time that the bytes of a step take at the measured bandwidth."""
    widths = sorted(rows["width"].unique())
    for name, steps in rows.groupby("implementation", sort=False):
        look, middle = STEP_LOOKS[name], steps["ms_per_step"]
        bars = [middle - steps["ms_per_step_q1"], steps["ms_per_step_q3"] - middle]
        axis.errorbar(steps["width"], middle, yerr=bars, color=look.color, marker=look.marker, elinewidth=0.8, capsize=1.5)
    floor = 1000 * rows["bytes_per_step"].iloc[0] / rows["bandwidth_bytes_per_s"].iloc[0]
    axis.axhline(floor, color=GREY, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(ticker.FixedLocator(widths))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda width, _: f"{width:g}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set(xlabel="tokens of a step", ylabel="ms per step")
    scale_axis(axis, "y", pd.concat([rows["ms_per_step_q1"], rows["ms_per_step_q3"], pd.Series([floor])]))
    if axis.get_yscale() == "linear":
        axis.set_ylim(bottom=0)


# ---- files ----

FIGURES = {
    figure.__name__: figure
    for figure in (
        quality_by_layer, acceptance_by_layer, speedup_vs_quality, potential_vs_tokens_per_call, acceptance_histograms, predicted_speedup,
        acceptance_by_position,
    )
}


def plot_results(folder: Path, train_logs: list[Path] | None = None) -> list[Path]:
    """Draw every figure of `folder`/results.csv into `folder`/plots and return the paths of the files.

    `train_logs` default to the logs beside the table's checkpoints. A figure of an earlier call that is left out now
    is removed. Raises UserError where the table or a log cannot be read.
    """
    table = read_results(folder / "results.csv")
    logs = train_logs_of(table) if train_logs is None else train_logs
    (folder / "plots").mkdir(exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for name, draw in FIGURES.items():
            written += write_figure(draw(table), folder / "plots" / name)
        written += write_figure(training_curves(logs), folder / "plots" / "training_curves")
    return written


def plot_step_times(folder: Path) -> list[Path]:
    """Draw `folder`/step_times.json into `folder`/plots and return the paths of the files. Raises UserError where it cannot be read."""
    rows = read_step_times(folder / STEP_TIMES)
    (folder / "plots").mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        return write_figure(step_times(rows), folder / "plots" / "step_times")


def write_figure(figure: Figure | None, stem: Path) -> list[Path]:
    """`figure` as PNG and PDF, without a date, so that equal results make equal files."""
    paths = {stem.with_suffix(".png"): {}, stem.with_suffix(".pdf"): {"CreationDate": None}}
    for path, metadata in paths.items():
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            figure.savefig(path, metadata=metadata)
    return list(paths) if figure else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_dir", type=Path, help=f"folder that holds results.csv or {STEP_TIMES}")
    parser.add_argument("--train_logs", type=Path, nargs="*", help="train_log.jsonl files (default: those beside the checkpoints)")
    args = parser.parse_args()
    has_step_times = (args.results_dir / STEP_TIMES).exists()
    for path in plot_step_times(args.results_dir) if has_step_times else plot_results(args.results_dir, args.train_logs):
        print(path)


if __name__ == "__main__":
    run(main)
