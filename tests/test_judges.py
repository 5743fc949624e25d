"""Fitting judges: the optimum, the figures and the threshold by their definitions; and their files, which fit one target, draft and tokenizer only."""

from __future__ import annotations

import json
from dataclasses import replace

from running.command_line import UserError

import pytest
import torch
from safetensors.torch import save_file

from decoding.autojudge import LAW_FEATURES, Judge
from models.target_model import Target
from toy_models import near_copy, noisy_exit, tiny_llama
from training import judges
from training.judges import (
    Fitted,
    JudgeInfo,
    Labelled,
    auc,
    calibrate,
    draft_hash,
    fit_draft_judge,
    fit_logistic,
    fit_paper_judge,
    load_judge,
    recall,
    save_judge,
)


def some_tokens(count: int = 400, size: int = 6, per_prompt: int = 8, noise: float = 1.0) -> Labelled:
    """Tokens whose importance depends on the first feature, more or less."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, size, generator=generator) * 3 + 1
    important = features[:, 0] - 1 + noise * 3 * torch.randn(count, generator=generator) > 1.5
    return Labelled(features, important, torch.arange(count) // per_prompt)


# ---- the fit ----

@pytest.mark.parametrize("c", [1e-7, 1e-4, 1e-2, 1.0, 100.0])
def test_logistic_regression_is_at_its_optimum(c):
    """The gradient of ½‖w‖² + C·Σ log(1 + exp(−y·z)), written out by hand, vanishes there."""
    rows = some_tokens()
    features, y = rows.features.double(), rows.important.double()
    weight, bias = fit_logistic(features, rows.important, c)
    error = (features @ weight[0] + bias).sigmoid() - y
    assert (weight[0] + c * error @ features).abs().max() < 1e-6 * max(1.0, c * len(y))
    assert (c * error.sum()).abs() < 1e-6 * max(1.0, c * len(y))


def test_logistic_regression_by_brute_force():
    """One feature: no other weight and bias of a fine grid do better."""
    rows = some_tokens(60, 1)
    x, signs, c = rows.features[:, 0].double(), 2 * rows.important.double() - 1, 0.1
    weight, bias = (float(value) for value in fit_logistic(rows.features, rows.important, c))

    def loss(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return w.square() / 2 + c * torch.log1p(torch.exp(-signs[:, None, None] * (x[:, None, None] * w + b))).sum(0)

    grid = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)
    around = loss(weight + grid[:, None], bias + grid[None])
    assert around.min() >= float(loss(torch.tensor([[weight]]), torch.tensor([[bias]]))) - 1e-9


def test_separable_tokens_have_a_finite_fit():
    rows = some_tokens(noise=0)
    weight, _ = fit_logistic(rows.features, rows.important, 1e-2)
    assert weight.isfinite().all() and weight[0, 0] > 0


def test_a_feature_that_never_varies_is_left_alone():
    mean, scale = judges.standardisation(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert mean.tolist() == [2, 5] and scale.tolist() == [1, 1]


# ---- figures ----

def test_auc_counts_pairs():
    scores, positive = torch.tensor([0.1, 0.4, 0.4, 0.4, 0.9, 0.2]), torch.tensor([False, True, False, True, True, True])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive].tolist() for b in scores[~positive].tolist()]
    assert auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("target", [0.001, 0.25, 0.5, 0.9, 1.0])
def test_threshold_is_the_largest_with_that_recall(target):
    generator = torch.Generator().manual_seed(1)
    scores, important = torch.rand(200, generator=generator).mul(50).round().div(50), torch.rand(200, generator=generator) < 0.3
    theta = calibrate(scores, important, target)
    assert recall(scores, important, theta) >= target
    assert all(recall(scores, important, larger) < target for larger in scores.unique().tolist() if larger > theta)


def test_tokens_of_a_prompt_stay_together():
    """Split by tokens instead, those of one prompt would leak what they share into the figures."""
    training, held_out = some_tokens().split(0)
    assert not set(training.prompts.tolist()) & set(held_out.prompts.tolist())
    assert len(held_out.prompts.unique()) == 5 and len(training.important) + len(held_out.important) == 400


def test_too_few_tokens_are_told():
    with pytest.raises(UserError, match="too few"):
        some_tokens(8).split(0)


# ---- both modes ----

def test_paper_judge_is_better_than_chance_and_calibrated():
    rows = some_tokens()
    fitted = fit_paper_judge(rows, "target", judges.C_GRID, 0.9, seed=0)
    assert fitted.val_auc > 0.7 and fitted.val_recall >= 0.9 and fitted.c in judges.C_GRID
    assert (fitted.n_train, fitted.n_important) == (400, int(rows.important.sum()))
    assert auc(fitted.judge.predict(rows.features), rows.important) > 0.7


def test_standardisation_is_inside_the_judge():
    rows = some_tokens()
    stretched = replace(rows, features=rows.features * torch.tensor([1e3, 1, 1, 1, 1, 1e-3]) + 7)
    plain, other = (fit_paper_judge(each, "target", [1e-2], 0.9, 0).judge.predict(each.features) for each in (rows, stretched))
    assert torch.allclose(plain, other, atol=1e-4)


def test_draft_judge_predicts_acceptance():
    rows = some_tokens(2000, LAW_FEATURES)
    fitted = fit_draft_judge(rows, 0)
    assert fitted.judge.mode == "draft" and fitted.judge.threshold == 0.5 and fitted.c is None and fitted.val_auc > 0.7
    scores = fitted.judge.predict(rows.features)
    assert scores[rows.important].mean() > scores[~rows.important].mean() + 0.2, "the score is P(important) in both modes"


# ---- files ----

@pytest.fixture
def target(tokenizer) -> Target:
    return Target(tiny_llama(vocab_size=len(tokenizer)).float(), tokenizer, "some/target")


def some_judge(size: int = 32, features: str = "target") -> Judge:
    generator = torch.Generator().manual_seed(2)
    layer = torch.randn(1, size, generator=generator), torch.randn(1, generator=generator)
    return Judge(torch.randn(size, generator=generator), torch.rand(size, generator=generator) + 1, (layer,), 0.25, features)


def saved(path, target: Target, draft, judge: Judge) -> JudgeInfo:
    info = JudgeInfo.of(Fitted(judge, 1e-3, 0.8, 0.91, 100, 20), target, draft, "the/draft", {"seed": 0})
    save_judge(path, judge, info)
    return info


def test_a_judge_comes_back_as_it_was(tmp_path, target):
    draft = noisy_exit(target.model, 2)
    for judge in (some_judge(), fit_draft_judge(some_tokens(200, LAW_FEATURES), 0).judge):
        wanted = saved(tmp_path / "judge.safetensors", target, draft, judge)
        found, info = load_judge(tmp_path / "judge.safetensors", target, draft)
        features = torch.randn(5, len(judge.mean))
        assert info == wanted and info.date and torch.equal(found.predict(features), judge.predict(features))
        assert (found.threshold, found.features, found.mode) == (judge.threshold, judge.features, judge.mode)


def test_a_judge_is_refused_by_others(tmp_path, target):
    path, draft = tmp_path / "judge.safetensors", noisy_exit(target.model, 2)
    saved(path, target, draft, some_judge())
    other = Target(tiny_llama(1, vocab_size=len(target.tokenizer)).float(), target.tokenizer, "other/target")
    cases = [(other, noisy_exit(other.model, 2), "another target .that of some/target"), (target, noisy_exit(target.model, 1), "another draft .that of the/draft"),
             (target, noisy_exit(target.model, 2, scale=0.06), "another draft"), (target, near_copy(target.model), "another draft")]
    for whole, its_draft, message in cases:
        with pytest.raises(UserError, match=message):
            load_judge(path, whole, its_draft)


def test_a_judge_is_refused_by_another_tokenizer(tmp_path, target, monkeypatch):
    path, draft = tmp_path / "judge.safetensors", noisy_exit(target.model, 2)
    saved(path, target, draft, some_judge())
    monkeypatch.setattr(judges, "tokenizer_hash", lambda tokenizer: "0" * 16)
    with pytest.raises(UserError, match="another tokenizer"):
        load_judge(path, target, draft)


def test_equal_heads_at_two_layers_are_two_drafts():
    target = tiny_llama()
    assert draft_hash(noisy_exit(target, 1, scale=0)) != draft_hash(noisy_exit(target, 2, scale=0))


@pytest.mark.parametrize(("content", "message"), [
    (None, "no judge at"), (b"nonsense", "broken"), ({"format": "followers-1"}, "is no judge"), ({"format": "judge-1"}, "header cannot be read"),
    ({"format": "judge-1", "info": json.dumps({"mode": "paper"})}, "header cannot be read"),
])
def test_other_files_are_refused(tmp_path, target, content, message):
    path = tmp_path / "judge.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({"mean": torch.zeros(1)}, path, metadata=content)
    with pytest.raises(UserError, match=message):
        load_judge(path, target, noisy_exit(target.model, 2))
