"""Figures of tree decoding, drawn from result files alone: what trees bring by size, what they promised, and a growmap's shape.

    python -m plotting.trees results/trees runs/growmap/growmap.json

Of a folder with commands/sweep_settings.py's `results.csv` it writes `plots/trees_by_size` and `plots/promised_tokens`; of a growmap, or of a folder
with a `growmap.json`, a picture beside it; each as .png (300 dpi) and .pdf. A panel whose numbers are missing is left out, and a line
says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from running.command_line import UserError, run

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from plotting.exits import (
    GREY,
    MEASURED_TAU,
    PAGE_INCHES,
    STAGES,
    STYLE,
    WIDE_INCHES,
    Look,
    Panel,
    beside,
    head_line,
    interval_lengths,
    interval_note,
    label_ends,
    panel_grid,
    pixels_per_point,
    settings_line,
    settle,
    write_figure,
)
from plotting.parts import read_table
from running.run_files import make_output_dir, read_config, read_manifest

RESULTS_NAME, GROWMAP_NAME = "results.csv", "growmap.json"
GROWMAP_FORMAT = "growmap-1"  # decoding.growmap's, which needs torch
DASHED, CHAIN_DASHES = (0, (4, 3)), (0, (7, 2, 1.5, 2))
METHOD_STYLES = {
    "static_tree": {"marker": "o", "linestyle": "-"},
    "dynamic_tree": {"marker": "s", "linestyle": (0, (4, 1.2))},
    "specexec": {"marker": "^", "linestyle": (0, (1, 1))},
}
CHAINS = {"self_speculative": "", "speculative": "*"}  # and the mark that tells a label of one from the other's
VERIFICATIONS = {  # the colours of stages, which do not appear here
    "coupled": STAGES["head"], "match": STAGES["last_block"], "swor": STAGES["head+last_block"], "rejection": STAGES["untuned"],
}
DODGE = 0.055  # octaves between two lines at one size, so that intervals stay apart
PROMISED, FOUND, BAND = "tree_expected_tokens", "tree_found_tokens", 0.05
MOST_NARROW = 14  # a tree of more nodes side by side is as wide as a page
COUSINS_APART = 1.2  # in distances of siblings
LEVEL_INCHES, WIDEST_NODE, NARROWEST_WITH_TEXT = 0.42, 15, 11  # of a growmap's levels; the others in points
INK = "#0B2545"
TONES, TONE = LinearSegmentedColormap.from_list("tones", ["#EAF2F9", "#9CC7E8", "#0072B2", INK]), PowerNorm(0.5, 0, 1)


# ---- tables ----

def read_benchmark(path: Path) -> pd.DataFrame:
    """The rows of a commands/sweep_settings.py's results.csv, one prompt at a time, infinite numbers as missing. Raises UserError with the remedy."""
    table = read_table(path, "commands/sweep_settings.py", dtype={"gamma": str})
    if not {"method", "batch"} <= set(table):
        raise UserError(f"{path}: has no columns method and batch; give the output folder of commands/sweep_settings.py")
    table = table.reindex(columns=[*table, *{"verification", "tree_budget", "gamma"} - set(table)]).replace([np.inf, -np.inf], np.nan)
    drafting = table[(table["batch"] == 1) & table["method"].isin([*METHOD_STYLES, *CHAINS])]
    unknown = sorted(set(drafting["verification"]) - set(VERIFICATIONS), key=str)
    if unknown:
        raise UserError(f"{path}: unknown verification {unknown[0]!r}; known: {', '.join(VERIFICATIONS)}")
    return drafting


def rows_with(rows: pd.DataFrame, columns: list[str], figure_name: str) -> pd.DataFrame:
    """The trees in `rows` that have a number in all of `columns`; a printed line where there are none."""
    columns = ["tree_budget", *columns]
    found = rows[rows["method"].isin(METHOD_STYLES)].reindex(columns=[*rows, *set(columns) - set(rows)]).dropna(subset=columns)
    if found.empty:
        print(f"tree_plots: {figure_name}: left out, no tree with numbers in {', '.join(columns)}")
    return found


def by_line(rows: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(method, verification, their rows by size) for every line, in the order of METHOD_STYLES and VERIFICATIONS."""
    groups = {key: group.sort_values("tree_budget") for key, group in rows.groupby(["method", "verification"])}
    return [(*key, groups[key]) for key in itertools.product(METHOD_STYLES, VERIFICATIONS) if key in groups]


def best_chains(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Of each verification the chain with the largest `column`."""
    chains = table[table["method"].isin(CHAINS)].dropna(subset=[column])
    return chains.loc[chains.groupby("verification")[column].idxmax()]


def run_line(folder: Path) -> str:
    """Target, draft, prompts and machine of the run in `folder`, as far as it is recorded."""
    config = read_config(folder) or {}
    planted = f"planted exit at layer {config.get('planted_layer')}, α = {config.get('planted_alpha')}"
    facts = {
        "target": config.get("model_path") or config.get("random_init"), "draft": planted if config.get("random_init") else config.get("draft"),
        "prompts": config.get("spec_prompt_dataset"), "on": machine(folder, config),
    }
    return named(facts)


def machine(folder: Path, config: dict) -> str | None:
    """The GPU, or the CPU with its threads, that the run in `folder` decoded on; None where that is not recorded."""
    start = next(reversed(read_manifest(folder)), {})
    if config.get("device") != "cpu" and "gpu" in start:
        return start["gpu"]
    return f"CPU, threads: {config['threads']}" if "threads" in config else None


def named(facts: dict[str, str | None]) -> str:
    """The facts that are known, one behind the other, each after its name."""
    return ", ".join(f"{name} {short(value)}" for name, value in facts.items() if value)


def short(name: str) -> str:
    """A path's last two parts, without the suffix of a checkpoint."""
    return "/".join(Path(name.removesuffix(".safetensors")).parts[-2:])


def head(figure: Figure, about: str, rows: pd.DataFrame, note: str = "") -> None:
    """What a figure is about, the policy of `rows` and a note, as its head; lines break between facts, not within one."""
    policy = settings_line(rows.drop(columns=["gamma", "verification"], errors="ignore"), note)
    head_line(figure, re.sub("(?<![,;]) ", "\u00a0", "; ".join(filter(None, [about, policy]))))


# ---- trees by size ----

def trees_by_size(table: pd.DataFrame, about: str) -> Figure | None:
    """A panel each for tokens per call, measured and forecast speedup against nodes: a line per method and verification."""
    panels = [
        Panel(MEASURED_TAU, "tokens per target call τ", table, "tokens per call"),
        Panel("speedup", "speedup over vanilla (×)", table, "speedup measured here"),
        Panel("weight_bound_speedup", "speedup over vanilla (×)", table, "forecast: weight-bound"),
    ]
    panels = [replace(panel, rows=rows_with(table, [panel.column], "trees_by_size")) for panel in panels]
    panels = [panel for panel in panels if not panel.rows.empty]
    if not panels:
        return None
    figure, [axes] = panel_grid([len(panels)], 2.9)
    labels = {}
    for axis, panel in zip(axes, panels, strict=True):
        draw_sizes(axis, panel)
        labels[axis] = draw_chains(axis, best_chains(table, panel.column), panel.column)
    head(figure, about, panels[0].rows, interval_note(panels[0].rows, panels[0].column, "trees_by_size"))
    lines_legend(figure, table, [text for text, _, _ in itertools.chain(*labels.values())])
    label_ends(figure, labels)
    return figure


def draw_sizes(axis: Axes, panel: Panel) -> None:
    """The lines of one panel, with 95 % intervals where there are some; for a speedup also the line of vanilla decoding."""
    lines, sizes = by_line(panel.rows), sorted(panel.rows["tree_budget"].unique())
    for index, (method, verification, rows) in enumerate(lines):
        dodge = 2 ** (DODGE * (index - (len(lines) - 1) / 2))
        draw_intervals(axis, rows, rows["tree_budget"] * dodge, panel.column)
        axis.plot(rows["tree_budget"] * dodge, rows[panel.column], color=VERIFICATIONS[verification].color, markersize=3.5, **METHOD_STYLES[method])
    if panel.column != MEASURED_TAU:
        axis.axhline(1, color="black", linewidth=0.7, linestyle=DASHED, zorder=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axis.minorticks_off()
    axis.set(xlim=(sizes[0] / 1.5, sizes[-1] * 1.5), xlabel="tree nodes, root included", ylabel=panel.label, title=panel.title)


def draw_intervals(axis: Axes, rows: pd.DataFrame, x: pd.Series, column: str) -> None:
    """The 95 % intervals of `column`, where there are some, in a light tone behind all lines. The rows are of one verification."""
    style = {"ecolor": VERIFICATIONS[rows["verification"].iloc[0]].shaded(0.25).color, "elinewidth": 0.9, "capsize": 1.4}
    axis.errorbar(x, rows[column], yerr=interval_lengths(rows, column), fmt="none", zorder=1.2, **style)


def draw_chains(axis: Axes, chains: pd.DataFrame, column: str) -> list[tuple[str, float, Look]]:
    """A horizontal line per chain; returns the label of each: its γ and the mark of its method."""
    labels = []
    for _, row in chains.iterrows():
        look = VERIFICATIONS[row["verification"]]
        axis.axhline(row[column], color=look.color, linewidth=0.9, linestyle=CHAIN_DASHES, zorder=1)
        labels.append((f"γ = {row['gamma']}{CHAINS[row['method']]}", row[column], replace(look, marker="_")))
    return labels


def lines_legend(figure: Figure, table: pd.DataFrame, chains: list[str]) -> None:
    """Below the figure: a row of verifications and a row of methods, and beside them the lines to compare with: `chains` are labels."""
    colors, styles = legend_keys(table)
    label = "best chain and its γ" + ", * speculative" * any("*" in chain for chain in chains)
    references = [Line2D([], [], color=GREY, linewidth=0.9, linestyle=CHAIN_DASHES, label=label)] if chains else []
    references.append(Line2D([], [], color="black", linewidth=0.7, linestyle=DASHED, label="vanilla"))
    longest = max(len(colors), len(styles))
    legend_rows(figure, [padded(colors, longest) + references[:1], padded(styles, longest) + references[1:]])


def legend_keys(table: pd.DataFrame) -> tuple[list[Line2D], list[Line2D]]:
    """A key per verification, by colour, and one per tree method, by line and marker."""
    colors = [Line2D([], [], color=look.color, linewidth=3, label=name) for name, look in VERIFICATIONS.items() if name in set(table["verification"])]
    styles = [Line2D([], [], color=GREY, label=name, **style) for name, style in METHOD_STYLES.items() if name in set(table["method"])]
    return colors, styles


def legend_rows(figure: Figure, rows: list[list[Line2D]]) -> None:
    """A legend below `figure`, laid out in `rows`; matplotlib fills columns first."""
    longest = max(map(len, rows))
    keys = itertools.chain.from_iterable(zip(*(padded(row, longest) for row in rows), strict=True))
    figure.legend(handles=list(keys), loc="outside lower center", ncols=longest, columnspacing=1.6, handlelength=2.6)


def padded(keys: list[Line2D], length: int) -> list[Line2D]:
    """`keys` with empty ones behind them."""
    return keys + [Line2D([], [], linestyle="none", label=" ")] * (length - len(keys))


# ---- what trees promised ----

def promised_tokens(table: pd.DataFrame, about: str) -> Figure | None:
    """Tokens per round that the trees promised against those found: a marker per entry, larger for larger trees."""
    rows = rows_with(table, [PROMISED, FOUND], "promised_tokens")
    if rows.empty:
        return None
    figure, [[axis]] = panel_grid([1], 4.1)
    octaves = np.log2(rows["tree_budget"] / rows["tree_budget"].min())
    for method, verification, entries in by_line(rows):
        draw_intervals(axis, entries, entries[PROMISED], FOUND)
        areas = (3.5 + 0.7 * octaves[entries.index]) ** 2
        style = {"color": VERIFICATIONS[verification].color, "marker": METHOD_STYLES[method]["marker"], "edgecolors": "white", "linewidths": 0.4}
        axis.scatter(entries[PROMISED], entries[FOUND], s=areas, zorder=2, **style)
    draw_equality(axis, rows)
    sizes = "larger markers: larger trees, {:g} to {:g} nodes".format(rows["tree_budget"].min(), rows["tree_budget"].max())
    head(figure, about, rows, "; ".join(filter(None, [interval_note(rows, FOUND, "promised_tokens"), sizes])))
    colors, styles = legend_keys(rows)
    for key in styles:
        key.set_linestyle("none")
    legend_rows(figure, [colors, styles])
    return figure


def draw_equality(axis: Axes, rows: pd.DataFrame) -> None:
    """Equal axes, the line on which trees keep what they promised, and a band around it."""
    values = rows.reindex(columns=[PROMISED, FOUND, f"{FOUND}_ci_low", f"{FOUND}_ci_high"]).astype(float)
    low, high = values.min(axis=None), values.max(axis=None)
    limits = np.array([low, high]) + (0.06 * (high - low) + 0.05) * np.array([-1, 1])
    axis.fill_between(limits, (1 - BAND) * limits, (1 + BAND) * limits, color="#EFEFEF", zorder=0)
    axis.axline((1, 1), slope=1, color="black", linewidth=0.7, linestyle=DASHED, zorder=1)
    axis.set(xlim=limits, ylim=limits, aspect="equal", xlabel="tokens per round that the trees promised", ylabel="tokens per round that drafted")
    axis.set_title(f"dashed: found = promised; band: ±{100 * BAND:g} %", fontsize=7, color=GREY)


# ---- a growmap ----

def read_growmap(path: Path) -> dict:
    """The content of a growmap.json. Raises UserError with the remedy, also where its nodes' chances are unknown."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no growmap ({error}); give a growmap.json of commands/build_growmap.py") from error
    if not isinstance(content, dict) or content.get("format") != GROWMAP_FORMAT or not {"parents", "acceptance", "replayed", "provenance"} <= set(content):
        raise UserError(f"{path}: not of the format {GROWMAP_FORMAT}; build it anew with commands/build_growmap.py")
    if not content["acceptance"]:
        raise UserError(f"{path}: has no acceptance vector, so its nodes' chances are unknown; build it anew with commands/build_growmap.py")
    return content


def chances(parents: Sequence[int], acceptance: Sequence[float], replayed: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Depth (n,) of every node and its chance (n,) to lie on the accepted path: `replayed`, or where that is empty the product of acceptance over the path to it."""
    depths, reach, rank = [0], [1.0], 0
    for node, parent in enumerate(parents[1:], start=1):
        rank = rank + 1 if parent == parents[node - 1] else 0  # siblings lie together, in draw order
        depths.append(depths[parent] + 1)
        reach.append(reach[parent] * acceptance[rank])
    return np.array(depths), np.array(replayed or reach)


def tidy(parents: Sequence[int]) -> np.ndarray:
    """x (n,) of every node: parents midway above their children, subtrees as close as leaves siblings 1 apart and cousins COUSINS_APART.

    Reingold and Tilford's layout: bottom up, each subtree is its outermost nodes per level, left and right, seen from its root.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    shifts, outlines = np.zeros(len(parents)), [([0.0], [0.0])] * len(parents)
    for node in reversed(range(len(parents))):
        if children[node]:
            places, lefts, rights = side_by_side([outlines[child] for child in children[node]])
            middle = (places[0] + places[-1]) / 2
            shifts[children[node]] = np.array(places) - middle
            outlines[node] = ([0.0, *(left - middle for left in lefts)], [0.0, *(right - middle for right in rights)])
    x = np.zeros(len(parents))
    for node, parent in enumerate(parents[1:], start=1):
        x[node] = x[parent] + shifts[node]
    return x


def side_by_side(outlines: list[tuple[list[float], list[float]]]) -> tuple[list[float], list[float], list[float]]:
    """Places of the subtrees with these outlines, from left to right, and the outline of them all."""
    places, lefts, rights = [], [], []
    for own_lefts, own_rights in outlines:
        gaps = itertools.chain([1.0], itertools.repeat(COUSINS_APART))
        place = max((right + gap - left for right, gap, left in zip(rights, gaps, own_lefts, strict=False)), default=0.0)  # as deep as both reach
        places.append(place)
        lefts += [left + place for left in own_lefts[len(lefts):]]
        rights = [right + place for right in own_rights] + rights[len(own_rights):]
    return places, lefts, rights


def growmap_figure(content: dict) -> Figure:
    """Nodes by depth, the root on top and children in draw order, in tones of their chance to lie on the accepted path."""
    parents = content["parents"]
    (depths, reach), x = chances(parents, content["acceptance"], content["replayed"]), tidy(parents)
    levels, wide = int(depths[-1]), np.ptp(x) > MOST_NARROW
    figure = Figure(figsize=(PAGE_INCHES if wide else WIDE_INCHES, 1.3 + LEVEL_INCHES * (levels + 0.8)), layout="constrained")
    axis = figure.subplots()
    draw_levels(axis, depths, reach)
    axis.set(xlim=(x.min() - 0.7, x.max() + 0.7), ylim=(levels + 0.45, -0.45))
    title = f"{len(parents)} nodes on {levels} level{'s' * (levels != 1)}, {reach.sum():.2f} tokens per call expected"
    axis.set_title(title, fontsize=9, fontweight="bold", pad=14)
    head(figure, fitted_to(content["provenance"]), pd.DataFrame([content["provenance"].get("policy", {})]))
    draw_tones(figure, axis)
    settle(figure)
    places = np.column_stack([x, depths])
    draw_edges(axis, places, parents, reach)
    draw_nodes(axis, places, reach)
    return figure


def fitted_to(provenance: dict) -> str:
    """Target, draft, data and verification that the growmap was made for, as far as they are recorded."""
    return named({"target": provenance.get("model"), "draft": provenance.get("draft"), "data": provenance.get("dataset"), "verification": provenance.get("verification")})


def draw_levels(axis: Axes, depths: np.ndarray, reach: np.ndarray) -> None:
    """A line per level, numbered at the left; at the right its nodes, and the chance that the accepted path reaches it."""
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.grid(visible=False, axis="x")
    axis.grid(axis="y", color="#F0F0F0")
    axis.tick_params(length=0)
    axis.set(xticks=[], yticks=range(depths[-1] + 1), ylabel="accepted tokens")
    style = {"ha": "right", "fontsize": 7, "color": GREY}
    columns = {"nodes": [f"{count}" for count in np.bincount(depths)], "reached": [f"{100 * share:.{int(share < 0.1)}f} %" for share in np.bincount(depths, reach)]}
    for points, (name, texts) in zip((26, 62), columns.items(), strict=True):
        axis.text(1, 1, name, va="bottom", transform=beside(axis, points), **style)
        for level, text in enumerate(texts):
            axis.text(1, level, text, va="center", transform=beside(axis, points, axis.get_yaxis_transform()), **style)


def draw_tones(figure: Figure, axis: Axes) -> None:
    """A colour bar below the tree."""
    ticks = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
    tones = mpl.cm.ScalarMappable(TONE, TONES)
    bar = figure.colorbar(tones, ax=axis, location="bottom", aspect=45, pad=0.02, shrink=0.7, ticks=ticks, format=lambda share, _: f"{100 * share:g}")
    bar.outline.set_visible(False)
    bar.ax.grid(visible=False)
    bar.set_label("chance to lie on the accepted path (%)")


def draw_edges(axis: Axes, places: np.ndarray, parents: Sequence[int], reach: np.ndarray) -> None:
    """A curve from every node's parent to it, in the node's tone, wider for a likelier node."""
    for node in np.argsort(reach[1:], kind="stable") + 1:  # the likeliest on top
        (x, y), (child_x, child_y) = places[parents[node]], places[node]
        middle = (y + child_y) / 2
        curve = Curve([(x, y), (x, middle), (child_x, middle), (child_x, child_y)], [Curve.MOVETO, *[Curve.CURVE4] * 3])
        axis.add_patch(PathPatch(curve, fill=False, edgecolor=TONES(0.15 + 0.85 * TONE(reach[node])), linewidth=0.5 + 2 * np.sqrt(reach[node]), zorder=1.5))


def draw_nodes(axis: Axes, places: np.ndarray, reach: np.ndarray) -> None:
    """A disc per node, as large as its neighbours allow; in a large one stands its chance. Needs a settled figure."""
    apart = np.abs(np.diff(axis.transData.transform([(0, 0), (1, 1)]), axis=0)).min() / pixels_per_point(axis.figure)
    diameter = min(WIDEST_NODE, 0.85 * apart)
    axis.scatter(*places.T, s=diameter**2, c=TONES(TONE(reach)), edgecolors=INK, linewidths=0.04 * diameter, zorder=3)
    if diameter < NARROWEST_WITH_TEXT:
        return
    for place, share in zip(places, reach, strict=True):
        text = f"{100 * share:.0f}" if share >= 0.01 else "<1"
        axis.text(*place, text, ha="center", va="center", fontsize=0.42 * diameter, color="white" if share > 0.2 else INK, zorder=4)


# ---- files ----

def plot_trees(folder: Path) -> list[Path]:
    """Draw `folder`/results.csv into `folder`/plots and return the paths of the files. Raises UserError where it cannot be read.

    A figure of an earlier call that is left out now is removed.
    """
    table, about = read_benchmark(folder / RESULTS_NAME), run_line(folder)
    make_output_dir(str(folder / "plots"))
    written = []
    with mpl.rc_context(STYLE):
        for draw in (trees_by_size, promised_tokens):
            written += write_figure(draw(table, about), folder / "plots" / draw.__name__)
    return written


def plot_growmap(path: Path) -> list[Path]:
    """Draw the growmap in `path` beside it and return the paths of the files. Raises UserError where it cannot be read."""
    content = read_growmap(path)
    with mpl.rc_context(STYLE):
        return write_figure(growmap_figure(content), path)


def redraw(path: Path) -> list[Path]:
    """The figures of a growmap, or of a folder that holds one or commands/sweep_settings.py's results."""
    growmap = path / GROWMAP_NAME if path.is_dir() else path
    return plot_trees(path) if path.is_dir() and not growmap.exists() else plot_growmap(growmap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FOLDER_OR_GROWMAP", help=f"folder that holds {RESULTS_NAME} or {GROWMAP_NAME}, or a growmap")
    for path in itertools.chain.from_iterable(map(redraw, parser.parse_args().paths)):
        print(path)


if __name__ == "__main__":
    run(main)
