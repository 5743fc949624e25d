"""Every known bug of this kind of code, planted: at least one check of exactness must fail on each."""

from collections.abc import Callable

import pytest
import torch

import decoding.drafting as drafting
import decoding.sampling as sampling
import decoding.state as state
import decoding.verify as verify
import truncated_llama
from decoding.sampling import Purpose, SamplingPolicy
from engine import kv_cache, static_llama
from engine.shared_exit import SharedExit
from test_verify import check_enumeration, check_zero_is_never_accepted
from toy_models import (
    bigram_pair,
    check_all_accepted,
    check_batch,
    check_first_two_tokens,
    check_law,
    check_law_under_a_peeking_rule,
    check_logits,
    check_same_text,
    context_free_pair,
    native_llama,
    noisy_exit,
    tiny_llama,
)
from truncated_llama import Exit, ExitForm, TruncatedLlama

SAMPLED, GREEDY = SamplingPolicy(0.7, top_p=0.95), SamplingPolicy(0.0)
DTYPES = [torch.float32, torch.float64]  # sampling and verification through C++, and through torch
LLAMAS = [native_llama, tiny_llama]  # blocks through C++, and through torch
BOTH_METHODS = ["speculative", "self_speculative"]


# ---- the rules ----

def test_bonus_from_p_after_a_rejection(monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        check_enumeration(SAMPLED, patch)
    monkeypatch.setattr(verify, "residual", lambda p, q: p)
    with pytest.raises(AssertionError):
        check_enumeration(SAMPLED, monkeypatch)


def test_accept_ratio_upside_down(monkeypatch):
    monkeypatch.setattr(verify, "accepts", lambda p, q, x, u: u * p[range(len(x)), x] < q[range(len(x)), x])
    with pytest.raises(AssertionError):
        check_enumeration(SAMPLED, monkeypatch)


def test_accepting_a_tie(monkeypatch):
    """`<=` instead of `<` keeps a token that the target cannot emit when u is 0."""
    check_zero_is_never_accepted()
    monkeypatch.setattr(verify, "accepts", lambda p, q, x, u: u * q[range(len(x)), x] <= p[range(len(x)), x])
    with pytest.raises(AssertionError):
        check_zero_is_never_accepted()


@pytest.mark.parametrize("dtype", DTYPES)
def test_draft_distribution_that_is_not_renormalised(monkeypatch, dtype):
    drafted = drafting.ChainRound.draw_draft
    monkeypatch.setattr(drafting.ChainRound, "draw_draft", lambda *args: (lambda tokens, q: (tokens, 0.6 * q))(*drafted(*args)))
    with pytest.raises(AssertionError):
        check_law(SAMPLED, "rejection", pair=bigram_pair(dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_1_draft_under_the_rejection_rule(monkeypatch, dtype):
    """Deterministic children with the stochastic rule: exact only if drafts were drawn from q."""
    monkeypatch.setattr(drafting, "draw", lambda probs, *_: probs.argmax(-1))
    with pytest.raises(AssertionError):
        check_law(SAMPLED, "rejection", pair=bigram_pair(dtype=dtype))


# ---- the noise ----

def change_places(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    """Let everything that draws take its noise at the places that `change(places, purpose)` says."""
    places = sampling.noise_places
    for module in (sampling, verify):
        monkeypatch.setattr(module, "noise_places", lambda purpose: change(places, purpose))


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_that_is_reused_at_every_position(monkeypatch, dtype):
    """Each token's marginal stays right; only pairs of tokens show it."""
    change_places(monkeypatch, lambda places, purpose: (0, places(purpose)[1]))
    with pytest.raises(AssertionError):
        check_law(SAMPLED, "rejection", pair=bigram_pair(dtype=dtype))
    with pytest.raises(AssertionError):
        check_first_two_tokens(SamplingPolicy(1.0), "coupled", 300, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_noise_stream_for_draft_accept_and_residual(monkeypatch, dtype):
    """A served engine shared its draft's noise with the residual draw, and 60 % became 63 %; here TV is 0.06."""
    pair = context_free_pair([0.03, 0.38, 0.59], [0.63, 0.07, 0.30], dtype)
    check_law(SamplingPolicy(1.0), "rejection", 6000, pair)
    change_places(monkeypatch, lambda places, purpose: places(Purpose.TOKEN))
    monkeypatch.setattr(sampling.Noise, "of_round", lambda self, starts: self)
    with pytest.raises(AssertionError):
        check_law(SamplingPolicy(1.0), "rejection", 6000, pair)


@pytest.mark.parametrize("dtype", DTYPES)
def test_draft_noise_that_is_not_fresh_in_each_round(monkeypatch, dtype):
    """With a fixed γ the law stays right: it takes a rule that remembers what was thrown away."""
    monkeypatch.setattr(sampling.Noise, "of_round", lambda self, starts: self)
    with pytest.raises(AssertionError):
        check_law_under_a_peeking_rule(dtype)


@pytest.mark.parametrize("llama", LLAMAS)
def test_verification_noise_off_by_one_position(monkeypatch, llama):
    exact = verify.verify_coupled
    monkeypatch.setattr(verify, "verify_coupled", lambda p, drafted, noise, positions: exact(p, drafted, noise, positions + 1))
    target = llama()
    with pytest.raises(AssertionError):
        check_same_text(target, noisy_exit(target, 2), SAMPLED, "coupled")


@pytest.mark.parametrize("llama", LLAMAS)
def test_one_noise_for_all_texts_of_a_batch(monkeypatch, llama):
    exact = sampling.Noise.of
    monkeypatch.setattr(sampling.Noise, "of", lambda seed, prompt_ids, device: exact(seed, prompt_ids[:1] * len(prompt_ids), device))
    with pytest.raises(AssertionError):
        check_batch(llama(), None, [[1, 2], [3, 4, 5]], policy=SAMPLED, max_new_tokens=12)


# ---- caches and positions ----

def crops_of_both_engines(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    for model in (kv_cache.CachedModel, static_llama.StaticLlama):
        monkeypatch.setattr(model, "crop", lambda self, lengths, exact=model.crop: change(self, exact, lengths))


@pytest.mark.parametrize("options", [{"engine": "transformers"}, {}, {"method": "self_speculative"}])
@pytest.mark.parametrize("llama", LLAMAS)
def test_forgotten_rollback(monkeypatch, llama, options):
    crops_of_both_engines(monkeypatch, lambda self, exact, lengths: None)
    target = llama()
    for verification, policy in (("coupled", SAMPLED), ("rejection", GREEDY)):
        with pytest.raises((AssertionError, RuntimeError)):
            check_same_text(target, noisy_exit(target, 2), policy, verification, **options)


@pytest.mark.parametrize("options", [{"engine": "transformers"}, {}, {"method": "self_speculative"}])
@pytest.mark.parametrize("llama", LLAMAS)
def test_rollback_by_one_too_few(monkeypatch, llama, options):
    crops_of_both_engines(monkeypatch, lambda self, exact, lengths: exact(self, [length + 1 for length in lengths]))
    target = llama()
    with pytest.raises((AssertionError, RuntimeError)):
        check_same_text(target, noisy_exit(target, 2), SAMPLED, "coupled", **options)


@pytest.mark.parametrize("method", BOTH_METHODS)
def test_state_rolls_back_by_one_too_few(monkeypatch, method):
    monkeypatch.setattr(state.DecodeState, "roll_back", lambda self: self.target.crop([len(text) for text in self.committed]))
    target = native_llama()
    with pytest.raises((AssertionError, RuntimeError)):
        check_same_text(target, noisy_exit(target, 2), SAMPLED, "coupled", method=method)


def test_positions_of_the_draft_off_by_one(monkeypatch):
    """Texts stay exact with a wrong draft; only a draft that should equal the target shows it."""
    exact = truncated_llama.prepare_pass

    def shifted(target, input_ids, attention_mask=None, cache=None, *further):
        hidden, inputs = exact(target, input_ids, attention_mask, cache, *further)
        moved = inputs["position_ids"] + (cache is not None and cache.get_seq_length() > 0)
        return hidden, {**inputs, "position_embeddings": target.model.rotary_emb(hidden, position_ids=moved)}

    monkeypatch.setattr(truncated_llama, "prepare_pass", shifted)
    target = tiny_llama()
    with pytest.raises(AssertionError):
        check_all_accepted(target, TruncatedLlama(target, Exit(target, 3)), SAMPLED, "coupled", engine="transformers")


@pytest.mark.parametrize("llama", LLAMAS)
def test_wrong_rotary_position_in_a_span(monkeypatch, llama):
    exact = static_llama.Span.__init__

    def shifted(self, rotary, start, count, *rest):
        exact(self, rotary, start, count, *rest)
        if start > 0:
            self.positions = torch.arange(start + 1, start + 1 + count)

    check_logits(llama(), [40, 3])
    monkeypatch.setattr(static_llama.Span, "__init__", shifted)
    with pytest.raises(AssertionError):
        check_logits(llama(), [40, 3])


def test_forgotten_write_of_keys(monkeypatch):
    exact = static_llama.SpanView.write
    monkeypatch.setattr(static_llama.SpanView, "write", lambda self, index, keys, values: exact(self, index, 0 * keys, values))
    with pytest.raises(AssertionError):
        check_logits(tiny_llama(), [40, 3])


def test_forgotten_write_of_keys_in_cpp(monkeypatch):
    """The C++ blocks write, and read, at the addresses that they are given: here those of another cache."""
    exact = static_llama._pointers
    elsewhere = []

    def pointers(block, cache, index):
        elsewhere.append(static_llama.KeyValues(4, 1, 256, native_llama().config, cache.store))
        return exact(block, elsewhere[-1], index)

    monkeypatch.setattr(static_llama, "_pointers", pointers)
    with pytest.raises(AssertionError):
        check_logits(native_llama(), [100])
        check_logits(native_llama(), [40, 3])


# ---- the exit on the target's blocks ----

def check_shared_text(target) -> None:
    check_same_text(target, noisy_exit(target, 2), SAMPLED, "coupled", method="self_speculative")


@pytest.mark.parametrize("llama", LLAMAS)
def test_hidden_states_of_the_wrong_position(monkeypatch, llama):
    exact = static_llama.Span.load
    monkeypatch.setattr(static_llama.Span, "load", lambda self, store: exact(self, store).roll(1, 0))
    with pytest.raises(AssertionError):
        check_shared_text(llama())


@pytest.mark.parametrize("llama", LLAMAS)
def test_hidden_states_that_are_not_kept(monkeypatch, llama):
    exact = static_llama.Stack.run
    monkeypatch.setattr(static_llama.Stack, "run", lambda self, x, place, first=0, last=None, kept=None: exact(self, x, place, first, last, kept if len(x) > 1 else None))
    with pytest.raises(AssertionError):
        check_shared_text(llama())


@pytest.mark.parametrize("llama", LLAMAS)
def test_own_block_of_the_exit_skips_a_token(monkeypatch, llama):
    """The last drafted token, when it was kept, is known to the target's blocks only. Texts stay exact without it."""
    target = llama()
    draft = TruncatedLlama(target, Exit(target, 3, ExitForm("last")))
    check_all_accepted(target, draft, SAMPLED, "coupled", method="self_speculative")
    exact = SharedExit.draft
    monkeypatch.setattr(SharedExit, "draft", lambda self, tokens, starts, index, behind: exact(self, tokens, starts, index, 0))
    with pytest.raises(AssertionError):
        check_all_accepted(target, draft, SAMPLED, "coupled", method="self_speculative")


@pytest.mark.parametrize("llama", LLAMAS)
def test_own_block_of_the_exit_is_not_rolled_back(monkeypatch, llama):
    monkeypatch.setattr(SharedExit, "crop", lambda self, lengths: None)
    target = llama()
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check_same_text(target, noisy_exit(target, 2, own_block=True), SAMPLED, "coupled", method="self_speculative")


# ---- batches ----

BATCH = [[1, 2, 3, 4], [9, 8, 7, 6, 5, 4, 3, 2, 1], [5] * 40]


@pytest.mark.parametrize("llama", LLAMAS)
def test_rows_of_a_batch_mixed_up(monkeypatch, llama):
    exact = static_llama.Scatter.__init__

    def mixed(self, *arguments):
        exact(self, *arguments)
        self.texts = self.texts.flip(0)

    check_batch(llama(), None, BATCH, policy=SAMPLED, max_new_tokens=12)
    monkeypatch.setattr(static_llama.Scatter, "__init__", mixed)
    with pytest.raises(AssertionError):
        check_batch(llama(), None, BATCH, policy=SAMPLED, max_new_tokens=12)


@pytest.mark.parametrize("llama", LLAMAS)
def test_prompts_of_a_batch_all_in_the_first_row(monkeypatch, llama):
    """The C++ blocks did so: they were given the addresses of the first text's keys, whatever the row."""
    exact = static_llama.Span.__init__
    monkeypatch.setattr(static_llama.Span, "__init__", lambda self, rotary, start, count, text=0, *rest: exact(self, rotary, start, count, 0, *rest))
    with pytest.raises(AssertionError):
        check_batch(llama(), None, BATCH, policy=SAMPLED, max_new_tokens=12)


def test_mask_of_a_batch_that_sees_one_slot_too_many(monkeypatch):
    exact = static_llama.ScatterView.__init__

    def view(self, place, cache):
        exact(self, place, cache)
        self.mask = cache.mask(torch.arange(place.reach) <= place.positions[..., None] + 1)

    monkeypatch.setattr(static_llama.ScatterView, "__init__", view)
    with pytest.raises(AssertionError):
        check_batch(tiny_llama(), None, BATCH, policy=SAMPLED, max_new_tokens=12)


def test_slot_of_a_batch_off_by_one_in_cpp(monkeypatch):
    exact = static_llama.Scatter.rows.func

    def moved(self):
        self.other = static_llama.Scatter(self.rotary, self.positions + 1, self.reach)  # held, as its tensors are what is read
        return exact(self.other)

    monkeypatch.setattr(static_llama.Scatter, "rows", property(moved))
    with pytest.raises(AssertionError):
        check_batch(native_llama(), None, BATCH, policy=SAMPLED, max_new_tokens=12)


# ---- counts ----

@pytest.mark.parametrize("dtype", DTYPES)
def test_target_stepped_once_per_token(monkeypatch, dtype):
    """A verification that calls the target token by token is exact but pointless: the model's own count shows it."""
    whole = kv_cache.CachedModel.forward
    monkeypatch.setattr(
        kv_cache.CachedModel, "forward", lambda self, tokens, starts: torch.cat([whole(self, token[None, None], starts) for token in tokens[0]], 1))
    with pytest.raises(AssertionError):
        check_law(SAMPLED, "rejection", tokens=200, pair=bigram_pair(dtype=dtype))
