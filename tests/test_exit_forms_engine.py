"""Exits with a head in two parts, or with a block that is attention alone: the engine runs them as transformers does, and texts stay vanilla's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from decoding.dynamic_tree import DynamicTree
from decoding.sampling import SamplingPolicy
from decoding.state import DecodeState, DecodeStats
from engine import native, static_llama
from engine.shared_exit import SharedExit
from engine.static_llama import Block, Head, Kept, Parts, StaticLlama, why_unsupported
from models.plain_llama import why_not_a_llama
from test_self_speculation import after_every_round, check_caches
from test_tree_engine import as_on_device, check_caches_after_every_round, check_text
from toy_models import check_batch, check_same_text, decode, native_llama, near, pass_logits, random_text, same_layers, tiny_llama
from truncated_llama import Exit, TruncatedLlama

GREEDY, TEMPERED = SamplingPolicy(0.0), SamplingPolicy(0.7)
TREE = {"method": "dynamic_tree", "tree": DynamicTree(16, 4, 3)}
LAYER = 2  # of 4
LEAST_ACCEPTED = 0.2  # of the tokens: a draft that says something else would pass every comparison of texts


@dataclass(frozen=True)
class Form:
    """`head`: "whole", "translator", or a rank as a share of D."""

    head: str | float = "whole"
    attention: bool = False
    trimmed: bool = False


FORMS = {
    "low rank": Form(0.5),  # 32 and 16: multiples of 16, which C++ takes
    "odd rank": Form(0.7),
    "low rank, trimmed": Form(0.5, trimmed=True),
    "translator": Form("translator"),
    "translator, trimmed": Form("translator", trimmed=True),
    "attention": Form(attention=True),
    "attention, low rank": Form(0.5, attention=True),
    "attention, translator, trimmed": Form("translator", attention=True, trimmed=True),
}
TWO_PART = [name for name, form in FORMS.items() if form.head != "whole"]
ATTENTION = [name for name, form in FORMS.items() if form.attention]
every_form = pytest.mark.parametrize("form", FORMS)
some_pairs = pytest.mark.parametrize(  # where a test takes long
    ("target", "form"), [*(("cpp", form) for form in FORMS), ("torch", "low rank, trimmed"), ("device", "attention, translator, trimmed")], indirect=["target"])


def two_part_head(head: nn.Linear, kind: str | float) -> nn.Sequential:
    """A head that says nearly what `head` says; a translator is followed by `head` itself."""
    size, like = head.in_features, {"dtype": head.weight.dtype}
    if kind == "translator":
        first = nn.Linear(size, size, **like)
        first.weight.data = torch.eye(size, **like) + 0.02 * torch.randn(size, size, **like)
        return nn.Sequential(first, head)  # biases up to 1/√D, as torch draws them
    u, s, v = torch.linalg.svd(head.weight.detach(), full_matrices=False)
    rank = int(kind * size)
    first, second = nn.Linear(size, rank, bias=False, **like), nn.Linear(rank, len(u), **like)
    first.weight.data, second.weight.data = v[:rank].contiguous(), (u * s)[:, :rank].contiguous()
    return nn.Sequential(first, second)


def attention_block(target: LlamaForCausalLM) -> nn.Module:
    """A block behind LAYER of small random attention weights, without an MLP."""
    config = copy.deepcopy(target.config)
    config.intermediate_size = 0
    block = copy.deepcopy(target.model.layers[LAYER])
    block.self_attn.layer_idx, block.mlp = LAYER + 1, LlamaMLP(config).to(target.dtype)
    for name, parameter in block.named_parameters():
        parameter.data = (1 if "norm" in name else 0) + 0.1 * torch.randn(parameter.shape, dtype=target.dtype)
    return block


def form_exit(target: LlamaForCausalLM, form: str) -> TruncatedLlama:
    """An exit of that form at LAYER, with a norm of its own."""
    torch.manual_seed(0)
    wanted, exit_ = FORMS[form], Exit(target, LAYER)
    exit_.norm.weight.data *= 1 + 0.1 * torch.randn_like(exit_.norm.weight)
    if wanted.attention:
        exit_.block = attention_block(target)
    exit_.head = target.lm_head if wanted.head == "whole" else two_part_head(target.lm_head, wanted.head)
    if wanted.trimmed:
        exit_.token_ids = torch.randperm(target.config.vocab_size)[:48].sort().values
        whole = exit_.head[-1]
        exit_.head[-1] = nn.Linear(whole.in_features, 48, bias=whole.bias is not None, dtype=target.dtype)
        exit_.head[-1].load_state_dict({name: tensor[exit_.token_ids] for name, tensor in whole.state_dict().items()})
    draft = TruncatedLlama(target, exit_.requires_grad_(False))
    assert draft.exit is exit_ and exit_.prefix == LAYER + 1
    return draft


def weak_blocks(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model, whose last block says so little that an exit before it is often right."""
    for linear in (model.model.layers[LAYER + 1].self_attn.o_proj, model.model.layers[LAYER + 1].mlp.down_proj):
        linear.weight.data *= 0.2
    return model


pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


@pytest.fixture(params=["cpp", "torch", "device"])
def target(request, monkeypatch) -> LlamaForCausalLM:
    """A target in fp32 through C++, in fp64 through torch, and with its places on a device."""
    if request.param == "device":
        as_on_device(monkeypatch)
    return weak_blocks(native_llama() if request.param == "cpp" else tiny_llama())


def tolerance(target: LlamaForCausalLM) -> float:
    return 1e-4 if target.dtype == torch.float32 else 1e-10


# ---- logits ----

@torch.inference_mode()
def by_transformers(draft: TruncatedLlama, text: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits (1, T, V), and keys and values of the blocks. transformers norms in fp32 whatever the dtype is; here in that of the model."""
    cache = DynamicCache(config=draft.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", lambda self, x: rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon))
        logits = draft(text, past_key_values=cache).logits
    return logits, [(layer.keys, layer.values) for layer in cache.layers if layer.get_seq_length()]


@torch.inference_mode()
def check_logits(target: LlamaForCausalLM, draft: TruncatedLlama) -> None:
    """A prefill and steps give transformers' logits, keys and values: as an exit on the target's blocks, and as a model of its own."""
    text = random_text(40)
    wanted, layers = by_transformers(draft, text)
    known = slice(None) if draft.exit.token_ids is None else draft.exit.token_ids
    assert len(layers) == LAYER + 1 + (draft.exit.block is not None)

    apart = StaticLlama(target, 40, parts=draft.parts())
    assert near(pass_logits(apart, text, [20, 1, 3, 1, 9]), wanted[..., known], tolerance(target))
    assert same_layers(apart.layers(), layers, tolerance(target))

    shared = SharedExit(StaticLlama(target, 40), draft.exit)
    shared.prefill([text[0, :20].tolist()])
    steps = [shared.draft(text[:, 20 + i : 21 + i], shared.target.starts(), i, 0).clone() for i in range(20)]
    assert near(torch.cat(steps, 1), wanted[:, 20:, known], tolerance(target))
    if shared.own is not None:
        held = [(keys[..., :40, :], values[..., :40, :]) for keys, values in zip(*shared.own.cache.halves(), strict=True)]
        assert same_layers(held, layers[-1:], tolerance(target))


@every_form
def test_logits_are_transformers(target, form):
    check_logits(target, form_exit(target, form))


@every_form
def test_cpp_runs_what_it_can(form):
    draft = form_exit(target := native_llama(), form)
    shared = SharedExit(StaticLlama(target, 8), draft.exit)
    assert (shared.head._native is not None) == (form != "odd rank")
    assert shared.own is None or shared.own._native is not None
    assert StaticLlama(target, 8, parts=draft.parts()).stack._native is not None


@pytest.mark.parametrize("form", [form for form in FORMS if form != "odd rank"])  # whose head goes through torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_bits_in_passes_of_any_width(form, dtype):
    target, text, threads = native_llama(), random_text(60), torch.get_num_threads()
    exit_ = form_exit(target, form).exit.to(dtype)
    engine = StaticLlama(target.to(dtype), 64, parts=TruncatedLlama(target, exit_).parts())
    alone = pass_logits(engine, text, [1] * 60)
    try:
        for width in (2, 3, 5, 12):
            torch.set_num_threads(1 + width % 2)
            assert torch.equal(pass_logits(engine, text, [width] * (60 // width)), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("form", TWO_PART)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_any_number_of_rows_are_the_modules(form, dtype):
    """Each dtype's C++ and torch, below and above the rows up to which C++ runs and buffers are kept."""
    exit_ = form_exit(native_llama(), form).exit.to(dtype)
    for rows in (1, 2, 11, 13, 40, 100):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)
        wanted = exit_.head(exit_.norm(x))
        for cpp in (True, False):
            head = Head(exit_.norm, exit_.head, 1e-6, cpp)
            assert all(near(head(x), wanted, 1e-5 if dtype == torch.float32 else 2e-2) for _ in range(2))


# ---- texts and caches ----

def accepted_share(stats: list[DecodeStats]) -> float:
    """Of the tokens, those that were drafted."""
    return sum(r.accepted for each in stats for r in each.rounds) / sum(each.emitted for each in stats)


def check_texts(target: LlamaForCausalLM, draft: TruncatedLlama, policy: SamplingPolicy) -> None:
    """Vanilla's text as a chain and as a tree on the target's blocks, and as a model of its own: with many drafted tokens in it."""
    for method in ("self_speculative", "speculative"):
        assert accepted_share(check_same_text(target, draft, policy, "coupled", 4, method=method)) > LEAST_ACCEPTED
    assert accepted_share(check_text(target, draft, 3, policy=policy, **TREE)) > LEAST_ACCEPTED


@some_pairs
@pytest.mark.parametrize("policy", [GREEDY, TEMPERED], ids=str)
def test_text_is_vanillas(target, form, policy):
    check_texts(target, form_exit(target, form), policy)


@every_form
def test_texts_of_a_batch_are_texts_alone(form):
    target = weak_blocks(native_llama())
    for method in ("self_speculative", "speculative"):
        check_batch(target, form_exit(target, form), [[1, 2], [3, 4, 5], [6]], method=method, policy=TEMPERED, verification="coupled", max_new_tokens=16)


def check_every_round(target: LlamaForCausalLM, draft: TruncatedLlama) -> None:
    """After every round of a chain, an independent draft and a tree, all that is cached equals a fresh prefill's."""
    def check_apart(state: DecodeState) -> None:
        cached = state.draft
        fresh = StaticLlama(target, 64, parts=draft.parts())
        fresh.prefill([state.committed[0][: cached.lengths[0]]])
        assert same_layers(cached.layers(), fresh.layers(), tolerance(target))

    for method, check in (("self_speculative", lambda state: check_caches(state, target, draft)), ("speculative", check_apart)):
        with pytest.MonkeyPatch.context() as patch:
            rounds = after_every_round(patch, check)
            _, stats = decode(target, draft, [1, 2, 3], method=method, policy=TEMPERED, verification="coupled", gamma=3, max_new_tokens=24)
            assert len(rounds) == len(stats.rounds) and accepted_share([stats]) > 0
    check_caches_after_every_round(target, draft, **TREE)


@some_pairs
def test_caches_equal_a_fresh_prefill_after_every_round(target, form):
    check_every_round(target, form_exit(target, form))


# ---- the checks above notice mistakes ----

def heads_made_of(patch: pytest.MonkeyPatch, change: Callable[[nn.Sequential], nn.Module]) -> None:
    """Every two-part head is `change` of it."""
    exact = Head.__init__
    patch.setattr(Head, "__init__", lambda self, norm, head, *rest: exact(self, norm, change(head) if isinstance(head, nn.Sequential) else head, *rest))


def without_bias(head: nn.Sequential, part: int) -> nn.Sequential:
    changed = copy.deepcopy(head)
    changed[part].bias = None
    return changed


def without_norm(patch: pytest.MonkeyPatch) -> None:
    def call(self: Head, x: torch.Tensor) -> torch.Tensor:
        for projection in self._projections:
            x = x @ projection.weight.T + (0 if projection.bias is None else projection.bias)
        return x

    patch.setattr(Head, "__call__", call)


def change_attention_blocks(patch: pytest.MonkeyPatch, change: Callable[[Block], None]) -> None:
    """Do `change` to every block without an MLP."""
    exact = Block.__init__

    def init(self: Block, layer: nn.Module) -> None:
        exact(self, layer)
        if self.gate_up is None:
            change(self)

    patch.setattr(Block, "__init__", init)


def bend_norm(block: Block) -> None:
    block.attention_norm = torch.ones_like(block.attention_norm)


def drop_attention(block: Block) -> None:
    block.out = static_llama.Projection(torch.zeros_like(block.out.weight))


WRONG_LOGITS: dict[str, tuple[str, Callable]] = {  # of which form, and what is done to it
    "the first part's bias is forgotten": ("translator", lambda patch: heads_made_of(patch, lambda head: without_bias(head, 0))),
    "the second part's bias is forgotten": ("low rank", lambda patch: heads_made_of(patch, lambda head: without_bias(head, 1))),
    "the first part is forgotten": ("translator", lambda patch: heads_made_of(patch, lambda head: head[1])),
    "the norm is forgotten": ("low rank", without_norm),
    "the norm of a trimmed head is forgotten": ("low rank, trimmed", without_norm),
    "a block of attention is the identity": ("attention", lambda patch: change_attention_blocks(patch, drop_attention)),
    "a block of attention has another norm": ("attention", lambda patch: change_attention_blocks(patch, bend_norm)),
}


@pytest.mark.parametrize("bug", WRONG_LOGITS)
def test_wrong_logits_are_noticed(target, bug, monkeypatch):
    form, plant = WRONG_LOGITS[bug]
    draft = form_exit(target, form)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_logits(target, draft)


def one_block_too_early(patch: pytest.MonkeyPatch) -> None:
    """The exit's prefix is what an own block in place of LAYER has: the target goes on from another block's hidden states."""
    patch.setattr("engine.shared_exit.Kept", lambda at, store: Kept(at - 1, store))


def tokens_by_column(patch: pytest.MonkeyPatch) -> None:
    """A trimmed head's columns are taken for token ids."""
    exact = SharedExit.__init__

    def init(self, target, exit_):
        exact(self, target, exit_)
        self.token_ids = torch.arange(len(exit_.token_ids))

    patch.setattr(SharedExit, "__init__", init)


def frozen_head_scaled(patch: pytest.MonkeyPatch) -> None:
    """The target's matrix is changed, which the head's last part shares."""
    exact = Head.__init__

    def init(self, norm, head, *rest):
        exact(self, norm, head, *rest)
        if isinstance(head, nn.Sequential):
            head[1].weight.data.mul_(torch.linspace(0.5, 1.5, len(head[1].weight))[:, None])

    patch.setattr(Head, "__init__", init)


WRONG_TEXTS = {"prefix": ("attention", one_block_too_early), "tokens": ("low rank, trimmed", tokens_by_column), "frozen": ("translator", frozen_head_scaled)}


@pytest.mark.parametrize("bug", WRONG_TEXTS)
@pytest.mark.parametrize("target", ["cpp"], indirect=True)
def test_wrong_texts_are_noticed(target, bug, monkeypatch):
    form, plant = WRONG_TEXTS[bug]
    draft = form_exit(target, form)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_texts(target, draft, TEMPERED)


@pytest.mark.parametrize("form", ATTENTION)
@pytest.mark.parametrize("target", ["cpp"], indirect=True)
def test_a_token_that_a_block_of_attention_never_saw_is_noticed(target, form, monkeypatch):
    draft, exact = form_exit(target, form), SharedExit.draft
    monkeypatch.setattr(SharedExit, "draft", lambda self, tokens, starts, index, behind: exact(self, tokens, starts, index, 0))
    with pytest.raises(AssertionError):
        check_every_round(target, draft)


# ---- weights stay where they are ----

def test_a_frozen_head_is_neither_copied_nor_moved():
    target = native_llama()
    draft = form_exit(target, "translator")
    place, before = target.lm_head.weight.data_ptr(), target.lm_head.weight.clone()
    for method in ("self_speculative", "speculative"):
        decode(target, draft, [1, 2], method=method)
    shared = SharedExit(engine := StaticLlama(target, 8), draft.exit)
    heads = [shared.head, engine.head, StaticLlama(target, 8, parts=draft.parts()).head]
    assert {head._projections[-1].weight.data_ptr() for head in heads} == {target.lm_head.weight.data_ptr()} == {place}
    assert target.lm_head.weight is target.model.embed_tokens.weight and torch.equal(target.lm_head.weight, before)


@pytest.mark.parametrize("form", FORMS)
def test_engine_follows_an_exit_that_was_changed_between(form):
    """In place, by other tensors, and by another form of head."""
    target = weak_blocks(native_llama())
    draft = form_exit(target, form)
    options = {"policy": TEMPERED, "method": "self_speculative", "record_overlap": True, "max_new_tokens": 16}

    def overlaps(draft: TruncatedLlama) -> list[float]:
        return [overlap for r in decode(target, draft, [1, 2, 3], **options)[1].rounds for overlap in r.overlaps]

    before = overlaps(draft)
    draft.exit.norm.weight.data *= 0.7
    assert overlaps(draft) == pytest.approx(overlaps(copy_on(target, draft))) != pytest.approx(before)
    draft.exit.head = two_part_head(draft.exit.head, 0.5) if isinstance(draft.exit.head, nn.Linear) else copy.deepcopy(draft.exit.head)
    for parameter in draft.exit.head.requires_grad_(False).parameters():
        parameter.data = 0.8 * parameter.data
    assert overlaps(draft) == pytest.approx(overlaps(copy_on(target, draft)))


def copy_on(target: LlamaForCausalLM, draft: TruncatedLlama) -> TruncatedLlama:
    """The draft anew, with an engine of its own."""
    return TruncatedLlama(target, copy.deepcopy(draft.exit))


# ---- what is refused ----

class Scaled(nn.Linear):
    """What an adapter does to a linear layer."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked(head: nn.Sequential, module: nn.Module) -> nn.Sequential:
    module.register_forward_hook(lambda module, inputs, output: output + 1)
    return head


def block_with_mlp(target: LlamaForCausalLM, **shape: object) -> nn.Module:
    block = copy.deepcopy(target.model.layers[LAYER])
    block.mlp = LlamaMLP(LlamaConfig(**{**target.config.to_dict(), **shape}))
    return block


def refused(target: LlamaForCausalLM) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """What is said of parts that look like the new forms."""
    into, out = nn.Linear(64, 64), nn.Linear(64, 64)
    for parts in ([out], [into, into, out], [into, nn.SiLU()], [into, Scaled(64, 64)]):
        yield "adapted layers: a Sequential", {"head": nn.Sequential(*parts)}
    yield "adapted layers: a Sequential", {"block": nn.Sequential(into, out)}
    yield "hooks: on a Sequential", {"head": hooked(head := nn.Sequential(into, out), head)}
    yield "hooks: on a Linear", {"head": hooked(nn.Sequential(into, out), into)}
    yield "an MLP of width 48 beside those of 96", {"block": block_with_mlp(target, intermediate_size=48)}
    yield "an MLP of width 0 with a bias", {"block": block_with_mlp(target, intermediate_size=0, mlp_bias=True)}


def test_what_only_looks_like_it_is_refused():
    target = native_llama()
    for form in FORMS:
        assert why_unsupported(target, form_exit(target, form).parts()) is None
    for reason, changes in refused(target):
        parts = Parts.of(target)
        parts = replace(parts, head=changes.get("head", parts.head), layers=(*parts.layers, *filter(None, [changes.get("block")])))
        with pytest.raises(ValueError, match=f"StaticLlama cannot run .*{reason}"):
            StaticLlama(target, 8, parts=parts)


@pytest.mark.parametrize(("form", "message"), [
    ("low rank", "its head is a Sequential, not a single matrix"),
    ("translator", "its head is a Sequential, not a single matrix"),
    ("attention", "its block differs from the target's in mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight"),
])
def test_a_plain_llama_cannot_be_made_of_it(form, message):
    target = tiny_llama()
    assert why_not_a_llama(form_exit(target, form).exit, target.config) == message


def test_without_the_library_torch_runs_it(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    target = weak_blocks(native_llama())
    for form in FORMS:
        check_logits(target, form_exit(target, form))
