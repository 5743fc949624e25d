"""Figures drawn from made-up tables: every number in this file is synthetic and measures nothing."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

from command_line import UserError

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

import metrics
import plots

ROOT = Path(__file__).parent.parent
GAMMA = 4
RANKING = "potential_vs_tokens_per_call"  # the figure that needs some drafts
NAMES = [*plots.FIGURES, "training_curves"]


def synthetic_draft(kind: str, layer: int) -> dict:
    """One row with plausible, invented numbers: later layers are better and slower."""
    rate = 0.3 + 0.05 * layer + (0.05 if kind == "head" else 0.0)
    row = {"checkpoint": f"runs/{kind}{layer}/step_9.safetensors", "kind": kind, "target_layer": layer, "step": 9}
    row |= {"gamma": GAMMA, "verification": "rejection", "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    row |= {"chat_kl": 4 * (1 - rate), "chat_kl_at_train_temperature": 1.0, "chat_ppl": 40 * (1 - rate), "chat_top1": rate / 2}
    row |= {"spec_mean_accepted": 3 * rate, "spec_token_accept_rate": rate, "spec_tv": 1 - rate, "spec_speedup": 1.4 - rate / 2}
    row |= {"chat_overlap": rate, "spec_tokens_per_call": 1 + 3 * rate}
    row |= {f"{name}_ci_low": 0.9 * row[name] for name in ("spec_mean_accepted", "spec_token_accept_rate", "spec_tv", "spec_speedup", "spec_tokens_per_call")}
    row |= {name.replace("_low", "_high"): value * 1.2 for name, value in row.items() if name.endswith("_ci_low")}
    row |= {"spec_predicted_speedup": 1.45 - rate / 2}
    row |= {f"spec_accept_at_{position}": rate for position in range(1, GAMMA + 1)}
    return row | {f"spec_accepted_hist_{accepted}": 20 - 4 * accepted for accepted in range(GAMMA + 1)}


TARGET_ROW = {"kind": "target", "target_layer": 11, "chat_kl": 0.0, "chat_ppl": 9.0, "chat_top1": 0.5}


def synthetic_table(kinds: tuple[str, ...] = ("untuned", "head"), layers: tuple[int, ...] = (1, 5, 9)) -> pd.DataFrame:
    return pd.DataFrame([synthetic_draft(kind, layer) for kind in kinds for layer in layers] + [TARGET_ROW])


def write_synthetic(folder: Path, table: pd.DataFrame) -> Path:
    folder.mkdir(exist_ok=True)
    table.to_csv(folder / "results.csv", index=False)
    return folder


def write_synthetic_log(folder: Path) -> Path:
    """Ten steps with two validations; the process was killed while it wrote the last line."""
    folder.mkdir(parents=True)
    rows = [{"step": step, "loss": 5 - 0.1 * step, "learning_rate": 1e-4, "tokens": 100} for step in range(1, 11)]
    rows += [{"step": step, "validation_kl": 2 - 0.1 * step, "validation_overlap": 0.05 * step} for step in (0, 10)]
    log = folder / "train_log.csv"
    log.write_text(pd.DataFrame(rows).to_csv(index=False) + "11,4.")
    return log


def drawn(table: pd.DataFrame) -> set[str]:
    """Names of the figures that `table` gives, drawn but not written."""
    with mpl.rc_context({**plots.STYLE, "figure.dpi": 72}):
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
            assert image.width in (round(300 * inches) for inches in (plots.COLUMN_INCHES, plots.WIDE_INCHES, plots.PAGE_INCHES))
        else:
            assert path.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("kinds, layers", [(("head",), (5,)), (("head",), (1, 5)), (("untuned", "head", "last_block", "head+last_block"), (5,))])
def test_one_layer_or_one_stage_is_enough(kinds: tuple[str, ...], layers: tuple[int, ...]) -> None:
    too_few = {RANKING} if len(kinds) * len(layers) < plots.FEWEST_RANKED else set()
    assert drawn(synthetic_table(kinds, layers)) == set(plots.FIGURES) - too_few


def test_target_alone_gives_its_quality(capsys: pytest.CaptureFixture) -> None:
    assert drawn(synthetic_table(kinds=())) == {"quality_by_layer"}
    assert "acceptance_histograms: left out" in capsys.readouterr().out


def test_target_as_its_own_draft_is_no_draft() -> None:
    """All its tokens are accepted by construction: it stands beside the drafts, but wins no front and gets no histogram."""
    as_draft = synthetic_draft("target", 11) | {"chat_kl": 0.0, "spec_speedup": 9.0}
    table = pd.concat([plots.drafts_of(synthetic_table()), pd.DataFrame([as_draft])], ignore_index=True)
    assert len(plots.acceptance_histograms(table).axes) == 3
    assert [axis.get_title(loc="left") or axis.get_title() for axis in plots.acceptance_by_position(table).axes] == ["untuned", "head"]
    points = np.vstack([line.get_xydata() for line in plots.speedup_vs_quality(table).axes[0].lines])
    assert points[:, 1].max() < 9
    assert [text.get_text() for text in plots.predicted_speedup(table).axes[0].texts].count("target") == 1


@pytest.mark.parametrize("prefix, as_nan, gone", [
    ("spec_speedup", False, {"speedup_vs_quality", "predicted_speedup"}),
    ("spec_accepted_hist_", False, {"acceptance_histograms"}),
    ("spec_accept_at_", True, {"acceptance_by_position"}),
    ("chat_", False, {"quality_by_layer", "speedup_vs_quality", RANKING}),
    ("chat_", True, {"quality_by_layer", "speedup_vs_quality", RANKING}),
    ("spec_tokens_per_call", False, {RANKING}),
    ("chat_top1", True, set()),
    ("spec_tv", False, set()),
])
def test_missing_numbers_leave_their_panel_out_and_say_so(
    capsys: pytest.CaptureFixture, prefix: str, as_nan: bool, gone: set[str],
) -> None:
    table = synthetic_table(("head",), (1, 5, 7, 9))
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
    assert np.isnan(plots.interval_lengths(table, "spec_tv")).all()
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
    with mpl.rc_context(plots.STYLE):
        kl, overlap = plots.potential_vs_tokens_per_call(table).axes
    drafts = plots.drafts_of(table)
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
@pytest.mark.parametrize("draw", [plots.speedup_vs_quality, plots.predicted_speedup, plots.potential_vs_tokens_per_call])
def test_labels_of_points_overlap_neither_each_other_nor_points(table: pd.DataFrame, draw) -> None:
    """Boxes as the renderer measures them, not those that the placement computed."""
    with mpl.rc_context(plots.STYLE):
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
    with mpl.rc_context(plots.STYLE):
        figure = plots.potential_vs_tokens_per_call(table)
        figure.draw_without_rendering()
    axis = figure.axes[1]
    labels = [text for text in axis.texts if text.get_gid() == "label"]
    points = axis.transData.transform([label.xy for label in labels])
    assert len(labels) == 6
    for index, label in enumerate(labels):
        distances = plots.gaps(Text.get_window_extent(label).extents, points)
        assert label.arrow_patch or distances.argmin() == index, label.get_text()


def test_labels_without_room_are_counted(capsys: pytest.CaptureFixture) -> None:
    with mpl.rc_context(plots.STYLE):
        plots.speedup_vs_quality(crowded_table(20))
    assert "points without a label, for want of room" in capsys.readouterr().out


def test_end_labels_keep_their_order_and_distance() -> None:
    placed = plots.spread([5.0, 5.0, 1.0, 99.0], gap=10, low=0, high=100)
    assert placed == [11.0, 21.0, 1.0, 99.0]
    assert np.diff(sorted(plots.spread([50.0] * 8, gap=10, low=0, high=100))).min() == pytest.approx(10)


def test_pareto_front_keeps_only_unbeaten_rows() -> None:
    table = pd.DataFrame({"kl": [1.0, 2.0, 2.0, 3.0, 0.5], "speedup": [1.0, 1.5, 1.4, 1.2, 0.9]})
    assert plots.pareto_front(table, "kl", "speedup").index.tolist() == [4, 0, 1]


def test_training_curves_skip_a_torn_line_and_repeat_no_step(tmp_path: Path) -> None:
    log = write_synthetic_log(tmp_path / "run")
    assert plots.read_train_log(log)["step"].max() == 10
    text = log.read_text()
    log.write_text(text[: text.rfind("\n") + 1] + "10,1.5,,,,\n")
    figure = plots.training_curves([log])
    assert [axis.get_title(loc="left") or axis.get_title() for axis in figure.axes] == ["training loss", "validation KL(p‖q)", "validation overlap"]
    raw = figure.axes[0].lines[0].get_xydata()
    assert len(raw) == 10 and raw[-1].tolist() == [10, 1.5]


def test_logs_are_found_beside_trained_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference row's checkpoint is a name like untuned@3, whose folder is no run."""
    log = write_synthetic_log(tmp_path / "run")
    monkeypatch.chdir(log.parent)
    assert plots.train_logs_of(synthetic_table().assign(checkpoint="untuned@3", kind="untuned")) == []
    assert plots.train_logs_of(synthetic_table(("head",)).assign(checkpoint=str(log.with_name("step_9.safetensors")))) == [log]


@pytest.mark.parametrize("text, complaint", [
    (None, "no such file"),
    ("", "not a table"),
    ("kind,target_layer\n", "rows without number"),
    ("kind,step\nhead,1\n", "rows without target_layer"),
    ("kind,target_layer\nmystery,1\n", "unknown kind 'mystery'; known kinds: untuned, head"),
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
    arguments = ["plots.py", str(folder)]
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = {arguments!r}; "
        f"runpy.run_path({str(ROOT / 'plots.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(folder / "plots/quality_by_layer.png") in done.stdout
