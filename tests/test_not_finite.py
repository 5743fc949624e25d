"""Logits that are not finite end decoding with an error that names the model, on every path; none becomes a token."""

import pytest
import torch
from torch import nn

from decoding.autojudge import TopK
from decoding.children import Chooser, Nodes
from decoding.common_sense import CommonSense
from decoding.dynamic_tree import DynamicTree
from decoding.growmap import Growmap
from decoding.sampling import Noise, SamplingPolicy, no_law, policy_probs
from decoding.specexec import SpecExec
from decoding.static_tree import StaticTree
from decoding.verify import TREE_RULES
from engine import native
from toy_models import decode, native_llama, noisy_exit, tiny_llama

POLICIES = [SamplingPolicy(0.0), SamplingPolicy(1.0), SamplingPolicy(0.7, 20, 0.9)]
BAD_ROWS = {"a NaN": [1.0, torch.nan, 2.0], "+inf": [torch.inf, 1.0, 2.0], "-NaN": [1.0, -torch.nan, 0.0], "nothing but -inf": [-torch.inf] * 3,
            "both infinities": [-torch.inf, 0.0, torch.inf]}
FOLLOWERS = torch.arange(64)[:, None].roll(-1, 0)
METHODS = {
    "vanilla": {}, "rejection": {"method": "speculative"}, "coupled": {"method": "speculative", "verification": "coupled"},
    "recorded": {"method": "speculative", "record_overlap": True}, "exit": {"method": "self_speculative"}, "topk": {"method": "topk", "judge": TopK(2)},
    **{f"static {rule}": {"method": "static_tree", "tree": StaticTree(Growmap((-1, 0, 0, 1, 1, 3)), rule)} for rule in TREE_RULES},
    **{f"dynamic {rule}": {"method": "dynamic_tree", "tree": DynamicTree(8, 3, 3, verification=rule)} for rule in TREE_RULES},
    "dynamic, stops early": {"method": "dynamic_tree", "tree": DynamicTree(8, 3, 3, level_cost=0.3)}, "specexec": {"method": "specexec", "tree": SpecExec(8, 4, 3)},
    "followers": {"method": "dynamic_tree", "tree": DynamicTree(8, 3, 3), "common_sense": CommonSense(FOLLOWERS, nodes=2)},
    "overwrite": {"method": "dynamic_tree", "tree": DynamicTree(8, 3, 3), "common_sense": CommonSense(FOLLOWERS, "overwrite", repair=True)},
    "hf_generate": {"method": "hf_generate"}, "hf_assisted": {"method": "hf_assisted"},
}


def broken(model: nn.Module, value: float = torch.nan) -> nn.Module:
    """`model` with one weight that is no number."""
    model.model.norm.weight[3] = value
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", BAD_ROWS)
def test_policy_probs_makes_a_row_of_nan_of_it_and_of_no_other(kind, policy, dtype):
    logits = torch.tensor([[0.0, 1.0, -torch.inf], BAD_ROWS[kind], [torch.finfo(dtype).max, 0.0, torch.finfo(dtype).min]], dtype=dtype)
    probs = policy_probs(logits, SamplingPolicy(max(policy.temperature, 1) if policy.temperature else 0, policy.top_k, policy.top_p))
    assert probs[1].isnan().all() and probs[::2].isfinite().all()
    assert no_law(probs).tolist() == [False, True, False]


@pytest.mark.parametrize("rule", TREE_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_children_of_it_have_no_value(dtype, rule):
    logits = torch.tensor([[0.0, 1.0, 2.0], BAD_ROWS["a NaN"], BAD_ROWS["+inf"]], dtype=dtype)
    for policy in POLICIES:
        zero = torch.zeros(3, dtype=torch.int64)
        found = Chooser(TREE_RULES[rule], policy, 3)(logits, 2, Nodes(Noise.of(0), torch.tensor([4]), zero, zero + torch.arange(3)))
        assert found.values[1:].isnan().all() and not found.values[0].isnan().any()


@pytest.mark.parametrize("make", [native_llama, tiny_llama])
@pytest.mark.parametrize("policy", POLICIES[:2])
@pytest.mark.parametrize("name", METHODS)
def test_a_target_with_a_weight_that_is_no_number(name, policy, make):
    target = broken(make())
    draft = None if name in ("vanilla", "hf_generate") else noisy_exit(target, 1) if name == "exit" else make(seed=1)
    with pytest.raises(FloatingPointError, match=r"the target's logits are not finite \(NaN or infinite\): check its weights"):
        decode(target, draft, [1, 2, 3], policy=policy, max_new_tokens=8, **METHODS[name])


@pytest.mark.parametrize("make", [native_llama, tiny_llama])
@pytest.mark.parametrize("policy", POLICIES[:2])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("vanilla", "hf_generate")])
def test_a_draft_with_a_weight_that_is_no_number(name, policy, make):
    target = make()
    draft = noisy_exit(target, 1) if name == "exit" else make(seed=1)
    (draft.exit.norm if name == "exit" else draft.model.norm).weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="the draft's logits are not finite"):
        decode(target, draft, [1, 2, 3], policy=policy, max_new_tokens=8, **METHODS[name])


@pytest.mark.parametrize("engine", ["static", "transformers"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_weights_and_both_engines(value, engine):
    with pytest.raises(FloatingPointError, match="target's logits"):
        decode(broken(native_llama(), value), None, [1, 2, 3], max_new_tokens=4, engine=engine)


def test_it_is_found_where_it_begins():
    """A token whose embedding is no number: the text before it is as it was."""
    target = native_llama(tie_word_embeddings=False)
    clean = decode(target, None, [1, 2, 3], max_new_tokens=20)[0]
    target.model.embed_tokens.weight[clean[9]] = torch.nan
    first = clean.index(clean[9]) + 1
    assert decode(target, None, [1, 2, 3], max_new_tokens=first)[0] == clean[:first]
    for draft, options in ((None, {}), (native_llama(seed=1), METHODS["coupled"]), (native_llama(seed=1), METHODS["dynamic coupled"])):
        with pytest.raises(FloatingPointError):
            decode(target, draft, [1, 2, 3], max_new_tokens=first + 1, **options)


def test_the_cpp_is_tested_above():
    assert native.library() is not None


@pytest.mark.parametrize("bad", [{"temperature": torch.nan}, {"temperature": torch.inf}, {"temperature": 1e-40}, {"temperature": 1e-46}, {"top_p": 1e-46},
                                 {"top_p": torch.nan}, {"temperature": -1e-3}])
def test_temperatures_and_top_p_that_fp32_cannot_divide_by_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} .* must"):
        SamplingPolicy(**bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", [SamplingPolicy(1e-10), SamplingPolicy(1.0, top_p=1e-10), SamplingPolicy(1e-6, top_p=1e-6)])
def test_the_smallest_of_them_keep_the_likeliest_token(policy, dtype):
    logits = 5 * torch.randn(20, 97, generator=torch.Generator().manual_seed(0), dtype=dtype)
    assert torch.equal(policy_probs(logits, policy).argmax(-1), logits.argmax(-1))
    assert torch.allclose(policy_probs(logits, policy).amax(-1), torch.ones(20, dtype=dtype))
