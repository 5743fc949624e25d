"""The figure of judges, drawn from made-up tables: every number in this file is synthetic and measures nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from running.command_line import UserError

import matplotlib as mpl
import pandas as pd
import pytest

from commands import evaluate_judge, plot_judges
from plotting.parts import STYLE


def synthetic_table() -> pd.DataFrame:
    """Two judges of one kind, one of another, and ranks."""
    rows = [{"method": "self_speculative", "lossless": True, "tokens_per_call": 4.0, "accuracy": 0.8}]
    for number, (judge, features) in enumerate((("a", "target"), ("b", "target"), ("c", "law"))):
        rows += [{"method": "autojudge", "lossless": False, "judge": judge, "judge_features": features, "threshold": step / 4, "own_threshold": step == 2,
                  "tokens_per_call": 4 + step / 3 + number / 9, "accuracy": 0.8 - 0.03 * step} for step in range(5)]
    rows += [{"method": "topk", "lossless": False, "rank": rank, "tokens_per_call": 4.5 + rank / 9, "accuracy": 0.5} for rank in (2, 4, 0)]
    table = pd.DataFrame(rows)
    for column, width in (("tokens_per_call", 0.2), ("accuracy", 0.03)):
        table[f"{column}_ci_low"], table[f"{column}_ci_high"] = table[column] - width, table[column] + width
    return table.assign(problems=500, gamma=8, verification="rejection", temperature=0.0, top_p=1.0, top_k=0)


def drawn(table: pd.DataFrame) -> mpl.figure.Figure:
    with mpl.rc_context(STYLE):
        return plot_judges.accuracy_by_tokens_per_call(table)


def test_every_way_is_drawn_once(tmp_path: Path):
    figure = drawn(synthetic_table())
    (axis,) = figure.axes
    named = {line.get_label(): len(line.get_xdata()) for line in axis.get_lines() if not line.get_label().startswith("_")}
    assert named == {"exact decoding": 1, "judge of the target's state": 5, "judge of the target's state (2)": 5, "judge of the draft's law": 5, "among the target's top k": 3}
    assert {text.get_text() for text in axis.texts} == {"2", "4", "all", "0.5"}
    assert "γ = 8" in figure.get_suptitle() and "500 problems" in figure.get_suptitle()


def test_a_table_without_judges_or_intervals_is_drawn(tmp_path: Path):
    table, path = synthetic_table(), tmp_path / "results.csv"
    ranks = table[table["method"] != "autojudge"].drop(columns=["judge", "judge_features", "own_threshold"])
    for part in (ranks, table.iloc[:1], table.drop(columns=[column for column in table if "_ci_" in column])):
        part.to_csv(path, index=False)
        assert drawn(plot_judges.read_ways(path))


def test_files_are_written(tmp_path: Path, monkeypatch, capsys):
    synthetic_table().to_csv(tmp_path / "results.csv", index=False)
    monkeypatch.setattr(sys, "argv", ["commands/plot_judges.py", str(tmp_path)])
    plot_judges.main()
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.suffix for path in paths] == [".png", ".pdf"] and all(path.stat().st_size > 1000 for path in paths)


@pytest.mark.parametrize(("content", "message"), [(None, "no such file"), ("", "not a table"), ("a,b\n1,2\n", "not a table of judges")])
def test_other_files_are_refused(tmp_path: Path, content, message):
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        plot_judges.plot_judges(tmp_path)


def test_columns_are_those_of_the_evaluation():
    known = {name for names in evaluate_judge.COLUMNS for name in names.split(", ")}
    assert {"judge_features", "threshold", "own_threshold", "rank", plot_judges.X, plot_judges.Y} <= known
