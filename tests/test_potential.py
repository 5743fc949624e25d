"""The potential test: its figures against computation by hand, and the command from flags to file."""

import json
import math

from running.command_line import UserError

import pytest
import torch

import evaluate
from data.registry import find_dataset
from data.row_files import open_rows
from decoding.sampling import SamplingPolicy, policy_probs
from decoding.verify import coupled_agreement
from measuring import potential
from measuring.evaluation import EvaluationArgs
from measuring.metrics import POTENTIAL_COLUMNS
from measuring.potential import PotentialArgs, PotentialOptions, evaluate_examples, measure_potential
from measuring.round_costs import tokens_per_round
from models.target_model import EMBEDDED_TARGET, DeviceArgs, Target, load_target, tokenizer_hash, weights_hash
from test_commands import check_one_line, run_main
from toy_models import bigram_pair, context_free_pair, native_llama, noisy_exit, tiny_llama
from truncated_llama import Exit, ExitInfo, ExitKind, save_exit

TEXTS = [[0, 3, 1, 1, 7, 2, 5], [4, 4], [6, 0, 2, 2, 1]]
POLICY = SamplingPolicy(0.7, top_p=0.9)
INTERVALS = ("kl", "overlap", "tv", "agreement", "tau_rejection", "tau_coupled")


def chain_by_hand(chances: list[list[float]], gamma: int) -> float:
    """1 + a_1 + a_1·a_2 + … of every γ positions in a row, averaged."""
    chains = [along[start : start + gamma] for along in chances for start in range(len(along) - gamma + 1)]
    return sum(1 + sum(math.prod(chain[: n + 1]) for n in range(gamma)) for chain in chains) / len(chains)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_figures_are_those_computed_by_hand(temperature):
    target, draft = bigram_pair()
    found = measure_potential(target, draft, TEXTS, PotentialOptions(POLICY, gamma=3, kl_temperature=temperature, batch_size=2))
    seen = torch.tensor([token for text in TEXTS for token in text[:-1]])  # the tokens that the others are predicted from
    p, q = ((model.table[seen] / temperature).softmax(-1) for model in (target, draft))
    assert found["potential_kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found["potential_kl_temperature"] == temperature
    p, q = (policy_probs(model.table, POLICY) for model in (target, draft))
    overlap, coupled = torch.minimum(p, q).sum(-1), coupled_agreement(p, q)
    assert found["potential_overlap"] == pytest.approx(float(overlap[seen].mean()), rel=1e-6)
    assert found["potential_tv"] == pytest.approx(0.5 * float((p - q).abs().sum(-1)[seen].mean()), rel=1e-6)
    assert found["potential_agreement"] == pytest.approx(float((target.table.argmax(-1) == draft.table.argmax(-1))[seen].double().mean()))
    for name, chances in (("rejection", overlap), ("coupled", coupled)):
        along = [chances[torch.tensor(text[:-1])] for text in TEXTS]
        assert found[f"potential_tau_{name}"] == pytest.approx(chain_by_hand([a.tolist() for a in along], 3), rel=1e-6)
        assert found[f"potential_tau_{name}"] == pytest.approx(tokens_per_round(along, 3), rel=1e-6)
    assert found["potential_samples"] == 3 and found["potential_tokens"] == len(seen) == 11


def test_a_chain_in_a_context_free_law_is_the_geometric_sum():
    target, draft = context_free_pair([0.5, 0.3, 0.2], [0.2, 0.3, 0.5])
    found = measure_potential(target, draft, [[0, 1, 2, 0, 1]], PotentialOptions(SamplingPolicy(1.0), gamma=2))
    assert found["potential_overlap"] == pytest.approx(0.7) and found["potential_tau_rejection"] == pytest.approx(1 + 0.7 + 0.49)
    assert not [name for name in found if "_ci_" in name], "one sample says nothing about others"


@pytest.mark.parametrize("policy", [POLICY, SamplingPolicy(0.0), SamplingPolicy(1.0)])
def test_a_draft_that_is_the_target_promises_everything(policy):
    model = native_llama()
    found = measure_potential(model, model, [[5, 9, 2, 7, 7, 1], [3, 8, 30, 2, 2]], PotentialOptions(policy, gamma=4))
    wanted = {"kl": 0, "overlap": 1, "tv": 0, "agreement": 1, "tau_rejection": 5, "tau_coupled": 5}
    for name, value in wanted.items():
        assert [found[f"potential_{name}{end}"] for end in ("", "_ci_low", "_ci_high")] == pytest.approx([value] * 3, abs=1e-5)


@pytest.mark.parametrize("own_block", [False, True])
def test_padding_does_not_count(own_block):
    """Texts of all lengths in one batch give what each gives alone; a pad that counted would shift every mean."""
    target = tiny_llama()
    draft = noisy_exit(target, 2, own_block)
    texts = [torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (9, 2, 5, 23)]
    alone, together = (measure_potential(target, draft, texts, PotentialOptions(POLICY, gamma=2, batch_size=size)) for size in (1, 4))
    assert alone == pytest.approx(together, rel=1e-6)
    assert alone["potential_tokens"] == 8 + 1 + 4 + 22
    reading = [potential.read_texts(target, draft, texts, PotentialOptions(POLICY, 2, batch_size=size)) for size in (1, 4)]
    for one, other in zip(*reading, strict=True):
        for name in one.chances:
            torch.testing.assert_close(one.chances[name], other.chances[name])


def test_long_texts_are_read_in_chunks(monkeypatch):
    target, draft = bigram_pair()
    whole = measure_potential(target, draft, TEXTS, PotentialOptions(POLICY, 2))
    monkeypatch.setattr(potential, "CHUNK_ROWS", 2)
    assert measure_potential(target, draft, TEXTS, PotentialOptions(POLICY, 2)) == pytest.approx(whole, rel=1e-6)


def test_what_cannot_be_measured_is_absent():
    """No text has a chain of 9; a draft without some tokens has an infinite KL."""
    target = tiny_llama()
    draft = noisy_exit(target, 1)
    draft.exit = draft.exit.trimmed(torch.arange(0, 64, 2))
    found = measure_potential(target, draft, [[1, 2, 3], [4, 5, 6, 7]], PotentialOptions(POLICY, gamma=9))
    assert not [name for name in found if name.startswith(("potential_kl_ci", "potential_tau"))] and "potential_kl" not in found
    assert 0 < found["potential_overlap"] < 1


def test_intervals_hold_their_value_and_columns_are_documented():
    target, draft = bigram_pair()
    found = measure_potential(target, draft, TEXTS * 3, PotentialOptions(POLICY, gamma=2, seed=3))
    for name in INTERVALS:
        low, value, high = (found[f"potential_{name}{end}"] for end in ("_ci_low", "", "_ci_high"))
        assert low < value < high
    assert {name.removesuffix("_ci_low").removesuffix("_ci_high") for name in found} | {"potential_skipped"} == {
        name for name in POTENTIAL_COLUMNS if name.startswith("potential_")}


# ---- the command ----

def command(draft: list, out, *more) -> list:
    return ["--model_path", EMBEDDED_TARGET, *draft, "--out_dir", out, "--quality_datasets", "arithmetic", "--potential", "--num_threads", 1,
            "--spec_temperature", 0.7, *more]


@pytest.fixture(scope="module")
def exit_path(tmp_path_factory):
    """An untuned exit at layer 7 of the embedded target."""
    target = load_target(str(EMBEDDED_TARGET), DeviceArgs(device="cpu"))
    info = ExitInfo(7, ExitKind(), target.name, weights_hash(target.model), tokenizer_hash(target.tokenizer))
    path = tmp_path_factory.mktemp("exit") / "exit.safetensors"
    save_exit(path, Exit(target.model, 7), info)
    return path


def test_command_on_the_embedded_target(exit_path, tmp_path, monkeypatch, capsys):
    arguments = command(["--checkpoint", exit_path], tmp_path / "exit", "--start", 2, "--end", 7, "--potential_length", 48, "--kl_temperature", 2)
    assert run_main(evaluate, arguments, monkeypatch) == 0
    row = json.loads((tmp_path / "exit" / "potential.json").read_text())
    assert row["potential_samples"] == 5 and row["potential_skipped"] == 0 and 5 < row["potential_tokens"] <= 5 * 47
    assert row["potential_kl"] > 0 and row["potential_kl_temperature"] == 2 and row["gamma"] == 4 and row["target_layer"] == 7
    assert 1 < row["potential_tau_coupled"] < row["potential_tau_rejection"] < 5
    assert {"cmd.txt", "config.json", "manifest.json"} <= {path.name for path in (tmp_path / "exit").iterdir()}
    shown = capsys.readouterr().out
    assert all(name in shown for name in POTENTIAL_COLUMNS if name.startswith("potential_")) and f"{row['potential_overlap_ci_high']:.4f}" in shown
    assert run_main(evaluate, arguments, monkeypatch) == 2
    check_one_line(capsys, "holds a potential test already; choose another --out_dir")


def test_command_with_the_target_as_its_own_draft(tmp_path, monkeypatch):
    assert run_main(evaluate, command(["--draft_model_path", EMBEDDED_TARGET], tmp_path, "--end", 3, "--gamma", 2), monkeypatch) == 0
    row = json.loads((tmp_path / "potential.json").read_text())
    assert [row[f"potential_{name}"] for name in INTERVALS] == pytest.approx([0, 1, 0, 1, 3, 3], abs=1e-5)


def test_short_samples_are_used_and_those_without_a_prediction_counted():
    """A window of 5 tokens: a longer text is cut, shorter ones are whole, and a single token predicts nothing."""
    target, draft = bigram_pair()
    letters = Target(target, lambda text: {"input_ids": [int(letter) for letter in text]}, "bigram")
    args, options = PotentialArgs(potential=True, end=4, potential_length=5), PotentialOptions(POLICY, gamma=2)
    found = evaluate_examples(letters, draft, [{"text": text} for text in ("03117", "4", "44", "6022155")], args, options)
    assert found["potential_skipped"] == 1 and found["potential_samples"] == 3 and found["potential_tokens"] == 4 + 1 + 4
    direct = measure_potential(target, draft, [[0, 3, 1, 1, 7], [4, 4], [6, 0, 2, 2, 1]], options)
    assert {name: found[name] for name in direct} == direct
    with pytest.raises(UserError, match="none of these samples has 2 tokens"):
        evaluate_examples(letters, draft, [{"text": "4"}], args, options)


def test_samples_keep_the_order_of_the_data_and_unusable_rows_have_no_number(tmp_path, monkeypatch, capsys):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("zero", "one", "", "two", "three", "four")))
    data = {"slim_pj": open_rows(find_dataset("slim_pj"), "test", str(path))}
    assert PotentialArgs(start=1, end=4).chosen_examples("slim_pj", data) == [{"text": text} for text in ("one", "two", "three")]
    arguments = ["--quality_datasets", "slim_pj", "--dataset_path", path, "--start", 1, "--end", 6]
    assert run_main(evaluate, command(["--draft_model_path", EMBEDDED_TARGET], tmp_path / "out", *arguments), monkeypatch) == 2
    check_one_line(capsys, "--start 1 --end 6: only 5 samples in the test split of slim_pj; lower --end")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", 5, "--end", 5], "--start 5 --end 5: must be 0 <= start < end"),
        (["--start", -1], "--start -1 --end 100: must be"),
        (["--end", 501], "only 496 samples in the test split of arithmetic; lower --end"),
        (["--gamma", "auto"], "--gamma auto: .* give a number"),
        (["--potential_length", 4], "--potential_length 4: must lie between --gamma \\+ 1 = 5 and"),
        (["--potential_length", 10**6], "--potential_length 1000000: must lie between"),
        (["--kl_temperature", 0], "--kl_temperature 0.0: must be positive"),
        (["--spec_top_p", 0], "--spec_top_p 0.0 must lie between"),
        (["--potential", "false", "--end", 5], "--end 5 belongs to the potential test; add --potential"),
        (["--potential", "false", "--potential_length", 5], "--potential_length 5 belongs to the potential test"),
    ],
)
def test_mistakes_get_one_line_before_a_model_is_loaded(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_target", lambda *_: pytest.fail("a model was loaded"))
    assert run_main(evaluate, command(["--draft_model_path", EMBEDDED_TARGET], tmp_path, *arguments), monkeypatch) == 2
    check_one_line(capsys, message)


def test_the_flags_of_the_potential_test_do_not_tell_evaluations_apart():
    """metrics.json and results.csv of the same settings carry the same hash."""
    flags = {"model_path": "m", "out_dir": "o", "quality_datasets": ["arithmetic"]}
    hashes = {args.settings_hash({}) for args in (EvaluationArgs(**flags), evaluate.Args(**flags, checkpoint="x"), evaluate.Args(**flags, start=3))}
    assert len(hashes) == 1


def test_table_has_a_line_per_figure():
    row = {"potential_kl": 0.5, "potential_kl_ci_low": 0.25, "potential_samples": 3, "gamma": 4}
    lines = [line.split() for line in potential.potential_table(row).splitlines()]
    assert lines == [["name", "value", "low", "high"], ["potential_kl", "0.5000", "0.2500"], ["potential_samples", "3"]]
