"""A Llama's forward pass with preallocated keys and values, over the very weight tensors of the transformers model.

transformers spends more time between the matrix products of a decoding step than in them. Here a block is about 15 calls
on buffers that were allocated once per pass width; queries, keys and values are one product, gate and up another: the
model's own parameters become views of the joined tensors, so nothing is stored twice. Every pass runs a range of blocks
on any number of rows, at explicit positions, behind any prefix of the cache, under a causal or a tree mask.

Shapes: B batch, T tokens of a pass, D hidden, V vocabulary, L blocks, H heads, K key-value heads, G = H/K, S capacity.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import nn
from torch.nn.functional import embedding, pad, rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from engine import native
from engine.exactness import rotary_limit
from engine.matmul import Product, Projection
from engine.programs import Programs
from engine.views import ImageEmbeddings

PLAIN = frozenset({  # what a Llama is made of
    LlamaForCausalLM, LlamaModel, LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding,
    nn.Embedding, nn.Linear, nn.ModuleList, type(ACT2FN["silu"]),
})
ROPE_TYPES = ("default", "linear", "dynamic", "longrope", "llama3", "yarn")
PREFILL_CHUNK = 512  # rows of a prefill pass: bounds the memory of its activations
KEPT_WIDTHS = 64  # buffers of passes with up to so many rows are kept for the next pass
REACH_STEP = 256  # where positions lie on the device, attention reads this many slots or a multiple of it


@dataclass(frozen=True, eq=False)
class Parts:
    """The blocks, norm and head that a pass goes through, and the tokens (V_d,) that the head knows where these are not all.

    A head is a linear map, or two in a row: a low-rank one, or a translator before a frozen one. A block whose MLP has width 0 is attention alone.
    """

    layers: tuple[nn.Module, ...]
    norm: nn.Module
    head: nn.Module
    token_ids: torch.Tensor | None = None

    @classmethod
    def of(cls, model: LlamaForCausalLM) -> Parts:
        """The whole model's."""
        return cls(tuple(model.model.layers), model.model.norm, model.lm_head)

    def modules(self) -> tuple[nn.Module, ...]:
        return self.norm, self.head, *self.layers


def why_unsupported(model: nn.Module, parts: Parts | None = None) -> str | None:
    """What keeps StaticLlama from running `model`, or `parts` that a draft has beside it, or None."""
    if not isinstance(model, LlamaForCausalLM):
        return f"{type(model).__name__} is no LlamaForCausalLM"
    config = model.config
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        return f"rotary embeddings of type {rope_type!r} (known: {', '.join(ROPE_TYPES)})"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r} (known: silu)"
    if getattr(config, "sliding_window", None):
        return "sliding-window attention"
    whole = (model,) if parts is None else (model, *parts.modules())
    if len({(parameter.device, parameter.dtype) for part in whole for parameter in part.parameters()}) > 1:
        return "weights on several devices or of several dtypes"
    modules = list(chain.from_iterable(part.modules() for part in whole))
    head = model.lm_head if parts is None else parts.head
    in_two_parts = type(head) is nn.Sequential and [type(part) for part in head] == [nn.Linear] * 2
    for module in modules:
        if type(module) not in PLAIN and not (module is head and in_two_parts):
            return f"quantised or adapted layers: a {type(module).__name__}"
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return f"hooks: on a {type(module).__name__}"
    return next(filter(None, (_mlp_complaint(module, config) for module in modules if type(module) is LlamaMLP)), None)


def _mlp_complaint(mlp: LlamaMLP, config: PretrainedConfig) -> str | None:
    """Blocks share their buffers, so an MLP is as wide as the config's or is skipped."""
    width = len(mlp.gate_proj.weight)
    if width not in (0, config.intermediate_size):
        return f"an MLP of width {width} beside those of {config.intermediate_size}"
    return "an MLP of width 0 with a bias" if width == 0 and mlp.down_proj.bias is not None else None


def linears(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The linear maps of a decoder block."""
    attention, mlp = layer.self_attn, layer.mlp
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def weights_at(*modules: nn.Module) -> list[tuple]:
    """Where the parameters of `modules` lie: differs once one was moved, replaced or adapted."""
    return [(parameter.data_ptr(), parameter.stride(), parameter.dtype) for module in modules for parameter in module.parameters()]


def _settings(model: LlamaForCausalLM) -> tuple:
    """What a forward pass depends on beside the weights, as far as it may be changed in a model."""
    return model.config.rms_norm_eps, repr(model.config.rope_parameters), id(model.model.rotary_emb)


# ---- weights ----

def join(linears: list[nn.Linear]) -> Projection:
    """The linear maps as one, whose weight and bias the given modules' parameters are views of from now on."""
    parts = [("weight", [linear.weight for linear in linears])]
    if linears[0].bias is not None:
        parts.append(("bias", [linear.bias for linear in linears]))
    with torch.inference_mode(linears[0].weight.is_inference()):  # views of a tensor of another kind could not be the parameters' data
        joined = {name: _joined(parameters) for name, parameters in parts}
    return Projection(joined["weight"], joined.get("bias"))


def single(linear: nn.Linear) -> Projection:
    """A linear map, where it lies."""
    return Projection(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _joined(parameters: list[nn.Parameter]) -> torch.Tensor:
    """The parameters' values in one tensor that they are views of; the tensor that is there where they are such views already."""
    first = parameters[0]
    rows = sum(len(parameter) for parameter in parameters)
    offsets = torch.tensor([0, *[parameter.numel() for parameter in parameters]]).cumsum(0).tolist()
    dense = all(parameter.is_contiguous() for parameter in parameters)
    same_storage = dense and {parameter.untyped_storage().data_ptr() for parameter in parameters} == {first.untyped_storage().data_ptr()}
    if same_storage and all(p.storage_offset() == first.storage_offset() + offset for p, offset in zip(parameters, offsets, strict=False)):
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return whole


def _tensors(projection: Projection | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias."""
    return (None, None) if projection is None else (projection.weight, projection.bias)


class Block:
    """The weights of one decoder block, joined; `gate_up` and `down` are None where it has no MLP."""

    def __init__(self, layer: nn.Module) -> None:
        q, k, v, out, gate, up, down = linears(layer)
        self.qkv, self.out = join([q, k, v]), single(out)
        self.gate_up, self.down = (join([gate, up]), single(down)) if len(gate.weight) else (None, None)
        self.attention_norm, self.mlp_norm = (norm.weight.detach() for norm in (layer.input_layernorm, layer.post_attention_layernorm))

    def tensors(self) -> list[torch.Tensor | None]:
        """Weights and biases, in the order of llama_blocks.cpp."""
        products = (self.qkv, self.out, self.gate_up, self.down)
        return [*chain.from_iterable(map(_tensors, products)), self.attention_norm, self.mlp_norm]


class Rotary:
    """Cosines (B, S, 1, head_dim) and sines (B, S, 1, head_dim/2) of every text's positions, in the model's dtype.

    Dynamic NTK scaling and longrope make them depend on the length that is reached: transformers rotates a prompt with the
    frequencies of its length and each later token with those of its own. `start` gives the same here, whatever the passes. Else
    all texts share one table.
    """

    def __init__(self, rotary_emb: LlamaRotaryEmbedding, like: torch.Tensor, capacity: int, batch: int) -> None:
        self._config, self._positions = rotary_emb.config, torch.arange(capacity, device=like.device)
        self._limit = rotary_limit(self._config, self._config.rope_parameters)
        by_length = self._limit is not None
        cos, sin = (table[0] for table in rotary_emb(like, position_ids=(self._positions.clamp(max=0) if by_length else self._positions)[None]))
        texts = batch if by_length else 1
        self.capacity = capacity
        self.cos = cos[None, :, None].repeat(texts, 1, 1, 1)
        self.sin = sin[None, :, None, : sin.shape[-1] // 2].repeat(texts, 1, 1, 1)
        self.tables = native.address(self.cos), native.address(self.sin), texts  # as C++ reads them

    def start(self, prompt_lengths: list[int]) -> None:
        """Fill the tables for texts with these prompts, in place: a captured program reads them where they are."""
        for text, length in enumerate([] if self._limit is None else prompt_lengths):
            cos, sin = _rotary_by_length(self._config, self._limit, self._positions, length, self.cos.dtype)
            self.cos[text], self.sin[text] = cos[:, None], sin[:, None, : sin.shape[-1] // 2]

    def span(self, text: int, where: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines (T, 1, head_dim) and sines (T, 1, head_dim/2) of text `text` at the positions `where`."""
        text = text % len(self.cos)
        return self.cos[text, where], self.sin[text, where]

    def scatter(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same (B·T, …) for `positions` (B, T) of every text."""
        texts = torch.arange(len(positions), device=positions.device)[:, None] % len(self.cos)
        return self.cos[texts, positions].flatten(0, 1), self.sin[texts, positions].flatten(0, 1)


def _rotary_by_length(
    config: PretrainedConfig, limit: int, positions: torch.Tensor, prompt_length: int, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (S, head_dim) where position i has the frequencies of length max(prompt_length, i + 1). Up to `limit` they are those of `limit`."""
    rope_type = config.rope_parameters["rope_type"]
    lengths = (positions + 1).clamp(min=max(prompt_length, limit), max=limit + 1 if rope_type == "longrope" else None).tolist()  # longrope has two sets
    found = {length: ROPE_INIT_FUNCTIONS[rope_type](config, positions.device, seq_len=length) for length in set(lengths)}
    angles = positions[:, None].float() * torch.stack([found[length][0] for length in lengths])
    angles, (_, scale) = torch.cat([angles, angles], -1), found[lengths[0]]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


# ---- where a pass's rows go ----

class KeyValues:
    """Preallocated keys and values of `num_blocks` blocks: (num_blocks, B, 2·K, S, head_dim), the keys first."""

    def __init__(self, num_blocks: int, batch: int, capacity: int, config: PretrainedConfig, like: torch.Tensor) -> None:
        self.heads, self.groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        self.store = like.new_zeros(num_blocks, batch, 2 * self.heads, capacity, config.head_dim)  # stale slots are masked, not skipped: no NaN

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (num_blocks, B, K, S, head_dim) each."""
        return self.store[:, :, : self.heads], self.store[:, :, self.heads :]

    def mask(self, visible: torch.Tensor) -> torch.Tensor:
        """What is added to the scores (B, 1, T·G, N) of G query heads that stand as further rows, for bool `visible` (B, T, N)."""
        rows = visible[:, :, None].expand(-1, -1, self.groups, -1).flatten(1, 2)[:, None]
        return torch.zeros(rows.shape, dtype=self.store.dtype, device=self.store.device).masked_fill_(~rows, -torch.inf)

    def move(self, row: int, source: torch.Tensor, start: int) -> None:
        """Copy the slots `source` (N,) of batch row `row` to start, start+1, …, in every block."""
        self.store[:, row, :, start : start + len(source)] = self.store[:, row, :, source]


class Span:
    """T rows of one text at slots start … start+T−1, known on the host: what is read and written are plain slices.

    `positions` (T,) say where in the text the rows stand (default: at their slots), and `visible` (T, W) which of the last W
    slots up to the pass's last each row sees, besides all before them (default: those up to its own). Raises
    ValueError where the slots end.
    """

    batch = 1

    def __init__(
        self, rotary: Rotary, start: int, count: int, text: int = 0, positions: torch.Tensor | None = None, visible: torch.Tensor | None = None,
    ) -> None:
        if start + count > rotary.capacity:
            raise ValueError(f"{count} tokens behind {start} exceed the cache's {rotary.capacity} slots")
        self.rotary, self.start, self.count, self.text, self.positions, self.visible = rotary, start, count, text, positions, visible

    def view(self, cache: KeyValues) -> SpanView:
        """What the rows see and write of `cache`."""
        return SpanView(self, cache)

    @cached_property
    def rows(self) -> native.Rows:
        """The rows as C++ reads them."""
        if self.positions is not None and int(self.positions.max()) >= self.rotary.capacity:
            raise ValueError(f"position {int(self.positions.max())} exceeds the cache's {self.rotary.capacity} slots")
        self._held = native.dense(self.positions, None if self.visible is None else self.visible.to(torch.uint8))
        positions, visible = map(native.address, self._held)
        window = 0 if self.visible is None else self.visible.shape[1]
        return native.Rows(self.count, self.start, self.text, None, None, positions, *self.rotary.tables, visible, window)

    def save(self, x: torch.Tensor, store: torch.Tensor) -> None:
        """Put `x` (T, D) where `store` (B, S, D) has this place."""
        store[self.text, self.start : self.start + self.count] = x

    def load(self, store: torch.Tensor) -> torch.Tensor:
        """A copy (T, D) of what `store` (B, S, D) has at this place."""
        return store[self.text, self.start : self.start + self.count].clone()


class SpanView:
    """A Span's angles, and what its rows see of a cache: per block keys and values (1, K, start+T, head_dim), and what to add to the scores."""

    def __init__(self, place: Span, cache: KeyValues) -> None:
        self._start, end = place.start, place.start + place.count
        self.angles = place.rotary.span(place.text, slice(place.start, end) if place.positions is None else place.positions)
        self.keys, self.values = (half[:, place.text : place.text + 1, :, :end].unbind(0) for half in cache.halves())
        self.causal = place.count > 1 and place.start == 0 and place.visible is None
        self.mask = None if self.causal or (place.count == 1 and place.visible is None) else self._mask(place, cache)

    @staticmethod
    def _mask(place: Span, cache: KeyValues) -> torch.Tensor:
        whole = torch.ones(1, place.count, place.start + place.count, dtype=torch.bool, device=cache.store.device)
        if place.visible is None:
            whole.tril_(place.start)
        else:
            whole[0, :, place.start + place.count - place.visible.shape[1] :] = place.visible
        return cache.mask(whole)

    def write(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values (T, K, head_dim) of block `index`."""
        self.keys[index][0, :, self._start :].copy_(keys.transpose(0, 1))
        self.values[index][0, :, self._start :].copy_(values.transpose(0, 1))


class Scatter:
    """T rows of every text at `slots` (B, T), known on the device: nothing depends on the host.

    Attention reads the first `reach` slots of every text and masks those behind each row's. The rows of a tree have `positions` (B, T)
    that are not their slots, and see of the window of W slots from `starts` (B,) what `visible` (T, W) says.
    """

    def __init__(self, rotary: Rotary, slots: torch.Tensor, reach: int, tree: TreeRows | None = None) -> None:
        self.batch, self.count = slots.shape
        self.rotary, self.slots, self.reach, self.tree = rotary, slots, reach, tree
        self.positions = slots if tree is None else tree.positions
        self.texts = torch.arange(self.batch, device=slots.device)[:, None]

    def seen(self) -> torch.Tensor:
        """Which slots each row sees, bool (B, T, reach)."""
        slots = torch.arange(self.reach, device=self.slots.device)
        if self.tree is None:
            return slots <= self.slots[..., None]
        window = slots - self.tree.starts[:, None]  # (B, reach)
        inside = (window >= 0) & (window < self.tree.visible.shape[1])
        of_window = self.tree.visible[:, window.clamp(0, self.tree.visible.shape[1] - 1)].transpose(0, 1)  # (B, T, reach)
        return (window < 0)[:, None] | (inside[:, None] & of_window)

    def view(self, cache: KeyValues) -> ScatterView:
        """What the rows see and write of `cache`."""
        return ScatterView(self, cache)

    @cached_property
    def rows(self) -> native.Rows:
        """The rows as C++ reads them; on the CPU."""
        if max(int(self.slots.max()), int(self.positions.max())) >= self.rotary.capacity:
            raise ValueError(f"slot {int(self.slots.max())} of {self.rotary.capacity}")  # C++ would write elsewhere
        if self.tree is not None:
            self._held = Span(self.rotary, int(self.slots[0, 0]), self.count, 0, self.positions[0], self.tree.visible)
            return self._held.rows
        self._held = native.dense(self.slots, self.texts.expand_as(self.slots))
        slots, texts = map(native.address, self._held)
        return native.Rows(self.slots.numel(), 0, 0, slots, texts, None, *self.rotary.tables, None, 0)

    def save(self, x: torch.Tensor, store: torch.Tensor) -> None:
        """Put `x` (B·T, D) where `store` (B, S, D) has this place."""
        store[self.texts, self.slots] = x.unflatten(0, (self.batch, self.count))

    def load(self, store: torch.Tensor) -> torch.Tensor:
        """A copy (B·T, D) of what `store` (B, S, D) has at this place."""
        return store[self.texts, self.slots].flatten(0, 1)


@dataclass(frozen=True, eq=False)
class TreeRows:
    """What the rows of a tree have beside their slots; see Scatter."""

    starts: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor


class ScatterView:
    """A Scatter's angles, and what its rows may see of a cache: per block keys and values (B, K, reach, head_dim), and what to add to the scores."""

    causal = False

    def __init__(self, place: Scatter, cache: KeyValues) -> None:
        self._place, self._halves, self.angles = place, cache.halves(), place.rotary.scatter(place.positions)
        self.keys, self.values = (half[..., : place.reach, :].unbind(0) for half in self._halves)
        self.mask = cache.mask(place.seen())

    def write(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values (B·T, K, head_dim) of block `index`."""
        place = self._place
        for half, new in zip(self._halves, (keys, values), strict=True):
            half[index][place.texts, :, place.slots] = new.unflatten(0, (place.batch, place.count))


@dataclass(frozen=True)
class Kept:
    """Hidden states to be kept while a pass runs: `store` (B, S, D) gets at the rows' places what reaches block `at`."""

    at: int
    store: torch.Tensor


# ---- one block on one pass's rows ----

class Norm:
    """RMS norm of R rows into a buffer of its own."""

    def __init__(self, rows: int, eps: float, like: torch.Tensor) -> None:
        size = like.shape[-1]
        self.eps, self.normed = eps, like.new_empty(rows, size)
        self._by_sums = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)
        self._mean_square, self._eps = like.new_empty(rows, 1), like.new_full((1, 1), eps)
        self._mean = like.new_full((size, 1), 1 / size)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`x` (R, D) normed. On the CPU five small calls take two thirds of the time of torch's own one."""
        if not self._by_sums:
            return self.normed.copy_(rms_norm(x, weight.shape, weight, self.eps))
        torch.mul(x, x, out=self.normed)
        torch.addmm(self._eps, self.normed, self._mean, out=self._mean_square).rsqrt_()
        return torch.mul(x, self._mean_square, out=self.normed).mul_(weight)


class Workspace:
    """The buffers of a pass over B·T rows, with the views of them that a block uses: made once per shape."""

    def __init__(self, config: PretrainedConfig, batch: int, count: int, like: torch.Tensor) -> None:
        rows, heads, kv_heads, size = batch * count, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.norm = Norm(rows, config.rms_norm_eps, like)
        self.qkv = Product(self.norm.normed, (heads + 2 * kv_heads) * size)
        by_head = self.qkv.result.unflatten(1, (-1, size))  # (B·T, H + 2K, head_dim)
        self.unrotated, self.new_values = by_head[:, : heads + kv_heads], by_head[:, heads + kv_heads :]
        self.first_half, self.second_half = self.unrotated.chunk(2, -1)
        self.rotated = like.new_empty(rows, heads + kv_heads, size)
        self.rotated_first, self.rotated_second = self.rotated.chunk(2, -1)
        queries, self.new_keys = self.rotated[:, :heads].unflatten(0, (batch, count)), self.rotated[:, heads:]
        attended = like.new_empty(batch, count, heads, size)
        self.queries, self.attended = queries.transpose(1, 2), attended.transpose(1, 2)  # (B, H, T, head_dim)
        groups = (kv_heads, heads // kv_heads)
        self.grouped_queries, self.grouped_attended = (t.unflatten(2, groups).transpose(1, 2) for t in (queries, attended))  # (B, K, T, G, head_dim)
        self.out = Product(attended.view(rows, -1), config.hidden_size)
        self.gate_up = Product(self.norm.normed, 2 * config.intermediate_size)
        self.gate, self.up = self.gate_up.result.chunk(2, -1)
        self.gated = like.new_empty(rows, config.intermediate_size)
        self.down = Product(self.gated, config.hidden_size)

    def rotate(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotary embedding of queries and keys, from `unrotated` into `rotated`."""
        torch.mul(self.unrotated, cos, out=self.rotated)
        self.rotated_first.addcmul_(self.second_half, sin, value=-1)
        self.rotated_second.addcmul_(self.first_half, sin)

    def attend(self, keys: torch.Tensor, values: torch.Tensor, causal: bool, mask: torch.Tensor | None) -> None:
        """Attention of the queries over keys and values (B, K, N, head_dim), into `attended`.

        Under a mask the G query heads of a key-value head stand as further rows, so that no key is repeated.
        """
        if mask is None:
            self.attended.copy_(scaled_dot_product_attention(self.queries, keys, values, is_causal=causal, enable_gqa=True))
        else:
            mixed = scaled_dot_product_attention(self.grouped_queries.flatten(2, 3), keys, values, attn_mask=mask)
            self.grouped_attended.copy_(mixed.view(self.grouped_attended.shape))


def run_block(block: Block, x: torch.Tensor, view: SpanView | ScatterView, index: int, space: Workspace) -> None:
    """One decoder block, number `index` of the cache, on `x` (B·T, D) in place."""
    space.norm(x, block.attention_norm)
    space.qkv(block.qkv)
    space.rotate(*view.angles)
    view.write(index, space.new_keys, space.new_values)
    space.attend(view.keys[index], view.values[index], view.causal, view.mask)
    x.add_(space.out(block.out))
    if block.gate_up is None:
        return
    space.norm(x, block.mlp_norm)
    space.gate_up(block.gate_up)
    torch.mul(silu(space.gate, inplace=True), space.up, out=space.gated)
    x.add_(space.down(block.down))


class Stack:
    """Blocks with the cache that they write to: `run` puts a pass through some of them."""

    def __init__(self, layers: Iterable[nn.Module], cache: KeyValues, config: PretrainedConfig, like: torch.Tensor, cpp: bool = True) -> None:
        self.blocks, self.cache = [Block(layer) for layer in layers], cache
        self._config, self._like = config, like
        self._spaces: dict[tuple[int, int], Workspace] = {}
        self._native = NativeStack(self.blocks, cache, config) if cpp and NativeStack.serves(self.blocks, config, like) else None

    def run(self, x: torch.Tensor, place: Span | Scatter, first: int = 0, last: int | None = None, kept: Kept | None = None) -> torch.Tensor:
        """`x` (B·T, D) through blocks first … last−1 (default: to the last), in place."""
        last = len(self.blocks) if last is None else last
        if self._native is not None and len(x) <= native.UP_TO[x.dtype]:
            self._native.run(x, place, first, last, kept)
            return x
        space, view = self._space(place), place.view(self.cache)
        for index in range(first, last + 1):
            if kept is not None and index == kept.at:
                place.save(x, kept.store)
            if index < last:
                run_block(self.blocks[index], x, view, index, space)
        return x

    def _space(self, place: Span | Scatter) -> Workspace:
        shape = (place.batch, place.count)
        if shape in self._spaces:
            return self._spaces[shape]
        space = Workspace(self._config, *shape, self._like)
        if place.count <= KEPT_WIDTHS:
            self._spaces[shape] = space
        return space


class NativeStack:
    """The same for a few rows on the CPU, in one call (llama_blocks.cpp).

    A row gets the same bits in passes of any width and batch, so what a text decodes to does not depend on how it was
    drafted, nor on the other texts.
    """

    def __init__(self, blocks: list[Block], cache: KeyValues, config: PretrainedConfig) -> None:
        self._blocks = (native.BlockPointers * len(blocks))(*[_pointers(block, cache, index) for index, block in enumerate(blocks)])
        self._shape = native.Shape(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size,
            cache.store.shape[3], cache.store.stride(1), config.rms_norm_eps,
        )
        self._call = native.function("run_blocks", cache.store.dtype)

    @staticmethod
    def serves(blocks: list[Block], config: PretrainedConfig, like: torch.Tensor) -> bool:
        """Whether the C++ can run these blocks: it reads dense tensors."""
        dense = all(tensor is None or tensor.is_contiguous() for block in blocks for tensor in block.tensors())
        return dense and native.serves(like.dtype, like.device, config.hidden_size, config.intermediate_size, config.head_dim)

    def run(self, x: torch.Tensor, place: Span | Scatter, first: int, last: int, kept: Kept | None) -> None:
        """As Stack.run."""
        blocks = ctypes.addressof(self._blocks) + first * ctypes.sizeof(native.BlockPointers)
        store, at = (None, 0) if kept is None else (native.address(kept.store), kept.at - first)
        self._call(native.Pass(blocks, last - first, native.address(x), store, at), self._shape, place.rows, torch.get_num_threads())


def _pointers(block: Block, cache: KeyValues, index: int) -> native.BlockPointers:
    keys, values = cache.store[index, 0, : cache.heads], cache.store[index, 0, cache.heads :]
    return native.BlockPointers(*map(native.address, [*block.tensors(), keys, values]))


class Head:
    """Final norm and output matrix, or two of them in a row: hidden states (R, D) -> logits (R, V)."""

    def __init__(self, norm: nn.Module, head: nn.Linear | nn.Sequential, eps: float, cpp: bool = True) -> None:
        self._norm, self._eps = norm.weight.detach(), eps
        self._projections = [single(linear) for linear in (head if isinstance(head, nn.Sequential) else [head])]
        self._spaces: dict[int, tuple[Norm, list[Product]]] = {}
        self._native = self._pointers(*_tensors(self._projections[-1])) if cpp and self._fits_cpp() else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (R, V); valid until the next call with as many rows."""
        self._read = x
        if self._native is not None and len(x) <= native.UP_TO[x.dtype]:
            return self._run_native(x.contiguous())
        norm, products = self._spaces.get(len(x)) or self._new_space(x)
        norm(x, self._norm)
        for product, projection in zip(products, self._projections, strict=True):
            logits = product(projection)  # each product reads the one before
        return logits.contiguous()

    @property
    def size(self) -> int:
        """D."""
        return len(self._norm)

    def states(self) -> torch.Tensor:
        """What the output matrix was given in the last call: hidden states (R, D) behind the norm, in fp32."""
        return rms_norm(self._read.float(), self._norm.shape, self._norm.float(), self._eps)

    def _fits_cpp(self) -> bool:
        tensors = [self._norm, *chain.from_iterable(map(_tensors, self._projections))]
        *sizes, outputs, last = chain.from_iterable(projection.weight.shape for projection in self._projections)
        dense = all(tensor is None or tensor.is_contiguous() for tensor in tensors)
        return dense and outputs >= native.OUTPUTS and native.serves(self._norm.dtype, self._norm.device, *sizes, last)

    def _pointers(self, weight: torch.Tensor, bias: torch.Tensor | None) -> native.Head:
        """The head with the last matrix `weight` (n, K), of which C++ makes as many outputs as it can: a multiple of native.OUTPUTS."""
        tensors = [self._norm, *_tensors(self._projections[0] if len(self._projections) > 1 else None), weight, bias]
        n, k = weight.shape
        return native.Head(*map(native.address, tensors), len(self._norm), k, n - n % native.OUTPUTS, self._eps)

    def _run_native(self, x: torch.Tensor) -> torch.Tensor:
        logits, last = self._call_native(self._native, x), self._projections[-1]
        rest = len(last.weight) % native.OUTPUTS
        if rest == 0:
            return logits
        padded = (None if tensor is None else pad(tensor[-rest:], (0, 0) * (tensor.dim() - 1) + (0, native.OUTPUTS - rest)) for tensor in _tensors(last))
        weight, bias = padded  # made anew, as weights may change where they lie
        return torch.cat([logits, self._call_native(self._pointers(weight, bias), x)[:, :rest]], 1)

    @staticmethod
    def _call_native(head: native.Head, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), head.n)
        native.function("run_head", x.dtype)(head, native.address(x), native.address(out), len(x), torch.get_num_threads())
        return out

    def _new_space(self, x: torch.Tensor) -> tuple[Norm, list[Product]]:
        norm = Norm(len(x), self._eps, x)
        products: list[Product] = []
        for projection in self._projections:
            products.append(Product(products[-1].result if products else norm.normed, len(projection.weight)))
        if len(x) <= KEPT_WIDTHS:
            self._spaces[len(x)] = (norm, products)
        return norm, products


# ---- the model ----

class StaticLlama:
    """A Llama with a cache of `capacity` slots for each of `batch` texts; `parts` may be an exit's.

    `token_ids` (V_d,) names the tokens of the logits' columns where the head knows only part of the vocabulary.

    `lengths[b]` tokens of text b are in the cache; `calls` passes over `tokens` tokens were made. `forward` computes a
    pass behind them, `advance` counts it as appended, `crop` rolls back; after any sequence of these the cache equals that of a fresh
    pass over the same tokens. With one text on the CPU all places are known on the host and nothing is masked that
    need not be computed; otherwise they are device tensors, so that a CUDA graph can replay a pass.
    """

    def __init__(self, model: LlamaForCausalLM, capacity: int, batch: int = 1, parts: Parts | None = None, *, cpp: bool = True) -> None:
        """`cpp` False: torch's calls also where the C++ could run. Raises ValueError for a model that `why_unsupported` names."""
        reason = why_unsupported(model, parts)
        if reason is not None:
            raise ValueError(f"StaticLlama cannot run {reason}")
        parts = parts or Parts.of(model)
        self.config, self.batch, self.token_ids = model.config, batch, parts.token_ids
        self.embedding = model.model.embed_tokens.weight.detach()
        self.device = self.embedding.device
        self.on_host = self.device.type == "cpu" and batch == 1
        self.capacity = -(-capacity // REACH_STEP) * REACH_STEP
        with torch.inference_mode(False), torch.no_grad():
            self.cache = KeyValues(len(parts.layers), batch, self.capacity, self.config, self.embedding)
            self.stack = Stack(parts.layers, self.cache, self.config, self.embedding, cpp)
            self.head = Head(parts.norm, parts.head, self.config.rms_norm_eps, cpp)
            self.rotary = Rotary(model.model.rotary_emb, self.embedding, self.capacity, batch)
        self._weights, self._settings = weights_at(model.model.embed_tokens, *parts.modules()), _settings(model)
        self.programs = Programs(self.device)
        self.start()

    def serves(self, model: nn.Module, capacity: int, batch: int, engine: str, parts: Parts | None = None) -> bool:
        """Whether this object can decode `batch` texts of up to `capacity` tokens of `model`, its arguments at construction still true.

        `engine` as in speculative.DecodeOptions.
        """
        if engine != "static" or batch != self.batch or capacity > self.capacity or why_unsupported(model, parts) is not None:
            return False
        weights = weights_at(model.model.embed_tokens, *(parts or Parts.of(model)).modules())
        return self._weights == weights and self._settings == _settings(model)

    def start(self, prompt_lengths: list[int] | None = None, ahead: int = 0) -> None:
        """Forget all tokens and counts. `prompt_lengths` matter to dynamic NTK scaling only (see Rotary); passes will fill up to `ahead` slots behind the cached
        tokens, or KEPT_WIDTHS."""
        self.lengths, self.calls, self.tokens, self.ahead = [0] * self.batch, 0, 0, max(ahead, KEPT_WIDTHS)
        self.rotary.start(prompt_lengths or [0] * self.batch)
        if not self.on_host:
            self.cache.store.zero_()  # masked slots are multiplied by 0, which a number that is none survives

    def starts(self) -> torch.Tensor:
        """Where the next pass begins in each text, int64 (B,) on the device."""
        return torch.tensor(self.lengths, device=self.device)

    @property
    def reach(self) -> int:
        """Slots that a pass which ends up to `ahead` behind the cached tokens may see, where places are device tensors."""
        return min(self.capacity, -(-(max(self.lengths) + self.ahead) // REACH_STEP) * REACH_STEP)

    def place(self, starts: torch.Tensor, count: int, offset: int = 0) -> Span | Scatter:
        """`count` rows behind the cached tokens of every text and `offset` further ones."""
        if self.on_host:
            return Span(self.rotary, self.lengths[0] + offset, count)
        if max(self.lengths) + offset + count > self.capacity:
            raise ValueError(f"{count} tokens behind {max(self.lengths) + offset} exceed the cache's {self.capacity} slots")
        positions = (starts[:, None] + torch.arange(offset, offset + count, device=self.device)).clamp(min=0)  # ended texts may be empty
        return Scatter(self.rotary, positions, self.reach)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (B·T, D) of `tokens` (B, T)."""
        return embedding(tokens.reshape(-1), self.embedding)

    def forward(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) that follow each of `tokens` (B, T), fed at `starts` (B,); valid until the next pass of that shape."""
        x = self.stack.run(self.embed(tokens), self.place(starts, tokens.shape[1]))
        return self.head(x).view(*tokens.shape, -1)

    def place_tree(self, starts: torch.Tensor, depths: torch.Tensor, visible: torch.Tensor) -> Span | Scatter:
        """T rows of the only text in the last of the W slots from `starts` (1,), at the positions starts + `depths` (T,); row i sees all before
        these slots, and of them what `visible` (T, W) says."""
        count, window = visible.shape
        if self.on_host:
            start = int(starts)
            return Span(self.rotary, start + window - count, count, positions=start + depths, visible=visible)
        if max(self.lengths) + window > self.capacity or window > self.ahead:
            raise ValueError(f"{window} nodes behind {max(self.lengths)} tokens exceed the cache's {self.capacity} slots, or the {self.ahead} that were announced")
        slots = starts[:, None] + torch.arange(window - count, window, device=self.device)
        return Scatter(self.rotary, slots, self.reach, TreeRows(starts, starts[:, None] + depths, visible))

    def forward_tree(self, tokens: torch.Tensor, starts: torch.Tensor, depths: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Logits (T, V) that follow the nodes `tokens` (T,), placed as `place_tree` says; valid until the next pass of that shape."""
        return self.head(self.stack.run(self.embed(tokens), self.place_tree(starts, depths, visible)))

    def advance(self, count: int) -> None:
        """Count the `count` tokens of a pass as appended to every text."""
        self.lengths = [length + count for length in self.lengths]
        self.note(count)

    def note(self, count: int) -> None:
        """Count a pass over `count` tokens of every text that the cache does not keep."""
        self.calls += 1
        self.tokens += count * self.batch

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """`forward` and `advance`: logits (B, T, V) of `tokens` (B, T)."""
        logits = self.forward(tokens, self.starts())
        self.advance(tokens.shape[1])
        return logits

    def prefill(self, prompts: list[list[int]], images: list[ImageEmbeddings | None] | None = None) -> None:
        """Fill the cache with a text each, without logits; an empty one is no change. `images`: those of each text."""
        for row, prompt in enumerate(prompts):
            for x, place in self.prefill_passes(row, prompt, images and images[row]):
                self.stack.run(x, place)

    def prefill_passes(self, row: int, prompt: list[int], images: ImageEmbeddings | None = None) -> Iterator[tuple[torch.Tensor, Span]]:
        """Embeddings (T, D) and place of each piece of `prompt`, to be run through all blocks."""
        for start in range(0, len(prompt), PREFILL_CHUNK):
            x = self.embed(torch.tensor(prompt[start : start + PREFILL_CHUNK], device=self.device))
            yield x if images is None else images.write_into(x, start), Span(self.rotary, start, len(x), row)
        self.lengths[row] = len(prompt)

    def crop(self, lengths: list[int]) -> None:
        """Forget what is behind the first `lengths[b]` tokens of text b; more than are held is no change."""
        self.lengths = [min(held, length) for held, length in zip(self.lengths, lengths, strict=True)]

    def keep(self, start: int, nodes: torch.Tensor) -> None:
        """Behind the only text's first `start` tokens keep of a tree that was run there the `nodes` (N,), ascending."""
        self.cache.move(0, start + nodes, start)
        self.lengths = [start + len(nodes)]

    def layers(self, row: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) of each block, (1, K, length, head_dim): for tests that compare caches."""
        keys, values = (half[:, row : row + 1, :, : self.lengths[row]] for half in self.cache.halves())
        return list(zip(keys, values, strict=True))
