"""Figures of benchmark.py's records: which are drawn, of what, and what rows are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from running.command_line import UserError

import pandas as pd
import pytest

import benchmark
from commands import plot_judges, plot_results, validate_results
from commands.plot_results import latest_summaries, way_names
from harness.figures import needed_summaries
from plotting import exits, trees
from test_commands import check_one_line, run_main
from test_records import KINDS, OF_ALL, SHARED, run_record

ROOT = Path(__file__).parent.parent

CHECKED = {"correct_by_prompt": [True, False], "exact_match": 0.5}


def write(path: Path, records: list[dict], shared: dict = SHARED) -> Path:
    """The records of runs with the `shared` inputs, and their summaries, behind what is there."""
    records = [{**record, "inputs": {**record["inputs"], "shared": shared}} for record in records]
    made = [{**OF_ALL, **one} for one in needed_summaries(records, shared, 0)]
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in [*records, *made])
    return path


def chain(gamma: int, **more: object) -> dict:
    own = {"k": gamma, "verification": "rejection", **more}
    return run_record("speculative", 1, (10, 20), (1, 1), inputs=own, acceptance_rate=0.5, **own)


def names_of(path: Path) -> list[str]:
    return way_names(latest_summaries(path))


def test_every_figure_is_written(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "out.jsonl", [run_record("vanilla", **CHECKED), chain(4, **CHECKED), run_record("topk", judge_rule="among the target's top 4", acceptance_rate=0.9, **CHECKED)])
    assert run_main(plot_results, [path], monkeypatch) == 0
    names = ("speedup", "acceptance_speedup", "accuracy_speedup", "accuracy_tokens_per_call")
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "plots" / f"{name}.{kind}") for name in names for kind in ("png", "pdf")]


@pytest.mark.parametrize("changes", [{"method": "of next year"}, {"method": "$\\frac$ 100 %"}, {"dataset": "a$b_{", "draft_model": "$", "judge_rule": "^$"}, {"dataset": "", "speedup_baseline": None}])
def test_what_the_validator_takes_is_drawn(tmp_path, monkeypatch, changes):
    path = write(tmp_path / "out.jsonl", [run_record("vanilla", **CHECKED), chain(4, **CHECKED)])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**record, **(changes if record["method"] == "speculative" else {})}) + "\n" for record in records))
    assert run_main(validate_results, ["--path", path, "--strict"], monkeypatch) == 0
    assert run_main(plot_results, [path], monkeypatch) == 0 and (tmp_path / "plots" / "accuracy_speedup.png").exists()


@pytest.mark.parametrize("changes", [{"inputs": {}}, {"steps": 10**400}, {"speedup": -3}, {"tokens_per_call_mean": 10**30}])
def test_what_cannot_be_is_neither_drawn_nor_gone_on_from(tmp_path, monkeypatch, capsys, changes):
    path = write(tmp_path / "out.jsonl", [run_record("vanilla"), chain(4)])
    with path.open("a") as file:
        file.write(json.dumps({**json.loads(path.read_text().splitlines()[-1]), **changes}) + "\n")
    name = next(iter(changes))
    assert run_main(validate_results, ["--path", path], monkeypatch) == 1 and f"line 5: {name}" in capsys.readouterr().out
    assert run_main(plot_results, [path], monkeypatch) == 2
    check_one_line(capsys, f"line 5: {name}")
    assert run_main(benchmark, ["--toy", "--method", "vanilla", "--max_samples", 1, "--max_new_tokens", 4, "--out", path], monkeypatch) == 2
    check_one_line(capsys, f"line 5: {name}")


@pytest.mark.parametrize(("out_dir", "message"), [("", '--out_dir "": is empty'), ("file", "cannot write to file"), ("file/plots", "cannot write to file/plots")])
def test_a_place_for_figures_that_is_none_gets_one_line(tmp_path, monkeypatch, capsys, out_dir, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    path = write(tmp_path / "out.jsonl", [run_record("vanilla"), chain(4)])
    assert run_main(plot_results, [path, "--out_dir", out_dir], monkeypatch) == 2
    check_one_line(capsys, message)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "out.jsonl"]


@pytest.mark.parametrize("redraw", [exits.plot_results, exits.plot_step_times, plot_judges.plot_judges, trees.plot_trees])
def test_a_file_where_the_plots_go_gets_one_line(tmp_path, monkeypatch, redraw):
    source = {"plot_results": "results/demo", "plot_step_times": "results/step_times", "plot_judges": "results/autojudge/greedy", "plot_trees": "results/trees/counts/exit-layer1-t0"}
    folder = Path(shutil.copytree(ROOT / source[redraw.__name__], tmp_path / "results", ignore=shutil.ignore_patterns("plots")))
    (folder / "plots").touch()
    with pytest.raises(UserError, match="cannot write to .*plots"):
        redraw(folder)


def test_figures_without_numbers_are_left_out_with_a_line(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "out.jsonl", [run_record("vanilla"), run_record("hf_generate")])
    assert run_main(plot_results, [path, "--out_dir", tmp_path / "figures"], monkeypatch) == 0
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {"speedup"}
    printed = capsys.readouterr().out
    assert "acceptance_speedup: left out, fewer than two methods have numbers in acceptance_rate_median, speedup" in printed and printed.count("left out") == 3


def test_a_single_prompt_has_no_intervals_and_is_drawn(tmp_path, monkeypatch):
    one = {"prompts": 1, "tokens_by_prompt": [10], "decode_sec_by_prompt": [1.0], "target_calls_by_prompt": [5]}
    path = write(tmp_path / "out.jsonl", [{**run_record("vanilla"), **one}, {**chain(4), **one}])
    assert "speedup_ci_low" not in latest_summaries(path)
    assert run_main(plot_results, [path], monkeypatch) == 0 and (tmp_path / "plots" / "speedup.png").exists()


def test_the_latest_inputs_are_drawn_with_all_settings_of_a_method(tmp_path):
    path = write(tmp_path / "out.jsonl", [run_record("vanilla"), chain(8)])
    write(path, [chain(4), chain(2), run_record("vanilla")], {**SHARED, "seed": 9})
    assert names_of(path) == ["vanilla", "speculative, γ = 4", "speculative, γ = 2"], "in the order of the methods"
    write(path, [chain(6)], {**SHARED, "draft": "another"})
    assert names_of(path) == ["speculative, γ = 6"], "figures of two drafts are not mixed"


def test_what_was_measured_anew_is_drawn_once(tmp_path):
    path = write(tmp_path / "out.jsonl", [chain(4)])
    write(path, [chain(4), run_record("speculative", 2, (10, 20), (3, 3), inputs={"k": 4, "verification": "rejection"}, k=4, verification="rejection")])
    table = latest_summaries(path)
    assert len(table) == 1 and table["runs"][0] == 2


def test_names_say_what_tells_rows_apart():
    rows = [{"method": "speculative", "k": 4.0}, {"method": "speculative", "k": "auto"}, {"method": "static_tree", "tree_budget": 16.0}, {"method": "topk", "k": 4, "judge_rule": "among"},
            {"method": "dynamic_tree", "tree_budget": 8.0, "verification": "coupled", "parallel_branches": 8.0},
            {"method": "dynamic_tree", "tree_budget": 8.0, "verification": "match", "parallel_branches": 8.0}]
    assert way_names(pd.DataFrame(rows)) == ["speculative, γ = 4", "speculative, γ = auto", "static_tree, 16 nodes", "topk, γ = 4, among",
                                             "dynamic_tree, 8 nodes, coupled, 8 branches", "dynamic_tree, 8 nodes, match, 8 branches"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(json.dumps(KINDS["skipped"]) + "\n", "no method was measured; run benchmark.py on it first"), ('{"turns": []}\n', "line 1: lacks schema_version.*give a file that benchmark.py wrote"),
     ("", "no method was measured"), ("{\n", "line 1: not JSON"), (None, "No such file")],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, content, message):
    if content is not None:
        (tmp_path / "out.jsonl").write_text(content)
    assert run_main(plot_results, [tmp_path / "out.jsonl"], monkeypatch) == 2
    check_one_line(capsys, message)
