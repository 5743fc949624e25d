"""Trees from the command line: every method with both kinds of draft, the growmap's two commands, and one clear line for every mistake."""

import json
import shutil

import pandas as pd
import pytest

import evaluate
import evaluate_checkpoints
import prove
from commands import build_followers, build_growmap, sweep_settings
from decoding.growmap import Growmap, chain, save_growmap
from measuring import tree_plans
from test_commands import EVALUATION, check_one_line, exit_path, run_main  # noqa: F401
from test_tuning import time_little
from toy_models import tiny_llama

PROMPTS = ["--spec_prompt_dataset", "arithmetic", "--spec_prompt_length", "8", "--spec_max_new_tokens", "12", "--spec_num_prompts", "3", "--fit_prompts", "4", "--num_threads", "1"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    time_little(monkeypatch)


@pytest.fixture
def drafts(tiny_target_path, exit_path, tmp_path, tokenizer):  # noqa: F811
    """Flags of an exit and of an independent model; the exit is a copy, as weights are kept beside it."""
    own = tmp_path / "exit.safetensors"
    shutil.copy(exit_path, own)
    model = tmp_path / "draft"
    tiny_llama(seed=3, vocab_size=len(tokenizer), num_hidden_layers=1).float().save_pretrained(model)
    tokenizer.save_pretrained(model)
    return {"exit": ["--checkpoint", own], "model": ["--draft_model_path", model]}


@pytest.fixture
def growmap(tmp_path):
    path = tmp_path / "growmap.json"
    save_growmap(path, Growmap((-1, 0, 0, 1, 1, 3), (0.5, 0.2)))
    return path


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["exit", "model"])
@pytest.mark.parametrize(
    ("method", "verification"),
    [("static_tree", "coupled"), ("static_tree", "match"), ("static_tree", "swor"), ("dynamic_tree", None), ("dynamic_tree", "match"),
     ("dynamic_tree", "swor"), ("specexec", None), ("specexec", "coupled")],
)
def test_every_method_with_both_drafts(tiny_target_path, drafts, growmap, tmp_path, monkeypatch, method, verification, kind, temperature):
    flags = [*drafts[kind], "--method", method, "--spec_temperature", temperature, "--tree_budget", 7, *(["--growmap", growmap] if method == "static_tree" else [])]
    flags = [*flags, *([] if method == "static_tree" else ["--tree_depth", 3]), *([] if verification is None else ["--verification", verification])]
    out = tmp_path / "out"
    if method == "static_tree":
        flags = [flag for flag in flags if flag not in ("--tree_budget", 7)]
    assert run_main(evaluate, ["--model_path", tiny_target_path, *flags, *EVALUATION, "--out_dir", out], monkeypatch) == 0
    row = json.loads((out / "metrics.json").read_text())
    assert row["method"] == method and row["lossless"] is True and row["spec_emitted"] == 36
    assert row["verification"] == (verification or {"specexec": "match"}.get(method, "coupled"))
    assert 1 < row["tree_nodes"] <= 7 and row["spec_tokens_per_call"] == pytest.approx(36 / row["spec_rounds"])
    assert row["spec_predicted_speedup"] > 0 and "spec_overlap" not in row and "gamma" not in row
    if verification in (None, "coupled") and method != "specexec":
        kept = list(tmp_path.glob("**/*coupling.json"))
        assert len(kept) == 1 and len(json.loads(kept[0].read_text())) == 1


def test_budget_of_one_is_vanilla(tiny_target_path, drafts, tmp_path, monkeypatch):
    for method in ("dynamic_tree", "specexec"):
        command = ["--model_path", tiny_target_path, *drafts["exit"], "--method", method, "--tree_budget", 1, *EVALUATION, "--out_dir", tmp_path / method]
        assert run_main(evaluate, command, monkeypatch) == 0
        row = json.loads((tmp_path / method / "metrics.json").read_text())
        assert row["spec_tokens_per_call"] == 1 and "tree_nodes" not in row


def test_weights_are_fitted_once_for_each_policy_and_draft(tiny_target_path, drafts, tmp_path, monkeypatch, capsys):
    def evaluated(name, temperature):
        command = ["--model_path", tiny_target_path, *drafts["exit"], "--method", "dynamic_tree", "--spec_temperature", temperature, *EVALUATION]
        assert run_main(evaluate, [*command, "--out_dir", tmp_path / name], monkeypatch) == 0
        return "weights of coupled values" in capsys.readouterr().out

    assert [evaluated("a", 0.7), evaluated("b", 0.7), evaluated("c", 1.0), evaluated("d", 0.7)] == [True, False, True, False]
    kept = next(tmp_path.glob("*.coupling.json"))
    kept.write_text(kept.read_text().replace('"draft": "', '"draft": "another'))
    assert evaluated("e", 0.7)
    kept.write_text("broken")
    assert evaluated("f", 0.7)


@pytest.mark.parametrize("content", ["", "null", "3", "{}", "[null]", '[{"made_for": {}}]', '[{"made_for": {}, "coupling": null}]', '[{"made_for": {}, "coupling": {"draft": "1"}}]', b"\xff"])
def test_a_file_of_weights_that_holds_something_else_counts_as_none(tmp_path, content):
    path = tmp_path / "exit.safetensors.coupling.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert tree_plans.kept_entries(path) == []
    whole = {"made_for": {"fit": "this"}, "coupling": {"draft": 0.5, "noise": 1.0, "trust": 0.9}}
    path.write_text(json.dumps([None, whole]))
    assert tree_plans.kept_entries(path) == [whole]


def test_a_growmap_in_two_commands(tiny_target_path, drafts, tmp_path, monkeypatch, capsys):
    shared = ["--model_path", tiny_target_path, *drafts["exit"], *PROMPTS]
    for verification in ("coupled", "match", "swor"):
        out = tmp_path / verification
        command = [*shared, "--verification", verification, "--tree_budgets", 2, 4, "--tree_depth", 3, "--tree_width", 4, "--out_dir", out]
        assert run_main(build_growmap, command, monkeypatch) == 0
        found = json.loads((out / "growmap.json").read_text())
        assert found["budget"] in (2, 4) and len(found["acceptance"]) == 4 == len(found["provenance"]["acceptance_in_rounds"])
        assert sum(found["replayed"]) == pytest.approx(found["provenance"]["expected"]["tokens_per_call"]) and len(found["replayed"]) == found["budget"]
        assert found["provenance"]["expected"]["speedup"] > 0 and (out / "growmap.png").exists() and (out / "cmd.txt").exists()
        command = [*shared, "--quality_datasets", "arithmetic", "--quality_max_batches", 1, "--method", "static_tree", "--growmap", out / "growmap.json"]
        assert run_main(evaluate, [*command, "--out_dir", out / "evaluation"], monkeypatch) == 0
        assert json.loads((out / "evaluation" / "metrics.json").read_text())["verification"] == verification
    assert run_main(build_growmap, [*shared, "--out_dir", out], monkeypatch) == 2
    check_one_line(capsys, "holds a growmap already")
    assert run_main(build_growmap, [*shared, "--tree_size", 6, "--tree_budgets", 2, "--out_dir", tmp_path / "sized"], monkeypatch) == 0
    assert json.loads((tmp_path / "sized" / "growmap.json").read_text())["budget"] == 6


def test_common_sense_from_the_command_line(tiny_target_path, drafts, tmp_path, monkeypatch):
    table = tmp_path / "followers.safetensors"
    assert run_main(build_followers, ["--model_path", tiny_target_path, "--dataset", "arithmetic", "--max_examples", 50, "--out", table], monkeypatch) == 0
    for number, (flags, lossless) in enumerate(((["exact"], True), (["overwrite"], False), (["overwrite", "--commonsense_repair", "true"], False))):
        command = ["--model_path", tiny_target_path, *drafts["exit"], "--method", "dynamic_tree", "--tree_budget", 12, "--commonsense_nodes", 4,
                   "--commonsense", *flags, "--followers", table, *EVALUATION, "--out_dir", tmp_path / str(number)]
        assert run_main(evaluate, command, monkeypatch) == 0
        row = json.loads((tmp_path / str(number) / "metrics.json").read_text())
        assert row["lossless"] is lossless and row["commonsense"] == flags[0]
        assert ("lossy_text_nll" in row) is not lossless and ("lossy_same_text" in row) is not lossless


def test_many_checkpoints_by_trees(tiny_target_path, drafts, tmp_path, monkeypatch):
    command = ["--model_path", tiny_target_path, "--checkpoint_glob", drafts["exit"][1], "--method", "dynamic_tree", "--tree_budget", 6, *EVALUATION]
    assert run_main(evaluate_checkpoints, [*command, "--out_dir", tmp_path / "out"], monkeypatch) == 0
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    assert list(table["kind"]) == ["target", "untuned", "head"] and (table["method"] == "dynamic_tree").all()
    assert table["spec_tokens_per_call"][0] > table["spec_tokens_per_call"][1]


@pytest.mark.parametrize("kind", ["exit", "model"])
def test_benchmark_of_all_trees(tiny_target_path, drafts, tmp_path, monkeypatch, kind):
    chain_method = {"exit": "self_speculative", "model": "speculative"}[kind]
    command = ["--model_path", tiny_target_path, *drafts[kind], "--methods", chain_method, "static_tree", "dynamic_tree", "specexec", "--gammas", 2,
               "--verifications", "rejection", "coupled", "match", "swor", "--tree_budgets", 3, 6, "--tree_depth", 3, *PROMPTS, "--out_dir", tmp_path / "out"]
    assert run_main(sweep_settings, command, monkeypatch) == 0
    table = pd.read_csv(tmp_path / "out" / "results.csv")
    trees = table[table["tree_budget"].notna()]
    assert len(trees) == 2 * (3 + 3 + 1) and len(table) == len(trees) + 3 and trees["lossless"].all()
    assert (trees["tree_nodes"] <= trees["tree_budget"]).all() and (trees["weight_bound_speedup"] > 0).all()
    assert {"spec_tokens_per_call_ci_low", "draft_calls_per_token", "spec_target_calls_per_token", "tree_expected_tokens"} <= set(table)
    assert run_main(sweep_settings, [*command[:-1], tmp_path / "counts", "--counts_only"], monkeypatch) == 0
    counts = pd.read_csv(tmp_path / "counts" / "results.csv")
    timed = {name for name in table if name.split("_ci_")[0] in sweep_settings.TIMED}
    assert set(counts) == set(table) - timed and len(timed) > 10 and not [name for name in counts if name.endswith(("_ms", "_per_s")) or "predicted" in name]
    assert (counts["spec_tokens_per_call"] == table["spec_tokens_per_call"])[1:].all()


def test_proof_finds_a_forgotten_compaction(tiny_target_path, tmp_path, monkeypatch, capsys):
    command = ["--model_path", tiny_target_path, *PROMPTS, "--out_dir", tmp_path / "bug"]
    monkeypatch.setattr("engine.static_llama.KeyValues.move", lambda self, row, source, start: None)
    assert run_main(prove, command, monkeypatch) == 1
    assert "FAIL  tree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "static_tree"], "--method static_tree needs --growmap; commands/build_growmap.py"),
        (["--method", "dynamic_tree", "--growmap", "GROWMAP"], "growmap.json belongs to --method static_tree"),
        (["--method", "static_tree", "--growmap", "GROWMAP", "--tree_budget", "16"], "--tree_budget 16 belongs to --method dynamic_tree or specexec"),
        (["--method", "dynamic_tree", "--commonsense_repair", "true"], "--commonsense_repair goes with --commonsense overwrite"),
        (["--method", "static_tree", "--growmap", "/no/such/map.json"], "/no/such/map.json"),
        (["--method", "dynamic_tree", "--verification", "rejection"], "trees are verified by coupled, match, swor"),
        (["--verification", "swor"], "chains are verified by rejection or coupled"),
        (["--method", "specexec", "--verification", "swor"], "rejection without replacement"),
        (["--method", "dynamic_tree", "--tree_budget", "0"], "--tree_budget 0: must be at least 1"),
        (["--method", "dynamic_tree", "--tree_depth", "0"], "--tree_depth 0: must be at least 1"),
        (["--method", "dynamic_tree", "--tree_level_cost", "cheap"], "--tree_level_cost cheap: must be auto or a number"),
        (["--method", "specexec", "--branch_prune_threshold", "2"], "--branch_prune_threshold 2.0: must lie between 0 and 1"),
        (["--method", "dynamic_tree", "--tree_depth", "500"], "context of the target is 512"),
        (["--tree_budget", "16"], "--tree_budget 16 belongs to --method dynamic_tree or specexec"),
        (["--method", "dynamic_tree", "--commonsense", "exact"], "go together; commands/build_followers.py"),
        (["--method", "dynamic_tree", "--commonsense", "exact", "--followers", "/no/table.safetensors"], "/no/table.safetensors"),
    ],
)
def test_mistakes_get_one_line(tiny_target_path, drafts, growmap, tmp_path, monkeypatch, capsys, flags, message):
    flags = [str(growmap) if flag == "GROWMAP" else flag for flag in flags]
    assert run_main(evaluate, ["--model_path", tiny_target_path, *drafts["exit"], *EVALUATION, *flags, "--out_dir", tmp_path / "out"], monkeypatch) == 2
    check_one_line(capsys, message)


def test_growmap_mistakes_get_one_line(tiny_target_path, drafts, tmp_path, monkeypatch, capsys):
    for flags, message in (
        (["--tree_budgets", 1], "must lie between 2 and"), (["--tree_width", 0], "--tree_width 0: must be at least 1"),
        (["--tree_depth", 500], "context of"), (["--tree_width", 2, "--tree_depth", 2, "--tree_budgets", 16], "no tree of --tree_width 2"), (["--spec_temperature", -1], "temperature -1.0 must be"),
    ):
        command = ["--model_path", tiny_target_path, *drafts["exit"], *PROMPTS, *flags, "--out_dir", tmp_path / "out"]
        assert run_main(build_growmap, command, monkeypatch) == 2
        check_one_line(capsys, message)
    broken = tmp_path / "broken.json"
    save_growmap(broken, chain(3))
    broken.write_text(broken.read_text().replace("[-1, 0", "[-1, 7"))
    command = ["--model_path", tiny_target_path, *drafts["exit"], *EVALUATION, "--method", "static_tree", "--growmap", broken, "--out_dir", tmp_path / "out"]
    assert run_main(evaluate, command, monkeypatch) == 2
    check_one_line(capsys, "broken.json")


