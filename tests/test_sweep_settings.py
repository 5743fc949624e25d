"""commands/sweep_settings.py from the command line: a row for every way to decode, the same prompts for all, and one clear line for every mistake."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from transformers import LlamaConfig

from commands import sweep_settings
from measuring import round_costs
from models.planted import TOLERANCE
from test_commands import check_one_line, run_main
from test_tuning import save_exits, time_little

PROMPTS, NEW_TOKENS = 4, 12
SUITE = ["vanilla", "speculative", "self_speculative"]
PEERS = ["hf_generate", "hf_assisted", "hf_early_exit"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    time_little(monkeypatch)


@pytest.fixture(scope="module")
def subject(tmp_path_factory, tokenizer) -> SimpleNamespace:
    """A saved target with two exits (see save_exits), and the shape of a smaller one."""
    root = tmp_path_factory.mktemp("benchmark")
    found = save_exits(root, tokenizer)
    shape = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                        max_position_embeddings=128, tie_word_embeddings=True)
    shape.save_pretrained(root / "shape")
    return SimpleNamespace(model=found.target.name, same=found.same, noisy=found.noisy, shape=str(root / "shape" / "config.json"))


def command(out_dir: Path, **changes: object) -> list:
    flags = {"out_dir": out_dir, "methods": SUITE, "gammas": [1, "auto"], "spec_prompt_dataset": "arithmetic", "spec_num_prompts": PROMPTS,
             "spec_prompt_length": 8, "spec_max_new_tokens": NEW_TOKENS, "num_threads": 1, **changes}
    given = {name: value for name, value in flags.items() if value is not None}
    return [text for name, value in given.items() for text in (f"--{name}", *(value if isinstance(value, list) else [value]))]


def results(monkeypatch, out_dir: Path, **changes: object) -> pd.DataFrame:
    """The rows of a run that must end well."""
    assert run_main(sweep_settings, command(out_dir, **changes), monkeypatch) == 0
    return pd.read_csv(out_dir / sweep_settings.RESULTS_NAME, dtype={"gamma": str})


def ways(table: pd.DataFrame) -> list[tuple]:
    """(method, γ, batch) of every row; γ None where nothing is drafted."""
    return [(row.method, None if pd.isna(row.gamma) else row.gamma, row.batch) for row in table.itertuples()]


def check_figures(table: pd.DataFrame) -> None:
    """What holds in every row of every run."""
    paces = {row.batch: row.tokens_per_s for row in table.itertuples() if row.method == "vanilla"}
    for row in table.itertuples():
        assert row.lossless
        assert row.tokens_per_s_ci_low <= row.tokens_per_s <= row.tokens_per_s_ci_high and row.tokens_per_s_ci_low > 0
        assert row.speedup == pytest.approx(row.tokens_per_s / paces[row.batch])
        assert row.speedup_ci_low <= row.speedup <= row.speedup_ci_high
        assert row.ms_per_round > 0
        if row.method == "vanilla":
            assert row.speedup == row.speedup_ci_low == row.speedup_ci_high == 1


def test_texts_of_one_token(subject, tmp_path, monkeypatch):
    """Rounds are timed all the same, and transformers' decoders, whose only token comes with the prefill, have no pace rather than one of 0."""
    table = results(monkeypatch, tmp_path, model_path=subject.model, checkpoint=subject.noisy, methods=[*SUITE, "hf_generate"], gammas=[2, "auto"], spec_max_new_tokens=1)
    peer = table[table["method"] == "hf_generate"]
    assert peer[["tokens_per_s", "speedup", "ms_per_round"]].isna().all(axis=None) and len(peer) == 1 and "over_hf_generate" not in table
    check_figures(table.drop(peer.index))
    assert (table.loc[table["gamma"] == "auto", "predicted"] > 0).all()


# ---- a trained exit ----

@pytest.fixture(scope="module")
def trained(subject, tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    """Folder and rows of a run of the suite's own methods with an exit like the target."""
    folder = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        time_little(patch)
        return folder, results(patch, folder, model_path=subject.model, checkpoint=subject.same, batch_sizes=[1, 2])


def test_a_row_for_every_way(trained):
    _, table = trained
    drafting = [(method, gamma, batch) for method in SUITE[1:] for gamma, batch in (("1", 1), ("auto", 1), ("1", 2))]
    assert ways(table) == [("vanilla", None, 1), ("vanilla", None, 2), *drafting]
    check_figures(table)
    assert not table["planted"].any() and (table["temperature"] == 0.7).all()


def test_drafting_rows_say_what_was_drafted_and_what_it_was_worth(trained):
    """The exit is the target: everything is kept."""
    _, table = trained
    vanilla, drafting = table[table["gamma"].isna()], table[table["gamma"].notna() & (table["batch"] == 1)]
    assert len(drafting) == 4 and (drafting["verification"] == "rejection").all() and (drafting["spec_token_accept_rate"] == 1).all()
    assert (drafting["measured_over_predicted"] * drafting["predicted"]).to_numpy() == pytest.approx(drafting["speedup"].to_numpy())
    for row in drafting.itertuples():
        costs = [float(cost) for cost in row.round_costs.split()]
        assert len(costs) == round_costs.LONGEST + 1 and costs[0] == 1 and costs == sorted(costs)
        if row.gamma == "1":
            assert row.spec_mean_proposed <= 1 < row.spec_tokens_per_call <= 2
            assert row.predicted == pytest.approx(2 / costs[1], rel=0.02)
    others = table[table["gamma"].isna() | (table["batch"] == 2)]
    assert others[["predicted", "round_costs", "spec_token_accept_rate"]].isna().all(axis=None), "costs are those of one text"
    assert vanilla["verification"].isna().all() and table["roofline_share"].between(0, 10, inclusive="neither").all()


def test_what_a_run_leaves_behind(trained):
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {"cmd.txt", "config.json", "manifest.json", sweep_settings.RESULTS_NAME}
    config = json.loads((folder / "config.json").read_text())
    assert config["bandwidth_bytes_per_s"] > 0 and config["threads"] == 1 and config["batch_sizes"] == [1, 2] and config["target_hash"]


def test_transformers_decoders_beside_the_suites(subject, tmp_path, monkeypatch):
    table = results(monkeypatch, tmp_path / "out", model_path=subject.model, checkpoint=subject.noisy, methods=["hf_assisted", "hf_early_exit", "hf_generate"],
                    gammas=[2, "auto"], batch_sizes=[1, 2])
    assert ways(table) == [("vanilla", None, 1), ("hf_generate", None, 1), ("vanilla", None, 2), ("hf_assisted", "2", 1), ("hf_early_exit", "2", 1)]
    check_figures(table)
    peer = table[table["method"] == "hf_generate"].iloc[0]
    for row in table.itertuples():
        if row.batch == 1:
            assert row.over_hf_generate == pytest.approx(row.tokens_per_s / peer.tokens_per_s)
            assert row.over_hf_generate_ci_low <= row.over_hf_generate <= row.over_hf_generate_ci_high
        assert pd.isna(row.roofline_share) == row.method.startswith("hf_")
    assert peer.over_hf_generate == 1 and table["over_hf_generate"].isna().tolist() == [False, False, True, False, False]


def test_vanilla_alone_needs_no_exit(subject, tmp_path, monkeypatch):
    table = results(monkeypatch, tmp_path / "out", model_path=subject.model, methods=["hf_generate"])
    assert list(table["method"]) == ["vanilla", "hf_generate"]


def test_every_way_decodes_every_prompt_as_often_in_an_order_that_changes(subject, tmp_path, monkeypatch):
    """And under coupled verification to the same text. The first prompts are decoded once more before, uncounted."""
    repeats, calls, exact, counted_batches, exact_pace = 2, [], sweep_settings.generate_batch, [], sweep_settings.pace

    def recorded(model, prompts, options, draft, *, prompt_ids):
        found = exact(model, prompts, options, draft, prompt_ids=prompt_ids)
        way = (options.method, len(prompts), options.gamma if options.method != "vanilla" else None)
        calls.append((way, prompt_ids, [(tuple(prompt), tuple(generation.tokens)) for prompt, generation in zip(prompts, found, strict=True)]))
        return found

    def counted_pace(batches):
        counted_batches.append([len(batch) for batch in batches])
        return exact_pace(batches)

    monkeypatch.setattr(sweep_settings, "generate_batch", recorded)
    monkeypatch.setattr(sweep_settings, "pace", counted_pace)
    flags = {"verifications": "coupled", "gammas": [2], "batch_sizes": [1, 2], "repeats": repeats}
    results(monkeypatch, tmp_path / "out", model_path=subject.model, checkpoint=subject.noisy, **flags)
    by_way, texts = defaultdict(list), defaultdict(set)
    for way, keys, pairs in calls:
        by_way[way] += keys
        for key, pair in zip(keys, pairs, strict=True):
            texts[key].add(pair)
    assert len(by_way) == 6 and all(keys == [0, 1, *list(range(PROMPTS)) * repeats] for keys in by_way.values())
    assert sorted(texts) == list(range(PROMPTS)) and all(len(found) == 1 for found in texts.values())
    assert all(sum(texts_of) == PROMPTS * repeats for texts_of in counted_batches)
    turns = [calls[start : start + 9] for start in range(0, len(calls), 9)]  # two prompts: two calls of three ways, one of the others
    orders = {tuple(dict.fromkeys(way for way, *_ in turn)) for turn in turns}
    assert len(orders) > 1 and all(len(order) == 6 for order in orders)


def test_head_cut_to_frequent_tokens(subject, tmp_path, monkeypatch):
    """With its whole head this exit has everything accepted. transformers drafts with that one."""
    table = results(monkeypatch, tmp_path / "out", model_path=subject.model, checkpoint=subject.same, draft_vocab_size=64, gammas=[1],
                    methods=["self_speculative", "hf_assisted"], spec_temperature=1.5)
    assert list(table["method"]) == ["vanilla", "self_speculative", "hf_assisted"]
    assert 0 < table["spec_token_accept_rate"][1] < 1


# ---- random weights ----

def planted(subject: SimpleNamespace, **changes: object) -> dict:
    return {"random_init": subject.shape, "planted_alpha": 0.7, "spec_prompt_dataset": None, **changes}


def test_planted_acceptance(subject, tmp_path, monkeypatch):
    table = results(monkeypatch, tmp_path / "out", **planted(subject), gammas=[1, "auto"], batch_sizes=[1, 2], spec_max_new_tokens=48)
    assert len(table) == 8 and table["planted"].all()
    check_figures(table)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["planted"] and abs(config["planted_alpha_reached"] - 0.7) <= TOLERANCE
    vanilla = table[table["method"] == "vanilla"]
    assert (vanilla["ms_per_round"] * vanilla["tokens_per_s"]).tolist() == pytest.approx([1000, 2000]), "no text ends before the others"
    gamma_one = table[(table["gamma"] == "1") & (table["batch"] == 1)]
    assert gamma_one["spec_token_accept_rate"].between(0.5, 0.9).all(), "0.7 within four standard errors of some 110 drafted tokens"


def test_planted_head_cut(subject, tmp_path, monkeypatch, capsys):
    table = results(monkeypatch, tmp_path / "out", **planted(subject, draft_vocab_size=64), methods=["self_speculative", "hf_assisted"], gammas=[1])
    assert list(table["method"]) == ["vanilla", "self_speculative"]
    assert "hf_assisted is left out" in capsys.readouterr().out


# ---- mistakes ----

def test_a_benchmark_is_never_written_over(trained, subject, monkeypatch, capsys):
    folder, _ = trained
    assert run_main(sweep_settings, command(folder, model_path=subject.model, checkpoint=subject.same), monkeypatch) == 2
    check_one_line(capsys, "holds a benchmark already; choose another --out_dir")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["vanilla", "medusa", "eagle"]}, "--methods eagle medusa: choose from vanilla, "),
        ({"verifications": ["hope"]}, "--verifications hope: choose from rejection, coupled"),
        ({"model_path": None}, "give either --model_path MODEL with --checkpoint EXIT, or --random_init SHAPE"),
        ({"random_init": "llama-3.2-1b"}, "give either --model_path"),
        ({"checkpoint": None}, "give either --checkpoint EXIT or --draft_model_path"),
        ({"checkpoint": "/no/such.safetensors"}, "no checkpoint at /no/such.safetensors"),
        ({"batch_sizes": [0, 1]}, "--batch_sizes 0 1: must lie between 1 and --spec_num_prompts 4"),
        ({"batch_sizes": [5]}, "--batch_sizes 5: must lie between 1 and --spec_num_prompts 4"),
        ({"batch_sizes": [1, 2, 3]}, "--batch_sizes 1 2 3: each must divide the largest"),
        ({"batch_sizes": [2], "methods": ["hf_generate"]}, "take one prompt at a time: add 1 to --batch_sizes"),
        ({"repeats": 0}, "--repeats 0: must be at least 1"),
        ({"gammas": [2, 0]}, "--gamma 0: must be auto, or a number from 1 to 63"),
        ({"gammas": ["many"]}, "--gamma many: "),
        ({"spec_top_p": 1.5}, "--spec_top_p 1.5 must lie between"),
        ({"spec_temperature": -1}, "--spec_temperature -1.0"),
        ({"spec_num_prompts": 0}, "must "),
        ({"spec_prompt_length": -1}, "--spec_prompt_length -1: must not be negative"),
        ({"spec_max_new_tokens": 500}, "the context of the target is 512 tokens"),
        ({"spec_prompt_dataset": "arithmetics"}, "unknown data set 'arithmetics'"),
        ({"model_path": "/no/such/model"}, "no model at /no/such/model"),
    ],
)
def test_mistakes_get_one_line(subject, tmp_path, monkeypatch, capsys, changes, message):
    arguments = command(tmp_path / "out", **{"model_path": subject.model, "checkpoint": subject.same, **changes})
    assert run_main(sweep_settings, arguments, monkeypatch) == 2
    check_one_line(capsys, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_init": "no-such-shape"}, "no shape no-such-shape: give one of "),
        ({"planted_alpha": 1.2}, "alpha 1.2: "),
        ({"planted_layer": 3}, "target layer 3: this target has 3 blocks"),
        ({"draft_vocab_size": 100}, "draft_vocab_size 100: choose a multiple of 16"),
        ({"spec_max_new_tokens": 127}, "the context of the target is 128 tokens"),
        ({"spec_prompt_length": 0}, "random prompts need a length"),
    ],
)
def test_planting_mistakes_get_one_line(subject, tmp_path, monkeypatch, capsys, changes, message):
    assert run_main(sweep_settings, command(tmp_path / "out", **planted(subject, **changes)), monkeypatch) == 2
    check_one_line(capsys, message)
