"""Loading a target: a checkpoint whose tensors, configuration or tokenizer do not go together is refused by name."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from running.command_line import UserError

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from commands.pretrain_draft_model import Args, make_model
from data_utils import EncodeOptions, encode_example
from models.llava_target import load_llava_config
from models.target_model import ASSETS, DeviceArgs, load_config, load_target
from toy_models import tiny_llama

CPU = DeviceArgs(device="cpu")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """A Llama of 4 blocks with its own head."""
    tiny_llama(vocab_size=len(tokenizer), tie_word_embeddings=False).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


TENSORS = {
    "a tensor is gone": (lambda tensors: tensors.pop(UP), f"lacks 1 tensors of its configuration, such as {UP}"),
    "the head is gone": (lambda tensors: tensors.pop("lm_head.weight"), r"such as lm_head.weight; .*tie_word_embeddings"),
    "a wrong shape": (lambda tensors: tensors.update({UP: tensors[UP][:8].clone()}), rf"{UP} is \(8, 32\), its configuration asks for \(64, 32\)"),
    "a bias": (lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "no place for, such as model.layers.0.self_attn.q_proj.bias"),
}
CONFIGS = {
    "more layers": (lambda config: config.update(num_hidden_layers=6), r"lacks 18 tensors .*model.layers.4.*num_hidden_layers"),
    "fewer layers": (lambda config: config.update(num_hidden_layers=2), r"has 18 tensors .*model.layers.2.*num_hidden_layers"),
    "no intermediate_size": (lambda config: config.pop("intermediate_size"), r"down_proj.weight is \(32, 64\), its configuration asks for \(32, 11008\)"),
    "no num_key_value_heads": (lambda config: config.pop("num_key_value_heads"), r"k_proj.weight is \(16, 32\), its configuration asks for \(32, 32\)"),
    "a larger vocabulary": (lambda config: config.update(vocab_size=400), r"asks for \(400, 32\)"),
    "unknown frequencies": (lambda config: config.update(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "its config.json has rope_type 'spiral'"),
    "incomplete frequencies": (lambda config: config.update(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "no model at .*'factor'"),
    "an unknown activation": (lambda config: config.update(hidden_act="zzz"), "its config.json has hidden_act 'zzz'"),
    "no key-value heads": (lambda config: config.update(num_key_value_heads=0), "its config.json has num_key_value_heads 0"),
    "fewer layers than none": (lambda config: config.update(num_hidden_layers=-1), "its config.json has num_hidden_layers -1"),
    "a wrong type": (lambda config: config.update(hidden_size="wide"), "no model at"),
}


@pytest.mark.parametrize(
    ("change_part", "change", "message"),
    [pytest.param(part, *case, id=name) for part, cases in ((change_tensors, TENSORS), (change_config, CONFIGS)) for name, case in cases.items()],
)
def test_tensors_and_configurations_that_do_not_go_together_are_named(change_part, change, message, folder):
    change_part(folder, change)
    with pytest.raises(UserError, match=message):
        load_target(str(folder), CPU)


def test_every_shape_of_the_suite_is_one_and_those_inside_llavas_are_looked_at(tmp_path):
    for path in (ASSETS / "configs").glob("*.json"):
        load_config(str(path), None)
    folder = Path(shutil.copytree(ASSETS / "shapes-llava", tmp_path / "llava"))
    change_config(folder, lambda config: config["text_config"]["rope_parameters"].update(rope_type="zigzag"))
    with pytest.raises(UserError, match="its config.json has rope_type 'zigzag'"):
        load_llava_config(str(folder))


def test_tied_heads_and_computed_buffers_are_no_complaint(folder):
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight") is None or tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    change_config(folder, lambda config: config.update(tie_word_embeddings=True))
    model = load_target(str(folder), CPU).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_pretraining_may_leave_blocks_out_but_draws_none_anew(folder, tokenizer):
    args = {"output_dir": "unused", "dataset": ["slim_pj"], "init_from": str(folder)}
    assert len(make_model(Args(**args, init="first_blocks", num_hidden_layers=2), tokenizer, "sdpa").model.layers) == 2
    change_tensors(folder, lambda tensors: tensors.pop(UP))
    for init, layers in (("checkpoint", 4), ("first_blocks", 2)):
        with pytest.raises(UserError, match=UP):
            make_model(Args(**args, init=init, num_hidden_layers=layers), tokenizer, "sdpa")


@pytest.mark.parametrize(("config", "reason"), [(T5Config(), "t5 model, which is no causal language model")])
def test_models_that_write_no_text_are_named(config, reason, tmp_path, tokenizer):
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason):
        load_target(str(tmp_path), CPU, families=None)


# ---- token ids ----

def test_a_padding_token_needs_no_embedding(folder, tokenizer):
    """Llama 2's usual [PAD] has the first id beyond the matrix; padded batches are what they are with any other."""
    example = {"messages": [{"role": "user", "content": "Show me"}, {"role": "assistant", "content": "an example, please."}]}
    longer = {"messages": [*example["messages"], {"role": "user", "content": "What?"}, {"role": "assistant", "content": "It adds two numbers."}]}
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    target = load_target(str(folder), CPU)
    assert target.tokenizer.pad_token_id == target.model.config.vocab_size
    batch = EncodeOptions(target.tokenizer).collate([encode_example(target.tokenizer, each) for each in (example, longer)])
    logits = target.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = target.model(input_ids=batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())]).logits
    assert torch.allclose(logits[:1, : alone.shape[1]], alone, atol=1e-5)


def test_other_tokens_beyond_the_embedding_are_named_with_both_sizes(folder, tokenizer):
    size, tokenizer = len(tokenizer), copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"'<\|tool\|>' is token {size} of its tokenizer, but its embedding has {size} rows"):
        load_target(str(folder), CPU)


def test_an_embedding_with_rows_to_spare_is_no_complaint(tmp_path, tokenizer):
    tiny_llama(vocab_size=len(tokenizer) + 12).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_target(str(tmp_path), CPU).model.config.vocab_size == len(tokenizer) + 12
