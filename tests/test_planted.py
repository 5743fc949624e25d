"""Planted pairs: random weights, but an acceptance that was asked for, and text that decoding can be measured on."""

from functools import cache

from running.command_line import UserError

import pytest
import torch
from transformers import LlamaConfig

from decoding.sampling import SamplingPolicy
from models.planted import ENTROPY, TOLERANCE, PlantedPair, planted_pair
from speculative import DecodeOptions, generate_batch
from toy_models import check_all_accepted, check_same_text, decode

GREEDY, SAMPLED = SamplingPolicy(0.0), SamplingPolicy(0.7, top_p=0.95)
VOCAB = 256
CONFIG = LlamaConfig(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=512, tie_word_embeddings=True,
)


@cache
def pair(alpha: float = 0.8, policy: SamplingPolicy = SAMPLED, verification: str = "rejection", **options: object) -> PlantedPair:
    return planted_pair(CONFIG, 1, alpha, policy, verification, **options)


def generations(planted: PlantedPair, policy: SamplingPolicy, method: str = "vanilla", verification: str = "rejection"):
    """32 generations of 64 tokens, behind prompts that planting did not use."""
    prompts = torch.randint(VOCAB, (32, 5), generator=torch.Generator().manual_seed(99)).tolist()
    options = DecodeOptions(method, policy, gamma=3, verification=verification, max_new_tokens=64)
    return generate_batch(planted.model, prompts, options, None if method == "vanilla" else planted.draft)


@pytest.mark.parametrize("alpha", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(("policy", "verification"), [(GREEDY, "rejection"), (SAMPLED, "rejection"), (SAMPLED, "coupled")])
def test_decoding_accepts_what_was_planted(alpha, policy, verification):
    """About 2000 tested positions: 0.06 is TOLERANCE and three to four standard errors."""
    planted = pair(alpha, policy, verification)
    assert abs(planted.alpha - alpha) <= TOLERANCE
    rounds = [r for generation in generations(planted, policy, "self_speculative", verification) for r in generation.stats.rounds]
    tested = sum(r.tested for r in rounds)
    assert tested > 1500
    assert abs(sum(r.accepted for r in rounds) / tested - alpha) < 0.06


@pytest.mark.parametrize(("policy", "verification"), [(GREEDY, "rejection"), (SAMPLED, "rejection"), (SAMPLED, "coupled")])
def test_at_alpha_1_the_exit_is_the_target(policy, verification):
    planted = pair(1.0, policy, verification)
    assert planted.scale == 0 and planted.alpha == pytest.approx(1, abs=1e-5)
    check_all_accepted(planted.model, planted.draft, policy, verification, method="self_speculative")


def test_distributions_are_as_peaked_as_a_chat_models():
    planted = pair()
    texts = torch.tensor([generation.tokens for generation in generations(planted, SamplingPolicy(1.0))])
    log_probs = planted.model(texts).logits[:, :-1].log_softmax(-1)
    assert -(log_probs.exp() * log_probs).sum(-1).mean().item() == pytest.approx(ENTROPY, abs=0.3)


@pytest.mark.parametrize("policy", [GREEDY, SAMPLED])
def test_text_neither_loops_nor_stays_on_one_token(policy):
    """Random models tend to: with query and key gains of 1 instead of 3, a quarter of the greedy 4-grams are repetitions, and more."""
    texts = [generation.tokens for generation in generations(pair(policy=policy), policy)]
    grams = [[tuple(text[i : i + 4]) for i in range(len(text) - 3)] for text in texts]
    assert sum(len(set(text)) for text in grams) > 0.9 * sum(map(len, grams))
    tokens = torch.tensor(texts).flatten()
    assert tokens.bincount().max() < 0.2 * len(tokens)


def test_common_tokens_have_low_ids():
    tokens = torch.cat([torch.tensor(generation.tokens) for generation in generations(pair(), SamplingPolicy(1.0))])
    quarters = torch.tensor([(tokens // (VOCAB // 4) == i).float().mean() for i in range(4)])
    assert quarters[0] > 0.6 and (quarters.diff() < 0).all()


def test_equal_arguments_give_equal_weights():
    first, second, other = (planted_pair(CONFIG, 1, 0.8, GREEDY, seed=seed).draft.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["target.model.layers.0.mlp.up_proj.weight"], other["target.model.layers.0.mlp.up_proj.weight"])


def test_weights_have_the_shapes_and_dtype_of_a_real_model():
    planted = pair(dtype=torch.bfloat16)
    assert abs(planted.alpha - 0.8) <= TOLERANCE
    assert {parameter.dtype for parameter in planted.draft.parameters()} == {torch.bfloat16}
    assert planted.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert planted.model.lm_head.weight is planted.model.model.embed_tokens.weight
    assert torch.equal(planted.draft.exit.head.weight, planted.model.lm_head.weight)
    assert planted.draft.exit.head.weight.data_ptr() != planted.model.lm_head.weight.data_ptr()


def test_untied_heads_are_planted_too():
    config = LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": False, "attention_bias": True})
    planted = planted_pair(config, 3, 0.8, SAMPLED)
    assert planted.model.lm_head.weight is not planted.model.model.embed_tokens.weight
    assert abs(planted.alpha - 0.8) <= TOLERANCE


def test_transformers_sees_the_scaled_weights_that_the_engine_runs():
    planted = pair(policy=GREEDY)
    tokens, stats = decode(planted.model, planted.draft, [7, 3], method="self_speculative", max_new_tokens=40)
    assert tokens == decode(planted.model, None, [7, 3], engine="transformers", max_new_tokens=40)[0]
    assert 0 < sum(r.accepted for r in stats.rounds) < sum(r.proposed for r in stats.rounds)


def test_exit_with_a_part_of_the_vocabulary():
    planted = pair(verification="coupled", draft_vocab_size=128)
    exit_ = planted.draft.exit
    assert abs(planted.alpha - 0.8) <= TOLERANCE
    assert torch.equal(exit_.head.weight, planted.model.lm_head.weight[exit_.token_ids])
    texts = torch.tensor([generation.tokens for generation in generations(planted, SAMPLED)])
    assert torch.isin(texts, exit_.token_ids).float().mean() > 0.7
    for policy, verification in ((SAMPLED, "coupled"), (GREEDY, "rejection")):
        check_same_text(planted.model, planted.draft, policy, verification, method="self_speculative")


@pytest.mark.parametrize(
    ("layer", "alpha", "options", "message"),
    [
        (1, 0.0, {}, "alpha 0.0"),
        (1, 1.5, {}, "alpha 1.5"),
        (6, 0.8, {}, "choose 0 to 5"),
        (-1, 0.8, {}, "choose 0 to 5"),
        (1, 0.8, {"draft_vocab_size": 24}, "multiple of 16"),
        (1, 0.8, {"draft_vocab_size": VOCAB + 16}, "vocabulary of 256"),
        (1, 0.05, {"policy": SamplingPolicy(3.0)}, r"choose one from 0\.\d\d to 1\.00"),  # so flat that unrelated models overlap
        (5, 0.5, {}, "choose one from 1.00 to 1.00"),
        (1, 0.9, {"draft_vocab_size": 16}, r"knows 16 tokens: choose one from 0\.\d\d to 0\.\d\d"),
        (1, 1.0, {"draft_vocab_size": 16}, "leave it all tokens"),
    ],
)
def test_what_cannot_be_planted_is_refused(layer, alpha, options, message):
    with pytest.raises(UserError, match=message):
        planted_pair(CONFIG, layer, alpha, **{"policy": SAMPLED, **options})
