"""Figures against their definitions, and the cost model against the published optimum."""

import numpy as np
import pytest
import torch

from decoding.state import DecodeStats, RoundResult
from measuring import metrics


def run(*rounds: tuple[int, int]) -> DecodeStats:
    """A generation whose rounds had (proposed, accepted) tokens; every tested position had chance 0.5."""
    results = [RoundResult([0] * (accepted + 1), proposed, accepted) for proposed, accepted in rounds]
    for r in results:
        r.overlaps = r.expected = [0.5] * r.tested
    return DecodeStats(emitted=sum(len(r.tokens) for r in results), target_calls=len(rounds), rounds=results)


def test_acceptance_figures():
    row = metrics.speculation_metrics([run((3, 3), (3, 0)), run((3, 1), (3, 2), (1, 1))], longest=3)
    assert row["spec_mean_accepted"] == 7 / 5
    assert row["spec_mean_proposed"] == 13 / 5
    assert row["spec_accept_rate"] == 7 / 13
    assert row["spec_tested"] == 3 + 1 + 2 + 3 + 1
    assert row["spec_token_accept_rate"] == 7 / 10
    assert row["spec_tokens_per_call"] == 12 / 5 and row["spec_target_calls_per_token"] == 5 / 12
    assert [row[f"spec_accept_at_{i}"] for i in (1, 2, 3)] == [4 / 5, 2 / 3, 1 / 2]
    assert [row[f"spec_accepted_hist_{n}"] for n in range(4)] == [1, 2, 1, 1]
    assert row["spec_overlap"] == row["spec_tv"] == 0.5
    assert row["spec_accept_z"] == pytest.approx((7 - 5) / (10 * 0.25) ** 0.5)
    assert row["spec_mean_accepted_ci_low"] <= row["spec_mean_accepted"] <= row["spec_mean_accepted_ci_high"]


def test_tokens_that_a_judge_kept_are_no_draws():
    judged = run((3, 3), (3, 0))
    judged.rounds[0].judged = judged.rounds[0].overridden = 1
    assert metrics.acceptance_z([judged]) is None is not metrics.acceptance_z([run((3, 3), (3, 0))])


def test_a_position_never_reached_has_no_rate():
    assert "spec_accept_at_2" not in metrics.speculation_metrics([run((3, 0))], longest=3)


def test_speedup_leaves_prefill_out():
    fast, slow = run((1, 0)), run((1, 0))
    for stats, decode_s in ((fast, 1.0), (slow, 2.0)):
        stats.seconds["prefill"], stats.wall_s = 5.0, 5.0 + decode_s
    row = metrics.speed_metrics([slow], [fast])
    assert row["spec_speedup"] == 2 and row["spec_tokens_per_s"] == 1 and row["vanilla_decode_s"] == 2


def test_seconds_of_decoding_and_of_the_host():
    """What recording overlaps takes is measurement: it is in neither."""
    stats = DecodeStats(seconds={"prefill": 1.0, "draft": 2.0, "verify": 3.0, "record": 1.5}, wall_s=10.0)
    assert stats.decode_s == 7.5 and stats.host_s == 2.5


def test_bootstrap_interval_covers_the_truth():
    """95 % intervals of a mean of 40 values, over 200 samples: coverage within 4 deviations of 0.95."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        row = metrics.with_interval("x", generator.normal(1.0, 1.0, 40), np.ones(40), seed)
        covered += row["x_ci_low"] <= 1.0 <= row["x_ci_high"]
    assert covered / 200 > 0.95 - 4 * (0.95 * 0.05 / 200) ** 0.5


def test_quality_means():
    generator = torch.Generator().manual_seed(0)
    teacher, draft = torch.randn(2, 7, 13, generator=generator)
    tokens = torch.randint(0, 13, (7,), generator=generator)
    parts = [metrics.quality_sums(teacher[s], draft[s], tokens[s], 2.0) for s in (slice(0, 3), slice(3, 7))]
    found = metrics.quality_means(metrics.add_sums(metrics.add_sums({}, parts[0]), parts[1]))
    p, q = teacher.softmax(-1), draft.softmax(-1)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found["overlap"] == pytest.approx(1 - 0.5 * float((p - q).abs().sum(-1).mean()), rel=1e-5)
    assert found["ppl"] == pytest.approx(float(torch.nn.functional.cross_entropy(draft, tokens).exp()), rel=1e-5)
    assert found["tokens"] == 7
    hopeless = metrics.quality_means(dict.fromkeys(metrics.QUALITY_SUMS, 800.0) | {"tokens": 1})  # e⁸⁰⁰ is no float
    assert hopeless["ce"] == 800 and "ppl" not in hopeless and "teacher_ppl" not in hopeless
    same = metrics.quality_means(metrics.quality_sums(teacher, teacher, tokens, 1.0))
    assert same["kl"] == 0 and same["agreement"] == 1 and same["tv"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("whose", "left"), [("teacher", {"ce", "ppl", "top1", "top5", "tokens"}), ("draft", {"teacher_ppl", "tokens"})])
def test_what_is_not_known_of_a_model_without_numbers_is_absent(whose, left, bad):
    """A teacher of NaN used to have a KL of 0, and a draft's rows of NaN were misses."""
    torch.manual_seed(0)
    logits, tokens = {"teacher": torch.randn(7, 5), "draft": torch.randn(7, 5)}, torch.randint(5, (7,))
    logits[whose][3, 1] = bad  # one number of one row
    found = metrics.quality_means(metrics.quality_sums(logits["teacher"], logits["draft"], tokens, 2.0))
    assert set(found) == left
    whole = metrics.quality_means(metrics.quality_sums(logits["teacher"][:3], logits["draft"][:3], tokens[:3], 2.0))
    assert set(whole) == set(metrics.QUALITY_COLUMNS)


def test_figures_have_their_documented_columns():
    teacher = torch.randn(4, 9)
    assert set(metrics.quality_means(metrics.quality_sums(teacher, teacher, torch.zeros(4, dtype=torch.int64), 1.0))) == set(metrics.QUALITY_COLUMNS)


def test_predicted_speedup_by_hand():
    """1 + ½ + ¼ tokens in two draft steps of a tenth and a verification of 1.3 target steps."""
    assert metrics.predicted_speedup(0.5, 2, 0.1, 1.3) == pytest.approx(1.75 / 1.5)
    assert metrics.predicted_speedup(1.0, 2, 0.1, 1.3) == pytest.approx(3 / 1.5)


@pytest.mark.parametrize(("alpha", "cost", "best", "speedup"), [(0.6, 0.05, 4, 1.92), (0.8, 0.1, 6, 2.47), (0.9, 0.1, 10, 3.43), (0.8, 0.2, 4, 1.87)])
def test_cost_model_has_the_known_optimum(alpha, cost, best, speedup):
    found = {gamma: metrics.predicted_speedup(alpha, gamma, cost) for gamma in range(1, 20)}
    assert max(found, key=found.get) == best
    assert found[best] == pytest.approx(speedup, abs=0.005)


def test_what_was_not_timed_has_no_pace():
    """All tokens of a prompt may come with the prefill: then there is no speed, not one of 0 or infinity."""
    some, none, seconds = np.array([3, 4]), np.array([0, 0]), np.array([1.0, 1.0])
    assert set(metrics.speedup_interval("x", (some, seconds), (some, seconds))) == {"x", "x_ci_low", "x_ci_high"}
    assert metrics.speedup_interval("x", (none, seconds), (some, seconds)) == metrics.speedup_interval("x", (some, seconds), (none, seconds)) == {}
    assert metrics.with_interval("x", some, none) == metrics.with_interval("x", none, none) == {}
    assert metrics.with_interval("x", none, some) == {"x": 0, "x_ci_low": 0, "x_ci_high": 0}
