"""What a bigger exit buys: the exits of a table by their cost and acceptance, and every figure of theirs side by side.

plotting/exits.py draws both beside its own. "Weight-bound" means that a step takes the time in which its weights are read: a draft step costs c target
steps, and verifying γ + 1 tokens as much as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from plotting.parts import (
    BACKDROP,
    GREY,
    MEASURED_TAU,
    PAGE_INCHES,
    WIDE_INCHES,
    beside,
    by_series,
    drafts_of,
    draw_points,
    draw_steps_up,
    head_line,
    interval_lengths,
    interval_note,
    label_points,
    label_y,
    pareto_front,
    pixels_per_point,
    point_names,
    rows_with,
    series_legend,
    settings_line,
    settle,
    spread,
)

COST, ALPHA = "cost_ratio_bytes", "spec_token_accept_rate"
GAMMAS = np.arange(1, 65)  # drafted tokens per round among which the best is chosen
SPEEDUPS = (1, 1.1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 15, 20)  # of the lines of equal speedup
SPEEDUP_GAPS = (8, 22)  # points between two of their names at the right, and at the top
BEST = "weight_bound_speedup"
BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
ROW_INCHES = 0.165
MAX_NAMED_POINTS = 9  # with more, the series move from the labels to a legend
MAX_POINTS_IN_WIDE = 24  # a figure of more is as wide as a page


def weight_bound_speedup(alpha: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """The largest E[τ] / (1 + γ·c) over GAMMAS for acceptance `alpha` and cost ratio `cost`, arrays that broadcast.

    E[τ] = 1 + α + ... + α^γ (Leviathan et al., theorem 3.8, with the tokens of a round verified at the price of one).
    """
    alpha, cost = np.asarray(alpha, float)[..., None], np.asarray(cost, float)[..., None]
    tokens = 1 + np.cumsum(alpha ** GAMMAS, axis=-1)
    return (tokens / (1 + GAMMAS * cost)).max(axis=-1)


# ---- cost against acceptance ----

def capacity_pareto(table: pd.DataFrame) -> Figure | None:
    """Cost ratio by bytes against acceptance, a point per exit, over lines of equal weight-bound speedup; the efficient exits ringed."""
    rows = rows_with(drafts_of(table), [COST, ALPHA], "capacity_pareto")
    if len(rows) < 2:
        print(f"plots: capacity_pareto: left out, {len(rows)} exits with {COST} and {ALPHA} are too few")
        return None
    figure = Figure(figsize=(WIDE_INCHES, 4.2) if len(rows) <= MAX_POINTS_IN_WIDE else (PAGE_INCHES, 4.8), layout="constrained")
    axis, front = figure.subplots(), pareto_front(rows, COST, ALPHA)
    for _, _, points in by_series(rows):
        draw_points(axis, points, (points[COST], ALPHA), interval=True)
    draw_steps_up(axis, front[COST], front[ALPHA])
    axis.plot(front[COST], front[ALPHA], "o", markersize=8, markerfacecolor="none", markeredgecolor="black", markeredgewidth=0.8)
    axis.margins(0.08)
    axis.set(xlim=(max(0, axis.get_xlim()[0]), axis.get_xlim()[1]), ylim=(max(0, axis.get_ylim()[0]), min(1.02, axis.get_ylim()[1])))
    axis.set(xlabel="cost ratio c: bytes that a draft step reads / bytes that a target step reads")
    label_y(axis, "accept rate α per token (%)")
    note = "ringed: no exit is both cheaper and better; light lines: equal S, the weight-bound speedup E[τ]/(1+γc) at the best γ"
    head_line(figure, settings_line(rows, "; ".join(filter(None, [interval_note(rows, ALPHA, "capacity_pareto"), note]))))
    named = len(rows) <= MAX_NAMED_POINTS
    if not named:
        series_legend(figure, rows)
    draw_speedups(axis)
    label_points(axis, rows, (COST, ALPHA), point_names(rows, "series" if named else None), bold=rows.index.isin(front.index))
    return figure


def draw_speedups(axis: Axes) -> None:
    """Lines of equal weight-bound speedup across the whole of `axis`, named where they leave it. Settles the figure."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    costs, alphas = np.linspace(left, right, 300), np.linspace(bottom, min(top, 1), 400)
    speedups = weight_bound_speedup(alphas[:, None], costs)  # (400, 300), rising with alpha
    names: dict[str, list] = {"right": [], "top": []}
    for speedup in SPEEDUPS:
        line = np.array([np.interp(speedup, column, alphas, left=np.nan, right=np.nan) for column in speedups.T])
        if np.isnan(line).all():
            continue
        vanilla = {"color": "black", "linestyle": (0, (4, 3))} if speedup == 1 else {"color": "#B5B5B5"}
        axis.plot(costs, line, linewidth=0.7, zorder=1, gid=BACKDROP, scalex=False, scaley=False, **vanilla)
        last = np.flatnonzero(~np.isnan(line))[-1]
        names["right" if last == len(costs) - 1 else "top"].append((f"{speedup:g}×", costs[last], line[last]))
    style = {"fontsize": 6.5, "color": GREY}
    at_right = [axis.text(1, y, text, va="center", transform=beside(axis, 3, axis.get_yaxis_transform()), **style) for text, _, y in names["right"]]
    on_top = [axis.text(x, 1.01, text, ha="center", va="bottom", transform=axis.get_xaxis_transform(), **style) for text, x, _ in names["top"]]
    settle(axis.figure)
    move_apart(axis, at_right, "y", SPEEDUP_GAPS[0])
    move_apart(axis, on_top, "x", SPEEDUP_GAPS[1])


def move_apart(axis: Axes, texts: list[Text], along: str, points: float) -> None:
    """Move `texts`, which lie at data coordinates `along` "x" or "y", to lie `points` apart beside `axis`, clear of its corners. Needs a settled figure."""
    index, gap = "xy".index(along), points * pixels_per_point(axis.figure)
    low, high = (edge[index] for edge in (axis.get_window_extent().min + gap / 2, axis.get_window_extent().max - gap / 2))
    places = [axis.transData.transform(text.get_position())[index] for text in texts]
    for text, place in zip(texts, spread(places, gap, low, high), strict=True):
        text.set(**{along: axis.transData.inverted().transform([place, place])[index]})


# ---- all figures side by side ----

@dataclass(frozen=True)
class Dots:
    """One panel of `kinds_side_by_side`: a column against the rows, beside it `other` as a tick."""

    column: str
    title: str
    scale: float = 1
    other: str | None = None


def kinds_side_by_side(table: pd.DataFrame) -> Figure | None:
    """A row per exit, the best weight-bound speedup on top: its bytes, cost ratio, acceptance, tokens per call and speedups as dots."""
    rows = rows_with(drafts_of(table), [COST, ALPHA], "kinds_side_by_side")
    if rows["series"].nunique() < 2:
        print("plots: kinds_side_by_side: left out, as exits of fewer than two kinds or runs are nothing to compare")
        return None
    rows = rows.assign(**{BEST: weight_bound_speedup(rows[ALPHA], rows[COST])}).sort_values(BEST, ascending=False, kind="stable", ignore_index=True)
    scale, unit = next((scale, unit) for scale, unit in BYTE_UNITS if rows.get("exit_bytes", pd.Series(dtype=float)).fillna(0).max() >= scale or scale == 1)
    panels = [
        Dots("exit_bytes", f"exit's own\n{unit}", 1 / scale), Dots(COST, "cost ratio c\n(bytes)"), Dots(ALPHA, "accept rate α\n(%)", 100),
        Dots(MEASURED_TAU, "tokens per\ncall τ"), Dots(BEST, "weight-bound\nspeedup S (×)"), Dots("spec_speedup", "measured\nspeedup (×)", other="spec_predicted_speedup"),
    ]
    panels = [panel for panel in panels if not rows_with(rows, [panel.column], "kinds_side_by_side").empty]
    figure = Figure(figsize=(PAGE_INCHES, 0.95 + ROW_INCHES * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        draw_dots(axis, rows, panel)
    name_rows(axes[0], rows)
    note = "bars: 95 % intervals; S: E[τ]/(1+γc) at the best γ" + "; grey ticks: predicted speedup" * ("spec_predicted_speedup" in rows)
    head_line(figure, settings_line(rows, note))
    return figure


def name_rows(axis: Axes, rows: pd.DataFrame) -> None:
    """The exits' names on the y axis that the panels share, in their own colours, from the top down."""
    axis.set_yticks(range(len(rows)), point_names(rows, "series"), fontsize=6.5)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    for label, look in zip(axis.get_yticklabels(), rows["look"], strict=True):
        label.set_color(look.ink)


def draw_dots(axis: Axes, rows: pd.DataFrame, panel: Dots) -> None:
    """A panel's values by row, each with its interval, and with a tick for the other column's."""
    values, places = rows[panel.column] * panel.scale, pd.Series(range(len(rows)), rows.index)
    lengths = interval_lengths(rows, panel.column) * panel.scale
    for _, look, points in by_series(rows):
        own = points.index
        axis.errorbar(values[own], places[own], xerr=lengths[:, own], linestyle="none", elinewidth=0.8, **look.marks | {"markersize": 3.6})
    if panel.other in rows:
        axis.plot(rows[panel.other] * panel.scale, places, linestyle="none", marker="|", markersize=7, markeredgewidth=1.1, color=GREY, zorder=3)
    if panel.title.endswith("(×)"):
        axis.axvline(1, color="black", linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
    axis.set_title(panel.title, fontsize=7)
    axis.margins(x=0.12)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=6.5)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(3))
