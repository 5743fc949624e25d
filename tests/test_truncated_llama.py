"""Exits and the models around them: equal to the target where they should be, saved alone, refused where they don't fit."""

import json
import re

from running.command_line import UserError

import pytest
import torch
from safetensors.torch import save_file

from models.target_model import Target, tokenizer_hash, weights_hash
from toy_models import noisy_exit, some_batch, tiny_llama
from truncated_llama import Exit, ExitForm, ExitInfo, ExitKind, TruncatedLlama, find_checkpoints, load_exit, read_exit_info, save_exit
from tuned_llama import Objective, TunedLlama


@pytest.fixture
def target(tokenizer):
    return Target(tiny_llama(vocab_size=len(tokenizer)).float(), tokenizer, "tiny")


def info_for(target, exit_, **changes):
    facts = {"target_hash": weights_hash(target.model), "tokenizer_hash": tokenizer_hash(target.tokenizer), "target_name": "tiny"}
    return ExitInfo(target_layer=exit_.target_layer, kind=ExitKind(exit_.form, ("head",)), **{**facts, **changes})


@pytest.mark.parametrize("own_block", [False, True])
def test_untuned_exit_at_the_last_layer_is_the_target(own_block):
    model = tiny_llama()
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    truncated = TruncatedLlama(model, Exit(model, 3, ExitForm("last" if own_block else "none")))
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


def test_training_moves_the_exit_and_not_one_byte_of_the_target():
    """Llama-3.2 ties head and embeddings: a head that is not its own tensor would drag the input embedding along."""
    model = tiny_llama().float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exit_ = Exit(model, 1, ExitForm("last"))
    head_before = exit_.head.weight.clone()
    tuned = TunedLlama(model, [exit_.requires_grad_(True)])
    assert {id(p) for p in tuned.parameters()} == {id(p) for p in exit_.parameters()}
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    for _ in range(3):
        tuned.learn(some_batch(), [Objective()], 1.0)
        optimizer.step()
    assert not torch.equal(exit_.head.weight, head_before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_cost_ratio_counts_blocks_and_head():
    model = tiny_llama()
    block, head = (sum(p.numel() for p in m.parameters()) for m in (model.model.layers[0], model.lm_head))
    expected = (2 * block + head + 32) / (4 * block + head + 32)
    assert Exit(model, 1).cost_ratio(model) == pytest.approx(expected)
    assert Exit(model, 1, ExitForm("last")).cost_ratio(model) == pytest.approx(expected)
    assert Exit(model, 1).float().cost_ratio(model) == pytest.approx(expected)  # stored in fp32, run in the target's dtype


@pytest.mark.parametrize("own_block", [False, True])
def test_checkpoint_round_trip(target, tmp_path, own_block):
    exit_ = noisy_exit(target.model, 1, own_block).exit
    path = tmp_path / "model.safetensors"
    save_exit(path, exit_, info_for(target, exit_, step=7, losses={"kl": 0.5}))
    loaded, info = load_exit(path, target)
    assert info.step == 7 and str(info.kind) == "head" and info.losses == {"kl": 0.5}
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


KINDS = ["head", "rank8", "translator", "last_block", "head+last_block", "full_block", "rank8+full_block", "attention_block", "translator+attention_block",
         "head+vocab20", "rank8+vocab20", "translator+vocab20", "last_block+vocab20"]


@pytest.mark.parametrize("name", KINDS)
def test_kinds_are_saved_by_their_own_tensors_and_loaded_as_they_were(target, tmp_path, name):
    kind = ExitKind.parse(name)
    assert str(kind) == name
    exit_ = Exit(target.model, 1, kind.form)
    if kind.draft_vocab:
        exit_ = exit_.trimmed(torch.arange(3, 3 + kind.draft_vocab))
    if kind.shares_output:
        exit_.share_output(target.model)
    for number, parameter in enumerate(exit_.own_parameters().values()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    path = tmp_path / "exit.safetensors"
    save_exit(path, exit_, ExitInfo(1, kind, "tiny", weights_hash(target.model), tokenizer_hash(target.tokenizer)))
    loaded, info = load_exit(path, target)
    assert info.kind == kind and loaded.form == kind.form and loaded.prefix == (1 if "last" in name else 2)
    ids = torch.arange(20)[None]
    wanted, found = (TruncatedLlama(target.model, one)(ids, use_cache=False).logits for one in (exit_, loaded))
    assert torch.equal(wanted, found) and torch.isfinite(found).sum(-1).unique().tolist() == [kind.draft_vocab or target.model.config.vocab_size]
    frozen_output = kind.shares_output and kind.draft_vocab is None
    assert (loaded.output.weight is target.model.lm_head.weight) == frozen_output  # and so it is not in the file either
    assert path.stat().st_size < loaded.own_bytes() + 8 * (kind.draft_vocab or 0) + 4096


@pytest.mark.parametrize("name", ["full_block", "attention_block", "translator", "translator+full_block"])
def test_added_parts_begin_as_the_identity(name):
    model = tiny_llama()
    ids = torch.arange(30)[None]
    plain, changed = (TruncatedLlama(model, Exit(model, 1, form))(ids, use_cache=False).logits for form in (ExitForm(), ExitKind.parse(name).form))
    assert torch.equal(plain, changed)


def test_a_low_rank_head_is_the_best_of_its_rank():
    model = tiny_llama()
    head = model.lm_head.weight.detach()
    into, out = Exit(model, 1, ExitForm(head_rank=8)).head
    singular = torch.linalg.svdvals(head)
    assert float((out.weight @ into.weight - head).norm()) == pytest.approx(float(singular[8:].norm()), rel=1e-9)


def test_bytes_of_kinds():
    """c counts what a step reads, shared or not; bytes of its own what the exit adds."""
    model = tiny_llama()
    block, head, norm = (sum(p.nbytes for p in m.parameters()) for m in (model.model.layers[0], model.lm_head, model.model.norm))
    attention = sum(p.nbytes for p in model.model.layers[0].self_attn.parameters()) + 2 * norm
    size, vocab, width = head // model.config.vocab_size // 32, model.config.vocab_size, model.config.hidden_size
    whole, number = 4 * block + head + norm, head // (vocab * width)
    assert size == number
    for name, read, own in (
        ("head", head + norm, head + norm), ("rank8", number * 8 * (width + vocab) + norm, number * 8 * (width + vocab) + norm),
        ("translator", number * (width + 1) * width + head + norm, number * (width + 1) * width), ("attention_block", attention + head + norm, attention),
        ("full_block", block + head + norm, block), ("head+vocab20", 20 * head // vocab + norm, 20 * head // vocab + norm),
    ):
        kind = ExitKind.parse(name)
        exit_ = Exit(model, 1, kind.form)
        exit_ = exit_.trimmed(torch.arange(20)) if kind.draft_vocab else exit_
        exit_ = exit_.share_output(model) if kind.shares_output else exit_
        assert exit_.own_bytes() == own and exit_.cost_ratio(model) == pytest.approx((2 * block + read) / whole), name


@pytest.mark.parametrize(("name", "said"), [
    ("", "its parts are head"), ("heads", "heads; its parts"), ("head+rank8", "head and rank8 exclude"), ("rank8+translator", "exclude each other"),
    ("last_block+full_block", "exclude each other"), ("vocab20", "nothing to train"), ("head+head", "a part stands twice"), ("rank", "its parts are"),
])
def test_kinds_that_cannot_be(name, said):
    with pytest.raises(UserError, match=re.escape(said)):
        ExitKind.parse(name)


def test_checkpoints_of_the_first_format_are_read(target, tmp_path):
    exit_ = noisy_exit(target.model, 1, own_block=True).exit
    info = {"target_layer": 1, "own_block": True, "tuned": ["last_block"], "target_name": "tiny", "target_hash": weights_hash(target.model),
            "tokenizer_hash": tokenizer_hash(target.tokenizer), "step": 3, "losses": {}, "flags": {}}
    path = tmp_path / "old.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in exit_.state_dict().items()}, path, metadata={"format": "early-exit-1", "info": json.dumps(info)})
    before = target.model.lm_head.weight.clone()
    loaded, found = load_exit(path, target)
    assert str(found.kind) == "last_block" and found.step == 3
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), exit_.state_dict().values(), strict=True))
    assert torch.equal(target.model.lm_head.weight, before)  # the file's frozen head did not go there


def test_checkpoints_are_found_by_name_and_by_glob_each_once(tmp_path, monkeypatch):
    """A name with brackets is a name where such a file lies, and a pattern where none does."""
    monkeypatch.chdir(tmp_path)
    for name in ("run[1]/a.safetensors", "run1/b.safetensors", "run2/c.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "link.safetensors").symlink_to("run2/c.safetensors")
    assert find_checkpoints(["run[1]/a.safetensors"]) == ["run[1]/a.safetensors"]
    assert find_checkpoints(["run[12]/*"]) == ["run1/b.safetensors", "run2/c.safetensors"]
    assert find_checkpoints(["run2/c.safetensors", "./run2/*", str(tmp_path / "run2/c.safetensors"), "link.safetensors"]) == ["./run2/c.safetensors"]
    with pytest.raises(UserError, match=r"no checkpoint matches run\[3\]/\*"):
        find_checkpoints(["run[3]/*"])
