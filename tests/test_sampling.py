"""The sampling policy equals transformers' processors; the noise is uniform, independent and order-free."""

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from decoding.sampling import Noise, Purpose, SamplingPolicy, draw, noise_places, policy_probs
from toy_models import chi_square_p

DTYPES = [torch.float32, torch.float64]  # through C++, and through torch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", [SamplingPolicy(0.7), SamplingPolicy(1.3, top_k=5), SamplingPolicy(0.6, top_p=0.9), SamplingPolicy(1.0, 20, 0.5)])
def test_policy_equals_transformers_processors(policy, dtype):
    logits = 3 * torch.randn(50, 97, generator=torch.Generator().manual_seed(0), dtype=dtype)
    processors = LogitsProcessorList([TemperatureLogitsWarper(policy.temperature)])
    if policy.top_k:
        processors.append(TopKLogitsWarper(policy.top_k))
    if policy.top_p < 1:
        processors.append(TopPLogitsWarper(policy.top_p))
    found, wanted = policy_probs(logits, policy), processors(None, logits).softmax(-1)
    assert torch.equal(found > 0, wanted > 0)
    assert found.dtype == dtype and torch.allclose(found, wanted, rtol=1e-5, atol=1e-7 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nucleus_keeps_the_token_that_crosses(dtype):
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=dtype).log()
    assert (policy_probs(logits, SamplingPolicy(1.0, top_p=0.6)) > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES])
def test_temperature_zero_is_one_hot_at_the_lowest_index(dtype):
    probs = policy_probs(torch.tensor([[1.0, 3.0, 3.0]], dtype=dtype), SamplingPolicy(0.0))
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and probs.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_bad_policies_are_refused(bad):
    with pytest.raises(ValueError):
        SamplingPolicy(**bad)


def test_noise_does_not_depend_on_who_asks_for_what_else():
    noise = Noise.of(seed=7, prompt_id=3)
    together = noise.exponential(torch.arange(20), 33, Purpose.TOKEN)
    assert torch.equal(together[11:12], Noise.of(7, 3).exponential(torch.tensor([11]), 33, Purpose.TOKEN))
    assert torch.equal(together[:, :9], noise.exponential(torch.arange(20), 9, Purpose.TOKEN))
    assert torch.equal(together[:, [5, 30]], noise.exponential(torch.arange(20), torch.tensor([5, 30]), Purpose.TOKEN))


def test_noise_of_a_batch_is_that_of_its_prompts():
    positions = torch.tensor([[4, 5, 6], [9, 10, 11]])
    batch = Noise.of(7, [3, 8])
    for values in (lambda noise, at: noise.exponential(at, 33, Purpose.DRAFT), lambda noise, at: noise.uniform(at, Purpose.ACCEPT)):
        alone = torch.stack([values(Noise.of(7, prompt_id), at) for prompt_id, at in zip((3, 8), positions, strict=True)])
        assert torch.equal(values(batch, positions), alone)


@pytest.mark.parametrize("change", [{"seed": 8}, {"prompt_id": 4}, {"position": 12}, {"purpose": Purpose.DRAFT}, {"start": 5}])
def test_noise_changes_with_each_of_its_keys(change):
    keys = {"seed": 7, "prompt_id": 3, "position": 11, "purpose": Purpose.TOKEN, "start": 4}

    def values(seed, prompt_id, position, purpose, start):
        return Noise.of(seed, [prompt_id]).of_round(torch.tensor([start])).exponential(torch.tensor([[position]]), 4096, purpose)[0, 0]

    correlation = torch.corrcoef(torch.stack([values(**keys), values(**{**keys, **change})]))[0, 1]
    assert abs(correlation) < 5 / 4096**0.5


def test_purposes_have_places_of_their_own():
    """At one position and at neighbouring ones: two names for one place would be no two purposes."""
    places = [position * spacing + offset for spacing, offset in map(noise_places, Purpose.__members__.values()) for position in range(3)]
    assert len(set(places)) == 3 * len(Purpose.__members__)


def test_uniforms_are_uniform():
    u = Noise.of(seed=0).uniform(torch.arange(100_000), Purpose.ACCEPT)
    counts = torch.histc(u, 50, 0, 1)[None]
    assert 0 < u.min() and u.max() < 1
    assert chi_square_p(counts, torch.full((1, 50), 2000.0)) > 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_have_the_law_and_neighbouring_positions_are_independent(dtype):
    probs = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0], dtype=dtype)
    tokens = draw(probs.expand(40_000, -1), Noise.of(seed=2), torch.arange(40_000))
    joint = torch.zeros(5, 5).index_put_((tokens[:-1], tokens[1:]), torch.ones(39_999), accumulate=True)
    assert joint[4].sum() == 0
    assert chi_square_p(joint.flatten()[None], 39_999 * torch.outer(probs, probs).flatten()[None]) > 1e-4
