"""What evaluation counts and leaves out, with generations and models whose figures are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from decoding.state import DecodeStats, RoundResult
from measuring import evaluation
from speculative import DecodeOptions, Generation
from toy_models import BigramModel

TARGET = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")))


def decoded_in(seconds: float) -> Generation:
    stats = DecodeStats(emitted=2, target_calls=1, rounds=[RoundResult([5, 6], 1, 1)], wall_s=seconds)
    return Generation([5, 6], stats)


def test_the_first_pair_of_generations_is_not_measured(monkeypatch):
    """It warms up both methods on the first prompt, which is decoded again; and of each pair the other method comes first."""
    asked = []

    def generate(model: object, prompt: list[int], options: DecodeOptions, draft: object, prompt_id: int) -> Generation:
        asked.append((options.method, prompt, prompt_id))
        return decoded_in(100.0 if prompt_id == 0 else 1.0 if options.method == "vanilla" else 0.5)

    stubs = {"choose_prompts": [[1], [2], [3]], "drafting_options": DecodeOptions("speculative"), "predict_by_steps": {}, "method_columns": {}}
    for name, made in stubs.items():
        monkeypatch.setattr(evaluation, name, lambda *_, made=made: made)
    monkeypatch.setattr(evaluation, "generate", generate)
    row, found = evaluation.measure_speculation(TARGET, SimpleNamespace(model=None), SimpleNamespace(gamma="4", seed=0), {})
    assert row["spec_prompts"] == len(found) == 3 and row["vanilla_decode_s"] == 3 and row["spec_decode_s"] == 1.5 and row["spec_speedup"] == 2
    assert [prompt for _, prompt, _ in asked[::2]] == [[1], [1], [2], [3]] and [index for *_, index in asked] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [asked[i][0] for i in (2, 4, 6)] != [asked[2][0]] * 3


@pytest.mark.parametrize(("temperature", "chance"), [(1.0, 0.25), (0.5, 0.1), (0.0, 0.25)])
def test_surprise_is_that_of_the_policys_temperature(temperature, chance):
    """Of the tokens behind the prompt alone, untruncated; at T = 0 of the law at 1. ¼ against ¾ is 1 against 9 at T = ½."""
    target = SimpleNamespace(model=BigramModel(torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log()))
    texts = [[1, 1], [0]]
    vanilla, lossy = ([Generation(tokens, DecodeStats()) for tokens in each] for each in (texts, [texts[0], [1]]))
    row = evaluation.lossy_distance(target, [[0, 0], [1]], vanilla, lossy, SimpleNamespace(spec_temperature=temperature, seed=0))
    assert row["lossy_same_text"] == 0.5 and row["lossy_text_nll"] == pytest.approx(-math.log(chance))
    assert row["vanilla_text_nll"] == pytest.approx(-(2 * math.log(chance) + math.log(1 - chance)) / 3)
