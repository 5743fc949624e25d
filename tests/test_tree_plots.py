"""Figures of trees from made-up tables and growmaps: every number of a table in this file is synthetic and measures nothing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from running.command_line import UserError

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from PIL import Image

from decoding.growmap import FORMAT, BestTrees, Growmap, chain, save_growmap
from decoding.verify import TREE_RULES, VERIFICATIONS
from measuring.tree_plans import TREE_METHODS
from plotting import exits
from plotting import trees as tree_plots

ROOT = Path(__file__).parent.parent
NAMES = ("trees_by_size", "promised_tokens")
ACCEPTANCE = [0.5, 0.17, 0.08, 0.05, 0.03, 0.02, 0.02, 0.01]
POLICY = {"batch": 1, "temperature": 0.7, "top_p": 0.95, "top_k": 0}


def with_interval(column: str, value: float) -> dict:
    return {column: value, f"{column}_ci_low": 0.9 * value, f"{column}_ci_high": 1.2 * value}


def synthetic_row(method: str, tau: float, **own: object) -> dict:
    """One entry of a benchmark with plausible, invented numbers."""
    return {"method": method, **POLICY, **with_interval("spec_tokens_per_call", tau), **with_interval("speedup", 0.5 * tau), "weight_bound_speedup": 0.7 * tau, **own}


def synthetic_table(sizes: tuple[int, ...] = (8, 32)) -> pd.DataFrame:
    """Vanilla, two kinds of chain by two verifications and γs, and every tree method."""
    rows = [{"method": "vanilla", **POLICY, **with_interval("speedup", 1.0)}]
    for verification, gamma in itertools.product(VERIFICATIONS, ("4", "auto")):
        rows.append(synthetic_row("self_speculative", 2.0 + 0.3 * (gamma == "auto"), verification=verification, gamma=gamma))
    rows.append(synthetic_row("speculative", 2.2, verification="rejection", gamma="4", speedup=1.9))
    for (number, method), verification, size in itertools.product(enumerate(tree_plots.METHOD_STYLES), TREE_RULES, sizes):
        tau = 1.5 + 0.3 * np.log2(size) + 0.2 * number + 0.1 * len(verification)
        rows.append(synthetic_row(method, tau, verification=verification, tree_budget=size, tree_expected_tokens=0.97 * tau, **with_interval("tree_found_tokens", tau)))
    return pd.DataFrame(rows)


def write_synthetic(folder: Path, table: pd.DataFrame) -> Path:
    folder.mkdir(parents=True)
    table.to_csv(folder / "results.csv", index=False)
    return folder


def figure_of(draw, table: pd.DataFrame, tmp_path: Path) -> Figure:
    """What `draw` makes of `table` as a results file, laid out."""
    with mpl.rc_context(exits.STYLE):
        figure = draw(tree_plots.read_benchmark(write_synthetic(tmp_path / draw.__name__, table) / "results.csv"), "about")
        figure.draw_without_rendering()
    return figure


def best_growmap(size: int, depth: int = 8) -> Growmap:
    return BestTrees(ACCEPTANCE, size, depth).growmap(size, depth, {"model": "assets/x", "verification": "coupled", "policy": {"temperature": 0.7}})


def content_of(growmap: Growmap) -> dict:
    return {"parents": list(growmap.parents), "acceptance": list(growmap.acceptance), "replayed": list(growmap.replayed), "provenance": growmap.provenance}


def test_constants_are_those_of_modules_that_need_torch():
    assert tree_plots.GROWMAP_FORMAT == FORMAT
    assert set(tree_plots.METHOD_STYLES) == set(TREE_METHODS)
    assert set(tree_plots.VERIFICATIONS) == {*VERIFICATIONS, *TREE_RULES}


# ---- tables ----

def test_both_figures_are_written_as_png_and_pdf(tmp_path: Path):
    folder = write_synthetic(tmp_path / "trees", synthetic_table())
    paths = tree_plots.plot_trees(folder)
    assert paths == [folder / "plots" / f"{name}{suffix}" for name in NAMES for suffix in (".png", ".pdf")]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert [Image.open(path).width for path in paths[::2]] == [300 * exits.PAGE_INCHES, 300 * exits.COLUMN_INCHES]


def test_panels_show_every_line_the_best_chains_and_vanilla(tmp_path: Path):
    figure = figure_of(tree_plots.trees_by_size, synthetic_table(), tmp_path)
    tokens, measured, forecast = figure.axes
    for axis, labels, references in ((tokens, {"γ = auto"}, 2), (measured, {"γ = auto", "γ = 4*"}, 3), (forecast, {"γ = auto"}, 3)):
        flat = [line for line in axis.lines if len(line.get_xdata()) == 2 and list(line.get_xdata()) == [0, 1]]
        assert len(flat) == references  # of two chains, and of vanilla where speedups are drawn
        assert {text.get_text() for text in axis.texts} == labels
        assert axis.get_xscale() == "log" and [text.get_text() for text in axis.get_xticklabels()] == ["8", "32"]
        lines = [line for line in axis.lines if line.get_marker() in ("o", "s", "^")]
        assert len(lines) == 9 and len({(line.get_marker(), line.get_color()) for line in lines}) == 9
    assert figure.get_suptitle().replace("\xa0", " ") == "about; temperature 0.7, top-p 0.95; bars: 95 % intervals"
    assert "best chain and its γ, * speculative" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_lines_of_one_size_are_dodged_and_coloured_by_verification(tmp_path: Path):
    axis = figure_of(tree_plots.trees_by_size, synthetic_table(), tmp_path).axes[0]
    lines = [line for line in axis.lines if line.get_marker() in ("o", "s", "^")]
    firsts = [line.get_xdata()[0] for line in lines]
    assert len(set(firsts)) == 9 and all(8 / 1.3 < first < 8 * 1.3 for first in firsts)
    assert {line.get_color() for line in lines} == {tree_plots.VERIFICATIONS[name].color for name in TREE_RULES}


def test_promised_tokens_has_a_marker_per_entry_the_diagonal_and_the_band(tmp_path: Path):
    table = synthetic_table((8, 16, 64))
    [axis] = figure_of(tree_plots.promised_tokens, table, tmp_path).axes
    markers = [found for found in axis.collections if isinstance(found, PathCollection)]
    points = np.vstack([marker.get_offsets() for marker in markers])
    trees = table.dropna(subset=["tree_budget"])
    wanted = trees[["tree_expected_tokens", "tree_found_tokens"]].to_numpy()
    np.testing.assert_allclose(sorted(points.tolist()), sorted(wanted.tolist()), rtol=1e-12)
    assert all((np.diff(marker.get_sizes()) > 0).all() for marker in markers)  # larger trees, larger markers
    [band] = [found for found in axis.collections if isinstance(found, PolyCollection)]
    (x, y) = band.get_paths()[0].vertices.T
    assert (y / x).min() == pytest.approx(0.95) and (y / x).max() == pytest.approx(1.05)
    assert axis.get_xlim() == axis.get_ylim() and "±5 %" in axis.get_title(loc="left")


@pytest.mark.parametrize("column, gone, panel_gone", [
    ("tree_expected_tokens", {"promised_tokens"}, False),
    ("tree_found_tokens", {"promised_tokens"}, False),
    ("spec_tokens_per_call", set(), True),
    ("weight_bound_speedup", set(), True),
    ("tree_budget", set(NAMES), False),
])
def test_what_has_no_numbers_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture, column: str, gone: set[str], panel_gone: bool,
):
    folder = write_synthetic(tmp_path / "trees", synthetic_table().drop(columns=column))
    (folder / "plots").mkdir()
    (folder / "plots/promised_tokens.png").write_text("from an earlier call")
    tree_plots.plot_trees(folder)
    assert {path.stem for path in (folder / "plots").iterdir()} == set(NAMES) - gone
    said = capsys.readouterr().out
    assert all(f"tree_plots: {name}: left out, no tree with numbers in" in said for name in gone)
    assert not panel_gone or f"trees_by_size: left out, no tree with numbers in tree_budget, {column}" in said


def test_trees_alone_without_intervals_have_no_key_of_chains(tmp_path: Path, capsys: pytest.CaptureFixture):
    table = synthetic_table()
    table = table[table["method"].isin(TREE_METHODS)]
    figure = figure_of(tree_plots.trees_by_size, table[[column for column in table if "_ci_" not in column]], tmp_path)
    assert not any("chain" in text.get_text() or text.get_text() == "rejection" for text in figure.legends[0].get_texts())
    assert "drawn without intervals" in capsys.readouterr().out


def test_batches_and_peers_are_no_chains(tmp_path: Path):
    others = pd.DataFrame([synthetic_row("self_speculative", 9.0, verification="coupled", gamma="4", batch=4),
                           synthetic_row("hf_assisted", 9.0, verification="rejection", gamma="4")])
    figure = figure_of(tree_plots.trees_by_size, pd.concat([synthetic_table(), others]), tmp_path)
    assert max(line.get_ydata()[0] for line in figure.axes[0].lines) < 9


@pytest.mark.parametrize("facts, text", [
    ({"model_path": "org/llama", "draft": "runs/a/layer3/step_9.safetensors", "spec_prompt_dataset": "pydoc", "device": "cpu", "threads": 2},
     "target org/llama, draft layer3/step_9, prompts pydoc, on CPU, threads: 2"),
    ({"random_init": "llama-3.2-1b", "planted_layer": 1, "planted_alpha": 0.8, "device": "auto", "threads": 2, "model_path": None},
     "target llama-3.2-1b, draft planted exit at layer 1, α = 0.8, on Some GPU"),
    (None, ""),
])
def test_head_says_what_is_recorded_of_the_run(tmp_path: Path, facts: dict | None, text: str):
    if facts is not None:
        (tmp_path / "config.json").write_text(json.dumps(facts))
        (tmp_path / "manifest.json").write_text(json.dumps([{}, {"gpu": "Some GPU"}]))
    assert tree_plots.run_line(tmp_path) == text


@pytest.mark.parametrize("text, complaint", [
    (None, "no such file; give the output folder of commands/sweep_settings.py"),
    ("", "not a table"),
    ("kind,target_layer\nhead,1\n", "has no columns method and batch"),
    ("method,batch,verification\nstatic_tree,1,mystery\n", "unknown verification 'mystery'; known: coupled"),
])
def test_an_unusable_table_is_one_line_with_the_remedy(tmp_path: Path, text: str | None, complaint: str):
    if text is not None:
        (tmp_path / "results.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        tree_plots.plot_trees(tmp_path)


# ---- growmaps ----

TREES = [chain(5).parents, (-1, *[0] * 8), best_growmap(64).parents, (-1, 0, 0, 1, 2, 2, 3, 3, 3, 4)]


@pytest.mark.parametrize("parents", TREES)
def test_depths_and_chances_are_those_of_the_growmap(parents: tuple[int, ...]):
    growmap = Growmap(parents, tuple(ACCEPTANCE))
    depths, reach = tree_plots.chances(parents, ACCEPTANCE, ())
    assert tuple(depths) == growmap.depths and tuple(reach) == pytest.approx(growmap.reach)
    measured = replace(growmap, replayed=tuple(0.9 * share if node else 1.0 for node, share in enumerate(growmap.reach)))
    assert tuple(tree_plots.chances(parents, ACCEPTANCE, measured.replayed)[1]) == measured.reach != growmap.reach


@pytest.mark.parametrize("parents", [*TREES, best_growmap(128, 10).parents])
def test_layout_is_tidy(parents: tuple[int, ...]):
    """Nodes of a level stand in the file's order, at least 1 apart; parents midway above their children, so edges do not cross."""
    x, growmap = tree_plots.tidy(parents), Growmap(tuple(parents))
    for level in range(growmap.depth + 1):
        nodes = [node for node in range(growmap.size) if growmap.depths[node] == level]
        assert (np.diff(x[nodes]) > 1 - 1e-9).all()
    for node in set(parents[1:]):
        children = [child for child, parent in enumerate(parents) if parent == node]
        assert x[node] == pytest.approx((x[children[0]] + x[children[-1]]) / 2)


def test_subtrees_are_pushed_together_below_shallow_siblings():
    """The second child's deep subtree reaches under the leaf on its left."""
    x = tree_plots.tidy((-1, 0, 0, 2, 2, 2))
    assert x[2] - x[1] == 1 and x[3] == x[1]


@pytest.mark.parametrize("size", [2, 8, 64, 128])
def test_growmap_is_drawn_beside_its_file(tmp_path: Path, size: int):
    path, growmap = tmp_path / "best.of.growmap.json", best_growmap(size)
    save_growmap(path, growmap)
    assert tree_plots.plot_growmap(path) == [tmp_path / "best.of.growmap.png", tmp_path / "best.of.growmap.pdf"]
    assert all(drawn.stat().st_size > 5000 for drawn in (path.with_suffix(".png"), path.with_suffix(".pdf")))


@pytest.mark.parametrize("size", [8, 64, 128])
def test_growmap_shows_all_nodes_and_edges_and_nothing_overlaps(size: int):
    growmap = best_growmap(size)
    with mpl.rc_context(exits.STYLE):
        figure = tree_plots.growmap_figure(content_of(growmap))
        figure.draw_without_rendering()
    axis = figure.axes[0]
    [discs] = [found for found in axis.collections if isinstance(found, PathCollection)]
    assert len(discs.get_offsets()) == size and sum(isinstance(patch, PathPatch) for patch in axis.patches) == size - 1
    assert axis.get_title(loc="left") == f"{size} nodes on {growmap.depth} levels, {growmap.tokens_per_call:.2f} tokens per call expected"
    places = axis.transData.transform(discs.get_offsets())
    distances = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))[~np.eye(size, dtype=bool)]
    assert distances.min() > np.sqrt(discs.get_sizes()[0]) * exits.pixels_per_point(figure)
    boxes = [text.get_window_extent() for text in (*axis.texts, figure._suptitle)]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_likelier_nodes_are_darker():
    with mpl.rc_context(exits.STYLE):
        figure = tree_plots.growmap_figure(content_of(best_growmap(16)))
    [discs] = [found for found in figure.axes[0].collections if isinstance(found, PathCollection)]
    light = discs.get_facecolors()[:, :3].sum(axis=1)
    assert (np.diff(light[np.argsort(best_growmap(16).reach)]) <= 1e-9).all()


@pytest.mark.parametrize("text, complaint", [
    (None, "no growmap"),
    ("{", "no growmap"),
    ("[]", "not of the format growmap-1"),
    ('{"format": "growmap-1"}', "not of the format growmap-1"),
    ('{"format": "growmap-1", "parents": [-1, 0], "acceptance": [], "replayed": [], "provenance": {}}', "no acceptance vector"),
])
def test_an_unusable_growmap_is_one_line_with_the_remedy(tmp_path: Path, text: str | None, complaint: str):
    if text is not None:
        (tmp_path / "growmap.json").write_text(text)
    with pytest.raises(UserError, match=complaint):
        tree_plots.plot_growmap(tmp_path / "growmap.json")


def test_runs_as_a_command_without_torch(tmp_path: Path):
    """Redraws a folder of a benchmark, a folder of a growmap and a growmap; a failing `torch` stands in the way."""
    (tmp_path / "torch.py").write_text("raise ImportError('tree_plots must not import torch')")
    folder = write_synthetic(tmp_path / "trees", synthetic_table())
    (tmp_path / "shape").mkdir()
    for path in (tmp_path / "shape/growmap.json", tmp_path / "other.json"):
        save_growmap(path, best_growmap(8))
    arguments = ["plotting/trees.py", str(folder), str(tmp_path / "shape"), str(tmp_path / "other.json")]
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = {arguments!r}; "
        f"runpy.run_module('plotting.trees', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in (folder / "plots/trees_by_size.png", tmp_path / "shape/growmap.png", tmp_path / "other.pdf"):
        assert str(path) in done.stdout and path.exists()
