"""The parts that figures are made of: style, the look of every kind of exit, rows of a table, panels, legends and labels."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from running.command_line import UserError

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.text import Text
from matplotlib.transforms import ScaledTranslation, Transform

COLUMN_INCHES, WIDE_INCHES, PAGE_INCHES = 3.5, 5.0, 7.0  # one, one and a half and two columns of a paper
POINTS_PER_INCH = 72
GREY = "#666666"
LOG_RANGE = 30  # an axis whose largest value exceeds its smallest by this factor is logarithmic
LABEL_GAP = 9.5  # points between the centres of two labels in a margin
CLEARER = 1.5  # points that a label lies nearer to its own point than to another
LEGEND_ROW_INCHES, LEGEND_LETTER = 0.16, 0.59  # of a legend's row; of a letter, in font sizes
MANY_KEYS = 16  # a legend of more is written smaller
MEASURED_TAU = "spec_tokens_per_call"
HALO = [Stroke(linewidth=1.5, foreground="white"), Normal()]  # keeps a text readable on lines
BACKDROP = "backdrop"  # a line with this gid leaves room for labels
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 7.5, "axes.labelsize": 8, "axes.titlesize": 8,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.axisbelow": True, "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.5,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4.5,
    "legend.frameon": False, "figure.dpi": 300, "savefig.dpi": 300, "pdf.fonttype": 42,
}


# ---- looks ----

@dataclass(frozen=True)
class Look:
    """Marker, its filling, colour and dashes of one line, and the colour of the text beside it."""

    color: str
    marker: str
    ink: tuple[float, float, float]
    fill: str = "full"  # matplotlib's fillstyle; the rest of the marker is white
    dashes: str | tuple = "-"

    @property
    def marks(self) -> dict:
        """Keyword arguments of a line's markers."""
        filled = {"fillstyle": "full", "markerfacecolor": "white"} if self.fill == "none" else {"fillstyle": self.fill}
        return {"color": self.color, "marker": self.marker, "markerfacecoloralt": "white", **filled}

    def shaded(self, share: float) -> Look:
        """The same look in a tone between light (`share` 0) and full (1)."""
        strength = 0.3 + 0.7 * share
        return replace(self, color=mpl.colors.to_hex([1 - strength * (1 - part) for part in mpl.colors.to_rgb(self.color)]))


def new_look(color: str, marker: str, **more: str | tuple) -> Look:
    """Text is written in a darker tone of `color`, for contrast on white."""
    return Look(color, marker, tuple(0.75 * part for part in mpl.colors.to_rgb(color)), **more)


STAGES = {  # colours of Okabe and Ito, which colour-blind readers can tell apart; of all other kinds see `look_of`
    "untuned": new_look("#E69F00", "^"),
    "head": new_look("#0072B2", "o"),
    "last_block": new_look("#D55E00", "s"),
    "head+last_block": new_look("#009E73", "D"),
    "model": new_look("#777777", "p"),
    "target": new_look("#000000", "*"),
}
HEADS = {"": "#D55E00", "head": "#009E73", "rank": "#8E3B7C", "translator": "#56B4E9"}  # colours of a kind's head beside a block
BLOCKS = {"": "o", "last_block": "D", "full_block": "P", "attention_block": "v"}  # markers of a kind's block
RANKS = (8, 1024)  # of the lightest and the darkest tone
TRIMMED = ((2048, "none"), (8192, "left"), (32768, "bottom"), (np.inf, "right"))  # the largest vocabulary of each filling
DASHES = ("-", (0, (5, 1.4)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
KIND_GRAMMAR = "untuned, target, model, or parts joined by +: head, rank<r> or translator; last_block, full_block or attention_block; and to one of these vocab<N>"


@dataclass(frozen=True)
class KindParts:
    """A tuned exit's kind, taken apart: see truncated_llama.ExitKind, which needs torch."""

    block: str = ""
    head: str = ""  # of HEADS
    rank: int = 0
    vocab: int = 0  # 0: all tokens

    def __str__(self) -> str:
        return "+".join(filter(None, [f"rank{self.rank}" if self.rank else self.head, self.block, self.vocab and f"vocab{self.vocab}"]))

    @property
    def place(self) -> tuple:
        """Kinds are listed by block, then by head, the trimmed ones behind the whole one."""
        return list(BLOCKS).index(self.block), list(HEADS).index(self.head), self.rank, self.vocab


def kind_parts(kind: str) -> KindParts | None:
    """The parts of a tuned exit's `kind`, in whatever order it names them; None where it is none."""
    found: dict[str, str | int] = {}
    for part in kind.split("+"):
        word, digits = re.fullmatch(r"(.*?)(\d*)", part).groups()
        new: dict[str, str | int] = {}
        if word in ("rank", "vocab") and digits and int(digits) > 0:
            new = {"head": "rank", "rank": int(digits)} if word == "rank" else {"vocab": int(digits)}
        elif part in ("head", "translator"):
            new = {"head": part}
        elif part and part in BLOCKS:
            new = {"block": part}
        if not new or new.keys() & found.keys():
            return None
        found |= new
    return KindParts(**found) if found.keys() - {"vocab"} else None


def known_kind(kind: str) -> str:
    """`kind` with its parts in the usual order. Raises UserError for one that breaks KIND_GRAMMAR."""
    parts = kind_parts(kind)
    if parts is None and kind not in STAGES:
        raise UserError(f"unknown kind {kind!r}; a kind is {KIND_GRAMMAR}")
    return str(parts or kind)


def kind_place(kind: str) -> tuple:
    """Kinds are listed in this order: untuned, tuned, independent models, the target."""
    parts = kind_parts(kind)
    return (1, *parts.place) if parts else ({"untuned": 0, "model": 2, "target": 3}[kind],)


def look_of(kind: str) -> Look:
    """The look of a kind, the same in every figure and table.

    Of a kind that STAGES lacks: colour by head, darker for a greater rank and for a full block; marker by block, with white in it for a trimmed vocabulary.
    """
    parts = kind_parts(kind)
    if parts is None or str(parts) in STAGES:
        return STAGES[str(parts or kind)]
    if parts.vocab:
        whole, fill = look_of(str(replace(parts, vocab=0))), next(fill for most, fill in TRIMMED if parts.vocab <= most)
        return replace(whole, fill=fill, dashes=DASHES[1])
    look = new_look(HEADS[parts.head], BLOCKS[parts.block])
    if parts.rank:
        return look.shaded(np.clip(np.log(parts.rank / RANKS[0]) / np.log(RANKS[1] / RANKS[0]), 0, 1))
    color = np.array(mpl.colors.to_rgb(look.color))
    tones = {"full_block": 0.6 * color, "attention_block": 1 - 0.6 * (1 - color)}
    return replace(look, color=mpl.colors.to_hex(tones.get(parts.block, color)))


# ---- series: exits that one line joins ----

def with_series(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the columns `run`, `series` (ordered categories), what one line joins, and `look`. Raises UserError for unknown kinds.

    A series is a kind; where runs of several folders made exits of one kind at one layer, a kind and what tells the run.
    """
    table = table.assign(kind=table["kind"].map(known_kind))
    runs = run_names(table)
    pairs = sorted(set(zip(table["kind"], runs, strict=True)), key=lambda pair: (kind_place(pair[0]), natural(pair[1])))
    names = {pair: ", ".join(filter(None, pair)) for pair in pairs}
    looks = {}
    for kind, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        looks |= dict(zip((group := list(group)), run_looks(look_of(kind), len(group)), strict=True))
    own = list(zip(table["kind"], runs, strict=True))
    series = pd.Categorical([names[pair] for pair in own], categories=list(names.values()), ordered=True)
    return table.assign(run=runs, series=series, look=pd.Series([looks[pair] for pair in own], table.index, dtype=object))


def run_looks(look: Look, count: int) -> list[Look]:
    """`look` in as many tones and dashes; a sole run has it as it is."""
    return [look] if count == 1 else [replace(look.shaded((n + 1) / count), dashes=DASHES[n % len(DASHES)]) for n in range(count)]


def run_names(table: pd.DataFrame) -> pd.Series:
    """What tells each row's run from those of other rows of its kind; "" for all rows of a kind without two folders at one layer."""
    names = pd.Series("", table.index)
    folders = pd.Series([run_folder(*row) for row in zip(table["checkpoint"], table["kind"], table["target_layer"], strict=True)], table.index)
    for _, rows in table.groupby("kind"):
        own = folders[rows.index]
        if own.groupby(rows["target_layer"], dropna=False).nunique().max() > 1:
            names[rows.index] = pd.Series(distinct_names(own.tolist()), rows.index)
    return names


def run_folder(checkpoint: str | float, kind: str, layer: float) -> tuple[str, ...]:
    """The parts of the path to a run's folder, without the words for the layer; a run of several exits has a folder for each of them."""
    if not isinstance(checkpoint, str):
        return ()
    parts = (Path(checkpoint) if kind == "model" else Path(checkpoint).parent).parts
    return tuple("-".join(word for word in words_of(part) if word != f"layer{layer:g}") for part in parts)


def words_of(name: str) -> list[str]:
    """The words that hyphens join: "layer3-head-lr5e-05" -> layer3, head, lr5e-05."""
    return re.split(r"-(?!\d)", name)


def distinct_names(folders: list[tuple[str, ...]]) -> list[str]:
    """Of each path its words that not all paths have; equal for equal paths only."""
    words = [{word for part in folder for word in words_of(part)} for folder in folders]
    shared = set.intersection(*words) if words else set()
    names = ["/".join(filter(None, ("-".join(word for word in words_of(part) if word not in shared) for part in folder))) for folder in folders]
    return names if len(set(names)) == len(set(folders)) else ["/".join(folder) for folder in folders]


def natural(text: str) -> list:
    """Sort key by which layer3 comes before layer11, and lr5e-05 before lr0.0001."""
    pieces = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", text)  # words and numbers by turns
    return [float(piece) if index % 2 else piece for index, piece in enumerate(pieces)]


def by_series(rows: pd.DataFrame) -> list[tuple[str, Look, pd.DataFrame]]:
    """(series, its look, its rows) in the usual order of kinds."""
    return [(name, group["look"].iloc[0], group) for name, group in rows.groupby("series", observed=True)]


# ---- rows of a table ----

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


def draw_steps_up(axis: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """A front: from each point level to the next and then up. (matplotlib's drawstyle would hide the steps from `drawn_boxes`.)"""
    axis.plot(np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1], color=GREY, linewidth=0.9, zorder=1)


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


def read_table(path: Path, made_by: str, **options: object) -> pd.DataFrame:
    """The CSV table at `path`, which the command `made_by` makes. Raises UserError with the remedy."""
    try:
        return pd.read_csv(path, **options)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the output folder of {made_by}") from error
    except ValueError as error:  # pandas' errors for an empty or broken file are ValueErrors
        raise UserError(f"{path}: not a table ({error}); run {made_by} again") from error


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
    figure.suptitle(textwrap.fill(text, characters, break_on_hyphens=False), x=0.01, ha="left", fontsize=7, color=GREY, parse_math=False)


def layer_axis(axis: Axes, layers: pd.Series) -> None:
    """An x axis of exit layers: whole numbers only, the evaluated ones where they fit. Independent models have none."""
    layers = sorted(set(layers.dropna())) or [0]
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
    marker = Line2D([1], [0.5], **look.marks, transform=beside(axis, 12), clip_on=False)
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


def label_points(axis: Axes, rows: pd.DataFrame, columns: tuple[str, str], texts: list[str], bold: Sequence[bool] | None = None) -> None:
    """Write `texts` beside the points of `rows`: for each point, from the top down, the nearest free place; those in `bold` first.

    Labels that find no free place are left out, with a printed line. Needs a settled figure.
    """
    bold = np.zeros(len(rows), bool) if bold is None else np.asarray(bold)
    values = rows[list(columns)].to_numpy(float)
    points = axis.transData.transform(values)
    pixels, obstacles, lines, left_out = pixels_per_point(axis.figure), drawn_boxes(axis), np.empty((0, 4)), []
    for index in np.lexsort((points[:, 0], -points[:, 1], ~bold)):
        look = rows["look"].iloc[index]
        style = {"fontsize": 7, "color": look.ink, "va": "bottom", "gid": "label", "fontweight": "bold" if bold[index] else "normal", "path_effects": HALO}
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
    """Boxes (n, 4), in pixels, around all lines, markers, intervals and texts that `axis` shows, but for lines of the gid BACKDROP."""
    pixels = pixels_per_point(axis.figure)
    boxes = [text.get_window_extent().extents[None] for text in axis.texts]
    for line in (line for line in axis.lines if line.get_gid() != BACKDROP):
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


def series_legend(figure: Figure, rows: pd.DataFrame) -> None:
    """The series of `rows` below the figure, for panels that have no room for direct labels."""
    legend_below(figure, [Line2D([], [], **look.marks, linestyle="none", label=name) for name, look, _ in by_series(rows)])


def legend_below(figure: Figure, keys: list[Line2D]) -> None:
    """A legend in as many columns as fit below a figure that is not laid out yet, which grows by further rows."""
    size, handle = 7.5 if len(keys) <= MANY_KEYS else 6.5, 2 if keys[0].get_linestyle() != "None" else 0.8
    widths = [handle + 1.8 + LEGEND_LETTER * len(key.get_label()) for key in keys]
    columns = columns_within(POINTS_PER_INCH * figure.get_figwidth() / size, widths)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW_INCHES * (-(-len(keys) // columns) - 1))
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, handlelength=handle, handletextpad=0.4, columnspacing=1.2, fontsize=size)


def columns_within(width: float, widths: list[float]) -> int:
    """The largest number of columns, filled one after the other, in which entries of `widths` take up no more than `width`; at least 1."""
    for columns in range(len(widths), 1, -1):
        pieces = np.array_split(widths, columns)  # as matplotlib does, the first ones longer
        if sum(piece.max() for piece in pieces) <= width:
            return columns
    return 1


# ---- points and files ----

@dataclass(frozen=True)
class Panel:
    """One column of the table against the layer."""

    column: str
    label: str
    rows: pd.DataFrame
    title: str = ""
    wide_range: bool = False


def draw_points(axis: Axes, rows: pd.DataFrame, at: tuple[pd.Series, str], *, interval: bool) -> None:
    """Markers of one series' `rows` at (x values, y column), with the 95 % interval of y where asked for."""
    lengths = interval_lengths(rows, at[1]) if interval else None
    size = {"markersize": 2.5} if len(rows) > 16 else {}  # so that markers of a deep model stay apart
    axis.errorbar(at[0], rows[at[1]], yerr=lengths, linestyle="none", elinewidth=0.8, capsize=1.5, **rows["look"].iloc[0].marks, **size)


def point_names(rows: pd.DataFrame, suffix: str | None) -> list[str]:
    """"ℓ3 head" for each row, with its text in the column `suffix`, or "ℓ3"; "ℓ3 head @100" where a series has several rows at a layer.

    The target and models, which have no layer, are named by their series.
    """
    own = rows[suffix].tolist() if suffix else itertools.repeat("")
    places = zip(rows["target_layer"], rows["kind"], rows["series"], own, strict=False)
    names = [series if kind in ("target", "model") else f"ℓ{layer:g} {text}".rstrip() for layer, kind, series, text in places]
    repeated = rows.duplicated(["target_layer", "series"], keep=False) & rows["step"].notna()
    return [f"{name} @{step:g}" if again else name for name, step, again in zip(names, rows["step"], repeated, strict=True)]


def write_figure(figure: Figure | None, stem: Path) -> list[Path]:
    """`figure` as PNG and PDF, without a date, so that equal results make equal files."""
    paths = {stem.with_suffix(".png"): {}, stem.with_suffix(".pdf"): {"CreationDate": None}}
    for path, metadata in paths.items():
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            figure.savefig(path, metadata=metadata)
    return list(paths) if figure else []
