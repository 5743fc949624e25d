"""Figures of benchmark.py's JSONL, drawn from the file alone.

    python -m commands.plot_results results.jsonl --out_dir plots

`speedup`: tokens per second over the baseline, a bar per method, with 95 % intervals. `acceptance_speedup`: against the share of drafted tokens that were kept.
`accuracy_speedup` and `accuracy_tokens_per_call`, where answers were checked: what lossy methods give up for what they gain; the line is the front that no method
beats in both. Each as .png (300 dpi) and .pdf; one without numbers is left out, and a line says so. Of a file with several sets of inputs (seeds,
models, prompts) the latest is drawn, with all settings of each method.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from running.command_line import UserError, check_value, run

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from harness.schema import first_complaint
from plotting.parts import (
    GREY,
    STYLE,
    WIDE_INCHES,
    Look,
    draw_steps_up,
    head_line,
    interval_lengths,
    interval_note,
    new_look,
    pareto_front,
    settings_line,
    write_figure,
)
from running.record_file import read_records
from running.run_files import make_output_dir

LOOKS = {  # colours of Okabe and Ito by family: plain, chains, trees, lossy, transformers' own
    "vanilla": new_look("#000000", "*"), "speculative": new_look("#0072B2", "o"), "self_speculative": new_look("#0072B2", "D"),
    "static_tree": new_look("#009E73", "o"), "dynamic_tree": new_look("#009E73", "s"), "specexec": new_look("#009E73", "^"), "common_sense": new_look("#009E73", "v"),
    "autojudge": new_look("#D55E00", "o"), "topk": new_look("#D55E00", "s", fill="none"),
    "hf_generate": new_look("#777777", "*"), "hf_assisted": new_look("#777777", "o"),
}
OTHER_LOOK = new_look("#777777", "x")  # of methods that this version does not know
BAR_INCHES = 0.22
DETAILS = {"k": "γ = {}", "tree_budget": "{} nodes", "judge_rule": "{}"}
# Where these do not tell rows apart:
FURTHER = {"verification": "{}", "commonsense": "{}", "parallel_branches": "{} branches", "branch_prune_threshold": "pruned below {}"}


@dataclass(frozen=True)
class Scatter:
    """A figure of one column against another: what its axes say."""

    name: str
    x: str
    x_label: str
    y: str
    y_label: str
    front: bool = False


SCATTERS = (
    Scatter("acceptance_speedup", "acceptance_rate_median", "drafted tokens kept (trees: of the levels offered)", "speedup", "speedup"),
    Scatter("accuracy_speedup", "speedup", "speedup", "exact_match_mean", "accuracy", front=True),
    Scatter("accuracy_tokens_per_call", "tokens_per_call_mean", "tokens per target call, τ", "exact_match_mean", "accuracy", front=True),
)


def latest_summaries(path: Path) -> pd.DataFrame:
    """The last summary of every method and setting, of the last set of inputs, in the order of LOOKS. Raises UserError where there is none."""
    records = read_records(path)
    wrong = first_complaint(records)
    if wrong is not None:
        raise UserError(f"{path}, {wrong}; give a file that benchmark.py wrote")
    good = {record["resume_key"]: record for record in records if record["summary"] and record["status"] == "ok"}
    if not good:
        raise UserError(f"{path}: no method was measured; run benchmark.py on it first")
    last = list(good.values())[-1]["inputs"]["shared"]
    table = pd.DataFrame([record for record in good.values() if record["inputs"]["shared"] == last])
    table["place"] = table["method"].map({name: place for place, name in enumerate(LOOKS)})
    return table.sort_values("place", kind="stable").reset_index(drop=True)


def look_of(method: str) -> Look:
    """How a method is drawn."""
    return LOOKS.get(method, OTHER_LOOK)


def way_names(table: pd.DataFrame) -> list[str]:
    """What each row is called: its method, with what tells it from others of the same."""
    names = [_name(row, DETAILS) for _, row in table.iterrows()]
    return [_name(row, {**DETAILS, **FURTHER}) if names.count(name) > 1 else name for name, (_, row) in zip(names, table.iterrows(), strict=True)]


def _name(row: pd.Series, details: dict[str, str]) -> str:
    own = [text.format(_plain(row[column])) for column, text in details.items() if pd.notna(row.get(column))]
    return ", ".join([row["method"], *own])


def _plain(value: object) -> object:
    """A whole number as such, which pandas keeps as a float where other rows have none."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def speedup_bars(table: pd.DataFrame) -> Figure | None:
    """A bar per method."""
    rows = with_numbers(table, "speedup", ["speedup"])
    if rows is None:
        return None
    figure = Figure(figsize=(WIDE_INCHES, 0.7 + BAR_INCHES * len(rows)), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(rows))[::-1]
    lengths = interval_lengths(rows, "speedup")
    lossless = [bool(value) for value in rows["lossless"]]
    bars = axis.barh(places, rows["speedup"], height=0.7, color=[look_of(method).color for method in rows["method"]], xerr=np.nan_to_num(lengths), ecolor=GREY,
                     error_kw={"elinewidth": 0.8, "capsize": 1.5})
    for bar, exact in zip(bars, lossless, strict=True):
        bar.set_alpha(1 if exact else 0.45)
    axis.axvline(1, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_yticks(places, way_names(rows))
    baselines = rows["speedup_baseline"].dropna() if "speedup_baseline" in rows else ()
    axis.set_xlabel(f"tokens per second, × {baselines.iloc[0] if len(baselines) else 'the baseline'}")
    axis.grid(visible=False, axis="y")
    note = [interval_note(rows, "speedup", "speedup"), "" if all(lossless) else "pale: lossy"]
    head_line(figure, head(rows, "; ".join(filter(None, note))))
    return figure


def scatter(table: pd.DataFrame, what: Scatter) -> Figure | None:
    """A point per method."""
    rows = with_numbers(table, what.name, [what.x, what.y])
    if rows is None:
        return None
    figure = Figure(figsize=(WIDE_INCHES, 3.0), layout="constrained")
    axis = figure.subplots()
    for name, (_, row) in zip(way_names(rows), rows.iterrows(), strict=True):
        own = pd.DataFrame([row])
        axis.errorbar(own[what.x], own[what.y], xerr=interval_lengths(own, what.x), yerr=interval_lengths(own, what.y), linestyle="none", elinewidth=0.6, capsize=1.2,
                      label=name, **look_of(row["method"]).marks)
    if what.front:
        front = pareto_front(rows.assign(cost=-rows[what.x]), "cost", what.y)
        draw_steps_up(axis, [-cost for cost in front["cost"]], front[what.y].tolist())
    axis.set_xlabel(what.x_label)
    axis.set_ylabel(what.y_label)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=6.5)
    head_line(figure, head(rows, "bars: 95 % intervals"))
    return figure


def with_numbers(table: pd.DataFrame, figure_name: str, columns: list[str]) -> pd.DataFrame | None:
    """The rows with numbers in `columns`; a printed line where there are fewer than two."""
    found = table.reindex(columns=[*table, *set(columns) - set(table)]).dropna(subset=columns)
    if len(found) < 2:
        print(f"plot_results: {figure_name}: left out, fewer than two methods have numbers in {', '.join(columns)}")
        return None
    return found


def head(rows: pd.DataFrame, note: str) -> str:
    """What was decoded with what."""
    first = rows.iloc[0]
    drafts = rows["draft_model"].dropna().unique() if "draft_model" in rows else []
    subject = f"{Path(first['target_model']).name}{f', draft {Path(drafts[0]).name}' if len(drafts) else ''}; {Path(first['dataset']).name}; {first['device']}, {first['dtype']}"
    return f"{subject}; {settings_line(rows[['temperature', 'top_p', 'top_k']], note)}"


def plot_all(path: Path, folder: Path) -> list[Path]:
    """All figures of the file that can be drawn."""
    table = latest_summaries(path)
    make_output_dir(str(folder))
    with mpl.rc_context({**STYLE, "text.parse_math": False}):  # a $ in a name is a $
        written = write_figure(speedup_bars(table), folder / "speedup")
        for what in SCATTERS:
            written += write_figure(scatter(table, what), folder / what.name)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path, help="benchmark.py's JSONL")
    parser.add_argument("--out_dir", help="where the figures go (default: plots/ beside the file)")
    args = parser.parse_args()
    check_value("out_dir", args.out_dir)
    for path in plot_all(args.path, Path(args.out_dir or args.path.parent / "plots")):
        print(path)


if __name__ == "__main__":
    run(main)
