"""Objectives and the pass that trains several exits: the gradients of the plain version, in chunks, and each exit as if it were alone."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from toy_models import some_batch, tiny_llama
from training import losses
from training.losses import LOSS_TYPES, grade, learned_rows, learned_tokens
from truncated_llama import Exit, ExitKind, TruncatedLlama
from tuned_llama import Objective, TunedLlama

KINDS = ["head", "rank8", "translator", "head+last_block", "attention_block", "head+full_block", "head+vocab20", "rank8+vocab20", "last_block"]


def plain_loss(loss_type: str, teacher: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The objectives as their definitions read, for autograd."""
    p, q = teacher.softmax(-1), draft.softmax(-1)
    log_p, log_q = (logits.div(temperature).log_softmax(-1) for logits in (teacher, draft))
    kl = temperature**2 * kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    ce = cross_entropy(draft, tokens, reduction="none")
    alpha = torch.minimum(p, q).sum(-1)
    weight = torch.exp(-3 * alpha.detach())
    return {
        "kl_divergence": kl, "cross_entropy": ce, "combined": kl + ce, "reverse_kl": temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1),
        "total_variation": (p - q).abs().sum(-1) / 2, "lk": weight * kl + (1 - weight) * (1 - alpha),
    }[loss_type].sum()


def some_logits(rows: int = 7, vocab: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, draft = 2 * torch.randn(2, rows, vocab, generator=generator)
    return teacher, draft.requires_grad_(), torch.randint(0, vocab, (rows,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_are_those_of_the_definition(loss_type, temperature):
    teacher, draft, tokens = some_logits()
    wanted = plain_loss(loss_type, teacher, draft, tokens, temperature)
    wanted.backward()
    found = grade(loss_type, teacher, draft.detach(), tokens, temperature)
    assert torch.allclose(found.loss.sum(), wanted, rtol=1e-5) and torch.allclose(found.gradient, draft.grad, atol=1e-5)
    assert float(found.overlap.sum()) == pytest.approx(float(torch.minimum(teacher.softmax(-1), draft.detach().softmax(-1)).sum()), rel=1e-5)
    assert float(found.lost_mass.sum()) == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_trimmed_vocabulary_renormalises_the_teacher_and_tells_what_is_lost(loss_type):
    teacher, _, tokens = some_logits(rows=40)
    ids = torch.tensor([1, 2, 5, 8])
    draft = torch.randn(40, 4, generator=torch.Generator().manual_seed(5)).requires_grad_()
    known = torch.isin(tokens, ids)
    columns = torch.searchsorted(ids, tokens).clamp(max=3)
    wanted = plain_loss(loss_type, teacher[:, ids], draft, columns)
    if loss_type in ("cross_entropy", "combined"):
        wanted = wanted - plain_loss("cross_entropy", teacher[~known][:, ids], draft[~known], columns[~known])
    wanted.backward()
    found = grade(loss_type, teacher, draft.detach(), tokens, token_ids=ids)
    assert torch.allclose(found.loss.sum(), wanted, rtol=1e-5) and torch.allclose(found.gradient, draft.grad, atol=1e-5)
    p = teacher.softmax(-1)[:, ids]
    assert float(found.lost_mass.sum()) == pytest.approx(float((1 - p.sum(-1)).sum()), rel=1e-5)
    assert float(found.overlap.sum()) == pytest.approx(float(torch.minimum(p, draft.softmax(-1)).sum()), rel=1e-5)  # with p itself: what acceptance will be


def test_a_wrong_gradient_is_found(monkeypatch):
    monkeypatch.setattr(losses, "_variation", lambda p, q: (1 - torch.minimum(p, q).sum(-1), q * (q > p)))  # forgets that q sums to 1
    with pytest.raises(AssertionError):
        test_gradients_are_those_of_the_definition("lk", 1.0)


def test_a_row_predicts_the_token_behind_it():
    """By hand, as all else here takes its rows from these two functions: unshifted, cross-entropy would see its own label."""
    learned = torch.tensor([[False, True, False, True], [False, False, True, False]])
    assert learned_rows(torch.arange(8).view(2, 4), learned).tolist() == [0, 2, 5]
    assert learned_tokens(torch.arange(10, 18).view(2, 4), learned).tolist() == [11, 13, 16]


def exits_of(model: nn.Module, kinds: list[str], seed: int = 0) -> list[Exit]:
    """Exits at layer 1, noisy, so that nothing is zero."""
    found = []
    for number, name in enumerate(kinds):
        kind = ExitKind.parse(name)
        exit_ = Exit(model, 1, kind.form)
        exit_ = exit_.trimmed(torch.arange(10, 30)) if kind.draft_vocab else exit_
        exit_ = exit_.share_output(model) if kind.shares_output else exit_
        generator = torch.Generator().manual_seed(seed + number)
        for parameter in exit_.own_parameters().values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.requires_grad_(True)
        found.append(exit_)
    return found


def plain_gradients(model: nn.Module, exit_: Exit, batch: dict, objective: Objective, scale: float) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients with all logits at once, through a second model."""
    mask = batch["loss_mask"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher = learned_rows(model(**inputs, use_cache=False).logits, mask)
    draft = learned_rows(TruncatedLlama(model, exit_)(**inputs, use_cache=False).logits, mask)
    tokens = learned_tokens(batch["input_ids"], mask)
    if exit_.token_ids is not None:
        ids, known = exit_.token_ids, torch.isin(tokens, exit_.token_ids)
        assert objective.loss_type == "kl_divergence" and known.any()
        loss = plain_loss("kl_divergence", teacher[:, ids], draft[:, ids], torch.zeros_like(tokens), objective.temperature)
    else:
        loss = plain_loss(objective.loss_type, teacher, draft, tokens, objective.temperature)
    return float(loss), list(torch.autograd.grad(scale * loss, list(exit_.own_parameters().values())))


@pytest.mark.parametrize(("name", "rows", "compiled"), [*product(KINDS, [1, 5, 1000], [False]), ("head+last_block", 5, True)])
def test_chunks_give_the_gradients_of_the_plain_version(name, rows, compiled, monkeypatch):
    monkeypatch.setattr(TunedLlama, "_rows", rows)
    model = tiny_llama(tie_word_embeddings=True).float()
    exit_, = exits_of(model, [name])
    batch, objective = some_batch(), Objective("kl_divergence", 1.5)
    loss, wanted = plain_gradients(model, exit_, batch, objective, 0.25)
    sums, = TunedLlama(model, [exit_], compiled).learn(batch, [objective], 0.25)
    assert float(sums["loss"].sum()) == pytest.approx(loss, rel=1e-4)
    for parameter, gradient in zip(exit_.own_parameters().values(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=2e-5), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forgotten_chunk_is_found(monkeypatch):
    whole = torch.Tensor.backward
    seen = []

    def forgetful(self: torch.Tensor, *args: object) -> None:
        seen.append(self)
        if len(seen) != 2:
            whole(self, *args)

    monkeypatch.setattr(torch.Tensor, "backward", forgetful)
    with pytest.raises((AssertionError, TypeError)):
        test_chunks_give_the_gradients_of_the_plain_version("head", 5, False, monkeypatch)


def test_together_every_exit_learns_what_it_learns_alone():
    """Ten steps of nine kinds at once, with objectives of their own, against ten steps of each, to the last bit of fp32 on equal shapes."""
    model = tiny_llama().float()
    objectives = [Objective(LOSS_TYPES[i % len(LOSS_TYPES)], 1.0 + i % 2) for i in range(len(KINDS))]

    def trained(exits: list[Exit], objectives: list[Objective]) -> list[Exit]:
        tuned = TunedLlama(model, exits)
        optimizers = [torch.optim.AdamW(exit_.own_parameters().values(), lr=3e-3) for exit_ in exits]
        for step in range(10):
            tuned.learn(some_batch(seed=step), objectives, 0.05)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return exits

    together = trained(exits_of(model, KINDS), objectives)
    for number, name in enumerate(KINDS):
        alone, = trained([copy.deepcopy(exits_of(model, KINDS)[number])], [objectives[number]])
        for found, wanted in zip(together[number].parameters(), alone.parameters(), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7), name


def test_logits_are_never_made_for_the_whole_batch(monkeypatch):
    """Nothing of more than a chunk's rows of V numbers is ever made, forward or backward, however long the batch."""
    monkeypatch.setattr(TunedLlama, "_rows", 16)
    model = tiny_llama(vocab_size=72).float()
    exits = exits_of(model, ["head", "rank8+last_block"])
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == 72 and tensor.shape[0] not in (8, 32):  # but for head weights
                    largest = max(largest, tensor.shape[:-1].numel())
            return result

    with Watch():
        TunedLlama(model, exits).learn(some_batch(rows=8, width=60), [Objective()] * 2, 1.0)
    assert 0 < largest <= 16
