"""Accept rules by exact enumeration: the law that they produce is the target's, to rounding."""

from itertools import product

import pytest
import torch

import decoding.verify as verify
from decoding.sampling import Noise, SamplingPolicy, draw, policy_probs

VOCAB, GAMMA = 4, 2
POLICIES = [SamplingPolicy(1.0), SamplingPolicy(0.3), SamplingPolicy(1.5, top_p=0.8), SamplingPolicy(0.7, top_k=2), SamplingPolicy(0.0)]


class ChosenUniforms:
    """Noise whose uniforms the test dictates."""

    def __init__(self, uniforms: list[float]) -> None:
        self.uniforms = torch.tensor(uniforms, dtype=torch.float64)

    def uniform(self, positions: torch.Tensor, purpose: verify.Purpose) -> torch.Tensor:
        return self.uniforms[: len(positions)]


def first_order_tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))


def enumerated_round_law(p_table: torch.Tensor, q_table: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Law (V, V, V) of the first three tokens after token 0: one round with γ = 2, then the target's own continuation.

    Runs the real `verify_rejection` on every pair of drafts and every accept/reject pattern, each weighed by its
    probability; the distribution that it hands to `draw` is captured instead of drawn from.
    """
    captured: list[torch.Tensor] = []
    monkeypatch.setattr(verify, "draw", lambda probs, *_: captured.append(probs[0]) or torch.zeros(1, dtype=torch.int64))
    law = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=torch.float64)
    for x1, x2 in product(range(VOCAB), repeat=GAMMA):
        p, q = p_table[[0, x1, x2]], q_table[[0, x1]]
        drafted = torch.tensor([x1, x2])
        chance = float(q[0, x1] * q[1, x2])
        thresholds = [accept_threshold(p[i], q[i], x) for i, x in enumerate((x1, x2)) if chance > 0]
        for pattern in product((True, False), repeat=GAMMA if chance > 0 else 0):
            weight = chance
            uniforms = []
            for accept, t in zip(pattern, thresholds, strict=True):
                weight *= t if accept else 1 - t
                uniforms.append(t / 2 if accept else (1 + t) / 2)
            if weight == 0 or not pattern:
                continue
            accepted, _ = verify.verify_rejection(p, q, drafted, ChosenUniforms(uniforms), torch.arange(GAMMA + 1))
            law += weight * continue_by_target([x1, x2][: int(accepted)], captured[-1], p_table)
    return law


def accept_threshold(p: torch.Tensor, q: torch.Tensor, token: int) -> float:
    """The u below which the rule accepts `token`, found by bisecting `accepts` itself."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        kept = verify.accepts(p[None], q[None], torch.tensor([token]), torch.tensor([middle], dtype=torch.float64))
        low, high = (middle, high) if bool(kept) else (low, middle)
    return high if high > 1e-15 else 0.0


def continue_by_target(kept: list[int], next_law: torch.Tensor, p_table: torch.Tensor) -> torch.Tensor:
    """Law (V, V, V) of three tokens that start with `kept`, go on with `next_law`, and then with the target."""
    law = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=torch.float64)
    for tokens in product(range(VOCAB), repeat=3):
        if list(tokens[: len(kept)]) == kept:
            weight = next_law[tokens[len(kept)]]
            for i in range(len(kept) + 1, 3):
                weight = weight * p_table[tokens[i - 1], tokens[i]]
            law[tokens] = weight
    return law


def check_enumeration(policy: SamplingPolicy, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    p_table, q_table = (policy_probs(table, policy) for table in first_order_tables(seed))
    law = enumerated_round_law(p_table, q_table, monkeypatch)
    wanted = p_table[0][:, None, None] * p_table[:, :, None] * p_table[None]
    assert (law - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_rejection_round_has_the_targets_law(policy, seed, monkeypatch):
    check_enumeration(policy, monkeypatch, seed)


def test_greedy_target_with_soft_draft_and_the_reverse(monkeypatch):
    p, q = (policy_probs(table, SamplingPolicy(t)) for table, t in zip(first_order_tables(2), (0.0, 1.0), strict=True))
    for p_table, q_table in ((p, q), (q, p)):
        law = enumerated_round_law(p_table, q_table, monkeypatch)
        wanted = p_table[0][:, None, None] * p_table[:, :, None] * p_table[None]
        assert (law - wanted).abs().max() < 1e-12


def check_zero_is_never_accepted() -> None:
    p, q = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    assert not verify.accepts(p, q, torch.tensor([0]), torch.tensor([0.0]))


def test_token_of_target_probability_zero_is_never_accepted():
    check_zero_is_never_accepted()


def test_residual_of_equal_distributions_is_the_distribution():
    p = torch.tensor([0.25, 0.75])
    assert torch.equal(verify.residual(p, p), p)


def test_coupled_agreement_matches_its_definition_and_simulation():
    """1/Σ max(p_w/p_v, q_w/q_v) summed over v, and the frequency with which two coupled draws agree."""
    policy = SamplingPolicy(0.8, top_p=0.9)
    p, q = (policy_probs(table, policy) for table in first_order_tables(3))
    plain = torch.zeros(VOCAB, dtype=torch.float64)
    for row, v in product(range(VOCAB), repeat=2):
        if p[row, v] > 0 and q[row, v] > 0:
            plain[row] += 1 / torch.maximum(p[row] / p[row, v], q[row] / q[row, v]).sum()
    agreement = verify.coupled_agreement(p, q)
    assert torch.allclose(agreement, plain, atol=1e-12)
    positions = torch.arange(20_000)
    noise = Noise.of(seed=1)
    for row in range(VOCAB):
        same = draw(p[row].expand(len(positions), -1), noise, positions) == draw(q[row].expand(len(positions), -1), noise, positions)
        deviation = (agreement[row] * (1 - agreement[row]) / len(positions)).sqrt()
        assert abs(same.double().mean() - agreement[row]) <= 4 * deviation + 1e-12


def test_coupled_agreement_lies_between_its_bounds():
    p, q = (policy_probs(table, SamplingPolicy(1.0)) for table in first_order_tables(4))
    tv = 1 - verify.overlap(p, q)
    agreement = verify.coupled_agreement(p, q)
    assert (agreement >= (1 - tv) / (1 + tv) - 1e-12).all() and (agreement <= 1 - tv + 1e-12).all()
