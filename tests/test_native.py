"""The C++ of sampling does what sampling.py says, whatever it is given; without a compiler torch does it all."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import decoding.verify as verify
from decoding.children import Chooser, Coupling, Nodes
from decoding.sampling import Noise, Purpose, SamplingPolicy, draw, draw_with_margin, policy_probs
from decoding.tree import Tree
from engine import native
from toy_models import bigram_pair, decode, native_llama, noisy_exit

POLICIES = [
    SamplingPolicy(1.0), SamplingPolicy(0.01), SamplingPolicy(3.0), SamplingPolicy(0.7, top_k=1), SamplingPolicy(1.0, top_k=3), SamplingPolicy(1.0, top_k=10_000),
    SamplingPolicy(0.7, top_p=0.95), SamplingPolicy(1.0, top_p=0.1), SamplingPolicy(1.0, top_p=0.999), SamplingPolicy(0.8, 20, 0.8), SamplingPolicy(0.0),
    SamplingPolicy(0.0, 3, 0.5),
]
SIZES = [1, 2, 3, 15, 16, 17, 63, 257, 1000]


def by_torch(function, *arguments):
    """`function` as it is without the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return function(*arguments)


def some_logits(size: int, kind: str, rows: int = 40) -> torch.Tensor:
    """Rows of logits (R, V) in fp32."""
    logits = 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    if kind == "ties":
        return logits.round()
    if kind == "-inf":
        masked = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.6
        masked[:, size // 2] = False
        return logits.masked_fill(masked, -torch.inf)
    if kind == "extreme":
        return logits * torch.tensor([1e-30, 1.0, 1e3, 1e6, 1e20]).repeat(rows)[:rows, None]
    if kind == "masked":  # with the lowest number, as some processors do
        return logits.masked_fill(logits < logits.mean(-1, keepdim=True), torch.finfo(torch.float32).min)
    return logits


# ---- the library ----

def test_the_library_is_here():
    """Everything below, and the C++ half of the other tests, would else be torch against torch."""
    assert native.library() is not None


def test_the_library_leaves_the_process_its_small_numbers():
    """A library linked with -ffast-math makes the processor flush subnormals to 0, for all of torch and numpy, from then on."""
    native.library()
    assert float(torch.tensor([1e-40]) * 1) > 0
    assert np.float32(1e-40) * np.float32(1) > 0
    assert float(torch.tensor([1e-310], dtype=torch.float64) * 1) > 0


def fresh_library(monkeypatch: pytest.MonkeyPatch):
    """Look for the library anew, as a new process would."""
    found = native.library.__wrapped__
    monkeypatch.setattr(native, "library", functools.cache(found))


def check_falls_back(capsys: pytest.CaptureFixture, message: str) -> None:
    """Decoding works without the library, which is said once."""
    target = native_llama()
    for draft, method in ((None, "vanilla"), (noisy_exit(target, 2), "self_speculative")):
        assert len(decode(target, draft, [1, 2], method=method, policy=SamplingPolicy(1.0), max_new_tokens=8)[0]) == 8
    said = capsys.readouterr().err
    assert said.count("slower") == 1 and message in said


@pytest.mark.parametrize("name", ["no-such-compiler", "/no/such/g++"])
def test_no_compiler(monkeypatch, capsys, name):
    monkeypatch.setenv("CXX", name)
    fresh_library(monkeypatch)
    check_falls_back(capsys, "no C++ compiler")


def test_no_compiler_on_the_path(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    fresh_library(monkeypatch)
    check_falls_back(capsys, "no C++ compiler")


def test_another_system(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    fresh_library(monkeypatch)
    check_falls_back(capsys, "decoding on the CPU goes through torch")


def test_source_that_does_not_compile(monkeypatch, capsys, tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++")
    monkeypatch.setattr(native, "SOURCES", (source,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fresh_library(monkeypatch)
    check_falls_back(capsys, "does not compile here")
    assert not list((tmp_path / "cache").rglob("*.so"))


def compiler(folder: Path, script: str) -> str:
    """A program that stands for a compiler."""
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", ["exit 1", "echo 1.0; [ $# = 1 ] || exit 1"])
def test_compiler_that_cannot(monkeypatch, capsys, tmp_path, script):
    """One that fails at once, and one that has a version and no more."""
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fresh_library(monkeypatch)
    check_falls_back(capsys, "")


def test_cache_folder_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    """A read-only home is usual in containers; here a file is where the folder should be. A library elsewhere is as good as none."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fresh_library(monkeypatch)
    target = native_llama()
    assert len(decode(target, None, [1, 2], max_new_tokens=8)[0]) == 8


def test_library_is_compiled_once(monkeypatch, tmp_path):
    """In a folder of its own; the second process finds it there."""
    monkeypatch.setattr(native, "SOURCES", native.SOURCES[1:])  # the smaller one: it is quicker
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__() is not None
    path, = tmp_path.rglob("*.so")
    made = path.stat().st_mtime_ns
    assert native.library.__wrapped__() is not None
    assert [path.stat().st_mtime_ns] == [p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()] == [made]


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_cpp_and_torch_decode_the_same_text(verification):
    """A target of fp32 tables, whose sampling and verification run in C++, and without the library."""
    settings = {"policy": SamplingPolicy(0.9, top_p=0.97), "verification": verification, "max_new_tokens": 300, "gamma": 3}
    found = decode(*bigram_pair(dtype=torch.float32), [0], **settings)
    wanted = by_torch(lambda: decode(*bigram_pair(dtype=torch.float32), [0], **settings))
    assert found[0] == wanted[0]
    assert [r.accepted for r in found[1].rounds] == [r.accepted for r in wanted[1].rounds]


# ---- policy_probs ----

@pytest.mark.parametrize("kind", ["plain", "ties", "-inf", "extreme", "masked"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policy_probs_are_the_definitions(policy, kind):
    """Against torch in fp64, but for rows where rounding, or a tie, decides which token crosses top-p."""
    rows = compared = 0
    for size in SIZES:
        logits = some_logits(size, kind)
        found, exact = policy_probs(logits, policy), policy_probs(logits.double(), policy)
        sure = ~at_the_edge(logits, policy)
        rounding = 1e-5 + 2e-7 * logits.clamp(min=-1e30).abs().amax(-1, keepdim=True) / (policy.temperature or 1)  # of z in exp(z)
        assert ((found - exact).abs() <= exact * rounding + 1e-30)[sure].all()
        assert torch.allclose(found.sum(-1), torch.ones(len(logits)), atol=1e-5)
        assert not found[sure][exact[sure] == 0].any()
        rows, compared = rows + len(logits), compared + int(sure.sum())
    assert compared > 0.5 * rows


def at_the_edge(logits: torch.Tensor, policy: SamplingPolicy) -> torch.Tensor:
    """Rows (R,) whose mass passes top-p at a token boundary up to rounding, or between two tokens that are equally likely."""
    if policy.top_p == 1 or policy.temperature == 0:
        return torch.zeros(len(logits), dtype=torch.bool)
    mass = policy_probs(logits.double(), SamplingPolicy(policy.temperature, policy.top_k)).sort(-1, descending=True).values
    kept = (mass.cumsum(-1) - mass < policy.top_p).sum(-1, keepdim=True)
    tied = mass.gather(-1, kept - 1) == torch.cat([mass, -torch.ones(len(mass), 1)], -1).gather(-1, kept)
    return ((mass.cumsum(-1) - policy.top_p).abs() < 2e-6).any(-1) | tied[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_logits_the_nucleus_keeps_the_lowest_ids(dtype):
    """bf16 logits tie often. Which of the tied are kept must not hang on where they stand in a vector register."""
    for size in range(2, 70):
        for value in torch.linspace(-5, -0.1, 12).tolist():
            logits = torch.full((1, size), value, dtype=dtype)
            logits[0, size // 2] = 0
            kept = (policy_probs(logits, SamplingPolicy(1.0, top_p=0.45))[0] > 0).nonzero()[:, 0].tolist()
            assert kept == sorted([*[i for i in range(size) if i != size // 2][: len(kept) - 1], size // 2])


def test_policy_probs_of_any_shape_and_layout():
    logits, policy = some_logits(33, "plain", 24), SamplingPolicy(0.7, 9, 0.9)
    wanted = by_torch(policy_probs, logits, policy)
    assert torch.allclose(policy_probs(logits.view(2, 3, 4, 33), policy).view(24, 33), wanted, atol=1e-6)
    assert torch.allclose(policy_probs(logits[5], policy), wanted[5], atol=1e-6)
    assert policy_probs(logits[:0], policy).shape == (0, 33)
    before = logits.clone()
    for strided in (logits.t().contiguous().t(), torch.stack([logits, -logits], -1)[..., 0], logits.repeat(1, 2)[:, :33]):
        assert not strided.is_contiguous()
        assert torch.allclose(policy_probs(strided, policy), wanted, atol=1e-6)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_logits_that_are_no_numbers_are_not_drawn_as_if_they_were(policy):
    """NaN says that the model is broken. It must not turn into a token of some other row, nor out of range."""
    logits = some_logits(40, "plain", 3)
    logits[1, 7] = torch.nan
    probs = policy_probs(logits, policy)
    assert torch.allclose(probs[[0, 2]], by_torch(policy_probs, logits, policy)[[0, 2]], atol=1e-6)
    tokens = draw(probs, Noise.of(0), torch.arange(3))
    assert ((tokens >= 0) & (tokens < 40)).all()


# ---- draw ----

@pytest.mark.parametrize("policy", [SamplingPolicy(1.0), SamplingPolicy(1.0, top_k=5), SamplingPolicy(0.6, top_p=0.9), SamplingPolicy(0.0)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_draw_is_the_gumbel_max_rule(size, policy):
    """argmax p/e with Noise's exponential values, of full and sparse rows; the margin is the distance of the two largest log p/e."""
    probs, positions = policy_probs(some_logits(size, "ties", 200), policy), torch.arange(7, 207)
    for noise in (Noise.of(3, 11), Noise.of(2**70 + 5, 12)):
        scores = probs.double() / noise.exponential(positions, size, Purpose.DRAFT)
        assert torch.equal(draw(probs, noise, positions, Purpose.DRAFT), scores.argmax(-1))
        tokens, margins = draw_with_margin(probs, noise, positions, Purpose.DRAFT)
        best = scores.sort(-1, descending=True).values.log()
        wanted = best[:, 0] - best[:, 1] if size > 1 else torch.full((200,), torch.inf, dtype=torch.float64)
        assert torch.equal(tokens, scores.argmax(-1)) and torch.allclose(margins, wanted, atol=1e-9)
        assert torch.equal(by_torch(draw_with_margin, probs, noise, positions, Purpose.DRAFT)[0], tokens)


@pytest.mark.parametrize("size", [3, 16, 61])
def test_draw_of_a_batch_and_of_named_tokens(size):
    probs = policy_probs(some_logits(size, "plain", 15).view(3, 5, size), SamplingPolicy(1.0, top_p=0.9))
    noise, positions = Noise.of(1, [4, 9, 2]), torch.tensor([[3], [50], [7]]) + torch.arange(5)
    ids = torch.randperm(4 * size, generator=torch.Generator().manual_seed(0))[:size].sort().values
    for token_ids in (None, ids):
        scores = probs.double() / noise.exponential(positions, size if token_ids is None else token_ids, Purpose.TOKEN)
        columns = scores.argmax(-1)
        assert torch.equal(draw(probs, noise, positions, token_ids=token_ids), columns if token_ids is None else ids[columns])


def test_draw_of_strided_rows_and_names():
    probs, noise = policy_probs(some_logits(32, "plain"), SamplingPolicy(1.0)), Noise.of(0)
    positions, ids = torch.arange(40), torch.arange(64)[::2]
    wanted = ids[(probs.double() / noise.exponential(positions, ids, Purpose.TOKEN)).argmax(-1)]
    assert torch.equal(draw(probs, noise, positions, token_ids=ids), wanted)
    assert torch.equal(draw(probs.t().contiguous().t(), noise, positions, token_ids=ids.clone()), wanted)
    assert torch.equal(draw(probs, noise, torch.arange(80)[::2], token_ids=ids.clone()),
                       ids[(probs.double() / noise.exponential(torch.arange(80)[::2], ids, Purpose.TOKEN)).argmax(-1)])
    square = torch.arange(40).view(8, 5).t()
    assert torch.equal(draw(probs.view(5, 8, 32), noise, square), (probs.view(5, 8, 32).double() / noise.exponential(square, 32, Purpose.TOKEN)).argmax(-1))


def test_draw_from_half_precision():
    probs, noise = policy_probs(some_logits(32, "plain"), SamplingPolicy(1.0)), Noise.of(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        scores = probs.to(dtype).double() / noise.exponential(torch.arange(40), 32, Purpose.TOKEN)
        assert torch.equal(draw(probs.to(dtype), noise, torch.arange(40)), scores.argmax(-1))


def test_noise_is_the_same_for_every_seed_and_place():
    """C++ and torch mix unsigned and signed 64 bits alike, at the ends of the range too."""
    probs = torch.full((6, 300), 1 / 300)
    positions = torch.tensor([0, 1, 2**31, 2**40, 2**58, 123_456_789])
    for seed in (0, -1, 2**63, 2**64 - 1, -(2**80)):
        for prompt_id in (0, 10**12):
            noise = Noise.of(seed, prompt_id)
            assert torch.equal(draw(probs, noise, positions), by_torch(draw, probs, noise, positions))


# ---- verify_rejection ----

@pytest.mark.parametrize("gamma", [0, 1, 4])
@pytest.mark.parametrize("policy", [SamplingPolicy(1.0), SamplingPolicy(0.7, top_p=0.8), SamplingPolicy(1.0, top_k=2), SamplingPolicy(0.0)], ids=str)
def test_rejection_in_cpp_is_torchs(policy, gamma):
    """The same tokens are kept and the same token follows, text by text, for a batch and for single texts."""
    texts, size = 60, 37
    p = policy_probs(some_logits(size, "plain", texts * (gamma + 1)), policy).view(texts, gamma + 1, size)
    near_p = some_logits(size, "plain", texts * (gamma + 1)).view(texts, gamma + 1, size)[:, :gamma]
    q = policy_probs(near_p + torch.randn(near_p.shape, generator=torch.Generator().manual_seed(3)), policy)
    positions = torch.arange(5, 5 + texts)[:, None] + torch.arange(gamma + 1)
    noise = Noise.of(4, list(range(texts)))
    drafted = draw(q, noise, positions[:, :gamma], Purpose.DRAFT) if gamma else torch.zeros(texts, 0, dtype=torch.int64)
    found, wanted = verify.verify_rejection(p, q, drafted, noise, positions), by_torch(verify.verify_rejection, p, q, drafted, noise, positions)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert policy.temperature == 0 or gamma < 4 or len(set(found[0].tolist())) > 2
    for row in range(0, texts, 7):
        alone = verify.verify_rejection(p[row], q[row], drafted[row], Noise.of(4, row), positions[row])
        assert [int(alone[0]), int(alone[1])] == [int(found[0][row]), int(found[1][row])]


def test_rejection_of_equal_and_disjoint_distributions():
    noise, positions = Noise.of(0, list(range(500))), torch.arange(500)[:, None] + torch.arange(3)
    p = policy_probs(some_logits(9, "plain", 1500).view(500, 3, 9), SamplingPolicy(1.0))
    drafted = draw(p[:, :2], noise, positions[:, :2], Purpose.DRAFT)
    accepted, _ = verify.verify_rejection(p, p[:, :2].clone(), drafted, noise, positions)
    assert (accepted == 2).all()
    apart = torch.zeros(500, 3, 9)
    apart[..., 4] = 1
    q = torch.zeros(500, 2, 9)
    q[..., 5] = 1
    accepted, following = verify.verify_rejection(apart, q, torch.full((500, 2), 5), noise, positions)
    assert (accepted == 0).all() and (following == 4).all()


def test_draft_in_another_precision_than_the_target():
    """An fp64 draft of an fp32 target: the C++ reads floats."""
    noise, positions = Noise.of(0, list(range(300))), torch.arange(300)[:, None] + torch.arange(4)
    p, q = (policy_probs(torch.randn(300, n, 11, generator=torch.Generator().manual_seed(n)), SamplingPolicy(1.0)) for n in (4, 3))
    drafted = draw(q, noise, positions[:, :3], Purpose.DRAFT)
    wanted = verify.verify_rejection(p, q, drafted, noise, positions)
    for p_dtype, q_dtype in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        found = verify.verify_rejection(p.to(p_dtype), q.to(q_dtype), drafted, noise, positions)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_token_of_target_probability_zero_never_follows():
    noise, positions = Noise.of(0, list(range(2000))), torch.arange(2000)[:, None] + torch.arange(2)
    p, q = torch.tensor([0.0, 0.3, 0.7]).expand(2000, 2, 3), torch.tensor([[0.9, 0.1, 0.0]]).expand(2000, 1, 3)
    drafted = draw(q, noise, positions[:, :1], Purpose.DRAFT)
    accepted, following = verify.verify_rejection(p, q, drafted, noise, positions)
    assert not accepted[drafted[:, 0] == 0].any() and (following != 0).all()


# ---- verify_match ----

def likely_tree(logits: torch.Tensor, policy: SamplingPolicy, noise: Noise, start: int) -> Tree:
    """Random parents; of each node one child is what the target draws there, the others are not. Some nodes are out of reach: their parent is −1."""
    generator = torch.Generator().manual_seed(start)
    nodes, size = logits.shape
    parents = [-1, *[int(torch.randint(max(0, node - 5), node, (1,), generator=generator)) for node in range(1, nodes)]]
    tree = Tree.of(torch.zeros(nodes, dtype=torch.int64), torch.tensor(parents), torch.zeros(nodes), nodes)
    drawn = draw(policy_probs(logits, policy)[None], noise, (start + 1 + tree.depths)[None])[0].tolist()
    ranks = [parents[:node].count(parent) for node, parent in enumerate(parents)]
    tokens = [(drawn[parent] + (rank + parent) % size) % size for parent, rank in zip(parents, ranks, strict=True)]
    reachable = torch.arange(nodes) % 7 != 6
    return Tree.of(torch.tensor(tokens), tree.parents.where(reachable, -1), tree.values, nodes)


@pytest.mark.parametrize("kind", ["plain", "-inf", "masked"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_matching_in_cpp_walks_as_torch_does(policy, kind):
    """Which nodes are reached and the last draw, at several positions, of trees of 1 to 40 nodes over vocabularies of any size; rows may have gaps."""
    reached = 0
    for size in (8, 17, 63, 257):
        for start, nodes in enumerate((1, 2, 5, 13, 40)):
            logits, noise = some_logits(size, kind, nodes).mul(0.3 if kind == "plain" else 1), Noise.of(start, [size])
            if at_the_edge(logits, policy).any():
                continue
            tree, starts = likely_tree(logits, policy, noise, 3**start), torch.tensor([3**start])
            wanted = by_torch(verify.verify_match, logits, policy, tree, noise, starts)
            for rows in (logits, logits.t().contiguous().t(), logits.repeat(1, 2)[:, :size]):
                found = verify.verify_match(rows, policy, tree, noise, starts)
                assert all(map(torch.equal, found, wanted))
            reached += int(wanted[0].sum()) - 1
            assert not wanted[0][1:][tree.parents[1:] < 0].any()
    assert reached > 10


# ---- gumbel_children ----

@pytest.mark.parametrize("kind", ["plain", "-inf", "masked"])
@pytest.mark.parametrize("policy", [SamplingPolicy(1.0), SamplingPolicy(0.7, 5, 0.9), SamplingPolicy(3.0), SamplingPolicy(0.0)], ids=str)
def test_coupled_children_in_cpp_are_the_definitions(policy, kind):
    """Against torch in fp64: neighbouring nodes at the same position and at others, counts up to all tokens, whole and trimmed vocabularies, rows with gaps.

    What is impossible may come in any order. The C++ rounds uniforms to fp32: an error of 2^-24 in u, which is that much times e^g in g.
    """
    depths = torch.tensor([0, 1, 1, 2, 1, 0, 5, 5, 5, 2])
    for size in (2, 15, 16, 63, 257):
        logits = some_logits(size, kind, len(depths))
        for ids in (None, torch.arange(size) * 3 + 1):
            for coupling in (Coupling(), Coupling(0.6, 0.9), Coupling(1.7, 0.3)):
                chooser = Chooser(verify.TREE_RULES["coupled"], policy, 3 * size + 1, coupling, ids)
                nodes = Nodes(Noise.of(7, [size]), torch.tensor([2**33]), depths, torch.arange(len(depths)))
                least = nodes.noise.exponential((2**33 + 1 + depths)[None], size if ids is None else ids, Purpose.TOKEN)[0].amin(-1, keepdim=True)
                for count in (1, 4, size, size + 5):
                    wanted = chooser(logits.double(), count, nodes)
                    for rows in (logits, logits.repeat(1, 2)[:, :size], logits.t().contiguous().t()):
                        found = chooser(rows, count, nodes)
                        possible = wanted.values > -1e30
                        assert found.tokens.shape == wanted.tokens.shape == (len(depths), min(count, size))
                        assert torch.equal(found.tokens[possible], wanted.tokens[possible])
                        assert ((found.values - wanted.values).abs() <= 1e-4 + 1e-5 * wanted.values.abs() + 2.0**-23 / least)[possible].all()
                        assert (found.values[~possible] < -1e30).all()
                        assert all(len(set(row)) == len(row) for row in found.tokens.tolist())
