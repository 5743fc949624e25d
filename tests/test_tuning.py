"""Round costs by a clock that the test turns, tokens per round by hand, and tune.py from the command line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import decoding.drafting as drafting
import tune
from decoding.sampling import SamplingPolicy, policy_probs
from decoding.verify import VERIFICATIONS, expected_acceptance
from measuring import machine_speed
from measuring import round_costs as tuning
from measuring.round_costs import Candidate, TimedLength, acceptance_along, frequent_tokens, round_costs, tokens_per_round
from speculative import DecodeOptions
from test_commands import check_one_line, run_main
from test_export_draft import save_checkpoint, save_target
from toy_models import BigramModel, bigram_pair, decode, noisy_exit, some_prompts, tiny_llama
from truncated_llama import Exit

SAMPLED = SamplingPolicy(0.7, top_p=0.95)
DRAFTING = DecodeOptions("speculative", SAMPLED, max_new_tokens=400)


# ---- round costs ----

def timed(gamma: int, seconds: list[float]) -> TimedLength:
    """A rule whose rounds took these seconds."""
    rule = TimedLength(gamma)
    for value in seconds:
        rule.learn([], [], value)
    return rule


@pytest.mark.parametrize("gamma", [0, 1, 4])
def test_timed_length_drafts_its_number_in_every_round(gamma):
    target, draft = bigram_pair()
    rule = TimedLength(gamma)
    _, stats = decode(target, draft, [0], gamma=rule, policy=SAMPLED, max_new_tokens=30)
    assert {r.proposed for r in stats.rounds} == {gamma}
    assert len(rule.seconds) == len(stats.rounds) and min(rule.seconds) > 0


def test_rounds_that_begin_too_soon_are_not_counted(monkeypatch):
    monkeypatch.setattr(tuning, "SETTLE_S", 10.0)
    assert timed(1, [6.0, 5.0, 3.0, 2.0, 1.0]).settled() == [3.0, 2.0, 1.0]
    assert timed(1, [4.0, 3.0, 1.0]).settled() == [3.0, 1.0], "without any that is late enough, all but the first"


def test_of_one_round_that_one_counts():
    assert timed(8, [0.5]).settled() == [0.5]


@pytest.mark.parametrize("max_new_tokens", [1, 8])
@pytest.mark.parametrize("context", [12, 13, 30, 512])
def test_texts_of_few_tokens_have_round_costs(monkeypatch, max_new_tokens, context):
    """Several rounds are timed where the context has room for them, and one where it has not."""
    seconds: list[list[float]] = []
    monkeypatch.setattr(TimedLength, "settled", lambda rule, settled=TimedLength.settled: seconds.append(rule.seconds) or settled(rule))
    target = tiny_llama(max_position_embeddings=context)
    longest = context - max_new_tokens - 2
    costs = round_costs(target, noisy_exit(target, 1), [1, 2], DecodeOptions("speculative", max_new_tokens=max_new_tokens), min(longest, 8))
    assert len(costs) == min(longest, 8) + 1 and min(costs) > 0
    assert min(map(len, seconds)) > 1 or context < 30


def test_enough_is_both_rounds_and_seconds(monkeypatch):
    for name, value in (("SETTLE_S", 1.0), ("TIMED_S", 10.0), ("FEWEST", 3)):
        monkeypatch.setattr(tuning, name, value)
    assert timed(1, [4.0] * 4).enough([])
    assert not timed(1, [40.0] * 3).enough([])
    assert not timed(1, [1.0] * 11).enough([]) and timed(1, [1.0] * 12).enough([])


class Clock:
    """What `time.perf_counter` says to rounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(drafting, "time", SimpleNamespace(perf_counter=lambda: self.now))


class ClockedBigram(BigramModel):
    """A pass over T tokens takes seconds[T - 1]; the last of them where T is larger."""

    def __init__(self, model: BigramModel, clock: Clock, seconds: list[float]) -> None:
        super().__init__(model.table)
        self.clock, self.seconds = clock, seconds

    def forward(self, input_ids: torch.Tensor, **names: object) -> SimpleNamespace:
        self.clock.now += self.seconds[min(input_ids.shape[1], len(self.seconds)) - 1]
        return super().forward(input_ids, **names)


def costs_of(monkeypatch, target_s: list[float], draft_s: float, options: DecodeOptions = DRAFTING, longest: int = 4) -> list[float]:
    clock = Clock(monkeypatch)
    target, draft = bigram_pair()
    return round_costs(ClockedBigram(target, clock, target_s), ClockedBigram(draft, clock, [draft_s]), [0], options, longest)


def test_a_round_costs_its_drafts_and_one_verification(monkeypatch):
    found = costs_of(monkeypatch, [0.010, 0.012, 0.014, 0.016, 0.018], 0.003)
    assert found == pytest.approx([0.010, 0.015, 0.020, 0.025, 0.030])


def test_costs_never_fall(monkeypatch):
    """A round that drafts more and costs less is measured wrong, and the rule that reads it would draft on for nothing."""
    assert costs_of(monkeypatch, [0.010, 0.020, 0.012, 0.014, 0.018], 0.001) == pytest.approx([0.010, 0.021, 0.021, 0.021, 0.022])


def test_ends_stops_and_records_of_the_options_do_not_shorten_what_is_timed(monkeypatch):
    options = DecodeOptions("speculative", SAMPLED, gamma=7, max_new_tokens=400, eos_ids=frozenset(range(8)), stop=lambda tokens: True, record_overlap=True)
    assert costs_of(monkeypatch, [0.010], 0.003, options) == pytest.approx([0.010, 0.013, 0.016, 0.019, 0.022])


def test_the_first_round_of_a_generation_does_not_count(monkeypatch):
    """It takes 50 times its seconds: as one of two rounds of three generations it would be half of what the median sees."""
    monkeypatch.setattr(tuning, "FEWEST", 1)
    clock, exact = Clock(monkeypatch), tuning.generate
    target, draft = bigram_pair()
    target = ClockedBigram(target, clock, [0.010])

    def generate(*arguments):
        target.seconds = [0.500]
        return exact(*arguments)

    def awake(rule, *arguments):
        target.seconds = [0.010]
        learn(rule, *arguments)

    learn = TimedLength.learn
    monkeypatch.setattr(tuning, "generate", generate)
    monkeypatch.setattr(TimedLength, "learn", awake)
    assert round_costs(target, ClockedBigram(draft, clock, [0.001]), [0], DRAFTING, 2) == pytest.approx([0.010, 0.011, 0.012])


def test_round_costs_by_the_real_clock(monkeypatch):
    monkeypatch.setattr(tuning, "TIMED_S", 0.01)
    target = tiny_llama()
    found = round_costs(target, noisy_exit(target, 1), [1, 2, 3], DecodeOptions("self_speculative", SAMPLED, max_new_tokens=200), longest=3)
    assert len(found) == 4 and found[0] > 0 and all(a <= b for a, b in pairwise(found))
    assert found[3] > 1.2 * found[0], "three passes through half of the blocks take some time"


# ---- what follows from them ----

def test_frequent_tokens():
    texts = [[5, 5, 5, 9, 9], [9, 3, 5, 7]]
    assert frequent_tokens(texts, 2, 12).tolist() == [5, 9]
    assert frequent_tokens(texts, 6, 12).tolist() == [0, 1, 3, 5, 7, 9], "filled up with the lowest that are missing"
    assert frequent_tokens([], 3, 12).tolist() == [0, 1, 2]
    assert frequent_tokens(texts, 12, 12).tolist() == list(range(12))


def tokens_by_hand(chances: list[list[float]], gamma: int) -> float:
    """1 and, for every start with γ positions ahead, the chance of each number of kept tokens times that number."""
    found = []
    for along in chances:
        for start in range(len(along) - gamma + 1):
            expected, reach = 1.0, 1.0
            for i in range(gamma):
                kept_so_far, reach = reach, reach * along[start + i]
                expected += i * (kept_so_far - reach)
            found.append(expected + gamma * reach)
    return sum(found) / len(found)


@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
def test_tokens_per_round_are_the_mean_over_all_starts(gamma):
    generator = torch.Generator().manual_seed(0)
    chances = [torch.rand(length, generator=generator, dtype=torch.float64) for length in (5, 9, 30, 3)]
    assert tokens_per_round(chances, gamma) == pytest.approx(tokens_by_hand([c.tolist() for c in chances], gamma))


def test_tokens_per_round_know_that_easy_positions_come_in_runs():
    """Equal means, another order: two in a row are kept half of the time, or never."""
    runs, turns = torch.tensor([1.0] * 50 + [0.0] * 50), torch.tensor([1.0, 0.0] * 50)
    assert tokens_per_round([runs], 2) == pytest.approx(2.0, abs=0.02) and tokens_per_round([turns], 2) == pytest.approx(1.5, abs=0.02)


def test_texts_shorter_than_the_longest_round():
    """Say more than two tokens, and all that is known is what two bring."""
    assert tokens_per_round([torch.tensor([0.5, 0.5])], 8) == 1.75


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_acceptance_along_a_text_is_that_of_its_positions(verification):
    target = tiny_llama()
    draft = noisy_exit(target, 2)
    texts = [(prompt + decode(target, None, prompt, i, policy=SAMPLED, max_new_tokens=9)[0], len(prompt)) for i, prompt in enumerate(some_prompts(3))]
    found = acceptance_along(target, draft, texts, DecodeOptions(policy=SAMPLED, verification=verification))
    for (tokens, start), along in zip(texts, found, strict=True):
        assert len(along) == 9
        for i in (0, 4, 8):
            ids = torch.tensor([tokens[: start + i]])
            p, q = (policy_probs(model(ids).logits[0, -1:], SAMPLED) for model in (target, draft))
            assert along[i] == pytest.approx(float(expected_acceptance(p, q, verification)), abs=1e-9)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_acceptance_along_a_text_is_what_decoding_it_recorded(verification):
    target, prompt = tiny_llama(), [1, 2, 3]
    draft = noisy_exit(target, 2)
    text, stats = decode(target, draft, prompt, policy=SAMPLED, verification=verification, gamma=1, max_new_tokens=40, record_overlap=True)
    along, = acceptance_along(target, draft, [(prompt + text, 3)], DecodeOptions(policy=SAMPLED, verification=verification))
    at = 0
    for r in stats.rounds[:-1]:
        assert r.expected[0] == pytest.approx(float(along[at]), abs=1e-6)
        at += len(r.tokens)


def candidate(costs: list[float], tokens: list[float]) -> Candidate:
    return Candidate("some", None, 64, 0.5, costs, tokens)


def test_candidate_predicts_tokens_per_round_over_cost_in_vanilla_steps():
    found = candidate([2.0, 3.0, 4.0, 6.0], [1.0, 1.8, 2.5, 3.0])
    assert [found.speedup(gamma) for gamma in range(4)] == pytest.approx([1.0, 1.2, 1.25, 1.0])
    assert found.best_gamma == 2


def test_candidate_that_does_not_pay_drafts_nothing():
    assert candidate([2.0, 4.0, 5.0], [1.0, 1.9, 2.4]).best_gamma == 0
    assert candidate([2.0, 4.0], [1.0, 2.0]).best_gamma == 0, "nor one that just breaks even"


# ---- tune.py ----

NEW_TOKENS, PROMPTS = 12, 3


@pytest.fixture(scope="module")
def subject(tmp_path_factory, tokenizer) -> SimpleNamespace:
    return save_exits(tmp_path_factory.mktemp("tune"), tokenizer)


def save_exits(root: Path, tokenizer) -> SimpleNamespace:
    """A saved target with two exits: one that says what the target says, and a disturbed one of layer 1."""
    target = save_target(root / "target", tokenizer)
    same = save_checkpoint(root / "a_same.safetensors", target, Exit(target.model, 3))
    noisy = save_checkpoint(root / "b_noisy.safetensors", target, noisy_exit(target.model, 1, scale=0.02).exit)
    return SimpleNamespace(target=target, same=str(same), noisy=str(noisy))


def time_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few rounds be timed, and a small buffer be read."""
    for name, value in (("SETTLE_S", 0.0), ("TIMED_S", 0.002), ("FEWEST", 2)):
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setitem(machine_speed.BUFFER_BYTES, "cpu", 1 << 20)


@pytest.fixture
def short(monkeypatch):
    time_little(monkeypatch)


def command(subject: SimpleNamespace, out_dir, **changes: object) -> list:
    flags = {"model_path": subject.target.name, "checkpoint_glob": [subject.same, subject.noisy], "out_dir": out_dir, "spec_prompt_dataset": "arithmetic",
             "spec_num_prompts": PROMPTS, "spec_prompt_length": 8, "spec_max_new_tokens": NEW_TOKENS, "num_threads": 1, **changes}
    return [text for name, value in flags.items() for text in (f"--{name}", *(value if isinstance(value, list) else [value]))]


def results_of(folder) -> tuple[pd.DataFrame, dict]:
    return pd.read_csv(folder / "candidates.csv"), json.loads((folder / tune.RESULTS_NAME).read_text())


def test_tune_measures_every_exit_with_every_head(subject, short, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run_main(tune, command(subject, out, draft_vocab_sizes=[64, 128]), monkeypatch) == 0
    table, found = results_of(out)
    sizes = (len(subject.target.tokenizer), 64, 128)
    names = {f"{path}{'' if size > 128 else f' cut to {size}'}": size for path in (subject.same, subject.noisy) for size in sizes}
    assert dict(zip(table["draft"], table["head_tokens"], strict=True)) == names
    alpha = dict(zip(table["draft"], table["alpha"], strict=True))
    assert alpha[subject.same] == pytest.approx(1, abs=1e-5) and 0 < alpha[subject.noisy] < 0.9
    assert alpha[f"{subject.same} cut to 64"] <= alpha[f"{subject.same} cut to 128"] < 1
    assert table["predicted_speedup"].is_monotonic_decreasing and (table["round_cost_0"] == 1).all()
    assert (table[[f"round_cost_{n}" for n in range(tuning.LONGEST + 1)]].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert found["draft"] == table["draft"][0] and found["gamma"] == table["best_gamma"][0] and found["candidates"] == 6
    assert found["predicted_speedup"] == pytest.approx(table["predicted_speedup"][0])
    assert capsys.readouterr().out.splitlines()[-1] == str(out / tune.RESULTS_NAME)
    assert {path.name for path in out.iterdir()} == {"cmd.txt", "config.json", "manifest.json", "candidates.csv", tune.RESULTS_NAME}


def with_costs(monkeypatch, costs: list[float]) -> None:
    monkeypatch.setattr(tune, "round_costs", lambda *_: costs)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_tune_recommends_the_exit_and_gamma_that_pay_most(subject, short, tmp_path, monkeypatch, capsys, verification):
    """At 10 % of a step for a drafted token, one that is always kept is worth eight of them."""
    with_costs(monkeypatch, [1 + 0.1 * n for n in range(9)])
    assert run_main(tune, command(subject, tmp_path / "out", verification=verification), monkeypatch) == 0
    table, found = results_of(tmp_path / "out")
    assert (found["draft"], found["gamma"]) == (subject.same, 8) and found["predicted_speedup"] == pytest.approx(9 / 1.8, rel=1e-4)
    assert list(table["draft"]) == [subject.same, subject.noisy]
    assert list(table["tokens_per_round_8"])[0] == pytest.approx(9, rel=1e-4)
    assert set(found["measured"]) == {"vanilla", "auto", "gamma 8"}
    assert found["measured"]["vanilla"]["speedup"] == 1
    for row in found["measured"].values():
        assert row["speedup"] == pytest.approx(row["tokens_per_s"] / found["measured"]["vanilla"]["tokens_per_s"])
        assert row["speedup_ci_low"] <= row["speedup"] <= row["speedup_ci_high"]
    assert f"use {subject.same} with --gamma 8: predicted speedup 5.00" in capsys.readouterr().out


def test_tune_says_where_no_draft_pays(subject, short, tmp_path, monkeypatch, capsys):
    with_costs(monkeypatch, [1 + 2.0 * n for n in range(9)])
    assert run_main(tune, command(subject, tmp_path / "out"), monkeypatch) == 0
    _, found = results_of(tmp_path / "out")
    assert found["gamma"] == 0 and found["predicted_speedup"] == 1 and set(found["measured"]) == {"vanilla", "auto"}
    assert "decode without one" in capsys.readouterr().out


def test_tune_never_writes_over_a_recommendation(subject, short, tmp_path, monkeypatch, capsys):
    (tmp_path / tune.RESULTS_NAME).touch()
    assert run_main(tune, command(subject, tmp_path), monkeypatch) == 2
    check_one_line(capsys, "holds a recommendation already; choose another --out_dir")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_vocab_sizes": [64, 100]}, "--draft_vocab_sizes 100: must be a multiple of 16"),
        ({"draft_vocab_sizes": [3200]}, "--draft_vocab_sizes 3200: .* below the vocabulary's 3"),
        ({"draft_vocab_sizes": [0]}, "--draft_vocab_sizes 0: "),
        ({"draft_vocab_sizes": [-16]}, "--draft_vocab_sizes -16: "),
        ({"checkpoint_glob": ["/no/such/*"]}, "no checkpoint matches"),
        ({"checkpoint_glob": [__file__]}, "is broken or no .safetensors file"),
        ({"spec_top_p": 0}, "--spec_top_p 0.0 must lie between"),
        ({"spec_num_prompts": 0}, "--spec_num_prompts 0: must be at least 1"),
        ({"spec_max_new_tokens": 497}, "the context of the target is 512 tokens"),
        ({"model_path": "/no/such/model"}, "no model at /no/such/model"),
    ],
)
def test_mistakes_get_one_line(subject, tmp_path, monkeypatch, capsys, changes, message):
    assert run_main(tune, command(subject, tmp_path / "out", **changes), monkeypatch) == 2
    check_one_line(capsys, message)
    assert not (tmp_path / "out").exists()


def test_an_exit_of_another_target_is_refused(subject, short, tmp_path, tokenizer, monkeypatch, capsys):
    other = save_target(tmp_path / "other", tokenizer, seed=5)
    assert run_main(tune, command(subject, tmp_path / "out", model_path=other.name), monkeypatch) == 2
    check_one_line(capsys, "belongs to another target")
