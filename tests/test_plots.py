"""Figures drawn from made-up tables: every number in this file is synthetic and measures nothing."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from running.command_line import UserError

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from measuring import metrics
from plotting import capacity
from plotting import exits as plots
from plotting import parts as plot_parts
from truncated_llama import ExitKind

ROOT = Path(__file__).parent.parent
GAMMA = 4
RANKING = "potential_vs_tokens_per_call"  # the figure that needs some drafts
NAMES = [*plots.FIGURES, "training_curves"]
TWELVE = (
    "untuned", "head", "rank64", "rank256", "translator", "last_block", "head+last_block", "rank64+last_block", "head+full_block", "attention_block",
    "head+vocab1024", "head+last_block+vocab4096",
)


def synthetic_draft(kind: str, layer: int, run: str = "") -> dict:
    """One row with plausible, invented numbers: later layers are better and slower. `run` ends the name of its folder."""
    rate = 0.2 + 0.04 * layer + (0.05 if kind == "head" else 0.012 * len(kind)) + 0.01 * len(run)
    row = {"checkpoint": f"runs/layer{layer}-{kind}{run}/step_9.safetensors", "kind": kind, "target_layer": layer, "step": 9}
    row |= {"exit_bytes": 1_000_000 * len(kind), "cost_ratio_bytes": 0.06 * (layer + 1) - 0.02 * ("vocab" in kind)}
    row |= {"gamma": GAMMA, "verification": "rejection", "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    row |= {"chat_kl": 4 * (1 - rate), "chat_kl_at_train_temperature": 1.0, "chat_ppl": 40 * (1 - rate), "chat_top1": rate / 2}
    row |= {"spec_mean_accepted": 3 * rate, "spec_token_accept_rate": rate, "spec_tv": 1 - rate, "spec_speedup": 1.4 - rate / 2}
    row |= {"chat_overlap": rate, "spec_tokens_per_call": 1 + 3 * rate}
    row |= {f"{name}_ci_low": 0.9 * row[name] for name in ("spec_mean_accepted", "spec_token_accept_rate", "spec_tv", "spec_speedup", "spec_tokens_per_call")}
    row |= {name.replace("_low", "_high"): value * 1.2 for name, value in row.items() if name.endswith("_ci_low")}
    row |= {"spec_predicted_speedup": 1.45 - rate / 2}
    row |= {f"spec_accept_at_{position}": rate for position in range(1, GAMMA + 1)}
    return row | {f"spec_accepted_hist_{accepted}": 20 - 4 * accepted for accepted in range(GAMMA + 1)}


TARGET_ROW = {"checkpoint": "target@11", "step": 0, "kind": "target", "target_layer": 11, "chat_kl": 0.0, "chat_ppl": 9.0, "chat_top1": 0.5}


def synthetic_table(kinds: tuple[str, ...] = ("untuned", "head"), layers: tuple[int, ...] = (1, 5, 9)) -> pd.DataFrame:
    return table_of([synthetic_draft(kind, layer) for kind in kinds for layer in layers] + [TARGET_ROW])


def table_of(rows: list[dict]) -> pd.DataFrame:
    return plot_parts.with_series(pd.DataFrame(rows))


def sweep_table() -> pd.DataFrame:
    """One kind at three layers, from runs of three learning rates each, and the untuned exits."""
    rows = [synthetic_draft("head", layer, run) for layer in (1, 5, 9) for run in ("-lr0.0001", "-lr2e-05", "-lk-lr2e-05")]
    return table_of([*(synthetic_draft("untuned", layer) | {"checkpoint": f"untuned@{layer}"} for layer in (1, 5, 9)), *rows])


def write_synthetic(folder: Path, table: pd.DataFrame) -> Path:
    folder.mkdir(exist_ok=True)
    table.drop(columns=["run", "series", "look"]).to_csv(folder / "results.csv", index=False)
    return folder


def write_synthetic_log(folder: Path) -> Path:
    """Ten steps with two validations; the process was killed while it wrote the last line."""
    folder.mkdir(parents=True)
    rows = [{"step": step, "loss": 5 - 0.1 * step, "learning_rate": 1e-4, "tokens": 100} for step in range(1, 11)]
    rows += [{"step": step, "validation_kl": 2 - 0.1 * step, "validation_overlap": 0.05 * step} for step in (0, 10)]
    log = folder / "train_log.csv"
    log.write_text(pd.DataFrame(rows).to_csv(index=False) + "11,4.")
    return log


def titles(figure: Figure) -> list[str]:
    return [axis.get_title(loc="left") or axis.get_title() for axis in figure.axes]


def drawn(table: pd.DataFrame) -> set[str]:
    """Names of the figures that `table` gives, drawn but not written."""
    with mpl.rc_context({**plot_parts.STYLE, "figure.dpi": 72}):
        return {name for name, draw in plots.FIGURES.items() if (figure := draw(table)) and figure.draw_without_rendering() is None}


def test_every_figure_is_written_as_png_and_pdf(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "synthetic", synthetic_table())
    paths = plots.plot_results(folder, [write_synthetic_log(tmp_path / "run")])
    assert paths == [folder / "plots" / f"{name}{suffix}" for name in NAMES for suffix in (".png", ".pdf")]
    for path in paths:
        assert path.stat().st_size > 5000, path
        if path.suffix == ".png":
            image = Image.open(path)
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
            assert image.width in (round(300 * inches) for inches in (plot_parts.COLUMN_INCHES, plot_parts.WIDE_INCHES, plot_parts.PAGE_INCHES))
        else:
            assert path.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("kinds, layers", [(("head",), (5,)), (("head",), (1, 5)), (("untuned", "head", "last_block", "head+last_block"), (5,))])
def test_one_layer_or_one_stage_is_enough(kinds: tuple[str, ...], layers: tuple[int, ...]) -> None:
    exits = len(kinds) * len(layers)
    too_few = {RANKING: exits < plots.FEWEST_RANKED, "capacity_pareto": exits < 2, "kinds_side_by_side": len(kinds) < 2}
    assert drawn(synthetic_table(kinds, layers)) == set(plots.FIGURES) - {name for name, lacking in too_few.items() if lacking}


def test_target_alone_gives_its_quality(capsys: pytest.CaptureFixture) -> None:
    assert drawn(synthetic_table(kinds=())) == {"quality_by_layer"}
    assert "acceptance_histograms: left out" in capsys.readouterr().out


def test_where_a_draft_has_no_kl_all_are_placed_by_tv():
    """A trimmed head's KL is infinite, and absent: its draft used to be left out, and the others were drawn as if they were all."""
    table = synthetic_table()
    table["chat_tv"] = table["chat_kl"] / 8
    trimmed = table["kind"] == "head"
    assert 0 < trimmed.sum() < len(plot_parts.drafts_of(table))
    for has_kl, label in ((True, "KL(p‖q) on chat (nats/token)"), (False, "TV distance of p and q on chat")):
        table.loc[trimmed, "chat_kl"] = table.loc[trimmed, "chat_kl"] if has_kl else np.nan
        axis, = plots.speedup_vs_quality(table).axes
        assert axis.get_xlabel() == label
        column = "chat_kl" if has_kl else "chat_tv"
        drawn_at = {x for line in axis.lines for x in np.asarray(line.get_xdata(), float).tolist()}
        assert drawn_at >= set(plot_parts.drafts_of(table)[column])
    assert plots.quality_by_layer(table).axes[0].get_ylabel() == "TV distance of p and q"


def test_target_as_its_own_draft_is_no_draft() -> None:
    """All its tokens are accepted by construction: it stands beside the drafts, but wins no front and gets no histogram."""
    as_draft = synthetic_draft("target", 11) | {"chat_kl": 0.0, "spec_speedup": 9.0}
    table = plot_parts.with_series(pd.concat([plot_parts.drafts_of(synthetic_table()), pd.DataFrame([as_draft])], ignore_index=True))
    assert len(plots.acceptance_histograms(table).axes) == 3
    assert titles(plots.acceptance_by_position(table)) == ["untuned", "head"]
    points = np.vstack([line.get_xydata() for line in plots.speedup_vs_quality(table).axes[0].lines])
    assert points[:, 1].max() < 9
    assert [text.get_text() for text in plots.predicted_speedup(table).axes[0].texts].count("target") == 1
    assert len(capacity.kinds_side_by_side(table).axes[0].get_yticks()) == 6
    assert all(text.get_text() != "target" for text in capacity.capacity_pareto(table).axes[0].texts)


@pytest.mark.parametrize("prefix, as_nan, gone", [
    ("spec_speedup", False, {"speedup_vs_quality", "predicted_speedup"}),
    ("spec_accepted_hist_", False, {"acceptance_histograms"}),
    ("spec_accept_at_", True, {"acceptance_by_position"}),
    ("chat_", False, {"quality_by_layer", "speedup_vs_quality", RANKING}),
    ("chat_", True, {"quality_by_layer", "speedup_vs_quality", RANKING}),
    ("spec_tokens_per_call", False, {RANKING}),
    ("chat_top1", True, set()),
    ("spec_tv", False, set()),
    ("cost_ratio_bytes", False, {"capacity_pareto", "kinds_side_by_side"}),
    ("spec_token_accept_rate", True, {"capacity_pareto", "kinds_side_by_side"}),
    ("exit_bytes", True, set()),
])
def test_missing_numbers_leave_their_panel_out_and_say_so(
    capsys: pytest.CaptureFixture, prefix: str, as_nan: bool, gone: set[str],
) -> None:
    table = synthetic_table(("head", "last_block"), (1, 5))
    columns = [column for column in table if column.startswith(prefix)]
    table = table.assign(**dict.fromkeys(columns, np.nan)) if as_nan else table.drop(columns=columns)
    assert drawn(table) == set(plots.FIGURES) - gone
    said = capsys.readouterr().out
    assert "left out, no" in said and all(f"plots: {name}: left out" in said for name in gone)


def test_missing_numbers_are_never_drawn_as_zero() -> None:
    table = synthetic_table()
    table.loc[1, "spec_tv"] = np.nan
    axis = plots.acceptance_by_layer(table).axes[2]
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    assert (values > 0).all()


def test_missing_intervals_are_said_and_half_ones_not_drawn(capsys: pytest.CaptureFixture) -> None:
    table = synthetic_table().drop(columns="spec_tv_ci_low")
    assert np.isnan(plot_parts.interval_lengths(table, "spec_tv")).all()
    assert plots.acceptance_by_layer(table).get_suptitle().endswith("temperature 1; bars: 95 % intervals")
    table = table[[column for column in table if "_ci_" not in column]]
    assert plots.acceptance_by_layer(table).get_suptitle().endswith("temperature 1")
    assert "drawn without intervals, no numbers in spec_tv_ci_low" in capsys.readouterr().out


def test_figure_of_an_earlier_call_does_not_stay(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "synthetic", synthetic_table(kinds=()))
    (folder / "plots").mkdir()
    (folder / "plots/acceptance_histograms.png").write_text("from an earlier call")
    plots.plot_results(folder, [])
    assert {path.name for path in (folder / "plots").iterdir()} == {"quality_by_layer.png", "quality_by_layer.pdf"}


def test_ranking_of_drafts_states_spearmans_rho_with_its_interval() -> None:
    """KL falls and overlap rises with τ, but for the two exits at layer 9, which trade places in KL."""
    table = synthetic_table()
    best = table.index[table["target_layer"] == 9]
    table.loc[best, "chat_kl"] = table.loc[best[::-1], "chat_kl"].to_numpy()
    with mpl.rc_context(plot_parts.STYLE):
        kl, overlap = plots.potential_vs_tokens_per_call(table).axes
    drafts = plot_parts.drafts_of(table)
    for axis, column in ((kl, "chat_kl"), (overlap, "chat_overlap")):
        rho, low, high = plots.rank_correlation(drafts[column], drafts["spec_tokens_per_call"])
        assert -1.001 < low <= rho <= high < 1.001
        assert f"ρ = {rho:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−") in axis.get_title(loc="left")
        assert axis.get_ylabel() == "tokens per target call τ"
    assert "KL: ρ = −0.94 [−1.00, " in kl.get_title(loc="left") and "overlap: ρ = 1.00 [1.00, 1.00]" in overlap.get_title(loc="left")
    assert kl.get_xscale() == "log" and overlap.get_xscale() == "linear"


def test_rank_correlation_shares_the_constants_of_metrics_and_needs_values_that_vary() -> None:
    assert (plots.NUM_RESAMPLES, plots.INTERVAL) == (metrics.NUM_RESAMPLES, metrics.INTERVAL)
    assert plots.rank_correlation(pd.Series([1.0, 1.0, 1.0, 1.0]), pd.Series([1.0, 2.0, 3.0, 4.0])) is None


@pytest.mark.parametrize(("x", "y", "wanted"), [
    ([1, 2, 3, 4], [10, 100, 1000, 10_000], 1),
    ([1, 2, 3, 4], [9, 3, 2, -1], -1),
    ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),  # 1 − 6 Σd² / (n (n² − 1)), which holds without ties
    ([1, 2, 2, 4], [1, 3, 2, 4], 4.5 / (4.5 * 5) ** 0.5),  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: Σ of products 4.5, of squares 4.5 and 5
    ([7, 7, 1, 1], [5, 5, 5, 8], -2 / (4 * 3) ** 0.5),  # ranks 3.5, 3.5, 1.5, 1.5 and 2, 2, 2, 4
])
def test_rank_correlation_against_values_by_hand(x, y, wanted) -> None:
    rho, low, high = plots.rank_correlation(pd.Series(x, dtype=float), pd.Series(y, dtype=float))
    assert rho == pytest.approx(wanted) and low <= high


def test_ranking_is_left_out_for_fewer_drafts_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(plots, "FIGURES", {RANKING: plots.FIGURES[RANKING]})
    for count, names in ((3, set()), (4, {f"{RANKING}.png", f"{RANKING}.pdf"})):
        folder = write_synthetic(tmp_path / str(count), synthetic_table(("head",), tuple(range(count))))
        plots.plot_results(folder, [])
        assert {path.name for path in (folder / "plots").glob(f"{RANKING}.*")} == names
    assert capsys.readouterr().out.count("3 drafts are too few to rank") == 2


def crowded_table(per_stage: int) -> pd.DataFrame:
    """Drafts in a small cloud, several of them at the same place."""
    table = synthetic_table(("untuned", "head", "head+last_block"), tuple(range(per_stage)))
    drafts = table["kind"] != "target"
    table.loc[drafts, "chat_kl"] = 1 + 0.02 * (table["target_layer"] % 3)
    table.loc[drafts, "spec_speedup"] = 1.1 + 0.01 * (table["target_layer"] % 2)
    return table


@pytest.mark.parametrize("table", [synthetic_table(), crowded_table(3), crowded_table(12)])
@pytest.mark.parametrize("draw", [plots.speedup_vs_quality, plots.predicted_speedup, plots.potential_vs_tokens_per_call, capacity.capacity_pareto])
def test_labels_of_points_overlap_neither_each_other_nor_points(table: pd.DataFrame, draw) -> None:
    """Boxes as the renderer measures them, not those that the placement computed."""
    with mpl.rc_context(plot_parts.STYLE):
        figure = draw(table)
        figure.draw_without_rendering()
        axis = figure.axes[0]
        labels = [text for text in axis.texts if text.get_gid() == "label"]
        boxes = [Text.get_window_extent(label) for label in labels]  # an annotation's own extent includes its leader
    assert len(labels) >= min(6, (table["kind"] != "target").sum())
    for (one, box), (other, second) in itertools.combinations(zip(labels, boxes, strict=True), 2):
        assert not box.overlaps(second), f"{one.get_text()} covers {other.get_text()}"
    markers = [line for line in axis.lines if line.get_marker() not in ("None", "_", "|", 2, 3)]
    points = np.vstack([line.get_transform().transform(line.get_xydata()) for line in markers])
    for label, box in zip(labels, boxes, strict=True):
        assert not any(box.contains(*point) for point in points), f"{label.get_text()} covers a point"
        assert axis.get_window_extent().contains(box.x0, box.y0) and axis.get_window_extent().contains(box.x1, box.y1)


def test_a_label_without_a_leader_is_nearest_to_its_own_point() -> None:
    """Three drafts in a row, closer than a label is wide: labels above them once stood in another order than the points."""
    table = synthetic_table(("untuned", "head"), (1, 3, 7))
    table.loc[:2, "chat_overlap"], table.loc[:2, "spec_tokens_per_call"] = [0.100, 0.126, 0.156], [1.145, 1.128, 1.140]
    table.loc[3:5, "spec_tokens_per_call"] = [1.8, 3.4, 4.1]
    with mpl.rc_context(plot_parts.STYLE):
        figure = plots.potential_vs_tokens_per_call(table)
        figure.draw_without_rendering()
    axis = figure.axes[1]
    labels = [text for text in axis.texts if text.get_gid() == "label"]
    points = axis.transData.transform([label.xy for label in labels])
    assert len(labels) == 6
    for index, label in enumerate(labels):
        distances = plot_parts.gaps(Text.get_window_extent(label).extents, points)
        assert label.arrow_patch or distances.argmin() == index, label.get_text()


def test_labels_without_room_are_counted(capsys: pytest.CaptureFixture) -> None:
    with mpl.rc_context(plot_parts.STYLE):
        plots.speedup_vs_quality(crowded_table(20))
    assert "points without a label, for want of room" in capsys.readouterr().out


def test_end_labels_keep_their_order_and_distance() -> None:
    placed = plot_parts.spread([5.0, 5.0, 1.0, 99.0], gap=10, low=0, high=100)
    assert placed == [11.0, 21.0, 1.0, 99.0]
    assert np.diff(sorted(plot_parts.spread([50.0] * 8, gap=10, low=0, high=100))).min() == pytest.approx(10)


def test_pareto_front_keeps_only_unbeaten_rows() -> None:
    table = pd.DataFrame({"kl": [1.0, 2.0, 2.0, 3.0, 0.5], "speedup": [1.0, 1.5, 1.4, 1.2, 0.9]})
    assert plot_parts.pareto_front(table, "kl", "speedup").index.tolist() == [4, 0, 1]


def test_training_curves_skip_a_torn_line_and_repeat_no_step(tmp_path: Path) -> None:
    log = write_synthetic_log(tmp_path / "run")
    assert plots.read_train_log(log)["step"].max() == 10
    text = log.read_text()
    log.write_text(text[: text.rfind("\n") + 1] + "10,1.5,,,,\n")
    figure = plots.training_curves([log])
    assert titles(figure) == ["training loss", "validation KL(p‖q)", "validation overlap"]
    raw = figure.axes[0].lines[0].get_xydata()
    assert len(raw) == 10 and raw[-1].tolist() == [10, 1.5]


def test_logs_are_found_beside_trained_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference row's checkpoint is a name like untuned@3, whose folder is no run."""
    log = write_synthetic_log(tmp_path / "run")
    monkeypatch.chdir(log.parent)
    assert plots.train_logs_of(synthetic_table().assign(checkpoint="untuned@3", kind="untuned")) == []
    assert plots.train_logs_of(synthetic_table(("head",)).assign(checkpoint=str(log.with_name("step_9.safetensors")), kind="rank64")) == [log]


def write_logs(folder: Path, names: list[str]) -> list[Path]:
    """A training log in a folder of each of `names`, which say the kind; a trimmed vocabulary has no KL."""
    logs = []
    for name in names:
        log = write_synthetic_log(folder / name)
        if "vocab" in name:
            pd.read_csv(io.StringIO(log.read_text().rpartition("\n")[0])).assign(validation_kl=np.nan).to_csv(log, index=False)
        logs.append(log)
    return logs


def test_curves_of_many_logs_are_named_briefly_and_told_apart(tmp_path: Path) -> None:
    names = [f"layer{layer}-{kind}" for layer in (11, 3, 1, 7) for kind in TWELVE[1:]]
    figure = plots.training_curves(write_logs(tmp_path, names))
    legend = figure.legends[0]
    labels = [text.get_text() for text in legend.texts]
    assert sorted(labels) == sorted(names)
    assert labels[:4] == ["layer1-head", "layer3-head", "layer7-head", "layer11-head"]
    looks = {(line.get_color(), line.get_marker(), line.get_fillstyle(), str(line.get_markerfacecolor())) for line in legend.get_lines()}
    assert len(looks) == len(names)
    loss, kl, overlap = (len(axis.lines) for axis in figure.axes)
    assert loss == overlap == len(names)
    assert sum(len(line.get_xdata()) > 0 for line in figure.axes[1].lines) == sum("vocab" not in name for name in names) < kl


def test_curves_have_no_panel_for_a_figure_that_no_run_has(tmp_path: Path) -> None:
    assert titles(plots.training_curves(write_logs(tmp_path, ["layer1-head+vocab1024"]))) == ["training loss", "validation overlap"]


def test_panels_of_several_validation_sets_stand_side_by_side_without_perplexities() -> None:
    columns = ["validation_b_kl", "loss", "validation_a_overlap", "validation_a_kl", "validation_new"]
    assert sorted(columns, key=lambda column: plots.log_panel(column)[2:]) == ["loss", "validation_a_kl", "validation_b_kl", "validation_a_overlap", "validation_new"]
    assert plots.log_panel("validation_b_kl")[:2] == ("validation KL(p‖q), b", "nats/token")


@pytest.mark.parametrize("folders, names", [
    (["runs/x/layer1", "runs/x/layer3"], ["layer1", "layer3"]),
    (["runs/head/layer1", "runs/ftlast/layer1", "runs/head/layer3"], ["head/layer1", "ftlast/layer1", "head/layer3"]),
    (["a/layer3", "b/layer3"], ["a", "b"]),
    (["x/layer3-head-lr5e-05", "x/layer3-head-lr0.0001"], ["lr5e-05", "lr0.0001"]),
    (["x/layer3", "x/layer3-lk"], ["layer3", "layer3-lk"]),  # nothing would be left of the first
    (["runs/alone"], ["alone"]),
])
def test_logs_are_named_by_what_tells_them_apart(folders: list[str], names: list[str]) -> None:
    assert plots.log_names([Path(folder, "train_log.csv") for folder in folders]) == names


def test_curves_of_tuned_exits_have_the_looks_of_their_kinds(tmp_path: Path) -> None:
    """As the table tells them, or else the folders; where one is unknown, or all are one kind, each run has a colour of its own."""
    logs = write_logs(tmp_path, ["one", "two", "three"])
    kinds = dict(zip((log.parent for log in logs), ("head", "rank64", "head"), strict=True))
    colors = {name: look.color for name, (_, look) in plots.styled_runs(logs, kinds).items()}
    head = [look.color for look in plot_parts.run_looks(plot_parts.look_of("head"), 2)]
    assert colors == {"one": head[0], "three": head[1], "two": plot_parts.look_of("rank64").color}
    for known in ({}, dict.fromkeys(kinds, "head")):
        assert {look.color for _, look in plots.styled_runs(logs, known).values()} == set(plots.RUN_COLORS[:3])


# ---- kinds ----

def test_kinds_are_those_of_exits() -> None:
    """Every order of every combination of parts is a kind here where it is one there, and has the same name."""
    words = ("head", "translator", "rank8", "last_block", "full_block", "attention_block", "vocab1024", "ranks", "rank", "vocab", "")
    valid = set()
    for parts in itertools.chain.from_iterable(itertools.permutations(words, count) for count in (1, 2, 3)):
        name = "+".join(parts)
        try:
            wanted = str(ExitKind.parse(name))
        except UserError:
            assert plot_parts.kind_parts(name) is None, name
        else:
            assert str(plot_parts.kind_parts(name)) == plot_parts.known_kind(name) == wanted
            valid.add(wanted)
    assert len(valid) == 30
    for name in ("head+head", "rank8+rank16", "vocab8+vocab16+head", "mystery"):
        with pytest.raises(UserError):
            plot_parts.known_kind(name)


def test_known_kinds_keep_their_looks_and_others_have_their_own() -> None:
    known = {"untuned": ("#E69F00", "^"), "head": ("#0072B2", "o"), "last_block": ("#D55E00", "s"), "head+last_block": ("#009E73", "D"), "target": ("#000000", "*")}
    assert {kind: (plot_parts.look_of(kind).color, plot_parts.look_of(kind).marker) for kind in known} == known
    heads, blocks, vocabs = ("head", "rank32", "rank64", "rank256", "translator", ""), ("", "last_block", "full_block", "attention_block"), ("", "vocab1024", "vocab4096")
    names = [plot_parts.known_kind("+".join(filter(None, parts))) for parts in itertools.product(heads, blocks, vocabs) if any(parts[:2])]
    looks = [plot_parts.look_of(kind) for kind in [*names, "untuned", "model", "target"]]
    assert len({(look.color, look.marker, look.fill) for look in looks}) == len(looks) == 72
    assert plot_parts.look_of("last_block+head") == plot_parts.look_of("head+last_block")


def test_a_kind_looks_the_same_in_every_table_and_figure() -> None:
    many, few = synthetic_table(TWELVE), synthetic_table(("rank64+last_block", "head+vocab1024"))
    for kind in ("rank64+last_block", "head+vocab1024"):
        [look] = {*many.loc[many["kind"] == kind, "look"], *few.loc[few["kind"] == kind, "look"]}
        assert look == plot_parts.look_of(kind)
    with mpl.rc_context(plot_parts.STYLE):
        figures = [draw(many) for draw in (plots.acceptance_by_layer, plots.speedup_vs_quality, capacity.capacity_pareto)]
    shown = [{text.get_text(): (line.get_color(), line.get_marker()) for text, line in zip(figure.legends[0].texts, figure.legends[0].get_lines(), strict=True)}
             for figure in figures]
    assert shown[0] | {"target": None} == shown[1] | {"target": None} == shown[2] | {"target": None} and len(shown[1]) == len(TWELVE)


def test_kinds_are_listed_from_small_to_large_whatever_their_order_in_the_table() -> None:
    table = synthetic_table(tuple(reversed(TWELVE)))
    wanted = ["untuned", "head", "head+vocab1024", "rank64", "rank256", "translator", "last_block", "head+last_block", "head+last_block+vocab4096",
              "rank64+last_block", "head+full_block", "attention_block", "target"]
    assert [name for name, _, _ in plot_parts.by_series(table)] == wanted
    assert titles(plots.acceptance_by_position(table)) == wanted[:-1]


def overlaps(figure: Figure) -> list[str]:
    """Pairs of texts that cover each other, and texts that leave the figure, as the renderer measures them."""
    figure.draw_without_rendering()
    unseen = set()
    for axis in itertools.chain.from_iterable((axes.xaxis, axes.yaxis) for axes in figure.axes):
        low, high = sorted(axis.get_view_interval())
        unseen |= {text for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high for text in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in unseen]
    boxes = np.array([Text.get_window_extent(text).extents for text in texts]) + [1, 1, -1, -1]
    found = [f"{one.get_text()} | {other.get_text()}" for (one, box), (other, second) in itertools.combinations(zip(texts, boxes, strict=True), 2)
             if plot_parts.touch(box[None], second[None])]
    outside = (boxes[:, :2] < -2).any(axis=1) | (boxes[:, 2:] > figure.bbox.size + 2).any(axis=1)
    return found + [f"{text.get_text()} is outside" for text, out in zip(texts, outside, strict=True) if out]


@pytest.mark.parametrize("make", [synthetic_table, lambda: synthetic_table(TWELVE, (1, 3, 6, 9)), sweep_table], ids=["few", "twelve", "runs"])
@pytest.mark.parametrize("name", plots.FIGURES)
def test_texts_of_a_figure_cover_neither_each_other_nor_its_edge(name: str, make: Callable[[], pd.DataFrame]) -> None:
    with mpl.rc_context(plot_parts.STYLE):
        figure = plots.FIGURES[name](make())
    assert overlaps(figure) == []


def test_overlapping_texts_are_found() -> None:
    figure = Figure(figsize=(2, 2))
    for x, text in ((0.1, "one"), (0.15, "two"), (0.6, "apart"), (0.95, "beyond")):
        figure.text(x, 0.5, text)
    assert overlaps(figure) == ["one | two", "beyond is outside"]


def test_histograms_of_many_kinds_are_stacked_bars_of_all_of_them() -> None:
    """Twelve kinds side by side would be bars a hair wide."""
    table = synthetic_table(TWELVE, (1, 5))
    counts = ["spec_accepted_hist_0", "spec_accepted_hist_4"]
    table.loc[(table["kind"] == "rank64") & (table["target_layer"] == 5), counts] = [0, 56]
    left, right = plots.acceptance_histograms(table).axes[:2]
    names = [label.get_text() for label in left.get_yticklabels()]
    assert sorted(names) == sorted(TWELVE) and len(right.patches) == len(TWELVE) * (GAMMA + 1)
    bars = [(round(bar.get_x(), 6), round(bar.get_width(), 6)) for bar in right.patches if round(bar.get_y() + bar.get_height() / 2) == names.index("rank64")]
    total = 16 + 12 + 8 + 56
    assert bars == [(round(start / total, 6), round(width / total, 6)) for start, width in ((0, 0), (0, 16), (16, 12), (28, 8), (36, 56))]


def test_an_exit_that_lacks_at_a_layer_leaves_its_own_place_empty() -> None:
    table = synthetic_table(TWELVE, (1, 5))
    table = table[(table["kind"] != "head") | (table["target_layer"] != 5)]
    left, right = plots.acceptance_histograms(table).axes[:2]
    missing = [label.get_text() for label in left.get_yticklabels()].index("head")
    places = {round(bar.get_y() + bar.get_height() / 2) for bar in right.patches}
    assert set(range(len(TWELVE))) - places == {missing}


@pytest.mark.parametrize("widths, columns", [([10, 10, 10, 10], 4), ([10, 10, 30, 10], 3), ([90, 10, 10, 10, 10], 1), ([40, 10, 10], 2)])
def test_a_legend_has_as_many_columns_as_fit(widths: list[float], columns: int) -> None:
    assert plot_parts.columns_within(55, widths) == columns


def test_a_model_without_a_layer_is_a_horizontal_line_and_a_point(tmp_path: Path) -> None:
    rows = [synthetic_draft("head", layer) for layer in (1, 5)]
    models = [synthetic_draft("head", 7) | {"kind": "model", "target_layer": None, "checkpoint": f"drafts/{name}", "cost_ratio_bytes": cost}
              for name, cost in (("small", 0.05), ("large", 0.2))]
    table = plots.read_results(write_synthetic(tmp_path / "models", table_of([*rows, *models])) / "results.csv")
    assert drawn(table) == set(plots.FIGURES)
    axis = plots.acceptance_by_layer(table).axes[1]
    level = models[0]["spec_token_accept_rate"]
    assert [set(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) == 2 and line.get_xdata()[1] == 1].count({level}) == 2
    with mpl.rc_context(plot_parts.STYLE):
        names = {text.get_text() for text in capacity.capacity_pareto(table).axes[0].texts}
    assert {"model, small", "model, large", "ℓ1 head", "ℓ5 head"} <= names
    assert titles(plots.acceptance_histograms(table)) == ["ℓ = 1", "ℓ = 5", "no layer"]


# ---- runs ----

def test_runs_of_one_kind_are_lines_and_names_of_their_own() -> None:
    """A sweep's exits share layer and kind: one line once led through whichever run stood last at each layer."""
    table = sweep_table()
    assert [name for name, _, _ in plot_parts.by_series(table)] == ["untuned", "head, lk-lr2e-05", "head, lr2e-05", "head, lr0.0001"]
    folders = {(row.target_layer, row.spec_token_accept_rate): row.checkpoint.rpartition("head")[2] for row in table.itertuples() if row.kind == "head"}
    with mpl.rc_context(plot_parts.STYLE):
        axis = plots.acceptance_by_layer(table).axes[1]
    joined = [[folders.get((round(x), y)) for x, y in line.get_xydata()] for line in axis.lines if line.get_linestyle() != "None" and len(line.get_xdata()) == 3]
    assert len(joined) == 4 and all(len(set(line)) == 1 for line in joined) and len({line[0] for line in joined}) == 4
    styles = {line.get_color() for line in axis.lines if len(line.get_xdata()) == 3 and line.get_linestyle() != "None"}
    assert len(styles) == 4


def test_every_run_has_its_own_bars_and_labels() -> None:
    table = sweep_table()
    assert [len(axis.patches) for axis in plots.acceptance_histograms(table).axes] == 3 * [4 * (GAMMA + 1)]
    head = plots.acceptance_by_position(table).axes[1]
    assert {text.get_text() for text in head.texts} == {f"ℓ{layer} {run}" for layer in (1, 5, 9) for run in ("lk-lr2e-05", "lr2e-05", "lr0.0001")}
    names = [label.get_text() for label in capacity.kinds_side_by_side(table).axes[0].get_yticklabels()]
    assert len(set(names)) == len(names) == 12 and "ℓ5 head, lk-lr2e-05" in names
    with mpl.rc_context(plot_parts.STYLE):
        legend = plots.speedup_vs_quality(table).legends[0]
    assert [text.get_text() for text in legend.texts] == ["untuned", "head, lk-lr2e-05", "head, lr2e-05", "head, lr0.0001"]


@pytest.mark.parametrize("checkpoints, runs", [
    (["runs/x/layer1-head/s.pt", "runs/x/layer3-head/s.pt"], ["", ""]),  # no two at one layer
    (["runs/one/layer1/s.pt", "runs/two/layer3/s.pt"], ["", ""]),
    (["runs/x/layer1/s_1.pt", "runs/x/layer1/s_2.pt"], ["", ""]),  # two steps of one run
    (["runs/one/layer1/s.pt", "runs/two/layer1/s.pt"], ["one", "two"]),
    (["runs/x/layer1/s.pt", "runs/x/layer1-lk/s.pt"], ["", "lk"]),
    (["a/b/layer1/s.pt", "b/a/layer1/s.pt"], ["a/b/", "b/a/"]),  # the same words
    (["layer1-2e-05/s.pt", "layer1-1e-05/s.pt", "layer3-1e-05/s.pt"], ["layer1-2e-05", "layer1-1e-05", "layer3-1e-05"]),
])
def test_a_run_is_what_its_folder_says_beyond_layer_and_shared_words(checkpoints: list[str], runs: list[str]) -> None:
    layers = [1 if "layer1" in checkpoint else 3 for checkpoint in checkpoints]
    table = pd.DataFrame({"kind": "head", "target_layer": layers, "checkpoint": checkpoints})
    assert plot_parts.run_names(table).tolist() == runs


def test_steps_of_one_run_stay_one_series() -> None:
    rows = [synthetic_draft("head", layer) | {"step": step, "checkpoint": f"runs/layer{layer}/s_{step}.pt"} for layer in (1, 5) for step in (10, 20)]
    table = table_of(rows)
    assert plot_parts.point_names(table, "series") == ["ℓ1 head @10", "ℓ1 head @20", "ℓ5 head @10", "ℓ5 head @20"]
    assert [name for name, _, _ in plot_parts.by_series(table)] == ["head"]


# ---- cost and capacity ----

def test_weight_bound_speedup_is_the_best_of_the_cost_model() -> None:
    for alpha, cost in itertools.product((0.0, 0.3, 0.8, 0.97, 1.0), (0.02, 0.2, 0.7, 1.1)):
        wanted = max(metrics.predicted_speedup(alpha, gamma, cost) for gamma in range(1, 65))
        assert capacity.weight_bound_speedup(alpha, cost) == pytest.approx(wanted)
    assert capacity.weight_bound_speedup(np.array([0.2, 0.5]), np.array([0.2, 0.5])) == pytest.approx([1, 1])  # where α = c a draft neither wins nor loses


def test_lines_of_equal_speedup_are_where_they_say() -> None:
    with mpl.rc_context(plot_parts.STYLE):
        axis = capacity.capacity_pareto(synthetic_table(TWELVE)).axes[0]
    lines = [line for line in axis.lines if line.get_gid() == plot_parts.BACKDROP]
    names = sorted((text.get_text() for text in axis.texts if text.get_text().endswith("×")), key=plot_parts.natural)
    found = []
    for line in lines:
        costs, alphas = line.get_xydata()[~np.isnan(line.get_ydata())].T
        speedups = capacity.weight_bound_speedup(alphas, costs)
        assert np.ptp(speedups) < 0.01 * speedups.mean()
        found.append(f"{speedups.mean():.1f}".removesuffix(".0") + "×")
    assert len(found) >= 4 and sorted(found, key=plot_parts.natural) == names and "1×" in found


def test_efficient_exits_are_ringed_and_no_others() -> None:
    costs, rates = [0.1, 0.2, 0.3, 0.4, 0.4], [0.5, 0.4, 0.6, 0.7, 0.6]
    rows = [synthetic_draft("head", layer) | {"cost_ratio_bytes": cost, "spec_token_accept_rate": rate} for layer, (cost, rate) in enumerate(zip(costs, rates, strict=True))]
    with mpl.rc_context(plot_parts.STYLE):
        axis = capacity.capacity_pareto(table_of([*rows, TARGET_ROW])).axes[0]
    [rings] = [line for line in axis.lines if line.get_markerfacecolor() == "none"]
    assert rings.get_xydata().tolist() == [[0.1, 0.5], [0.3, 0.6], [0.4, 0.7]]
    assert {text.get_text() for text in axis.texts if text.get_fontweight() == "bold"} == {"ℓ0 head", "ℓ2 head", "ℓ3 head"}


def test_labels_in_bold_are_placed_first(capsys: pytest.CaptureFixture) -> None:
    """Of forty exits at one place the last is efficient; from the top down it would find no room."""
    table = synthetic_table(("head",), tuple(range(40))).assign(cost_ratio_bytes=0.5, spec_token_accept_rate=0.6)
    with mpl.rc_context(plot_parts.STYLE):
        figure, [[axis]] = plot_parts.panel_grid([1], 2)
        axis.plot(table["cost_ratio_bytes"], table["spec_token_accept_rate"], "o")
        plot_parts.settle(figure)
        texts = [f"exit {number}" for number in range(41)]
        plot_parts.label_points(axis, table, ("cost_ratio_bytes", "spec_token_accept_rate"), texts, bold=table.index == 40)
    assert "exit 40" in {text.get_text() for text in axis.texts} and "exit 39" in capsys.readouterr().out


def test_names_of_lines_of_equal_speedup_move_apart() -> None:
    """On a wide axis those of 20×, 15×, 10×, 7× and 5× would lie on one another."""
    table = synthetic_table(TWELVE[:3]).assign(cost_ratio_bytes=np.linspace(0.05, 1.4, 10), spec_token_accept_rate=np.linspace(0.5, 0.99, 10))
    with mpl.rc_context(plot_parts.STYLE):
        figure = capacity.capacity_pareto(table)
    assert {"20×", "15×", "10×", "7×", "5×"} <= {text.get_text() for text in figure.axes[0].texts}
    assert overlaps(figure) == []


def test_a_legend_takes_no_room_from_the_panels() -> None:
    with mpl.rc_context(plot_parts.STYLE):
        figures = [plots.acceptance_by_layer(synthetic_table(kinds)) for kinds in (TWELVE[:4], TWELVE)]
        for figure in figures:
            figure.draw_without_rendering()
    heights = [figure.axes[0].get_window_extent().height for figure in figures]
    assert not figures[0].legends and figures[1].legends and heights[1] > 0.95 * heights[0]


@pytest.mark.parametrize(("alpha", "cost", "best"), [(0.8, 0.1, 6), (0.6, 0.05, 4), (0.3, 0.5, 1)])
def test_best_speedup_is_that_of_the_cost_model(alpha, cost, best):
    assert capacity.weight_bound_speedup(alpha, cost) == pytest.approx(metrics.predicted_speedup(alpha, best, cost))


def test_exits_side_by_side_are_sorted_and_each_value_stands_in_its_row() -> None:
    table = synthetic_table(TWELVE[:4], (1, 5))
    table.loc[2, "spec_speedup"] = np.nan
    figure = capacity.kinds_side_by_side(table)
    drafts = plot_parts.drafts_of(table)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    best = capacity.weight_bound_speedup(drafts["spec_token_accept_rate"], drafts["cost_ratio_bytes"])
    assert names == [plot_parts.point_names(drafts, "series")[index] for index in np.argsort(-best, kind="stable")]
    rows = dict(zip(plot_parts.point_names(drafts, "series"), drafts.to_dict("records"), strict=True))
    columns = ("exit_bytes", "cost_ratio_bytes", "spec_token_accept_rate", "spec_tokens_per_call", None, "spec_speedup")
    for axis, column, scale in zip(figure.axes, columns, (1e-6, 1, 100, 1, 1, 1), strict=True):
        points = np.vstack([line.get_xydata() for line in axis.lines if line.get_marker() in "o^s"])
        shown = {names[int(y)]: x for x, y in points if not np.isnan(x)}
        wanted = dict(zip(rows, best, strict=True)) if column is None else {name: row[column] * scale for name, row in rows.items() if not np.isnan(row[column])}
        assert shown == pytest.approx(wanted) and len(shown) == (7 if column == "spec_speedup" else 8)
    ticks = [line for line in figure.axes[5].lines if line.get_marker() == "|"][0]
    assert dict(zip((names[y] for y in ticks.get_ydata()), ticks.get_xdata(), strict=True)) == pytest.approx({name: row["spec_predicted_speedup"] for name, row in rows.items()})


def test_side_by_side_needs_something_to_compare_and_grows_with_its_rows(capsys: pytest.CaptureFixture) -> None:
    assert capacity.kinds_side_by_side(synthetic_table(("head",))) is None
    assert "kinds_side_by_side: left out" in capsys.readouterr().out
    heights = [capacity.kinds_side_by_side(synthetic_table(TWELVE, layers)).get_figheight() for layers in ((1,), (1, 3, 6, 9))]
    assert heights[1] - heights[0] == pytest.approx(36 * capacity.ROW_INCHES)


@pytest.mark.parametrize("text, complaint", [
    (None, "no such file"),
    ("", "not a table"),
    ("kind,target_layer\n", "rows without number"),
    ("kind,step\nhead,1\n", "rows without target_layer"),
    ("kind,target_layer\nhead,\n", "rows without target_layer"),
    ("kind,target_layer\nmystery,1\n", "unknown kind 'mystery'; a kind is untuned, .* rank<r> or translator; .* vocab<N>$"),
    ("kind,target_layer\nhead+rank8,1\n", r"unknown kind 'head\+rank8'"),
])
def test_an_unusable_table_is_one_line_with_the_remedy(tmp_path: Path, text: str | None, complaint: str) -> None:
    if text is not None:
        (tmp_path / "results.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        plots.plot_results(tmp_path)


def test_runs_as_a_command_without_torch(tmp_path: Path) -> None:
    """The module draws on machines without a model stack: a failing `torch` stands in its way."""
    (tmp_path / "torch.py").write_text("raise ImportError('plots must not import torch')")
    folder = write_synthetic(tmp_path / "synthetic", synthetic_table(kinds=()))
    arguments = ["plotting/exits.py", str(folder)]
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = {arguments!r}; "
        f"runpy.run_module('plotting.exits', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(folder / "plots/quality_by_layer.png") in done.stdout
