"""A Llama of any shape with random weights and an exit of chosen acceptance: to measure decoding speed where weights can't be had.

    pair = planted_pair(config, 1, alpha=0.8, policy=policy, dtype=torch.bfloat16)
    generation = generate(pair.model, prompt_ids, DecodeOptions("self_speculative", policy), pair.draft)

Shapes, bytes and acceptance are true, so seconds are; the text means nothing. What the blocks behind the exit write into
the residual stream is scaled by one factor s: at 0 the exit is the target, at large s they have nothing in common.

Four things make random weights look, to decoding, like a chat model's:
- Peaked distributions. The final norm's weight is one constant, chosen so that the mean entropy at temperature 1 is ENTROPY.
  The head itself can't be scaled: where it is tied it is the embedding, and untying it would change what memory holds.
- Common and rare tokens. The larger an id, the shorter its row of the head, so that ids are emitted by the law of Zipf
  and Mandelbrot. An exit with a part of the vocabulary then knows most of the text, as real ones do.
- No loops. Sharp attention picks single tokens out of the context. A random model that averages over its context soon
  repeats itself, greedy and sampled alike.
- No copies. The first block's MLP writes √D times what the embedding is, so a tied head hardly sees which token was the last;
  its attention writes no more than the embedding, or the last token would not matter at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from running.command_line import UserError

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from decoding.sampling import Noise, SamplingPolicy, policy_probs
from decoding.state import DecodeState
from decoding.vanilla import vanilla_round
from decoding.verify import Verification, expected_acceptance
from engine.static_llama import StaticLlama
from truncated_llama import Exit, TruncatedLlama, prepare_pass, run_blocks

ENTROPY = 1.5  # nats: mean over positions, temperature 1
RANK_SHIFT, RANK_POWER = 10, 1.5  # id i is emitted about (i + 10)^-1.5 often: a quarter of 32,000 ids makes 95 % of the text
# A weight's standard deviation is gain / √inputs, so a map writes `gain` times what it reads. With queries and keys of gain 1, 25 to 38 %
# of the 4-grams of greedy text are repetitions, with 3 about 5 % (the shape of tests/test_planted.py). SiLU(x)·y of standard normal
# x and y has the root mean square 0.6.
GAINS = {"embed_tokens": 1.0, "lm_head": 1.0, "q_proj": 3.0, "k_proj": 3.0, "v_proj": 1.0, "o_proj": 0.5, "gate_proj": 1.0, "up_proj": 1.0,
         "down_proj": 1 / 0.6}

TEXTS, PROMPT_TOKENS, NEW_TOKENS = 32, 8, 32  # acceptance is the mean over 1024 positions: standard error 0.013 at α = 0.8, temperature 0
TOLERANCE = 0.02  # of the acceptance on text that was written with s
CLOSE = 0.01  # of the acceptance on the text that s is searched on
SCALES = (2.0**-12, 2.0**4)  # s lies between them, or is 0
ROUNDS, STEPS = 10, 20  # at most so many texts, and values of s on each
ROWS = 64  # positions whose distributions are held at a time


@dataclass(frozen=True)
class PlantedPair:
    """A frozen target, an exit of it, the acceptance that was measured (see `planted_pair`) and the scale s that gave it."""

    model: LlamaForCausalLM
    draft: TruncatedLlama
    alpha: float
    scale: float


@torch.no_grad()
def planted_pair(
    config: LlamaConfig,
    target_layer: int,
    alpha: float,
    policy: SamplingPolicy,
    verification: Verification = "rejection",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    draft_vocab_size: int | None = None,
) -> PlantedPair:
    """A random target of shape `config` and an untuned exit at `target_layer` whose acceptance is `alpha`, within TOLERANCE.

    Acceptance is `expected_acceptance` under `policy` and `verification`, mean over positions of text that the target itself
    writes. With `draft_vocab_size` the exit's head knows only that many tokens, those that the target writes most: `exit.token_ids`.
    Weights are drawn in `dtype` and nothing is held twice; equal arguments give equal weights. Raises UserError for an `alpha`,
    layer or vocabulary that cannot be, and ValueError for a model that StaticLlama cannot run.
    """
    _check(config, alpha, draft_vocab_size)
    target = _empty_llama(config, target_layer, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    _randomise(target, generator)
    _sharpen(target, generator)
    planting = _Planting(target, target_layer, policy, verification, generator)
    planting.rescale(planting.likely_scale(alpha))
    if draft_vocab_size is not None:
        planting.trim(draft_vocab_size)
    achieved = planting.reach(alpha)
    return PlantedPair(target, TruncatedLlama(target, planting.exit), achieved, planting.scale)


def _check(config: LlamaConfig, alpha: float, draft_vocab_size: int | None) -> None:
    if not 0 < alpha <= 1:
        raise UserError(f"alpha {alpha}: an acceptance is more than 0 and at most 1")
    if draft_vocab_size is not None and (draft_vocab_size % 16 or not 0 < draft_vocab_size <= config.vocab_size):
        raise UserError(f"draft_vocab_size {draft_vocab_size}: choose a multiple of 16, at most the vocabulary of {config.vocab_size} tokens")
    if draft_vocab_size is not None and alpha == 1:
        raise UserError(f"alpha 1: an exit that knows {draft_vocab_size} tokens is not always accepted; choose less, or leave it all tokens")


# ---- weights ----

def _empty_llama(config: LlamaConfig, target_layer: int, dtype: torch.dtype, device: torch.device | str) -> LlamaForCausalLM:
    """A frozen model without values: they come to be in their own dtype and place. Raises UserError for a layer that it would lack."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
        Exit(model, target_layer)  # refuses a wrong layer while nothing has been allocated
    model.to_empty(device=device).tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # holds no weights, but its tables have lost their values, too
    return model.eval().requires_grad_(False)


def _randomise(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Fill every parameter, in place and in its own dtype."""
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        if module.endswith("norm"):
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0, GAINS[module] / math.sqrt(parameter.shape[1]), generator=generator)
    model.model.layers[0].self_attn.o_proj.weight.div_(math.sqrt(model.config.hidden_size))
    sizes = _row_sizes(model.config.vocab_size)[:, None]
    for rows in {model.model.embed_tokens.weight, model.lm_head.weight}:
        rows.mul_(sizes.to(rows))


def _row_sizes(vocab_size: int) -> torch.Tensor:
    """How large each token's row of the head is, (V,), at most 1.

    Token i wins where its logit, normal with a deviation of that size, passes a level that all tokens share. For it to do so with
    frequency f_i, the size must be inversely proportional to the normal quantile of 1 − f_i.
    """
    frequencies = (torch.arange(vocab_size, dtype=torch.float64) + RANK_SHIFT) ** -RANK_POWER
    quantiles = torch.special.ndtri(1 - frequencies / frequencies.sum())
    return quantiles[0] / quantiles


def _sharpen(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Set the final norm's weight to the constant by which the mean entropy on random text is ENTROPY."""
    ids = torch.randint(model.config.vocab_size, (2, 64), generator=generator, device=model.device)
    logits = model(ids, use_cache=False).logits.flatten(0, 1).float()  # (128, V)

    def entropy(weight: float) -> float:
        log_probs = (weight * logits).log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1).mean().item()

    low, high = 1.0, 100.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if entropy(middle) > ENTROPY else (low, middle)
    model.model.norm.weight.fill_(low)


def _writes(blocks: Iterable[nn.Module]) -> list[nn.Linear]:
    """The linear maps by which `blocks` write into the residual stream."""
    return [linear for block in blocks for linear in (block.self_attn.o_proj, block.mlp.down_proj)]


@contextmanager
def _scaled_writes(blocks: Iterable[nn.Module], factor: float) -> Iterator[None]:
    """Inside, `blocks` write `factor` times what their weights say: no weight is rounded on the way to the right scale."""
    handles = [linear.register_forward_hook(lambda module, inputs, output: output * factor) for linear in _writes(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- acceptance ----

class _Planting:
    """A pair on the way to its acceptance. `scale` is what the writes behind the exit were multiplied by so far."""

    def __init__(
        self, target: LlamaForCausalLM, target_layer: int, policy: SamplingPolicy, verification: Verification, generator: torch.Generator
    ) -> None:
        self.target, self.exit = target, Exit(target, target_layer)
        self.policy, self.verification, self.scale = policy, verification, 1.0
        self._generator = generator
        self._engine = StaticLlama(target, PROMPT_TOKENS + NEW_TOKENS, TEXTS)
        self._shared, self._behind = target.model.layers[: self.exit.prefix], target.model.layers[self.exit.prefix :]

    def likely_scale(self, alpha: float) -> float:
        """About the s that gives `alpha`: writes of independent blocks add up as squares (found for 6 and 16 blocks, from 2 and 4 on)."""
        if alpha == 1:
            return 0.0
        depth = math.sqrt(self.exit.prefix / max(1, len(self._behind)))
        return min(max(0.14 * depth * (_odds(alpha) / _odds(0.8)) ** 0.8, SCALES[0]), SCALES[1])

    def rescale(self, scale: float) -> None:
        """Bring the weights from `self.scale` to `scale`, in place: engines over them see it. Rounds each of them once."""
        for linear in _writes(self._behind):
            linear.weight.mul_(scale / self.scale)
        self.scale = scale

    def trim(self, size: int) -> None:
        """Leave the exit the `size` tokens that the target writes most; of equally frequent ones, the lowest."""
        counts = self.write()[:, PROMPT_TOKENS:].flatten().bincount(minlength=self.target.config.vocab_size)
        self.exit = self.exit.trimmed(counts.argsort(descending=True, stable=True)[:size].sort().values)

    def write(self) -> torch.Tensor:
        """New texts of the target as it is, behind random prompts: int64 (TEXTS, PROMPT_TOKENS + NEW_TOKENS)."""
        prompts = torch.randint(self.target.config.vocab_size, (TEXTS, PROMPT_TOKENS), generator=self._generator, device=self.target.device).tolist()
        noise = Noise.of(self._generator.initial_seed(), list(range(TEXTS)), self.target.device)
        state = DecodeState(self._engine, None, self.policy, noise, prompts)
        self._engine.start([PROMPT_TOKENS] * TEXTS)
        self._engine.prefill([prompt[:-1] for prompt in prompts])
        for _ in range(NEW_TOKENS):
            for text, result in zip(state.committed, vanilla_round(state), strict=True):
                text += result.tokens
        return torch.tensor(state.committed, device=self.target.device)

    def acceptance_on(self, texts: torch.Tensor) -> Callable[[float], float]:
        """Mean expected acceptance on what is new in `texts` (of `write`), as a function of s. What s does not change is computed once."""
        embedded, inputs = prepare_pass(self.target, texts)
        at_exit = run_blocks(self._shared, embedded, inputs)
        draft_logits = self.exit(_before_new(at_exit)[None], {})[0]  # (TEXTS·NEW_TOKENS, V)

        @cache
        def acceptance(scale: float) -> float:
            with _scaled_writes(self._behind, 1.0 if scale == self.scale else scale / self.scale):
                at_end = run_blocks(self._behind, at_exit, inputs)
            pieces = zip(_before_new(at_end).split(ROWS), draft_logits.split(ROWS), strict=True)
            return sum(self._accepted(*piece) for piece in pieces) / len(draft_logits)

        return acceptance

    def _accepted(self, at_end: torch.Tensor, draft_logits: torch.Tensor) -> float:
        """Sum of the expected acceptances of R positions: hidden states (R, D) behind the last block, logits (R, V) of the exit."""
        p = policy_probs(self.target.lm_head(self.target.model.norm(at_end)), self.policy)
        q = policy_probs(draft_logits, self.policy)
        possible = (p + q > 0).any(0)  # of a large vocabulary few: coupled acceptance sorts them
        return expected_acceptance(p[:, possible], q[:, possible], self.verification).sum().item()

    def reach(self, alpha: float) -> float:
        """Find the scale that gives `alpha`; returns what it gives on text that was written with it. Raises UserError.

        Text and scale depend on each other, though little: a text leads to another scale until one confirms the scale it was written with.
        """
        for _ in range(ROUNDS):
            acceptance = self.acceptance_on(self.write())
            found = acceptance(self.scale)
            if abs(found - alpha) <= TOLERANCE:
                return found
            scale = _search(acceptance, alpha, self.scale)
            if scale is None:
                lowest, highest = acceptance(SCALES[1]), acceptance(0.0)
                raise UserError(f"alpha {alpha} is out of reach of an exit at layer {self.exit.target_layer} that knows "
                                f"{self.exit.head.out_features} tokens: choose one from {lowest:.2f} to {highest:.2f}")
            self.rescale(scale)
        raise UserError(f"alpha {alpha}: this model's texts differ too much in acceptance (the last had {found:.2f}); choose another seed")


def _before_new(hidden: torch.Tensor) -> torch.Tensor:
    """Of hidden states (TEXTS, T, D) of `_Planting.write`'s texts those that a new token follows, (TEXTS·NEW_TOKENS, D)."""
    return hidden[:, PROMPT_TOKENS - 1 : -1].flatten(0, 1)


def _search(acceptance: Callable[[float], float], alpha: float, scale: float) -> float | None:
    """The s in SCALES at which `acceptance`, which falls with s, is `alpha`, and None where there is none; `scale` is the first guess.

    Bisection with better guesses where they lie in the bracket: (1 − α)/α grows about as s^1.25.
    """
    low, high = SCALES
    for _ in range(STEPS):
        found = acceptance(scale)
        if abs(found - alpha) <= CLOSE:
            return scale
        low, high = (scale, high) if found > alpha else (low, scale)
        guess = scale * (_odds(alpha) / _odds(found)) ** 0.8
        scale = guess if low < guess < high else math.sqrt(low * high)
    return None


def _odds(acceptance: float) -> float:
    """Of a rejection: (1 − α)/α, kept finite and above 0."""
    kept = min(max(acceptance, 1e-4), 1 - 1e-4)
    return (1 - kept) / kept
