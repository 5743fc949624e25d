"""Figures of lossy decoding, drawn from result files alone: what judges and ranks gain in tokens per target call, and what they cost in accuracy.

    python -m commands.plot_judges results/autojudge/greedy

Of a folder with commands/evaluate_judge.py's `results.csv` it writes `plots/accuracy_by_tokens_per_call` as .png (300 dpi) and .pdf.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from running.command_line import UserError, run

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from plotting.parts import (
    GREY,
    STYLE,
    WIDE_INCHES,
    Look,
    head_line,
    interval_lengths,
    legend_below,
    new_look,
    read_table,
    settings_line,
    settle,
    write_figure,
)
from running.run_files import make_output_dir

RESULTS_NAME, FIGURE_NAME = "results.csv", "accuracy_by_tokens_per_call"
HEIGHT = 3.4  # inches
X, Y = "tokens_per_call", "accuracy"
EXACT, TOPK = new_look("#000000", "*"), new_look("#777777", "s", fill="none", dashes=(0, (4, 2)))
JUDGES = {  # by what they read
    "target": ("judge of the target's state", new_look("#D55E00", "o")),
    "both": ("judge of both models' states", new_look("#0072B2", "D")),
    "law": ("judge of the draft's law", new_look("#009E73", "v")),
}


def read_ways(path: Path) -> pd.DataFrame:
    """The rows of an commands/evaluate_judge.py's results.csv, the exact one first. Raises UserError with the remedy."""
    table = read_table(path, "commands/evaluate_judge.py")
    if not {"method", "lossless", X, Y} <= set(table) or not bool(table["lossless"].iloc[0]):
        raise UserError(f"{path}: not a table of judges; give the output folder of commands/evaluate_judge.py")
    return table.reindex(columns=[*table, *{"judge", "judge_features", "threshold", "own_threshold", "rank"} - set(table)])


def lines(table: pd.DataFrame) -> Iterator[tuple[str, Look, pd.DataFrame]]:
    """(name, look, rows by leniency) of every judge and of the ranks."""
    for features, (name, look) in JUDGES.items():
        of_kind = table[table["judge_features"] == features]
        for number, (_, rows) in enumerate(of_kind.groupby("judge", sort=False)):
            yield name if number == 0 else f"{name} ({number + 1})", look, rows.sort_values(X)
    ranks = table[table["method"] == "topk"]
    if len(ranks):
        yield "among the target's top k", TOPK, ranks.sort_values(X)


def accuracy_by_tokens_per_call(table: pd.DataFrame) -> Figure:
    """Accuracy against τ, a line per judge over its thresholds; the band is the exact decoding's interval."""
    figure = Figure(figsize=(WIDE_INCHES, HEIGHT), layout="constrained")
    axis, exact = figure.subplots(), table.iloc[:1]
    if f"{Y}_ci_low" in table:
        axis.axhspan(exact[f"{Y}_ci_low"].iloc[0], exact[f"{Y}_ci_high"].iloc[0], color=GREY, alpha=0.12, linewidth=0, gid="backdrop")
    draw_line(axis, exact, EXACT, "exact decoding")
    for name, look, rows in lines(table):
        draw_line(axis, rows, look, name)
        own = rows[rows["own_threshold"].eq(True)]
        axis.plot(own[X], own[Y], linestyle="none", marker="o", markersize=11, markerfacecolor="none", markeredgecolor=look.color, markeredgewidth=0.9)
    annotate(axis, table)
    axis.set_xlabel("tokens per target call, τ")
    axis.set_ylabel("problems solved")
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    head_line(figure, settings_line(table, f"{exact['problems'].iloc[0]:.0f} problems; bars and band: 95 % intervals; ring: the calibrated threshold"))
    legend_below(figure, [line for line in axis.get_lines() if not line.get_label().startswith("_")])
    settle(figure)
    return figure


def draw_line(axis: Axes, rows: pd.DataFrame, look: Look, name: str) -> None:
    """Points with their intervals in both directions, joined."""
    for column, direction in ((X, "xerr"), (Y, "yerr")):
        lengths = np.nan_to_num(interval_lengths(rows, column))
        axis.errorbar(rows[X], rows[Y], **{direction: lengths}, linestyle="none", ecolor=look.color, elinewidth=0.5, alpha=0.45)
    size = 9 if look is EXACT else 4.5
    axis.plot(rows[X], rows[Y], **look.marks, linestyle=look.dashes if len(rows) > 1 else "none", markersize=size, label=name)


def annotate(axis: Axes, table: pd.DataFrame) -> None:
    """Each rank at its point; thresholds of the calibrated ones."""
    for _, row in table[table["method"] == "topk"].iterrows():
        axis.annotate(f"{row['rank']:.0f}" if row["rank"] else "all", (row[X], row[Y]), (3, 3), textcoords="offset points", fontsize=6, color=TOPK.ink)
    for _, row in table[table["own_threshold"].eq(True)].iterrows():
        look = JUDGES[row["judge_features"]][1]
        axis.annotate(f"{row['threshold']:.2g}", (row[X], row[Y]), (6, 5), textcoords="offset points", fontsize=6, color=look.ink)


def plot_judges(folder: Path) -> list[Path]:
    """Draw the folder's figure; the files that were written."""
    table = read_ways(folder / RESULTS_NAME)
    make_output_dir(str(folder / "plots"))
    with mpl.rc_context(STYLE):
        return write_figure(accuracy_by_tokens_per_call(table), folder / "plots" / FIGURE_NAME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of commands/evaluate_judge.py")
    for folder in parser.parse_args().folders:
        for path in plot_judges(folder):
            print(path)


if __name__ == "__main__":
    run(main)
