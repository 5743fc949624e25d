"""Linear maps by oneDNN are torch's to rounding, alone and in a frozen pass."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from toy_models import some_batch, tiny_llama
from training import frozen_linear
from training.frozen_linear import fast_linears
from tuned_llama import TunedLlama


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was asked."""
    made: list[int] = []
    whole = frozen_linear.onednn_linear
    monkeypatch.setattr(frozen_linear, "onednn_linear", lambda *args, **kwargs: made.append(1) or whole(*args, **kwargs))
    return made


@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (3, 5, 16)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_torchs(calls, shape, biased):
    x, weight, bias = torch.randn(shape), torch.randn(7, 16), torch.randn(7) if biased else None
    with fast_linears(x):
        torch.testing.assert_close(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias), rtol=0, atol=0)
        found = torch.nn.functional.linear(x, weight, bias=bias)
    assert len(calls) == 3
    torch.testing.assert_close(found, linear(x, weight, bias))


def test_half_precision_stays_with_torch():
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    with fast_linears(x):
        found = linear(x, x)
    assert torch.equal(found, linear(x, x))


def test_a_frozen_pass_is_the_targets(calls):
    model, batch = tiny_llama().float(), some_batch()
    text = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        wanted = model.model(*text).last_hidden_state
    found = TunedLlama(model, []).frozen_pass(*text).teacher
    assert calls
    seen = text[1].bool()
    torch.testing.assert_close(found[seen], wanted[seen])
