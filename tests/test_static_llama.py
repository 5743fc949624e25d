"""The engine's own forward pass is transformers': every Llama, every way to cut a text into passes, both code paths."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import speculative
from decoding.sampling import Noise, SamplingPolicy
from decoding.state import DecodeState
from engine import native, static_llama
from engine.programs import Programs
from engine.shared_exit import SharedExit
from engine.static_llama import PREFILL_CHUNK, Head, Scatter, StaticLlama, why_unsupported
from speculative import DecodeOptions, generate, generate_batch
from toy_models import (
    check_batch,
    check_logits,
    decode,
    native_llama,
    near,
    noisy_exit,
    pass_logits,
    random_text,
    same_layers,
    some_batch,
    some_prompts,
    tiny_llama,
)
from truncated_llama import Exit, ExitForm, TruncatedLlama
from tuned_llama import Objective, TunedLlama

GREEDY, SAMPLED = SamplingPolicy(0.0), SamplingPolicy(1.0)


def rope(rope_type: str, **settings: float) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **settings}}


LLAMAS = {
    "gqa, tied, llama3": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention bias only": {"attention_bias": True},
    "default rope": rope("default"),
    "linear rope": rope("linear", factor=2.0),
    "dynamic rope": rope("dynamic", factor=2.0),
    "yarn rope": {**rope("yarn", factor=4.0, original_max_position_embeddings=128), "max_position_embeddings": 512},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "heads of 10": {"hidden_size": 40},
    "odd vocabulary": {"vocab_size": 61},
    "odd vocabulary, untied": {"vocab_size": 61, "tie_word_embeddings": False},
    "odd mlp": {"intermediate_size": 91},
    "five heads to one": {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1},
    "seven heads": {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 7, "intermediate_size": 208, "vocab_size": 80},
}


def llama(name: str = "gqa, tied, llama3", **more: object) -> LlamaForCausalLM:
    """One of LLAMAS in fp32, with biases that are not 0."""
    model = native_llama(**{**LLAMAS[name], **more})
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(params=["cpp", "torch"])
def path(request, monkeypatch) -> str:
    """Run the test through the C++ blocks and through torch."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    return request.param


# ---- logits ----

@pytest.mark.parametrize("name", LLAMAS)
def test_logits_are_transformers(name, path):
    for number, dtype in enumerate((torch.float32, torch.float64)):
        widths = (torch.randperm(24, generator=torch.Generator().manual_seed(number))[:14] + 1).tolist()
        check_logits(llama(name).to(dtype), widths, length=200)


def test_cpp_runs_what_it_can():
    """The parameters above reach the C++ blocks: those with sizes of 16, in fp32."""
    served = {name for name in LLAMAS if StaticLlama(llama(name), 8).stack._native is not None}
    assert served == LLAMAS.keys() - {"narrow heads", "heads of 10", "odd mlp"}
    assert StaticLlama(llama().double(), 8).stack._native is None


def test_passes_of_every_width(path):
    check_logits(llama(max_position_embeddings=4096), list(range(1, 71)), length=2485)


def test_prompts_longer_than_a_prefill_pass(path):
    model = llama(max_position_embeddings=2048)
    text = random_text(2 * PREFILL_CHUNK + 77)
    engine = StaticLlama(model, text.shape[1])
    with torch.inference_mode():
        engine.prefill([text[0, :-3].tolist()])
        found = engine.append(text[:, -3:])
        assert near(found, model(text, logits_to_keep=3).logits)


def test_positions_beyond_8192(path):
    """Llama-3's scaling is 0 off at position 0 and grows: a forgotten factor shows late."""
    settings = rope("llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    settings["rope_parameters"]["rope_theta"] = 500_000.0
    model = llama(max_position_embeddings=131_072, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, **settings)
    text = random_text(9000)
    engine = StaticLlama(model, 9000)
    with torch.inference_mode():
        engine.prefill([text[0, :-9].tolist()])
        found = torch.cat([engine.append(text[:, -9:-8]), engine.append(text[:, -8:])], 1)
        assert near(found, model(text, logits_to_keep=9).logits)


@pytest.mark.parametrize("prompt_length", [40, 63, 64, 65, 90])
def test_dynamic_ntk_beyond_its_length_is_transformers_stepwise(path, prompt_length):
    """transformers rotates a prompt by its own length and each later token by the length that it reaches."""
    settings = {**rope("dynamic", factor=3.0), "max_position_embeddings": 64}
    model, text = llama(**settings), random_text(110)
    with torch.inference_mode():
        wanted = model(text[:, :prompt_length], use_cache=True)
        logits, cache = [wanted.logits], wanted.past_key_values
        for i in range(prompt_length, text.shape[1]):
            logits.append(model(text[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
        engine = StaticLlama(llama(**settings), 110)
        for widths in ([1] * 20, [7, 2, 9]):
            engine.start([prompt_length])
            engine.prefill([text[0, : prompt_length - 1].tolist()])
            found = [engine.append(piece).clone() for piece in text[:, prompt_length - 1 :].split(widths + [111 - prompt_length - sum(widths)], 1)]
            assert near(torch.cat(found, 1), torch.cat(logits, 1)[:, prompt_length - 1 :])


@pytest.mark.parametrize("name", ["gqa, tied, llama3", "mha", "untied", "biases", "odd vocabulary"])
def test_bf16_is_as_near_to_fp32_as_transformers_is(name, path):
    """Root mean square of the error of all logits, at most 1.1 times that of transformers' own bf16 passes of the same widths: torch's narrow ones are less exact on some CPUs."""
    exact, widths = llama(name), [1, 30, 2, 9, 1, 1, 5]
    text, model = random_text(120, exact.config.vocab_size), llama(name).bfloat16()
    with torch.inference_mode():
        wanted, cache = exact.bfloat16().float()(text).logits, DynamicCache(config=model.config)
        found = pass_logits(StaticLlama(model, 120), text, widths)
        usual = torch.cat([model(piece, past_key_values=cache).logits for piece in text.split([*widths, 120 - sum(widths)], 1)], 1)
        error, usual_error = ((logits.float() - wanted).square().mean().sqrt() for logits in (found, usual))
    assert error < 1.1 * usual_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gqa, tied, llama3", "mha", "biases", "five heads to one", "seven heads"])
def test_a_row_gets_the_same_bits_in_passes_of_any_width(name, dtype):
    text = random_text(64)
    engine = StaticLlama(llama(name).to(dtype), 64)
    alone = pass_logits(engine, text, [1] * 64)
    for width in (2, 3, 5, 9, 17, 31):
        if width <= native.UP_TO[dtype]:
            assert torch.equal(pass_logits(engine, text, [width] * (64 // width)), alone)


def test_bits_do_not_depend_on_the_number_of_threads():
    text = random_text(40)
    engine, threads = StaticLlama(llama(), 40), torch.get_num_threads()
    alone = pass_logits(engine, text, [1] * 40)
    try:
        torch.set_num_threads(2)
        assert torch.equal(pass_logits(engine, text, [3] * 13), alone)
    finally:
        torch.set_num_threads(threads)


# ---- several texts, and places on the device ----

def on_device(model: LlamaForCausalLM, capacity: int, batch: int = 1) -> StaticLlama:
    """An engine whose places are tensors, as on CUDA."""
    engine = StaticLlama(model, capacity, batch)
    engine.on_host = False
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scatter_is_span(path, dtype):
    model, text = llama().to(dtype), random_text(300)
    on_host = pass_logits(StaticLlama(model, 300), text, [31, 1, 2, 60])
    scattered = pass_logits(on_device(model, 300), text, [31, 1, 2, 60] + [64] * 3)
    assert near(scattered, on_host, 1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_a_batch_are_texts_alone(path, dtype):
    """Lengths from 0 to 300 tokens, prefilled in rows of one cache, then fed together."""
    model = llama().to(dtype)
    lengths, more = [0, 1, 33, 300, 17], random_text(12)
    texts = [random_text(length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    engine = StaticLlama(model, 320, len(texts))
    with torch.inference_mode():
        engine.prefill(texts)
        found = torch.cat([engine.append(piece.expand(len(texts), -1)).clone() for piece in more.split([1, 4, 7], 1)], 1)
        assert engine.lengths == [length + 12 for length in lengths]
        for row, text in enumerate(texts):
            wanted = model(torch.tensor([text + more[0].tolist()]), logits_to_keep=12)
            assert near(found[row], wanted.logits[0])
            assert same_layers(engine.layers(row), [(layer.keys, layer.values) for layer in wanted.past_key_values.layers])


def test_what_an_earlier_text_left_in_the_cache_is_not_seen(path):
    """NaN under a mask is still NaN: a text whose numbers overflowed must not spoil those that follow."""
    model, text = llama(), random_text(40)
    for make in (StaticLlama, on_device):
        engine = make(model, 300)
        wanted = pass_logits(engine, text, [31, 1])
        for left in (7.0, torch.nan):
            engine.cache.store.fill_(left)
            assert torch.equal(pass_logits(engine, text, [31, 1]), wanted)


class CheckedPrograms(Programs):
    """Plain calls, which must do the same work in the same memory where key and input shapes are equal: a CUDA graph would."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.work: dict = {}

    def another(self) -> CheckedPrograms:
        return CheckedPrograms(self._device)

    def __call__(self, key, function, *inputs):
        places: list[tuple] = []

        class Recorded(Scatter):
            def __init__(self, rotary, positions, reach):
                super().__init__(rotary, positions, reach)
                places.append((tuple(positions.shape), reach, rotary.cos.data_ptr(), rotary.sin.data_ptr()))

            def view(self, cache):
                places.append(cache.store.data_ptr())
                return super().view(cache)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(static_llama, "Scatter", Recorded)
            found = function(*inputs)
        whole = (key, *((tuple(tensor.shape), tensor.dtype) for tensor in inputs))
        assert self.work.setdefault(whole, places) == places, f"{key} names not all that the work depends on"
        return found


@pytest.mark.parametrize("name", ["gqa, tied, llama3", "dynamic rope"])
@pytest.mark.parametrize("method", ["vanilla", "speculative", "self_speculative"])
def test_what_a_graph_would_replay_is_the_same_work(monkeypatch, method, name):
    """On CUDA a step is captured once per key; a slot limit or a table that the key does not name would be the first call's for ever."""
    monkeypatch.setattr(static_llama, "Programs", CheckedPrograms)
    check_replays(method, name)
    monkeypatch.setattr(DecodeState, "program", lambda state, programs, key, function, *inputs: programs(
        (key, state.policy), lambda *tensors: function(*tensors[:-1], Noise(tensors[-1])), *inputs, state.noise.key))
    with pytest.raises(AssertionError, match="names not all that the work depends on"):
        check_replays(method, name)


def check_replays(method: str, name: str) -> None:
    """Decode batches of texts that cross REACH_STEP, with one engine after another text's."""
    settings = {"max_position_embeddings": 64} if name == "dynamic rope" else {}
    target = llama(name, **settings)
    draft = None if method == "vanilla" else noisy_exit(target, 2, own_block=True)
    options = DecodeOptions(method=method, policy=SAMPLED, gamma=3, max_new_tokens=24)
    for lengths in ((420, 3), (180, 30), (185, 181), (60, 189)):
        prompts = [random_text(length, seed=length)[0].tolist() for length in lengths]
        generate_batch(target, prompts, options, draft)


# ---- trees ----

def random_tree(nodes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Depths (N,) and who sees whom (N, N), each node its ancestors and itself, for parents drawn from all before and the text."""
    parents = [int(torch.randint(-1, i, (1,), generator=generator)) for i in range(nodes)]
    depths, visible = torch.zeros(nodes, dtype=torch.int64), torch.eye(nodes, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            visible[node] |= visible[parent]
    return depths, visible


@pytest.mark.parametrize("prefix", [0, 37])
def test_tree_is_its_paths_and_a_kept_path_is_a_prefill(path, prefix):
    """50 random trees of up to 40 nodes: logits along every path; then the cache that is left of one path."""
    generator = torch.Generator().manual_seed(prefix)
    model, text = llama(), random_text(prefix or 1)[:, :prefix]
    engine, fresh = StaticLlama(model, 128), StaticLlama(model, 128)
    with torch.inference_mode():
        for _ in range(25):
            nodes = int(torch.randint(1, 41, (1,), generator=generator))
            depths, visible = random_tree(nodes, generator)
            tokens = torch.randint(0, 64, (nodes,), generator=generator)
            engine.start()
            engine.prefill([text[0].tolist()])
            found = engine.forward_tree(tokens, engine.starts(), depths, visible)
            paths = [visible[node].nonzero()[:, 0] for node in range(nodes)]
            padded = torch.stack([torch.cat([text[0], tokens[path], tokens.new_zeros(nodes - len(path))]) for path in paths])
            logits = model(padded).logits
            for node, along in enumerate(paths):
                assert near(found[node], logits[node, prefix + len(along) - 1])
            along = paths[int(torch.randint(0, nodes, (1,), generator=generator))]
            engine.keep(prefix, along)
            fresh.start()
            fresh.prefill([[*text[0].tolist(), *tokens[along].tolist()]])
            assert engine.lengths == fresh.lengths == [prefix + len(along)]
            assert same_layers(engine.layers(), fresh.layers())


# ---- the weights stay the model's ----

def storages(model: nn.Module) -> int:
    """Bytes of memory behind all parameters, each piece once."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


@pytest.mark.parametrize("name", ["gqa, tied, llama3", "untied", "biases"])
def test_joined_weights_are_the_models_own(name):
    model, text = llama(name), random_text(30)
    before, size, logits = {k: v.clone() for k, v in model.state_dict().items()}, storages(model), model(text).logits
    engine = StaticLlama(model, 32)
    assert storages(model) == size
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(text).logits, logits)
    for block, layer in zip(engine.stack.blocks, model.model.layers, strict=True):
        for joined, parts in ((block.qkv, ("q_proj", "k_proj", "v_proj")), (block.gate_up, ("gate_proj", "up_proj"))):
            linears = [getattr(layer.mlp if "gate" in parts[0] else layer.self_attn, part) for part in parts]
            assert joined.weight.data_ptr() == linears[0].weight.data_ptr()
            assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
            assert torch.equal(joined.weight, torch.cat([linear.weight for linear in linears]))
    again = StaticLlama(model, 32)
    assert again.stack.blocks[0].qkv.weight.data_ptr() == engine.stack.blocks[0].qkv.weight.data_ptr()


def test_exit_shares_the_targets_memory():
    target = llama()
    draft = noisy_exit(target, 2, own_block=True)
    size = storages(target), storages(draft.exit)
    for method in ("speculative", "self_speculative"):
        decode(target, draft, [1, 2], method=method)
    assert (storages(target), storages(draft.exit)) == size


def by_transformers(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()


def check_follows(model: nn.Module, prompt: tuple[int, ...] = (3, 1, 4)) -> None:
    """Greedy text is transformers' for the weights that the model has now."""
    assert decode(model, None, list(prompt), policy=GREEDY, max_new_tokens=12)[0] == by_transformers(model, list(prompt), 12)


class Scaled(nn.Linear):
    """What an adapter does to a linear layer."""

    def forward(self, x):
        return 2 * super().forward(x).roll(1, -1)


@contextmanager
def changed(model: LlamaForCausalLM):
    """`model` decoded before the block, and must follow what was done in the block."""
    check_follows(model)
    before = model(random_text(8)).logits
    yield
    assert not torch.allclose(model(random_text(8)).logits, before.to(model.dtype), atol=0.1) or model.dtype != before.dtype
    check_follows(model)


def test_engine_follows_weights_changed_in_place(path):
    model = llama()
    with changed(model), torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)


def test_engine_follows_another_dtype(path):
    model = llama()
    with changed(model):
        model.double()
    with changed(model):
        model.float()


def test_engine_follows_a_loaded_state(path):
    for assign in (False, True):
        model = llama()
        with changed(model):
            model.load_state_dict(llama(seed=3).state_dict(), assign=assign)
            model.tie_weights()


@pytest.mark.parametrize("name", ["o_proj", "down_proj", "v_proj", "input_layernorm"])
def test_engine_follows_a_single_tensor_that_was_put_elsewhere(path, name):
    model = llama()
    with changed(model):
        for parameter_name, parameter in model.named_parameters():
            if f"layers.1.{name}" in parameter_name or (f".{name}." in parameter_name and ".1." in parameter_name):
                parameter.data = -2 * parameter.data


def test_engine_follows_a_replaced_module(path):
    model = llama()
    with changed(model):
        model.model.layers[1].mlp.down_proj = nn.Linear(96, 64, bias=False)
    with changed(model):
        model.model.norm = copy.deepcopy(model.model.norm)
        model.model.norm.weight.data *= torch.linspace(-1, 1, 64)
    with changed(model):
        model.lm_head = nn.Linear(64, 64, bias=False)


def test_engine_follows_an_exit_that_was_trained_between(path):
    target = llama()
    exit_ = Exit(target, 3, ExitForm("last"))
    draft = TruncatedLlama(target, exit_)
    settings = {"policy": SAMPLED, "method": "self_speculative", "record_overlap": True, "max_new_tokens": 24}
    decode(target, draft, [1, 2, 3], **settings)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    tuned = TunedLlama(target, [exit_.requires_grad_(True)])
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=3e-2)
    for _ in range(3):
        tuned.learn(some_batch(vocab_size=target.config.vocab_size), [Objective("cross_entropy")], 1.0)
        assert all(parameter.grad is not None for parameter in exit_.parameters())
        optimizer.step()
        optimizer.zero_grad()
    _, stats = decode(target, draft, [1, 2, 3], **settings)
    _, wanted = decode(copy.deepcopy(target), TruncatedLlama(other := copy.deepcopy(target), copy.deepcopy(exit_)), [1, 2, 3], **{**settings, "method": "speculative"})
    assert [r.overlaps for r in stats.rounds] == [pytest.approx(r.overlaps, abs=1e-4) for r in wanted.rounds]
    assert other is not target and any(min(r.overlaps, default=1) < 0.9 for r in stats.rounds)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_models_are_whole_after_decoding(tmp_path):
    """Copies, files and gradients of a model do not know that its weights are views of joined ones."""
    target = llama("untied")
    draft = noisy_exit(target, 2, own_block=True)
    decode(target, draft, [1, 2], method="self_speculative")
    assert not any(parameter.is_inference() for parameter in [*target.parameters(), *draft.parameters()])
    assert storages(copy.deepcopy(target)) == sum(p.numel() * 4 for p in target.parameters())
    target.save_pretrained(tmp_path / "model")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), target.state_dict().values(), strict=True))
    check_follows(copy.deepcopy(target))
    twin = copy.deepcopy(target)
    twin.load_state_dict(llama("untied", seed=4).state_dict())
    check_follows(twin)
    check_follows(target)
    target.requires_grad_(True)
    assert len(decode(target, draft, [1, 2], method="self_speculative", max_new_tokens=9)[0]) == 9
    target(random_text(8)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in target.parameters())


def test_weights_that_lie_otherwise_in_memory(path):
    """A transposed weight is a view that is not dense; the C++ reads rows."""
    model = llama("untied")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()
            assert not parameter.is_contiguous(), name
    check_follows(model)


def test_model_made_in_inference_mode_decodes():
    with torch.inference_mode():
        model = llama()
    check_follows(model)


def test_decoding_keeps_no_model_alive():
    target = llama()
    drafts = [noisy_exit(target, 2, own_block=True), llama(seed=2), llama(seed=3, hidden_act="gelu")]
    for draft in drafts:
        decode(target, draft, [1, 2])
    decode(target, drafts[0], [1, 2], method="self_speculative")
    gone = [weakref.ref(model) for model in (*drafts, target)]
    del draft
    drafts.clear()
    gc.collect()
    assert [ref() is None for ref in gone] == [True, True, True, False]
    del target
    gc.collect()
    assert gone[-1]() is None


# ---- one engine for many generations ----

def test_engine_is_kept_and_reused(path):
    target = llama()
    draft = noisy_exit(target, 2, own_block=True)
    decode(target, draft, [1] * 100, method="self_speculative")
    engine = speculative._engines[target]
    for prompt in ([5], [1, 2, 3], random_text(80)[0].tolist()):
        for policy in (GREEDY, SAMPLED, SamplingPolicy(0.7, 5, 0.9)):
            settings = {"policy": policy, "max_new_tokens": 20, "verification": "coupled"}
            wanted = decode(copy.deepcopy(target), None, prompt, **settings)[0]
            for method, model in (("vanilla", None), ("speculative", draft), ("self_speculative", draft)):
                assert decode(target, model, prompt, **{**settings, "method": method})[0] == wanted
    assert speculative._engines[target] is engine
    check_batch(target, draft, [[1, 2], [3, 4, 5], [6]], policy=SAMPLED, verification="coupled", max_new_tokens=10)
    check_batch(target, draft, [[1, 2], [3, 4, 5]], policy=SAMPLED, verification="coupled", max_new_tokens=10)
    check_follows(target)
    decode(target, draft, [1] * 400, method="self_speculative", max_new_tokens=2)
    assert speculative._engines[target].target.capacity > engine.target.capacity


def test_engine_survives_a_generation_that_was_broken_off(path):
    target, wanted = llama(), decode(llama(), None, [1, 2, 3], policy=SAMPLED, max_new_tokens=10)[0]
    draft = noisy_exit(target, 2, own_block=True)

    def interrupt(tokens):
        raise KeyboardInterrupt

    for method in ("vanilla", "speculative", "self_speculative"):
        options = DecodeOptions(method=method, policy=SAMPLED, verification="coupled", max_new_tokens=10)
        with pytest.raises(KeyboardInterrupt):
            generate(target, [9, 9, 9, 9], options, draft, on_tokens=interrupt)
        assert generate(target, [1, 2, 3], options, draft).tokens == wanted


@pytest.mark.parametrize("method", ["vanilla", "speculative", "self_speculative"])
def test_a_cache_without_a_slot_to_spare(monkeypatch, path, method):
    """Capacity is rounded up, which could hide a pass that writes behind its end."""
    prompts = [random_text(length, seed=length)[0].tolist() for length in (70, 5)]
    options = DecodeOptions(method=method, policy=SAMPLED, verification="coupled", gamma=5, max_new_tokens=30)
    target = llama()
    wanted = [generation.tokens for generation in generate_batch(target, prompts, options, noisy_exit(target, 2, own_block=True))]
    monkeypatch.setattr(static_llama, "REACH_STEP", 1)
    target = llama()
    draft = noisy_exit(target, 2, own_block=True)
    assert [generation.tokens for generation in generate_batch(target, prompts, options, draft)] == wanted
    assert speculative._engines[target].target.capacity == 70 + 30 + 5 + 1
    for row, prompt in enumerate(prompts):
        assert generate(target, prompt, options, draft, prompt_id=row).tokens == wanted[row]


@pytest.mark.parametrize("make", [StaticLlama, on_device])
def test_a_pass_behind_the_last_slot_is_refused(make):
    """The C++ writes where it is told to, into the next head's slots or behind the cache."""
    engine = make(llama(), 256)
    engine.lengths = [255]
    assert engine.place(engine.starts(), 1).count == 1
    for count, offset in ((2, 0), (1, 1), (40, 0)):
        with pytest.raises(ValueError, match="256"):
            engine.place(engine.starts(), count, offset)
    with pytest.raises(ValueError, match="256"):
        engine.prefill([[1] * 257])


# ---- models that the engine does not run ----

def with_layer(kind: str) -> nn.Module:
    """A Llama of which one layer is not what it was."""
    model = llama("untied")
    attention = model.model.layers[2].self_attn
    part, name = {"lora on q": (attention, "q_proj"), "lora on k": (attention, "k_proj"), "lora on o": (attention, "o_proj"),
                  "lora on head": (model, "lm_head")}[kind]
    linear = getattr(part, name)
    setattr(part, name, Scaled(linear.in_features, linear.out_features, bias=False).requires_grad_(False))
    return model


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
        max_position_embeddings=512, initializer_range=0.3)).eval().requires_grad_(False)


UNSUPPORTED = {
    "MistralForCausalLM is no LlamaForCausalLM": mistral,
    "the activation 'gelu'": lambda: llama(hidden_act="gelu"),
    "quantised or adapted": lambda: with_layer("lora on q"),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_models_are_named_and_decoded_by_transformers(reason, capsys):
    model = UNSUPPORTED[reason]()
    assert reason in why_unsupported(model)
    with pytest.raises(ValueError, match=f"StaticLlama cannot run .*{reason}"):
        StaticLlama(model, 32)
    check_follows(model, tuple(some_prompts(1)[0] * 2))
    assert f"StaticLlama cannot run {reason}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="only StaticLlama decodes several texts"):
        generate_batch(model, [[1], [2]], DecodeOptions())


def test_hooks_and_modules_of_ones_own_are_noticed():
    hooked, overridden = llama(), llama()
    hooked.model.layers[1].register_forward_hook(lambda module, inputs, output: output + 1)
    overridden.model.layers[1].mlp.forward = lambda x: 0 * x
    for model in (hooked, overridden):
        check_follows(model)
        assert "hooks" in why_unsupported(model)


def test_exit_of_another_dtype_than_the_target():
    """The C++ would read past its weights."""
    target = llama().bfloat16()
    draft = noisy_exit(target, 2)
    target.float()
    with pytest.raises(ValueError, match="several dtypes; use method 'speculative'"):
        decode(target, draft, [1, 2], method="self_speculative")
    with pytest.raises(ValueError, match="as the target is"):
        SharedExit(StaticLlama(target, 32), draft.exit)
    assert decode(target, draft, [1, 2], max_new_tokens=12)[0] == decode(target, None, [1, 2], max_new_tokens=12)[0]
    draft.exit.norm.float()
    assert {parameter.dtype for parameter in TruncatedLlama(target, draft.exit).exit.parameters()} == {torch.float32}


def test_engine_follows_changed_settings():
    model = llama()
    check_follows(model)
    model.config.rms_norm_eps = 0.5
    for norm in [module for module in model.modules() if hasattr(module, "variance_epsilon")]:
        norm.variance_epsilon = 0.5
    check_follows(model)


@pytest.mark.parametrize("kind", ["lora on q", "lora on k", "lora on o", "lora on head"])
def test_adapters_anywhere_are_noticed(kind):
    check_follows(with_layer(kind))


def test_the_note_is_printed_once(capsys):
    model = llama(hidden_act="gelu")
    for _ in range(3):
        decode(model, None, [1, 2], max_new_tokens=3)
    assert capsys.readouterr().err.count("slower") == 1


def test_self_speculation_on_an_unsupported_model_is_refused():
    model = llama(hidden_act="gelu")
    with pytest.raises(ValueError, match="use method 'speculative'"):
        decode(model, TruncatedLlama(model, Exit(model, 2)), [1, 2], method="self_speculative")
    model = tiny_llama()
    with pytest.raises(ValueError, match="use method 'speculative'"):
        decode(model, TruncatedLlama(model, Exit(model, 2)), [1, 2], method="self_speculative", engine="transformers")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [16, 17, 439, 448])
@torch.inference_mode()
def test_a_head_of_any_size_gives_a_row_the_same_bits_at_every_width(outputs, bias):
    """C++ makes outputs by 16; the last few of others go through it as well, from the weights as they are now."""
    torch.manual_seed(0)
    norm, linear, x = LlamaRMSNorm(64), nn.Linear(64, outputs, bias=bias), torch.randn(12, 64)
    head = Head(norm, linear, 1e-5)
    assert head._native is not None
    for _ in range(2):
        whole, by_torch = head(x).clone(), Head(norm, linear, 1e-5, cpp=False)(x)
        assert whole.shape == (12, outputs) and near(whole, by_torch, 1e-5)
        for width in (1, 3, 5):
            assert torch.equal(torch.cat([head(rows).clone() for rows in x.split(width)]), whole)
        linear.weight.mul_(-2)
