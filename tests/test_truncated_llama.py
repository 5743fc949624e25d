"""Exits and the models around them: equal to the target where they should be, saved alone, refused where they don't fit."""

from command_line import UserError

import pytest
import torch

from losses import kl_divergence, learned_rows, learned_tokens, training_loss
from target_model import Target, tokenizer_hash, weights_hash
from toy_models import noisy_exit, tiny_llama
from truncated_llama import Exit, ExitInfo, TruncatedLlama, load_exit, read_exit_info, save_exit
from tuned_llama import TunedLlama


@pytest.fixture
def target(tokenizer):
    return Target(tiny_llama(vocab_size=len(tokenizer)).float(), tokenizer, "tiny")


def info_for(target, exit_, **changes):
    own_block = exit_.block is not None
    facts = {"target_hash": weights_hash(target.model), "tokenizer_hash": tokenizer_hash(target.tokenizer), "tuned": ("head",), "target_name": "tiny"}
    return ExitInfo(target_layer=exit_.target_layer, own_block=own_block, **{**facts, **changes})


@pytest.mark.parametrize("own_block", [False, True])
def test_untuned_exit_at_the_last_layer_is_the_target(own_block):
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    truncated = TruncatedLlama(model, Exit(model, 3, own_block))
    wanted = model(input_ids=ids, attention_mask=mask).logits
    found = truncated(ids, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-12)


def test_exit_matches_the_hidden_states_of_transformers():
    model = tiny_llama()
    ids = torch.arange(30)[None]
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states  # the last one is after the norm, all others before
    for layer in range(3):
        found = TruncatedLlama(model, Exit(model, layer))(ids, use_cache=False).logits
        assert torch.allclose(found, model.lm_head(model.model.norm(hidden[layer + 1])), atol=1e-12)


def test_tuned_llama_agrees_with_the_single_models():
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    exits = [noisy_exit(model, 1).exit, noisy_exit(model, 2, own_block=True).exit]
    teacher, drafts = TunedLlama(model, exits)(ids)
    assert torch.allclose(teacher, model(ids).logits, atol=1e-12)
    for exit_, draft in zip(exits, drafts, strict=True):
        assert torch.allclose(draft, TruncatedLlama(model, exit_)(ids, use_cache=False).logits, atol=1e-12)


def test_training_moves_the_exit_and_not_one_byte_of_the_target():
    """Llama-3.2 ties head and embeddings: a head that is not its own tensor would drag the input embedding along."""
    model = tiny_llama().float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exit_ = Exit(model, 1, own_block=True)
    head_before = exit_.head.weight.clone()
    tuned = TunedLlama(model, [exit_.requires_grad_(True)])
    assert {id(p) for p in tuned.parameters()} == {id(p) for p in exit_.parameters()}
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        teacher, (draft,) = tuned(ids)
        kl_divergence(teacher.flatten(0, 1), draft.flatten(0, 1)).backward()
        optimizer.step()
    assert not torch.equal(exit_.head.weight, head_before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_cost_ratio_counts_blocks_and_head():
    model = tiny_llama()
    block, head = (sum(p.numel() for p in m.parameters()) for m in (model.model.layers[0], model.lm_head))
    expected = (2 * block + head + 32) / (4 * block + head + 32)
    assert Exit(model, 1).cost_ratio(model) == pytest.approx(expected)
    assert Exit(model, 1, own_block=True).cost_ratio(model) == pytest.approx(expected)
    assert Exit(model, 1).float().cost_ratio(model) == pytest.approx(expected)  # stored in fp32, run in the target's dtype


@pytest.mark.parametrize("own_block", [False, True])
def test_checkpoint_round_trip(target, tmp_path, own_block):
    exit_ = noisy_exit(target.model, 1, own_block).exit
    path = tmp_path / "model.safetensors"
    save_exit(path, exit_, info_for(target, exit_, step=7, losses={"kl": 0.5}))
    loaded, info = load_exit(path, target)
    assert info.step == 7 and info.kind == "head" and info.losses == {"kl": 0.5}
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), exit_.state_dict().values(), strict=True))


def test_checkpoint_holds_the_exit_only(target, tmp_path):
    exit_ = Exit(target.model, 1)
    save_exit(tmp_path / "head.safetensors", exit_, info_for(target, exit_))
    assert (tmp_path / "head.safetensors").stat().st_size < exit_.own_bytes() + 4096


@pytest.mark.parametrize(
    ("change", "message"), [({"target_hash": "0"}, "belongs to another target"), ({"tokenizer_hash": "0"}, "belongs to another tokenizer")]
)
def test_checkpoint_of_another_target_is_refused(target, tmp_path, change, message):
    exit_ = Exit(target.model, 1)
    save_exit(tmp_path / "a.safetensors", exit_, info_for(target, exit_, **change))
    with pytest.raises(UserError, match=message):
        load_exit(tmp_path / "a.safetensors", target)


def test_broken_checkpoints_are_named(target, tmp_path):
    exit_ = Exit(target.model, 1)
    path = tmp_path / "a.safetensors"
    save_exit(path, exit_, info_for(target, exit_))
    whole = path.read_bytes()
    for broken in (whole[:20], whole[:-100], b"not a checkpoint", b""):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="broken"):
            load_exit(path, target)
    with pytest.raises(UserError, match="no checkpoint at"):
        read_exit_info(tmp_path / "missing.safetensors")


def test_weights_hash_survives_the_dtype_and_sees_other_weights(target):
    model = target.model.bfloat16()
    assert weights_hash(model) == weights_hash(model.float())
    assert weights_hash(tiny_llama(seed=1, vocab_size=model.config.vocab_size)) != weights_hash(model)


@pytest.mark.parametrize("layer", [-1, 4])
def test_layers_that_the_target_lacks_are_refused(layer):
    with pytest.raises(UserError, match="choose 0 to 3"):
        Exit(tiny_llama(), layer)


def test_losses_are_sums_over_learned_tokens_only():
    generator = torch.Generator().manual_seed(0)
    teacher, draft = torch.randn(2, 2, 6, 11, generator=generator)
    ids = torch.randint(0, 11, (2, 6), generator=generator)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]]).bool()
    rows_p, rows_q, tokens = learned_rows(teacher, mask), learned_rows(draft, mask), learned_tokens(ids, mask)
    kl = ce = 0.0
    for b, t in mask.nonzero().tolist():
        p, q = (x[b, t - 1].softmax(-1) for x in (teacher / 2, draft / 2))
        kl += 4 * (p * (p / q).log()).sum()
        ce -= draft[b, t - 1].log_softmax(-1)[ids[b, t]]
    assert torch.allclose(training_loss("kl_divergence", rows_p, rows_q, tokens, 2.0), kl, rtol=1e-5)
    assert torch.allclose(training_loss("cross_entropy", rows_p, rows_q, tokens, 2.0), ce, rtol=1e-5)
    assert torch.allclose(training_loss("combined", rows_p, rows_q, tokens, 2.0), kl + ce, rtol=1e-5)
