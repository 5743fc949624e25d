"""Mining: the labels of the paper's algorithm, done slowly by hand; what it guarantees; and the commands, killed and continued."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from running.command_line import UserError

import pandas as pd
import pytest
import torch
from torch import nn

from commands import evaluate_judge, train_judge
from data.answers import final_answer, same_answer
from decoding.sampling import policy_probs
from models.target_model import DeviceArgs, Target, load_target, tokenizer_hash, weights_hash
from toy_models import native_llama, near_copy, noisy_exit, some_prompts
from training import judge_mining
from training.judge_mining import LABEL_POLICY, Miner, Question, Reader, draft_labels
from training.judges import load_judge
from truncated_llama import ExitInfo, ExitKind, TruncatedLlama, load_exit, save_exit

MOST, END = 20, 3


class Remainders:
    """In place of a tokenizer: a text's answer is a remainder of its tokens' sum, so that some swaps change it and some do not; every seventh text has none."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        total = sum(tokens)
        return "" if total % 7 == 0 else f"#### {total % 2}"


def toy_target(seed: int = 0) -> Target:
    model = native_llama(seed)
    model.generation_config.eos_token_id = [END]
    return Target(model, Remainders(), "toy")


def questions(count: int = 8) -> list[Question]:
    return [Question(index, ids) for index, ids in enumerate(some_prompts(count))]


def mined(target: Target, draft: nn.Module, batch: int, count: int = 8) -> list[judge_mining.Search]:
    return list(Miner(target, draft, MOST, 16, batch).run(iter(questions(count))))


def labels(searches: list[judge_mining.Search]) -> list:
    return [(s.question.index, s.skipped, [(w.position, w.target_token, w.draft_token, w.important) for w in s.swaps]) for s in searches]


@torch.inference_mode()
def said(model: nn.Module, text: list[int]) -> list[int]:
    """The most likely token behind each token of `text`."""
    return model(input_ids=torch.tensor([text])).logits[0].argmax(-1).tolist()


def greedy(model: nn.Module, text: list[int], most: int) -> list[int]:
    """What follows `text`, up to END."""
    found: list[int] = []
    while len(found) < most and (not found or found[-1] != END):
        found.append(said(model, [*text, *found])[-1])
    return found


def mined_slowly(target: Target, draft: nn.Module, prompt: list[int]) -> tuple[str | None, list]:
    """Algorithm 1 of the paper, one token and one text at a time."""
    def read(text: list[int]) -> str | None:
        return final_answer(target.tokenizer.decode(text))

    y, found, cursor = greedy(target.model, prompt, MOST), [], 0
    answer = read(y)
    if answer is None:
        return judge_mining.NO_ANSWER, []
    while True:
        drafted = said(draft, prompt + y)[len(prompt) - 1 : -1]
        t = next((i for i in range(cursor, len(y)) if drafted[i] != y[i]), None)
        if t is None:
            return None, found
        other = [*y[:t], drafted[t]]
        other += greedy(target.model, prompt + other, MOST - t - 1) if drafted[t] != END and t + 1 < MOST else []
        important = not same_answer(read(other), answer)
        found.append((t, y[t], drafted[t], important))
        y, cursor = y if important else other, t + 1


DRAFTS = {
    "exit": lambda target: noisy_exit(target, 2, scale=0.2), "model": lambda target: near_copy(target, 0.1),
    "trimmed": lambda target: TruncatedLlama(target, noisy_exit(target, 2).exit.trimmed(torch.arange(1, 64, 2))),
}


@cache
def slow_labels(draft: str) -> list:
    target = toy_target()
    return [(question.index, *mined_slowly(target, DRAFTS[draft](target.model), question.ids)) for question in questions(5)]


def check_labels(draft: str) -> None:
    target = toy_target()
    found = labels(mined(target, DRAFTS[draft](target.model), 3, 5))
    assert found == slow_labels(draft)
    important = [swap[3] for _, _, swaps in found for swap in swaps]
    assert any(important) and not all(important)


@pytest.mark.parametrize("draft", DRAFTS)
def test_labels_are_the_algorithms(draft):
    check_labels(draft)


@pytest.mark.parametrize("draft", ["exit", "model"])
def test_a_batch_is_mined_as_each_prompt_alone(draft):
    target = toy_target()
    alone, together = (mined(target, DRAFTS[draft](target.model), batch) for batch in (1, 5))
    assert labels(alone) == labels(together)
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one.swaps, other.swaps, strict=True):
            assert torch.equal(a.target_state, b.target_state) and torch.equal(a.draft_state, b.draft_state)


def test_states_are_those_behind_the_drafts_token():
    target = toy_target()
    draft = near_copy(target.model, 0.1)
    searched = [search for search in mined(target, draft, 4) if search.swaps]
    for search in searched:
        first = search.swaps[0]
        text = [*search.question.ids, *greedy(target.model, search.question.ids, MOST)[: first.position], first.draft_token]
        for model, state in ((target.model, first.target_state), (draft, first.draft_state)):
            with torch.inference_mode():
                wanted = model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0, -1]
            assert torch.allclose(state, wanted, atol=1e-3)
    assert searched


def test_if_the_drafts_answer_differs_a_token_is_important():
    differing = 0
    for seed in range(2):
        target = toy_target(seed)
        draft = near_copy(target.model, 0.15)
        for search in mined(target, draft, 8, 16):
            if search.skipped is None:
                own = final_answer(target.tokenizer.decode(greedy(draft, search.question.ids, MOST)))
                differing += not same_answer(own, search.answer)
                assert same_answer(own, search.answer) or any(swap.important for swap in search.swaps)
    assert differing > 3


def test_prompts_that_are_too_long_are_skipped():
    target = toy_target()
    (search,) = Miner(target, noisy_exit(target.model, 2), MOST, 3, 2).run(iter([Question(0, [1, 2, 3, 4])]))
    assert search.skipped == judge_mining.TOO_LONG and not search.swaps


# ---- planted bugs ----

def test_length_of_the_continuation_alone_is_capped(monkeypatch):
    exact = Reader.continued
    monkeypatch.setattr(Reader, "continued", lambda self, texts, most, ends: exact(self, texts, [MOST] * len(most), ends))
    with pytest.raises((AssertionError, ValueError)):
        check_labels("model")


def test_answers_compared_with_the_current_text(monkeypatch):
    """An answer that drifts: an unimportant swap may not be the measure of the next."""
    current: dict[str | None, str | None] = {}

    def drifting(found, wanted):
        return current.setdefault(wanted, found) == found if found is not None else True

    monkeypatch.setattr(judge_mining, "same_answer", drifting)
    with pytest.raises(AssertionError):
        check_labels("model")


def test_swaps_judged_one_by_one(monkeypatch):
    """Without walking on from the swapped text the target mends every slip, and the guarantee is lost."""
    step = Miner.step

    def forgetting(self, searches):
        responses = [search.response for search in searches]
        step(self, searches)
        for search, response in zip(searches, responses, strict=True):
            search.response = response
        self.guess(searches)

    monkeypatch.setattr(Miner, "step", forgetting)
    with pytest.raises(AssertionError):
        check_labels("model")


# ---- draft mode ----

@pytest.mark.parametrize("draft", DRAFTS)
def test_draft_labels_are_bernoulli_draws(draft):
    """Over many texts as many tokens are kept as min(1, p/q) says, by passes of transformers."""
    target = toy_target()
    model = DRAFTS[draft](target.model)
    readers, kept, wanted, variance = (Reader(target.model, 64, 1), Reader(model, 64, 1)), 0, 0.0, 0.0
    for question in questions(24):
        drafted = draft_labels(*readers, question, MOST, 4, 0, frozenset({END}))
        assert drafted.features.shape == (len(drafted.accepted), 7) and drafted.features[:5, -1].tolist() == [0.25, 0.5, 0.75, 1.0, 0.25][: len(drafted.features)]
        q = drafted.features[:, 0].double()
        p = target_chances(target.model, model, question, readers)
        chances = (p / q).clamp(max=1)
        kept, wanted, variance = kept + int(drafted.accepted.sum()), wanted + float(chances.sum()), variance + float((chances * (1 - chances)).sum())
    assert abs(kept - wanted) < 4 * variance**0.5 and variance > 5


@torch.inference_mode()
def target_chances(target: nn.Module, draft: nn.Module, question: Question, readers: tuple[Reader, Reader]) -> torch.Tensor:
    """p (N,) of the tokens that draft_labels drew, which are told by watching what the draft is fed."""
    fed: list[list[int]] = []
    exact = Reader.feed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "feed", lambda self, tokens: fed.append(tokens[0]) or exact(self, tokens))
        draft_labels(*readers, question, MOST, 4, 0, frozenset({END}))
    tokens = fed[-1]  # what the target is fed, all at once
    p = policy_probs(target(input_ids=torch.tensor([[*question.ids[:-1], *tokens]])).logits[0, len(question.ids) - 1 : -1], LABEL_POLICY)
    return p.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].double()


# ---- the commands ----

@pytest.fixture(scope="module")
def exit_path(tiny_target_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disturbed exit of the tiny target."""
    target = load_target(str(tiny_target_path), DeviceArgs(device="cpu"))
    draft, path = noisy_exit(target.model, 2, scale=0.1), tmp_path_factory.mktemp("exit") / "exit.safetensors"
    info = ExitInfo(2, ExitKind(tuned=("head",)), str(tiny_target_path), weights_hash(target.model), tokenizer_hash(target.tokenizer))
    save_exit(path, draft.exit, info)
    return path


def command(monkeypatch: pytest.MonkeyPatch, module: object, **flags: object) -> None:
    """Run a command as if typed."""
    words = [word for name, value in flags.items() for word in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
    module.main()


@pytest.fixture
def flags(tiny_target_path: Path, exit_path: Path, tmp_path: Path) -> dict:
    return {"model_path": tiny_target_path, "checkpoint": exit_path, "num_prompts": 12, "max_new_tokens": 12, "batch_size": 4, "out": tmp_path / "judge.safetensors",
            "device": "cpu"}


@pytest.fixture(autouse=True)
def answers_of_random_models(monkeypatch):
    """A random model's texts hold no answer: their length's remainder stands for one."""
    monkeypatch.setattr(judge_mining, "final_answer", lambda text: str(sum(map(ord, text)) % 2) if text else None)


def test_a_judge_is_mined_fitted_used_and_reused(monkeypatch, capsys, flags, tmp_path, tiny_target_path, exit_path):
    command(monkeypatch, train_judge, **flags)
    assert capsys.readouterr().out.splitlines()[-1] == str(flags["out"])
    first = flags["out"].read_bytes()
    command(monkeypatch, train_judge, **flags)
    said = capsys.readouterr()
    assert "is reused" in said.err and said.out.strip() == str(flags["out"]) and flags["out"].read_bytes() == first
    with pytest.raises(UserError, match="made with other settings .recall_target 0.9 -> 0.5"):
        command(monkeypatch, train_judge, **flags, recall_target=0.5)
    both = tmp_path / "both.safetensors"
    command(monkeypatch, train_judge, **{**flags, "out": both, "mined": flags["out"].with_suffix(".jsonl")}, features="both")
    assert not both.with_suffix(".jsonl").exists()
    evaluated = {name: flags[name] for name in ("model_path", "checkpoint", "max_new_tokens", "device")}
    command(monkeypatch, evaluate_judge, **evaluated, judges=[flags["out"], both], thresholds=[0.0, 1.0], ranks=[1, 0], num_problems=6, gamma=3, spec_temperature=0,
            out_dir=tmp_path / "evaluation")
    table = pd.read_csv(tmp_path / "evaluation" / "results.csv")
    assert table["method"].tolist() == ["self_speculative", *["autojudge"] * 6, "topk", "topk"] and table["own_threshold"].sum() == 2
    exact, free = table.iloc[0], table[table["threshold"] == 1]
    same = table[(table["threshold"] == 0) | (table["rank"] == 1)]
    assert (same["same_texts"] == 1).all() and (same["tokens_per_call"] == exact["tokens_per_call"]).all() and (same["mcnemar_p"] == 1).all()
    assert (free["tokens_per_call"] > exact["tokens_per_call"]).all()
    assert {name for names in evaluate_judge.COLUMNS for name in names.split(", ")} <= set(table)


def test_draft_mode(monkeypatch, flags, tiny_target_path, exit_path):
    command(monkeypatch, train_judge, **flags, autojudge_mode="draft")
    target = load_target(str(tiny_target_path), DeviceArgs(device="cpu"))
    judge, info = load_judge(flags["out"], target, TruncatedLlama(target.model, load_exit(exit_path, target)[0]))
    assert judge.mode == info.mode == "draft" and info.settings["gamma"] == 4 and len(judge.layers) == 3


class Killed(Exception):
    pass


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_continues_to_the_same_file(monkeypatch, flags, tmp_path, torn):
    command(monkeypatch, train_judge, **flags)
    whole, judge = flags["out"].with_suffix(".jsonl").read_bytes(), flags["out"].read_bytes()
    other = {**flags, "out": tmp_path / "again" / "judge.safetensors"}
    append, written = train_judge.append, []

    def dying(path, rows):
        written.append(path)
        if len(written) == 7:
            raise Killed
        append(path, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_judge, "append", dying)
        with pytest.raises(Killed):
            command(patch, train_judge, **other)
    path = other["out"].with_suffix(".jsonl")
    if torn:
        path.write_bytes(path.read_bytes()[:-10])
    command(monkeypatch, train_judge, **other)
    assert path.read_bytes() == whole
    mine, again = (json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"]["info"] for file in (judge, other["out"].read_bytes()))
    assert {**json.loads(mine), "date": 0} == {**json.loads(again), "date": 0}


def test_mined_prompts_of_other_settings_are_not_continued(monkeypatch, flags):
    command(monkeypatch, train_judge, **flags)
    flags["out"].unlink()
    with pytest.raises(UserError, match="mined with other settings .max_new_tokens 12 -> 10"):
        command(monkeypatch, train_judge, **{**flags, "max_new_tokens": 10})


def test_more_prompts_continue_the_same_file(monkeypatch, flags):
    command(monkeypatch, train_judge, **flags)
    path = flags["out"].with_suffix(".jsonl")
    before = path.read_bytes()
    flags["out"].unlink()
    command(monkeypatch, train_judge, **{**flags, "num_prompts": 14})
    assert path.read_bytes().startswith(before) and len(path.read_bytes().splitlines()) == 15


@pytest.mark.parametrize(("change", "message"), [
    ({"out": "judge.bin"}, "must end in .safetensors"), ({"recall_target": 0}, "--recall_target 0"), ({"c_grid": [0.1, -1]}, "--c_grid"), ({"num_prompts": 0}, "--num_prompts 0"),
    ({"num_prompts": 10**6}, "has 12000 rows"), ({"max_new_tokens": 10**5}, "the context of"), ({"dataset": "ultrachat"}, "invalid choice"), ({"seed": -1}, "--seed -1"),
    ({"draft_model_path": "x"}, "give either"),
])
def test_mistakes_in_training_are_told(monkeypatch, flags, change, message):
    with pytest.raises(UserError, match=message):
        command(monkeypatch, train_judge, **{**flags, **change})


@pytest.mark.parametrize(("change", "message"), [
    ({"thresholds": [2]}, "--thresholds 2"), ({"ranks": [-1]}, "--ranks -1"), ({"gamma": 64}, "--gamma 64"), ({"judges": ["none"]}, "no judge at none"),
    ({"max_new_tokens": 10**5}, "does not fit"), ({"spec_temperature": -1}, "temperature"),
])
def test_mistakes_in_evaluation_are_told(monkeypatch, flags, tmp_path, change, message):
    given = {name: flags[name] for name in ("model_path", "checkpoint", "max_new_tokens", "device")}
    with pytest.raises(UserError, match=message):
        command(monkeypatch, evaluate_judge, **{**given, "out_dir": tmp_path / "evaluation", **change})


def test_comparison_with_exact_decoding():
    exact, other = (SimpleNamespace(tokens=[[n] for n in tokens], answers=answers, right=right) for tokens, answers, right in (
        ([1, 2, 3, 4], ["1", "2", None, "4"], [True, True, False, False]), ([1, 5, 3, 6], ["1.0", "3", None, "5"], [True, False, False, True])))
    assert evaluate_judge.comparison(other, exact) == {"lost": 1, "gained": 1, "mcnemar_p": 1.0, "same_answers": 0.5, "same_texts": 0.5}
