"""Models of other families: their text by every method is vanilla's, or they are refused by name."""

from running.command_line import UserError

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from decoding.dynamic_tree import DynamicTree
from decoding.growmap import Growmap
from decoding.sampling import SamplingPolicy
from decoding.static_tree import StaticTree
from engine import kv_cache
from engine.exactness import why_no_trees
from models.target_model import DeviceArgs, load_target
from speculative import DecodeOptions, generate
from toy_models import decode, tiny_llama

VOCAB, WINDOW, LIMIT = 64, 8, 32
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 256, "initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": LIMIT, "factor": 8.0,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
TREES = {"static_tree": StaticTree(Growmap((-1, 0, 0, 1, 1, 2, 3))), "dynamic_tree": DynamicTree(budget=12, depth=4)}
PROMPT = [5, 9, 33, 2, 60, 7, 21, 44, 18, 3, 50, 11]
SAMPLED = SamplingPolicy(1.0)


def made(model_class: type[PreTrainedModel], config_class: type, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(config_class(**settings)).eval().requires_grad_(False)


WINDOWED = {
    "one window": lambda: made(MistralForCausalLM, MistralConfig, **SHAPE, sliding_window=WINDOW),
    "windows in turn": lambda: made(Gemma2ForCausalLM, Gemma2Config, **SHAPE, head_dim=8, sliding_window=WINDOW),
    "windows and sinks": lambda: made(GptOssForCausalLM, GptOssConfig, **SHAPE, head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1),
    "upper blocks": lambda: made(Qwen2ForCausalLM, Qwen2Config, **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "chunks": lambda: made(Llama4ForCausalLM, Llama4TextConfig, **SHAPE, head_dim=8, attention_chunk_size=WINDOW, num_local_experts=2, intermediate_size_mlp=48),
}


def texts(target: nn.Module, method: str, **options: object) -> tuple[list[int], list[int]]:
    """Vanilla's text, and that of `method` with a draft that is often right and often wrong."""
    settings = {"policy": SAMPLED, "max_new_tokens": 20, "seed": 3}
    draft = near_copy_of(target)
    return decode(target, None, PROMPT, **settings)[0], decode(target, draft, PROMPT, method=method, **settings, **options)[0]


def near_copy_of(target: nn.Module) -> nn.Module:
    copied = type(target)(target.config).eval().requires_grad_(False)
    copied.load_state_dict({name: tensor + 0.02 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in target.state_dict().items()})
    return copied


@pytest.mark.parametrize("name", WINDOWED)
def test_windowed_attention_gives_vanillas_text_in_chains_and_trees(name):
    target = WINDOWED[name]()
    for method, options in [("speculative", {"verification": "coupled"}), *((method, {"tree": tree}) for method, tree in TREES.items())]:
        vanilla, found = texts(target, method, **options)
        assert found == vanilla


@torch.inference_mode()
def check_tree_pass(target: nn.Module) -> None:
    """Nodes fed in levels behind a root that was fed as text, and in one pass, give the logits of a pass over each path."""
    paths = [[4, 7], [4, 8], [6, 9]]
    wanted = torch.stack([target(input_ids=torch.tensor([PROMPT + path])).logits[0, -1] for path in paths])
    tokens, depths = torch.tensor([4, 6, 7, 8, 9]), torch.tensor([1, 1, 2, 2, 2])
    visible = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1]]).bool()
    for passes in ([(0, 2), (2, 5)], [(0, 5)]):
        cached = kv_cache.CachedModel(target)
        cached.prefill([PROMPT[:-1]])
        starts = cached.starts()
        cached.append(torch.tensor([PROMPT[-1:]]))
        for first, last in passes:
            logits = cached.forward_tree(tokens[first:last], starts, depths[first:last], visible[first:last, : last + 1])
        assert torch.allclose(logits[-3:], wanted, atol=1e-4)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_tree_pass_sees_what_a_pass_over_each_path_sees(name):
    check_tree_pass(WINDOWED[name]())


@pytest.mark.parametrize("name", WINDOWED)
def test_that_check_finds_a_mask_without_windows(name, monkeypatch):
    def without_windows(config, seen, positions, keys, dtype):
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
        return dict.fromkeys(config.layer_types, mask) if getattr(config, "layer_types", None) else mask

    monkeypatch.setattr(kv_cache, "tree_masks", without_windows)
    with pytest.raises(AssertionError):
        check_tree_pass(WINDOWED[name]())


def test_the_texts_find_it_too(monkeypatch):
    monkeypatch.setattr(kv_cache, "tree_masks", lambda config, seen, positions, keys, dtype: torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[None, None])
    vanilla, found = texts(WINDOWED["one window"](), "dynamic_tree", tree=TREES["dynamic_tree"])
    assert found != vanilla


# ---- what cannot be exact ----

STATEFUL = {
    "linear_attention": lambda: made(MambaForCausalLM, MambaConfig, **SMALL, state_size=4),
    "linear_attention ": lambda: made(Mamba2ForCausalLM, Mamba2Config, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=16, n_groups=1),
    "conv": lambda: made(Lfm2ForCausalLM, Lfm2Config, **SHAPE, layer_types=["conv", "full_attention"]),
    "recurrent": lambda: made(RwkvForCausalLM, RwkvConfig, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
}


@pytest.mark.parametrize("reason", STATEFUL)
def test_models_with_a_state_are_refused_by_name(reason, tmp_path, tokenizer):
    model = STATEFUL[reason]()
    for target, draft in ((model, None), (tiny_llama(), model)):
        with pytest.raises(ValueError, match=f"cannot be decoded here: it has {reason.strip()} layers"):
            decode(target, draft, [1, 2, 3])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{model.config.model_type} model with {reason.strip()} layers"):
        load_target(str(tmp_path), DeviceArgs(device="cpu"), families=None)


def test_encoders_are_refused_by_name():
    encoder, decoder = (made(BertLMHeadModel, BertConfig, **{**SHAPE, "is_decoder": is_decoder}) for is_decoder in (False, True))
    with pytest.raises(ValueError, match="attention to later tokens"):
        decode(encoder, None, [1, 2, 3])
    assert len(decode(decoder, None, [1, 2, 3], max_new_tokens=4)[0]) == 4


@pytest.mark.parametrize(("model_class", "settings"), [
    (BloomForCausalLM, {"config_class": BloomConfig, "vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}),
    (GPTNeoForCausalLM, {"config_class": GPTNeoConfig, "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": WINDOW,
                         "attention_types": [[["global", "local"], 1]], "initializer_range": 0.4}),
])
def test_models_with_masks_of_their_own_decode_chains_and_refuse_trees(model_class, settings):
    target = made(model_class, **settings)
    vanilla, found = texts(target, "speculative", verification="coupled")
    assert found == vanilla
    with pytest.raises(ValueError, match=f"no trees .*{model_class.__name__} makes masks and positions of its own"):
        texts(target, "dynamic_tree")


def test_trees_need_an_attention_that_takes_masks():
    target = WINDOWED["one window"]()
    target.config._attn_implementation = "flash_attention_2"
    assert why_no_trees(target) == "attention by flash_attention_2 takes no mask; choose sdpa"


# ---- rotary frequencies that depend on the pass ----

def test_longrope_is_transformers_stepwise_whatever_the_passes():
    """StaticLlama has a table: text across the limit is transformers' own, and every method's is vanilla's."""
    target = tiny_llama(rope_parameters=LONGROPE)
    prompt = [1 + i % 50 for i in range(LIMIT - 4)]
    ids = torch.tensor([prompt])
    wanted = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()
    settings = {"max_new_tokens": 16}
    draft = tiny_llama(seed=4, rope_parameters=LONGROPE)
    assert decode(target, None, prompt, **settings)[0] == wanted
    for options in ({"verification": "coupled"}, *({"method": method, "tree": tree} for method, tree in TREES.items())):
        assert decode(target, draft, prompt, **settings, **options)[0] == wanted


CHANGING = {
    "longrope": lambda: (made(Phi3ForCausalLM, Phi3Config, **SHAPE, original_max_position_embeddings=LIMIT, rope_parameters=LONGROPE), {}),
    "dynamic": lambda: (made(Qwen2ForCausalLM, Qwen2Config, **{**SHAPE, "max_position_embeddings": LIMIT}, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), {}),
    "longrope of a Llama": lambda: (tiny_llama(rope_parameters=LONGROPE), {"engine": "transformers"}),
}


@pytest.mark.parametrize("name", CHANGING)
def test_texts_within_which_frequencies_change_are_refused(name):
    target, settings = CHANGING[name]()
    across = {"max_new_tokens": LIMIT - len(PROMPT) + 1, **settings}
    for draft, options in ((None, {}), (target, {"verification": "coupled"}), (target, {"method": "dynamic_tree"}), (target, {"method": "hf_assisted"})):
        with pytest.raises(ValueError, match=f"rotary embeddings of type '{name.split()[0]}' change at {LIMIT} tokens"):
            decode(target, draft, PROMPT, **across, **options)
    assert decode(target, None, PROMPT, method="hf_generate", max_new_tokens=LIMIT)[0]
    for prompt, count in ((PROMPT, LIMIT - len(PROMPT) - 4), (PROMPT * 3, 12)):
        if name == "dynamic" and prompt is not PROMPT:
            continue
        within = {"max_new_tokens": count, **settings}
        assert decode(target, target, prompt, verification="coupled", gamma=4, **within)[0] == decode(target, None, prompt, **within)[0]


def test_a_context_without_positions_has_no_limit():
    target = made(BloomForCausalLM, BloomConfig, vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)
    assert len(generate(target, [1, 2], DecodeOptions(max_new_tokens=3)).tokens) == 3
