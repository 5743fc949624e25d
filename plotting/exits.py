"""Every figure of the suite, drawn from result files alone: no model is loaded, nothing is measured.

    python -m plotting.exits results/chat_layers
    python -m plotting.exits results/chat_layers --train_logs runs/layer3/train_log.csv runs/layer7/train_log.csv

Reads `results.csv` in the given folder and the training logs (by default those beside the checkpoints that the table
names), or, where benchmark_torch_compile.py wrote it, `step_times.json`. Writes `plots/<figure>.png` (300 dpi) and `.pdf`.
A panel whose numbers are missing is left out, and a line says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from running.command_line import UserError, run

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plotting.capacity import capacity_pareto, kinds_side_by_side
from plotting.parts import (
    COLUMN_INCHES,  # noqa: F401 (plotting/trees.py takes it from here)
    DASHES,
    GREY,
    MEASURED_TAU,
    PAGE_INCHES,
    STAGES,
    STYLE,
    WIDE_INCHES,
    Look,
    Panel,
    beside,  # noqa: F401 (plotting/trees.py takes it from here)
    by_series,
    distinct_names,
    drafts_of,
    draw_points,
    draw_steps_up,
    head_line,
    interval_lengths,  # noqa: F401 (plotting/trees.py takes it from here)
    interval_note,
    kind_parts,
    kind_place,
    label_ends,
    label_points,
    label_y,
    last_of_layer,
    layer_axis,
    legend_below,
    look_of,
    natural,
    new_look,
    panel_grid,
    pareto_front,
    pixels_per_point,  # noqa: F401 (plotting/trees.py takes it from here)
    point_names,
    read_table,
    row_counts,
    rows_with,
    run_looks,
    scale_axis,
    series_legend,
    settings_line,
    settle,
    with_series,
    words_of,
    write_figure,
)
from running.run_files import make_output_dir, read_csv_log

MAX_LABELS_WITH_SERIES = 9  # with more points than this, the series moves from the labels to a legend
MAX_POINTS_IN_COLUMN, MAX_POINTS_IN_WIDE = 5, 24  # a figure of more labelled points is wider
MAX_END_LABELS = 12  # as many as fit beside a panel
MAX_NAMED_LINES = 6  # with more lines than this, their names move from beside a panel to a legend
STACK_TONES = mpl.colors.LinearSegmentedColormap.from_list("stack", ["#DCE6EE", "#9CC7E8", "#0072B2", "#0B2545"])
MAX_BARS = 5  # side by side; more series are stacked bars
FEWEST_RANKED = 4  # drafts; a rank correlation of fewer says nothing
DISTANCES = {"kl": ("KL(p‖q)", " (nats/token)"), "tv": ("TV distance of p and q", "")}  # of a draft from the target: name and unit
MANY_RUNS = 12  # with more than this, only the smoothed loss is drawn, and a marker at each line's end
NUM_RESAMPLES, INTERVAL = 2000, (2.5, 97.5)  # measuring/metrics.py's, which needs torch
RUN_COLORS, RUN_MARKERS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#000000", "#CC79A7", "#56B4E9"), "osD^*vP"

# ---- tables ----

def read_results(path: Path) -> pd.DataFrame:
    """The rows of a results.csv by layer and step, infinite numbers as missing. Raises UserError with the remedy."""
    table = read_table(path, "evaluate_checkpoints.py")
    table = table.reindex(columns=[*table, *(column for column in ("checkpoint", "step") if column not in table)])
    layered = table[table.get("kind") != "model"]  # an independent model has no layer
    empty = [column for column, rows in (("kind", table), ("target_layer", layered)) if column not in rows or rows[column].isna().any()]
    if empty or not len(table):
        raise UserError(f"{path}: rows without {' and '.join(empty) or 'number'}; give the output folder of evaluate_checkpoints.py")
    try:
        table = with_series(table.replace([np.inf, -np.inf], np.nan))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return table.sort_values(["target_layer", "step"], kind="stable", ignore_index=True)


def read_train_log(path: Path) -> pd.DataFrame:
    """The rows of a train_log.csv by step; a torn last line is left out. Raises UserError with the remedy."""
    if not path.exists():
        raise UserError(f"{path}: no such file; give the train_log.csv of a run")
    rows = read_csv_log(path)
    if "step" not in rows:
        raise UserError(f"{path}: no train_log.csv, as it has no column step; give that of a run")
    return rows.sort_values("step", kind="stable")


def train_logs_of(table: pd.DataFrame) -> list[Path]:
    """The training logs that lie beside the checkpoints of `table`'s tuned exits."""
    return [folder / "train_log.csv" for folder in tuned_folders(table) if (folder / "train_log.csv").exists()]


def tuned_folders(table: pd.DataFrame) -> dict[Path, str]:
    """The folder of each tuned exit's checkpoint and its kind."""
    tuned = table[table["kind"].map(kind_parts).notna()].dropna(subset=["checkpoint"])
    return {Path(checkpoint).parent: kind for checkpoint, kind in zip(tuned["checkpoint"], tuned["kind"], strict=True)}


def dataset_names(table: pd.DataFrame, figure_name: str) -> list[str]:
    """Names of the quality data sets; a printed line names the figure that has none."""
    names = [column.removesuffix("_kl") for column in table if column.endswith("_kl")]
    if not names:
        print(f"plots: {figure_name}: left out, no column <data set>_kl")
    return names


def distance_column(drafts: pd.DataFrame, dataset: str) -> str:
    """The column of DISTANCES that all `drafts` have: KL, or TV where one knows a part of the vocabulary only, as its KL is infinite."""
    kl, tv = (f"{dataset}_{distance}" for distance in DISTANCES)
    return tv if tv in drafts and drafts[kl].isna().any() else kl


def distance_label(column: str, place: str = "") -> str:
    """What an axis of such a column shows; `place` stands behind its name."""
    name, unit = DISTANCES[column.rsplit("_", 1)[1]]
    return f"{name}{place}{unit}"


def numbered_columns(table: pd.DataFrame, prefix: str) -> list[str]:
    """Columns `<prefix><number>` in the order of their numbers."""
    columns = [column for column in table if re.fullmatch(re.escape(prefix) + r"\d+", column)]
    return sorted(columns, key=lambda column: int(column.removeprefix(prefix)))


# ---- figures with the layer on the x axis ----

LineEnds = dict[str, tuple[float, Look]]  # of each series its value at the last layer


def quality_by_layer(table: pd.DataFrame) -> Figure | None:
    """A row of panels per quality data set: layer against the distance from the target, perplexity and top-1 accuracy of the text."""
    grid, drafts = [], drafts_of(table)
    for dataset in dataset_names(table, "quality_by_layer"):
        distance = distance_column(drafts, dataset)
        panels = [
            Panel(distance, distance_label(distance), drafts, dataset, wide_range=distance.endswith("_kl")),
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


def layer_figure(grid: list[list[Panel]], draw: Callable[[Axes, Panel], LineEnds], head: str) -> Figure | None:
    """One row of panels per row of `grid`; few series are named beside the last panel where all of them end there, others below."""
    grid = [panels for panels in grid if panels]
    if not grid:
        return None
    figure, axes = panel_grid([len(panels) for panels in grid], 2.1)
    head_line(figure, head)
    labels = {}
    for row, panels in zip(axes, grid, strict=True):
        ends = [draw(axis, panel) for axis, panel in zip(row, panels, strict=True)]
        labels[row[-1]] = [(name, y, look) for name, (y, look) in ends[-1].items()]
    every = pd.concat([panel.rows for panel in itertools.chain(*grid)])
    count = every["series"].nunique()
    if count <= MAX_NAMED_LINES and all(len(named) == count for named in labels.values()):
        label_ends(figure, labels)
    else:
        figure.set_figheight(figure.get_figheight() + 0.35)
        series_legend(figure, every)
    return figure


def draw_quality(axis: Axes, panel: Panel) -> LineEnds:
    for value in panel.rows.loc[panel.rows["kind"] == "target", panel.column]:
        axis.axhline(value, color=STAGES["target"].color, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
    if panel.wide_range:
        scale_axis(axis, "y", panel.rows[panel.column])
    return draw_layers(axis, panel)


def draw_acceptance(axis: Axes, panel: Panel) -> LineEnds:
    ends = draw_layers(axis, panel, interval=True)
    axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])  # so that markers at 0 are whole
    return ends


def draw_layers(axis: Axes, panel: Panel, *, interval: bool = False) -> LineEnds:
    """A line with markers per series, through the last row of each layer; that of a model, which has no layer, is horizontal."""
    series, ends = by_series(panel.rows), {}
    apart = min([0.9, *np.diff(np.unique(panel.rows["target_layer"].dropna()))])
    step = min(0.1, 0.8 * apart / len(series)) if interval else 0.0  # so that intervals stay apart
    for index, (name, look, rows) in enumerate(series):
        last, dodge = last_of_layer(rows), step * (index - (len(series) - 1) / 2)
        axis.plot(last["target_layer"] + dodge, last[panel.column], color=look.color, linestyle=look.dashes)
        draw_points(axis, rows, (rows["target_layer"] + dodge, panel.column), interval=interval)
        for value in rows.loc[rows["target_layer"].isna(), panel.column]:
            axis.axhline(value, color=look.color, linewidth=0.9)
        ends[name] = [*rows[panel.column], *last[panel.column]][-1], look
    layer_axis(axis, panel.rows["target_layer"])
    label_y(axis, panel.label)
    axis.set_title(panel.title)
    return ends


# ---- figures with one point per draft ----

def speedup_vs_quality(table: pd.DataFrame) -> Figure | None:
    """Distance from the target against measured speedup, a panel per quality data set, with the Pareto front."""
    drafts = drafts_of(table)
    columns = [distance_column(drafts, dataset) for dataset in dataset_names(table, "speedup_vs_quality")]
    return point_figure(drafts, columns, draw_pareto, "speedup_vs_quality")


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
    most = max(len(rows) for _, rows in panels)
    figure, axes = panel_grid(row_counts(len(panels), 2), 3.1)
    if len(panels) == 1 and most > MAX_POINTS_IN_COLUMN:
        figure.set_size_inches(*((WIDE_INCHES, 4) if most <= MAX_POINTS_IN_WIDE else (PAGE_INCHES, 4.6)))
    for axis, (column, rows) in zip(itertools.chain(*axes), panels, strict=True):
        for _, _, points in by_series(rows):
            draw_points(axis, points, (points[column], "spec_speedup"), interval=True)
        draw(axis, rows, column)
    head_line(figure, settings_line(table, interval_note(panels[0][1], "spec_speedup", name)))
    suffix = "series" if most <= MAX_LABELS_WITH_SERIES else None
    if suffix is None:
        series_legend(figure, pd.concat([rows for _, rows in panels]))
    settle(figure)
    for axis, (column, rows) in zip(itertools.chain(*axes), panels, strict=True):
        label_points(axis, rows, (column, "spec_speedup"), point_names(rows, suffix))
    return figure


def draw_pareto(axis: Axes, rows: pd.DataFrame, column: str) -> None:
    """Axes, the line of vanilla decoding, and the front: the best speedup that is reached up to each distance."""
    scale_axis(axis, "x", rows[column])
    axis.margins(0.12)
    axis.axhline(1, color="black", linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
    left, right = axis.get_xlim()
    front = pareto_front(rows, column, "spec_speedup")
    best = front["spec_speedup"].tolist()
    draw_steps_up(axis, [*front[column], right], [*best, best[-1]])
    axis.set(xlim=(left, right), xlabel=distance_label(column, f" on {column.rsplit('_', 1)[0]}"), ylabel="measured speedup over vanilla (×)")
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
    series_legend(figure, every)
    settle(figure)
    for axis, panel in pairs:
        label_points(axis, panel.rows, (panel.column, MEASURED_TAU), point_names(panel.rows, None))
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
    for _, _, points in by_series(panel.rows):
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
    """A panel per layer: the share of rounds in which 0, 1, ... γ drafted tokens were accepted, few series side by side or many stacked."""
    columns = numbered_columns(table, "spec_accepted_hist_")
    rows = rows_with(drafts_of(table), columns[:1], "acceptance_histograms")
    rows = rows[rows[columns].sum(axis=1) > 0]
    if rows.empty:
        return None
    panels = [(f"ℓ = {layer:g}" if layer == layer else "no layer", group) for layer, group in rows.groupby("target_layer", dropna=False)]
    draw = bar_panels if rows["series"].nunique() <= MAX_BARS else stack_panels
    figure = draw(panels, columns, [name for name, _, _ in by_series(rows)])
    head_line(figure, settings_line(rows))
    return figure


def bar_panels(panels: list[tuple[str, pd.DataFrame]], columns: list[str], series: list[str]) -> Figure:
    """A panel with bars side by side per (title, rows)."""
    counts = row_counts(len(panels), 4)
    figure, axes = panel_grid(counts, 1.3 + 0.7 / len(counts))
    for axis, (title, rows) in zip(itertools.chain(*axes), panels, strict=True):
        draw_bars(axis, rows, columns, series)
        axis.set_title(title)
    join_axes(axes, "accepted tokens per round", "rounds (%)")
    series_legend(figure, pd.concat([rows for _, rows in panels]))
    return figure


def draw_bars(axis: Axes, rows: pd.DataFrame, columns: list[str], series: list[str]) -> None:
    """Bars per number of accepted tokens, tipped by the series' marker; where a series has several rows, its last."""
    width = 0.8 / len(series)
    for name, look, points in by_series(rows):
        counts = points[columns].iloc[-1].dropna().to_numpy(float)
        places = np.arange(len(counts)) + width * (series.index(name) - (len(series) - 1) / 2)
        axis.bar(places, counts / counts.sum(), width=0.85 * width, color=look.color)
        tip = {"markersize": 3.5, "markeredgecolor": "white", "markeredgewidth": 0.4}  # the bar's end stays visible
        axis.plot(places[counts > 0], counts[counts > 0] / counts.sum(), linestyle="none", **look.marks | tip)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(9, integer=True))
    axis.grid(visible=False, axis="x")


def stack_panels(panels: list[tuple[str, pd.DataFrame]], columns: list[str], series: list[str]) -> Figure:
    """A panel per (title, rows) with a stacked bar per series, which are named at the left."""
    counts = row_counts(len(panels), 4)
    figure, axes = panel_grid(counts, 0.55 + 0.15 * len(series))
    figure.set_size_inches(PAGE_INCHES, figure.get_figheight() + 0.6)
    for axis, (title, rows) in zip(itertools.chain(*axes), panels, strict=True):
        draw_stacks(axis, rows, columns, series)
        axis.set(title=title, xlim=(0, 1), ylim=(len(series) - 0.4, -0.6), yticks=[])
        axis.xaxis.set_major_locator(ticker.FixedLocator([0, 0.5, 1]))
        axis.xaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=""))
    for row, following in itertools.zip_longest(axes, axes[1:], fillvalue=[]):
        row[0].set_yticks(range(len(series)), series)
        row[0].tick_params(axis="y", length=0)
        for axis in row[len(following):]:
            axis.set_xlabel("rounds (%)")
    steps = mpl.cm.ScalarMappable(mpl.colors.Normalize(-0.5, len(columns) - 0.5), STACK_TONES.resampled(len(columns)))
    bar = figure.colorbar(steps, ax=list(itertools.chain(*axes)), location="bottom", aspect=50, shrink=0.6, label="accepted tokens per round")
    bar.ax.grid(visible=False)
    bar.ax.xaxis.set_major_locator(ticker.MaxNLocator(17, integer=True))
    return figure


def draw_stacks(axis: Axes, rows: pd.DataFrame, columns: list[str], series: list[str]) -> None:
    """A horizontal bar per series at its place among all `series`; where one has several rows, its last."""
    style = {"color": STACK_TONES.resampled(len(columns))(range(len(columns))), "height": 0.75, "edgecolor": "white", "linewidth": 0.2}
    for name, _, points in by_series(rows):
        counts = points[columns].iloc[-1].fillna(0).to_numpy(float)
        shares = counts / counts.sum()
        axis.barh([series.index(name)] * len(columns), shares, left=np.cumsum(shares) - shares, **style)
    axis.grid(visible=False, axis="y")


def acceptance_by_position(table: pd.DataFrame) -> Figure | None:
    """A panel per kind, a line per draft: accept rate at draft position 1..γ among the rounds that reach it."""
    columns = numbered_columns(table, "spec_accept_at_")
    rows = rows_with(drafts_of(table), columns[:1], "acceptance_by_position")
    if rows.empty:
        return None
    kinds = sorted(rows["kind"].unique(), key=kind_place)
    figure, axes = panel_grid(row_counts(len(kinds), 3), 2.2 if len(kinds) <= 6 else 1.8)
    labels = {}
    for axis, kind in zip(itertools.chain(*axes), kinds, strict=True):
        labels[axis] = draw_positions(axis, rows[rows["kind"] == kind], columns)
        axis.set_title(kind, color=look_of(kind).ink)
    join_axes(axes, "draft position", "accept rate (%)")
    head_line(figure, settings_line(rows, "accept rate: of the rounds that reach the position"))
    label_ends(figure, labels)
    return figure


def draw_positions(axis: Axes, rows: pd.DataFrame, columns: list[str]) -> list[tuple[str, float, Look]]:
    """A line per row, darker for later layers; returns labels of the lines' ends, of every second, third, ... of many."""
    labels, share = [], rows["target_layer"].rank(method="dense", pct=True).fillna(1)
    for (index, row), name in zip(rows.iterrows(), point_names(rows, "run"), strict=True):
        rates = row[columns].astype(float).dropna()
        look = replace(look_of(row["kind"]).shaded(share[index]), dashes=row["look"].dashes)
        axis.plot([int(column.rpartition("_")[2]) for column in rates.index], rates, linestyle=look.dashes, **look.marks)
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

LOG_COLUMNS = {  # panel title and unit of y; with several validation sets their names stand behind "validation_"
    "loss": ("training loss", "per token"),
    "validation_loss": ("validation loss", "nats/token"),
    "validation_kl": ("validation KL(p‖q)", "nats/token"),
    "validation_ce": ("validation cross-entropy", "nats/token"),
    "validation_overlap": ("validation overlap", "Σ min(p, q)"),
    "validation_top1": ("validation top-1 accuracy", "tokens (%)"),
    "validation_agreement": ("validation top-1 agreement", "tokens (%)"),
}
NOT_DRAWN = "_ppl"  # exp of the cross-entropy


def training_curves(logs: list[Path], kinds: dict[Path, str] | None = None) -> Figure | None:
    """A panel for the training loss and one per validation figure, a line per run; `kinds` of the exits in the logs' folders, where known."""
    runs = styled_runs(logs, kinds or {})
    found = {column for log, _ in runs.values() for column in log if column == "loss" or column.startswith("validation_") and log[column].notna().any()}
    columns = sorted((column for column in found if not column.endswith(NOT_DRAWN)), key=lambda column: log_panel(column)[2:])
    if not columns:
        print("plots: training_curves: left out, no training log with a loss")
        return None
    figure, axes = panel_grid(row_counts(len(columns), 3), 2.1)
    for axis, column in zip(itertools.chain(*axes), columns, strict=True):
        for log, look in runs.values():
            draw_run(axis, log, column, look, many=len(runs) > MANY_RUNS)
        title, unit, *_ = log_panel(column)
        axis.set(xlabel="optimizer step", title=title)
        label_y(axis, unit)
    legend_below(figure, [Line2D([], [], linestyle=look.dashes, label=name, **look.marks) for name, (_, look) in runs.items()])
    return figure


def log_panel(column: str) -> tuple[str, str, int, str]:
    """Title, unit of y and place of a log's column."""
    if column in LOG_COLUMNS:
        return (*LOG_COLUMNS[column], list(LOG_COLUMNS).index(column), "")
    source, _, figure = column.removeprefix("validation_").rpartition("_")
    if f"validation_{figure}" not in LOG_COLUMNS:
        return column.replace("_", " "), "", len(LOG_COLUMNS), column
    title, unit, place, _ = log_panel(f"validation_{figure}")
    return f"{title}, {source}", unit, place, source


def styled_runs(logs: list[Path], kinds: dict[Path, str]) -> dict[str, tuple[pd.DataFrame, Look]]:
    """Name -> log and look of each run. Where the runs are of several kinds, all known, they have their kinds' looks in tones."""
    names = dict(zip(logs, log_names(logs), strict=True))
    found = {log: kinds.get(log.parent) or kind_in(log.parent) for log in logs}
    if len(set(found.values())) == 1 or None in found.values():
        ordered = sorted(logs, key=lambda log: natural(names[log]))
        looks = [new_look(RUN_COLORS[n % 7], RUN_MARKERS[(n + n // 7) % 7], dashes=DASHES[n // 7 % len(DASHES)]) for n in range(len(logs))]
    else:
        ordered = sorted(logs, key=lambda log: (kind_place(found[log]), natural(names[log])))
        looks = [look for kind, group in itertools.groupby(ordered, key=found.get) for look in run_looks(look_of(kind), len(list(group)))]
    return {names[log]: (read_train_log(log), look) for log, look in zip(ordered, looks, strict=True)}


def log_names(logs: list[Path]) -> list[str]:
    """What tells the logs' folders apart: words of their own names where these differ, or else of their paths."""
    folders = [log.parent.name for log in logs]
    names = distinct_names([log.parent.parts if len(set(folders)) < len(logs) else (log.parent.name,) for log in logs])
    return names if all(names) else folders


def kind_in(folder: Path) -> str | None:
    """The kind that a run's folder, or else one around it, has in its name."""
    return next((str(parts) for part in reversed(folder.parts) for parts in map(kind_parts, words_of(part)) if parts), None)


def draw_run(axis: Axes, log: pd.DataFrame, column: str, look: Look, *, many: bool) -> None:
    """One run's `column` by step; a resumed run's repeated steps once. The noisy training loss gets a running mean."""
    if column not in log:
        return
    rows = log.dropna(subset=[column]).drop_duplicates("step", keep="last")
    style = {"color": look.color, "linestyle": look.dashes}
    if column.startswith("validation_"):
        axis.plot(rows["step"], rows[column], markevery=slice(-1, None) if many else None, **look.marks | style)
        return
    if not many:
        axis.plot(rows["step"], rows[column], color=look.color, linewidth=0.5, alpha=0.35)
    smooth = rows[column].rolling(max(1, len(rows) // 20), center=True, min_periods=1).mean()
    axis.plot(rows["step"], smooth, **style)


# ---- step times ----

STEP_TIMES = "step_times.json"  # made by benchmark_torch_compile.py
STEP_LOOKS = {
    "transformers": new_look("#000000", "*"),
    "transformers static": new_look("#999999", "v"),
    "transformers+compile default": new_look("#E69F00", "^"),
    "transformers+compile reduce-overhead": new_look("#D55E00", "s"),
    "transformers+compile max-autotune": new_look("#CC79A7", "v"),
    "transformers+compile max-autotune-no-cudagraphs": new_look("#F0E442", "^"),
    "engine": new_look("#0072B2", "o"),
    "engine torch": new_look("#56B4E9", "D"),
    "engine+graph": new_look("#009E73", "D"),
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
        acceptance_by_position, capacity_pareto, kinds_side_by_side,
    )
}


def plot_results(folder: Path, train_logs: list[Path] | None = None) -> list[Path]:
    """Draw every figure of `folder`/results.csv into `folder`/plots and return the paths of the files.

    `train_logs` default to the logs beside the table's checkpoints. A figure of an earlier call that is left out now
    is removed. Raises UserError where the table or a log cannot be read.
    """
    table = read_results(folder / "results.csv")
    logs = train_logs_of(table) if train_logs is None else train_logs
    make_output_dir(str(folder / "plots"))
    written = []
    with mpl.rc_context(STYLE):
        for name, draw in FIGURES.items():
            written += write_figure(draw(table), folder / "plots" / name)
        written += write_figure(training_curves(logs, tuned_folders(table)), folder / "plots" / "training_curves")
    return written


def plot_step_times(folder: Path) -> list[Path]:
    """Draw `folder`/step_times.json into `folder`/plots and return the paths of the files. Raises UserError where it cannot be read."""
    rows = read_step_times(folder / STEP_TIMES)
    make_output_dir(str(folder / "plots"))
    with mpl.rc_context(STYLE):
        return write_figure(step_times(rows), folder / "plots" / "step_times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_dir", type=Path, help=f"folder that holds results.csv or {STEP_TIMES}")
    parser.add_argument("--train_logs", type=Path, nargs="*", help="train_log.csv files (default: those beside the checkpoints)")
    args = parser.parse_args()
    has_step_times = (args.results_dir / STEP_TIMES).exists()
    for path in plot_step_times(args.results_dir) if has_step_times else plot_results(args.results_dir, args.train_logs):
        print(path)


if __name__ == "__main__":
    run(main)
