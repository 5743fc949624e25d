"""Models small enough to know exactly, and the checks of exactness that the tests and the planted bugs share."""

from __future__ import annotations

import copy
import math
from itertools import accumulate, pairwise
from types import SimpleNamespace

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.dynamic_tree import DynamicTree
from decoding.growmap import Growmap
from decoding.sampling import SamplingPolicy, policy_probs
from decoding.specexec import SpecExec
from decoding.state import DecodeStats, RoundResult
from decoding.static_tree import StaticTree
from engine.static_llama import StaticLlama
from speculative import DecodeOptions, generate, generate_batch
from truncated_llama import Exit, ExitForm, TruncatedLlama

TOY_VOCAB = 8


class BigramModel(nn.Module):
    """A first-order language model: the next token's logits are a row of a table. Called as transformers' models are, and counts it."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table, self.calls = table, 0
        self.device, self.dtype = table.device, table.dtype
        self.config = SimpleNamespace(vocab_size=len(table), max_position_embeddings=10**9)

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


def bigram_pair(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[BigramModel, BigramModel]:
    """A target and a draft that differs from it by logit noise. In fp32 sampling and verification run in C++."""
    generator = torch.Generator().manual_seed(seed)
    table = 1.5 * torch.randn(TOY_VOCAB, TOY_VOCAB, generator=generator, dtype=torch.float64)
    noise = torch.randn(TOY_VOCAB, TOY_VOCAB, generator=generator, dtype=torch.float64)
    return BigramModel(table.to(dtype)), BigramModel((table + noise).to(dtype))


def context_free_pair(p: list[float], q: list[float], dtype: torch.dtype = torch.float64) -> tuple[BigramModel, BigramModel]:
    """A target and a draft that draw every token from p and from q."""
    return tuple(BigramModel(torch.tensor([law] * len(law), dtype=dtype).log()) for law in (p, q))


def tiny_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A random 4-block Llama with GQA, tied embeddings and Llama-3 RoPE scaling, fp64, peaked enough to disagree with itself."""
    rope = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128}
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True, "initializer_range": 0.3}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**shape, "rope_parameters": rope, **overrides})).double().eval().requires_grad_(False)


def native_llama(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """`tiny_llama` in fp32, of sizes that the C++ blocks take (multiples of 16)."""
    return tiny_llama(seed, **{"hidden_size": 64, "intermediate_size": 96, **overrides}).float()


def noisy_exit(target: LlamaForCausalLM, layer: int, own_block: bool = False, scale: float = 0.05) -> TruncatedLlama:
    """A truncated draft whose exit was disturbed, so that it differs from the target in every tensor that it owns."""
    exit_ = Exit(target, layer, ExitForm("last" if own_block else "none"))
    generator = torch.Generator().manual_seed(layer)
    for parameter in exit_.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return TruncatedLlama(target, exit_.requires_grad_(False))


def decode(target: nn.Module, draft: nn.Module | None, prompt: list[int], prompt_id: int = 0, **options: object) -> tuple[list[int], DecodeStats]:
    """Tokens and stats of one generation; speculative where there is a draft and no other method is named."""
    method = "vanilla" if draft is None else "speculative"
    generation = generate(target, prompt, DecodeOptions(**{"method": method, **options}), draft, prompt_id=prompt_id)
    return generation.tokens, generation.stats


def some_prompts(count: int, vocab_size: int = 64, longest: int = 12) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def chi_square_p(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """p-value of Pearson's test for counts (R, V) against expected ones, rows given; cells expected below 5 are pooled per row.

    Wilson and Hilferty's cube-root normal approximation.
    """
    statistic, freedom = 0.0, 0
    for seen, wanted in zip(observed.double(), expected.double(), strict=True):
        large = wanted >= 5
        pairs = [(seen[large], wanted[large]), (seen[~large].sum()[None], wanted[~large].sum()[None])]
        cells = [(s, w) for ss, ws in pairs for s, w in zip(ss.tolist(), ws.tolist(), strict=True) if w >= 5]
        statistic += sum((s - w) ** 2 / w for s, w in cells)
        freedom += max(0, len(cells) - 1)
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def transition_p(pairs: list[tuple[int, int]], target: BigramModel, policy: SamplingPolicy) -> float:
    """p-value of observed (token, next token) pairs under the target's law of the next token given the first."""
    counts = torch.zeros_like(target.table)
    for first, second in pairs:
        counts[first, second] += 1
    assert not counts[policy_probs(target.table, policy) == 0].any(), "a token of probability 0 was emitted"
    return chi_square_p(counts, counts.sum(1, keepdim=True) * policy_probs(target.table, policy))


# ---- checks: each raises AssertionError when a law or an equality does not hold ----

def check_same_text(
    target: nn.Module, draft: nn.Module, policy: SamplingPolicy, verification: str, count: int = 6, **options: object
) -> list[DecodeStats]:
    """Speculative text equals vanilla's, token for token, on `count` prompts. Returns the speculative stats."""
    settings = {"policy": policy, "max_new_tokens": 32, "seed": 5}
    found = []
    for prompt_id, prompt in enumerate(some_prompts(count)):
        vanilla, _ = decode(target, None, prompt, prompt_id, **settings)
        speculated, stats = decode(target, draft, prompt, prompt_id, **{**settings, "gamma": 3, "verification": verification, **options})
        assert speculated == vanilla
        found.append(stats)
    return found


def check_all_accepted(target: nn.Module, draft: nn.Module, policy: SamplingPolicy, verification: str, count: int = 6, **options: object) -> None:
    """A draft that equals the target has every proposal accepted."""
    for prompt_id, prompt in enumerate(some_prompts(count)):
        _, stats = decode(target, draft, prompt, prompt_id, policy=policy, verification=verification, max_new_tokens=16, **options)
        assert all(r.accepted == r.proposed for r in stats.rounds)


def check_law(
    policy: SamplingPolicy, verification: str, tokens: int = 2500, pair: tuple[BigramModel, BigramModel] | None = None, gamma: object = 2
) -> DecodeStats:
    """In one long generation, tokens behind a round boundary and tokens within a round have the target's law."""
    target, draft = pair or bigram_pair()
    before = target.calls, draft.calls
    text, stats = decode(target, draft, [0], policy=policy, verification=verification, gamma=gamma, max_new_tokens=tokens, seed=3, record_overlap=True)
    assert stats.target_calls == target.calls - before[0] == len(stats.rounds)
    assert stats.draft_calls == draft.calls - before[1] == sum(r.proposed for r in stats.rounds)
    text = [0, *text]
    boundaries = set(accumulate((len(r.tokens) for r in stats.rounds), initial=0))
    pairs = list(zip(text[:-1], text[1:], strict=True))
    across = [pair for i, pair in enumerate(pairs) if i in boundaries]
    within = [pair for i, pair in enumerate(pairs) if i not in boundaries]
    assert transition_p(across, target, policy) > 1e-4, "law behind a round boundary"
    assert transition_p(within, target, policy) > 1e-4, "law within a round"
    return stats


def check_first_two_tokens(policy: SamplingPolicy, verification: str, runs: int = 2000, dtype: torch.dtype = torch.float64) -> None:
    """The joint law of the first two tokens after a fixed prompt, over independent generations.

    γ = 1, so the second token is behind a round boundary whenever the first draft was rejected.
    """
    target, draft = bigram_pair(dtype=dtype)
    counts = torch.zeros(TOY_VOCAB, TOY_VOCAB)
    for prompt_id in range(runs):
        (first, second), _ = decode(target, draft, [0], prompt_id, policy=policy, verification=verification, gamma=1, max_new_tokens=2)
        counts[first, second] += 1
    p = policy_probs(target.table, policy)
    joint = p[0][:, None] * p
    assert chi_square_p(counts.flatten()[None], runs * joint.flatten()[None]) > 1e-4


class PeekingLength:
    """Drafts in a round only if the signal that ended the round before was no larger than `limit`.

    It asks signals alone, so it is a rule that rejection verification has to be exact under. The signal behind a drafted
    token tells which it was, though it was thrown away; were it drawn again with the same noise, the rule would choose its draft.
    """

    wants_signals = True

    def __init__(self, longest: int, limit: float) -> None:
        self.longest, self.limit, self.last = longest, limit, -math.inf

    def goes_on(self, drafted: int, signals: list[torch.Tensor]) -> bool:
        return drafted < self.longest and (drafted > 0 or self.last <= self.limit)

    def learn(self, signals: list[torch.Tensor], results: list[RoundResult], seconds: float) -> None:
        self.last = float(signals[-1]) if signals else -math.inf


def check_law_under_a_peeking_rule(dtype: torch.dtype, tokens: int = 2500) -> None:
    """A rule that learns from drafted tokens that were thrown away changes no law: looked at where the next round drafts again."""
    p, q = [0.1, 0.5, 0.4], [0.5, 0.1, 0.4]
    target, _ = context_free_pair(p, q, dtype)
    draft = BigramModel(torch.tensor([q, q, [0.499, 0.1, 0.401]], dtype=dtype).log())  # the third row's largest entry tells that token 2 was drafted
    rule = PeekingLength(3, math.log(0.4995 / 0.5005))
    _, stats = decode(target, draft, [0], policy=SamplingPolicy(1.0), gamma=rule, max_new_tokens=tokens, seed=3)
    again = [now.tokens[0] for before, now in pairwise(stats.rounds) if before.proposed == 3 and before.accepted == 0 and now.proposed]
    counts = torch.bincount(torch.tensor(again), minlength=3)
    assert len(again) > 100 and chi_square_p(counts[None], len(again) * torch.tensor([p])) > 1e-4


def check_batch(target: nn.Module, draft: nn.Module | None, prompts: list[list[int]], **options: object) -> None:
    """A batch gives each text what it gets alone: the same tokens in the same rounds."""
    settings = DecodeOptions(**{"method": "vanilla" if draft is None else "speculative", **options})
    together = generate_batch(target, prompts, settings, draft)
    for prompt_id, (prompt, found) in enumerate(zip(prompts, together, strict=True)):
        alone = generate(target, prompt, settings, draft, prompt_id=prompt_id)
        assert found.tokens == alone.tokens
        assert [(r.proposed, r.accepted) for r in found.stats.rounds] == [(r.proposed, r.accepted) for r in alone.stats.rounds]


def random_text(length: int, vocab_size: int = 64, seed: int = 0) -> torch.Tensor:
    """Token ids (1, length)."""
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def pass_logits(engine: StaticLlama, text: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Logits (1, T, V) of `text` (1, T) fed to an empty `engine` in passes of these widths, the last one for what is left."""
    engine.start([text.shape[1]])
    ends = [*accumulate(widths, initial=0), text.shape[1]]
    return torch.cat([engine.append(text[:, start:end]).clone() for start, end in pairwise(ends) if end > start], 1)


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether no value is off by more than `tolerance` times the largest of `wanted`."""
    return bool((found.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max())


def same_layers(held: list[tuple[torch.Tensor, torch.Tensor]], wanted: list[tuple[torch.Tensor, torch.Tensor]], tolerance: float = 1e-4) -> bool:
    """Whether two caches hold equally many keys and values, equal up to rounding, block by block."""
    pairs = [(a, b) for both in zip(held, wanted, strict=True) for a, b in zip(*both, strict=True)]
    return all(a.shape == b.shape and (a.numel() == 0 or near(a, b, tolerance)) for a, b in pairs)


@torch.inference_mode()
def check_logits(target: LlamaForCausalLM, widths: list[int], length: int = 100) -> None:
    """A StaticLlama's logits and keys and values are transformers', in passes of any widths."""
    text = random_text(length, target.config.vocab_size)
    engine = StaticLlama(target, length)
    found, wanted = pass_logits(engine, text, widths), target(text, use_cache=True)
    assert near(found, wanted.logits)
    assert same_layers(engine.layers(), [(layer.keys, layer.values) for layer in wanted.past_key_values.layers])


# ---- trees ----

BUSHY = Growmap((-1, 0, 0, 0, 1, 1, 2, 4, 4, 7))  # 10 nodes on 4 levels
COUPLED_TREES: dict[str, dict] = {  # options of those whose text is vanilla's, token for token
    "static": {"method": "static_tree", "tree": StaticTree(BUSHY)},
    "static, match": {"method": "static_tree", "tree": StaticTree(BUSHY, "match")},
    "dynamic": {"method": "dynamic_tree", "tree": DynamicTree(16, 4, 3)},
    "dynamic, match": {"method": "dynamic_tree", "tree": DynamicTree(16, 4, 3, verification="match")},
    "specexec": {"method": "specexec", "tree": SpecExec(16, 5, 3)},
    "specexec, coupled": {"method": "specexec", "tree": SpecExec(16, 5, 3, verification="coupled")},
}
TREES: dict[str, dict] = {
    **COUPLED_TREES,
    "static, swor": {"method": "static_tree", "tree": StaticTree(BUSHY, "swor")},
    "dynamic, swor": {"method": "dynamic_tree", "tree": DynamicTree(16, 4, 3, verification="swor")},
}


def near_copy(target: LlamaForCausalLM, scale: float = 0.02) -> LlamaForCausalLM:
    """A model of its own that says nearly what the target says."""
    model = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def some_batch(rows: int = 3, width: int = 24, vocab_size: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Padded text of which some tokens are learned, as data_utils.collate makes it."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = torch.ones(rows, width, dtype=torch.int64)
    attention_mask[-1, width // 2 :] = 0
    loss_mask = (torch.rand(rows, width, generator=generator) < 0.7) & attention_mask.bool()
    return {"input_ids": torch.randint(0, vocab_size, (rows, width), generator=generator), "attention_mask": attention_mask, "loss_mask": loss_mask}
