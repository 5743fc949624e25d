"""Every known bug of this kind of code, planted: at least one check of exactness must fail on each."""

import pytest
import torch

import decoding.chain as chain
import decoding.kv_cache as kv_cache
import decoding.sampling as sampling
import decoding.verify as verify
import truncated_llama
from decoding.sampling import Purpose, SamplingPolicy
from test_verify import check_enumeration, check_zero_is_never_accepted
from toy_models import check_all_accepted, check_first_two_tokens, check_law, check_same_text, context_free_pair, noisy_exit, tiny_llama
from truncated_llama import Exit, TruncatedLlama

SAMPLED = SamplingPolicy(0.7, top_p=0.95)


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


def test_draft_distribution_that_is_not_renormalised(monkeypatch):
    drafted = chain.draft_chain
    monkeypatch.setattr(chain, "draft_chain", lambda *args: (lambda tokens, q: (tokens, 0.6 * q))(*drafted(*args)))
    with pytest.raises(AssertionError):
        check_law(SAMPLED, "rejection")


def test_noise_that_is_reused_at_every_position(monkeypatch):
    """Each token's marginal stays right; only pairs of tokens show it."""
    fresh = sampling.Noise._row_keys
    monkeypatch.setattr(sampling.Noise, "_row_keys", lambda self, positions, purpose: fresh(self, 0 * positions, purpose))
    with pytest.raises(AssertionError):
        check_law(SAMPLED, "rejection")
    with pytest.raises(AssertionError):
        check_first_two_tokens(SamplingPolicy(1.0), "coupled")


def test_one_noise_stream_for_draft_accept_and_residual(monkeypatch):
    """A served engine shared its draft's noise with the residual draw, and 60 % became 63 %; here TV is 0.06."""
    pair = context_free_pair([0.03, 0.38, 0.59], [0.63, 0.07, 0.30])
    check_law(SamplingPolicy(1.0), "rejection", pair=pair)
    fresh = sampling.Noise._row_keys
    monkeypatch.setattr(sampling.Noise, "_row_keys", lambda self, positions, purpose: fresh(self, positions, Purpose.TOKEN))
    with pytest.raises(AssertionError):
        check_law(SamplingPolicy(1.0), "rejection", pair=pair)


def test_top_1_draft_under_the_rejection_rule(monkeypatch):
    """Deterministic children with the stochastic rule: exact only if drafts were drawn from q."""
    drawn = chain.draw
    monkeypatch.setattr(chain, "draw", lambda probs, noise, positions, purpose: probs.argmax(-1) if purpose == Purpose.DRAFT else drawn(probs, noise, positions, purpose))
    with pytest.raises(AssertionError):
        check_law(SAMPLED, "rejection")


def test_forgotten_rollback(monkeypatch):
    monkeypatch.setattr(kv_cache.CachedModel, "crop", lambda self, length: None)
    target = tiny_llama()
    for verification, policy in (("coupled", SAMPLED), ("rejection", SamplingPolicy(0.0))):
        with pytest.raises((AssertionError, RuntimeError)):
            check_same_text(target, noisy_exit(target, 2), policy, verification)


def test_rollback_by_one_too_few(monkeypatch):
    exact = kv_cache.CachedModel.crop
    monkeypatch.setattr(kv_cache.CachedModel, "crop", lambda self, length: exact(self, length + 1))
    target = tiny_llama()
    with pytest.raises((AssertionError, RuntimeError)):
        check_same_text(target, noisy_exit(target, 2), SAMPLED, "coupled")


def test_positions_of_the_draft_off_by_one(monkeypatch):
    """Texts stay exact with a wrong draft; only a draft that should equal the target shows it."""
    exact = truncated_llama.prepare_pass

    def shifted(target, input_ids, attention_mask=None, cache=None):
        hidden, inputs = exact(target, input_ids, attention_mask, cache)
        moved = inputs["position_ids"] + (cache is not None and cache.get_seq_length() > 0)
        return hidden, {**inputs, "position_embeddings": target.model.rotary_emb(hidden, position_ids=moved)}

    monkeypatch.setattr(truncated_llama, "prepare_pass", shifted)
    target = tiny_llama()
    with pytest.raises(AssertionError):
        check_all_accepted(target, TruncatedLlama(target, Exit(target, 3)), SAMPLED, "coupled")


def test_verification_noise_off_by_one_position(monkeypatch):
    exact = verify.verify_coupled
    monkeypatch.setattr(verify, "verify_coupled", lambda p, drafted, noise, positions: exact(p, drafted, noise, positions + 1))
    target = tiny_llama()
    with pytest.raises(AssertionError):
        check_same_text(target, noisy_exit(target, 2), SAMPLED, "coupled")


def test_target_stepped_once_per_token(monkeypatch):
    """A verification that calls the target token by token is exact but pointless: the call count shows it."""
    whole = kv_cache.CachedModel.forward
    monkeypatch.setattr(kv_cache.CachedModel, "forward", lambda self, tokens: torch.cat([whole(self, token[None]) for token in tokens]))
    with pytest.raises(AssertionError):
        check_law(SAMPLED, "rejection", tokens=200)
