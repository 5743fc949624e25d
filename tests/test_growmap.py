"""Shapes of draft trees: the best one against all others, what a shape may not be, and what a file may not say."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from decoding.growmap import LARGEST, BestTrees, Growmap, best_size, chain, load_growmap, save_growmap

Tree = tuple["Tree", ...]  # a node is the tuple of its children
# Published for a 68M draft of a 7B target at temperature 0.6, the first five of 32; the others are made up to be awkward.
PUBLISHED = (0.6316, 0.1000, 0.0485, 0.0292, 0.0226)
VECTORS = [PUBLISHED, (0.9,), (0.5, 0.5), (0.0, 0.6), (0.1, 0.2, 0.7), (0.3, 0.0, 0.0, 0.4), (0.0, 0.0), (1.0, 0.0)]


def random_vectors() -> list[tuple[float, ...]]:
    """Chances in no order, of 1 to 6 children, whose sum is anything up to 1."""
    rng = random.Random(0)
    weights = [[rng.random() for _ in range(width + 1)] for width in range(1, 7)]
    return [tuple(weight / sum(row) for weight in row[1:]) for row in weights]


def refused(action: Callable[[], object], *said: str) -> None:
    """`action` raises ValueError with one line that holds `said`."""
    with pytest.raises(ValueError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line and all(words in line for words in said), line


# ---- brute force, which shares no line with decoding/growmap.py ----

@cache
def forests(nodes: int) -> tuple[Tree, ...]:
    """Every ordered list of trees with as many nodes in all."""
    if nodes == 0:
        return ((),)
    return tuple((first, *rest) for size in range(1, nodes + 1) for first in forests(size - 1) for rest in forests(nodes - size))


def levels(tree: Tree) -> int:
    return max((1 + levels(child) for child in tree), default=0)


def widest(tree: Tree) -> int:
    return max([len(tree), *map(widest, tree)])


def worth(tree: Tree, acceptance: tuple[float, ...]) -> float:
    """Expected tokens: one more than those that are kept below."""
    return 1 + sum(chance * worth(child, acceptance) for chance, child in zip(acceptance, tree, strict=False))


def best_worth(nodes: int, depth: int, acceptance: tuple[float, ...]) -> float:
    fitting = (tree for tree in forests(nodes - 1) if levels(tree) <= depth and widest(tree) <= len(acceptance))
    return max((worth(tree, acceptance) for tree in fitting), default=-math.inf)


def breadth_first(tree: Tree) -> tuple[int, ...]:
    parents, nodes = [-1], [tree]
    for number, node in enumerate(nodes):
        parents += [number] * len(node)
        nodes += node
    return tuple(parents)


# ---- the best tree ----

def test_enumeration_is_complete():
    """As many ordered trees as Catalan's numbers say, all different."""
    assert [len(set(forests(nodes - 1))) for nodes in range(1, 8)] == [1, 1, 2, 5, 14, 42, 132]


@pytest.mark.parametrize("acceptance", [*VECTORS, *random_vectors()], ids=str)
def test_no_tree_is_better(acceptance):
    """Published code dropped the last entry of the vector (Sequoia issue 15): that loses here wherever the last child pays."""
    trees = BestTrees(acceptance, 7, 7)
    for nodes in range(1, 8):
        for depth in range(8):
            assert trees.tokens(nodes, depth) == pytest.approx(best_worth(nodes, depth, acceptance), abs=1e-12), (nodes, depth)


@pytest.mark.parametrize("acceptance", [*VECTORS, *random_vectors()], ids=str)
def test_the_tree_is_as_good_as_promised(acceptance):
    trees = BestTrees(acceptance, 24, 8)
    for nodes in range(1, 25):
        for depth in range(9):
            if trees.tokens(nodes, depth) == -math.inf:
                refused(lambda n=nodes, d=depth: trees.parents(n, d), f"{nodes} nodes", f"{depth} levels")
                continue
            growmap = trees.growmap(nodes, depth, {"asked": [nodes, depth]})
            assert growmap.size == nodes and growmap.depth <= depth and growmap.acceptance == acceptance
            assert growmap.provenance == {"asked": [nodes, depth]}
            assert growmap.tokens_per_call == pytest.approx(trees.tokens(nodes, depth), abs=1e-12)


def test_by_hand():
    """v = (0.6, 0.3): the third node goes below the first child (0.36) before it goes beside it (0.3), where there is a second level."""
    trees = BestTrees((0.6, 0.3), 5, 3)
    assert trees.parents(2, 1) == (-1, 0) and trees.tokens(2, 1) == pytest.approx(1.6)
    assert trees.parents(3, 1) == (-1, 0, 0) and trees.tokens(3, 1) == pytest.approx(1.9)
    assert trees.parents(3, 2) == (-1, 0, 1) and trees.tokens(3, 2) == pytest.approx(1.96)
    assert trees.parents(4, 2) == (-1, 0, 0, 1) and trees.tokens(4, 2) == pytest.approx(2.26)
    assert trees.parents(5, 3) == (-1, 0, 0, 1, 3) and trees.tokens(5, 3) == pytest.approx(2.476)
    assert trees.tokens(4, 1) == trees.tokens(2, 0) == -math.inf
    assert trees.tokens(1, 0) == trees.tokens(1, 3) == 1


def test_a_worthless_first_child_is_drawn_for_the_sake_of_the_second():
    """Chances belong to places in the draw order, so the vector is not sorted: the subtree hangs from the second child."""
    assert BestTrees((0.0, 0.6), 5, 2).parents(5, 2) == (-1, 0, 0, 2, 2)


def test_deep_wide_and_large():
    trees = BestTrees([0.6 * 0.62**k for k in range(32)] / np.float64(1.7), 128, 10)
    tokens = np.array([[trees.tokens(n, d) for n in range(1, 129)] for d in range(11)])
    feasible = np.isfinite(tokens)
    assert feasible[2:].all() and feasible[1].sum() == 33 and feasible[0].sum() == 1
    for axis in (0, 1):
        assert (np.diff(np.where(feasible, tokens, 0), axis=axis)[np.diff(feasible, axis=axis) == 0] >= -1e-12).all()
    for nodes, depth in ((33, 1), (128, 2), (128, 10), (127, 9)):
        growmap = trees.growmap(nodes, depth, {})
        assert growmap.size == nodes and growmap.depth <= depth
        assert growmap.tokens_per_call == pytest.approx(tokens[depth, nodes - 1], abs=1e-12)
    assert trees.growmap(128, 10, {}).tokens_per_call > chain_worth(10, trees.acceptance[0])


def chain_worth(length: int, chance: float) -> float:
    return sum(chance**level for level in range(length + 1))


def test_every_width_and_depth_that_a_tree_can_have():
    """2 children and 3 levels make 15 nodes and no more, and a chain is as long as it may be deep."""
    assert [n for n in range(1, 20) if BestTrees((0.5, 0.2), 19, 3).tokens(n, 3) > 0] == list(range(1, 16))
    assert BestTrees((0.8,), 6, 5).growmap(6, 5, {}).parents == chain(5).parents
    assert BestTrees((0.8,), 6, 5).tokens(6, 5) == pytest.approx(chain_worth(5, 0.8))


def test_vectors_of_numpy_and_torch():
    for vector in (np.array([0.5, 0.25]), torch.tensor([0.5, 0.25])):
        assert BestTrees(vector, 3, 2).growmap(3, 2, {}).acceptance == (0.5, 0.25)


@pytest.mark.parametrize("arguments, said", [
    (((), 4, 2), "empty"), (((0.5, 0.6), 4, 2), "sums to 1.1"), (((0.5, -0.1), 4, 2), "v_2 is -0.1"), (((math.nan,), 4, 2), "v_1 is nan"),
    (((0.5,), 0, 2), "size 0"), (((0.5,), LARGEST + 1, 2), f"1 … {LARGEST}"), (((0.5,), 4, -1), "depth -1"),
])
def test_what_has_no_best_tree(arguments, said):
    refused(lambda: BestTrees(*arguments), said)


@pytest.mark.parametrize("nodes, depth", [(0, 1), (5, 1), (1, 3), (1, -1), (-1, 1)])
def test_asking_for_what_was_not_solved(nodes, depth):
    for ask in (BestTrees((0.5,), 4, 2).tokens, BestTrees((0.5,), 4, 2).parents):
        refused(lambda ask=ask: ask(nodes, depth), f"{nodes} nodes", "1 … 4 nodes")


# ---- the best size ----

def test_a_free_draft_and_target_take_the_largest_tree():
    assert best_size(BestTrees((0.6, 0.3), 5, 3), 0.0, {n: 1.0 for n in (1, 3, 5)})[:2] == (5, 3)


def test_a_slow_draft_is_left_out():
    assert best_size(BestTrees((0.6, 0.3), 5, 3), 1.0, {1: 1.0, 3: 1.1, 5: 1.2}) == (1, 0, 1.0)


def test_seconds_are_weighed_by_hand():
    """1 / 1, 1.9 / (0.05 + 1.0 + 0.1), 1.96 / (0.1 + 1.0 + 0.1), and 5 nodes that cost too much."""
    trees = BestTrees((0.6, 0.3), 5, 3)
    times = {1: 1.0, 3: 1.0, 5: 9.0}
    n, d, tokens_per_s = best_size(trees, 0.05, times, overhead_s=0.1)
    assert (n, d) == (3, 1) and tokens_per_s == pytest.approx(1.9 / 1.15)
    n, d, tokens_per_s = best_size(trees, 0.01, times, overhead_s=0.1)
    assert (n, d) == (3, 2) and tokens_per_s == pytest.approx(1.96 / 1.12)


def test_a_depth_of_d_costs_d_draft_passes():
    """With a vector of one entry the tree of 3 nodes is a chain: two passes, not one or three."""
    assert best_size(BestTrees((0.5,), 3, 2), 0.25, {3: 1.0}) == (3, 2, pytest.approx(1.75 / 1.5))


def test_of_equals_the_smallest():
    assert best_size(BestTrees((0.0, 0.0), 7, 3), 0.0, {7: 1.0, 3: 1.0, 2: 1.0})[:2] == (2, 1)


@pytest.mark.parametrize("draft_s, target_s, overhead_s, said", [
    (-0.1, {1: 1.0}, 0.0, "draft_s is -0.1"), (math.nan, {1: 1.0}, 0.0, "draft_s is nan"), (0.1, {1: 1.0}, math.inf, "overhead_s is inf"),
    (0.1, {2: 0.0}, 0.0, "target_s[2] is 0.0"), (0.1, {9: 1.0}, 0.0, "9 nodes"), (0.1, {5: 1.0}, 0.0, "no tree has any of [5]"), (0.1, {}, 0.0, "[]"),
])
def test_times_from_which_nothing_can_be_chosen(draft_s, target_s, overhead_s, said):
    refused(lambda: best_size(BestTrees((0.5,), 6, 2), draft_s, target_s, overhead_s), said)


# ---- one shape ----

def test_facts_of_a_shape():
    growmap = Growmap((-1, 0, 0, 0, 1, 1, 3), (0.5, 0.25, 0.125))
    assert (growmap.size, growmap.depth) == (7, 2)
    assert growmap.depths == (0, 1, 1, 1, 2, 2, 2)
    assert growmap.ranks == (-1, 0, 1, 2, 0, 1, 0)
    assert growmap.children == (3, 2, 0, 1, 0, 0, 0)
    assert growmap.reach == (1.0, 0.5, 0.25, 0.125, 0.25, 0.125, 0.0625)
    assert growmap.tokens_per_call == 2.3125


@pytest.mark.parametrize("tree", [tree for nodes in range(1, 7) for tree in forests(nodes - 1)], ids=str)
def test_every_shape_is_accepted_and_weighed(tree):
    acceptance = (0.4, 0.1, 0.2, 0.15, 0.05)
    growmap = Growmap(breadth_first(tree), acceptance)
    assert growmap.depth == levels(tree) and max(growmap.children) == widest(tree)
    assert growmap.tokens_per_call == pytest.approx(worth(tree, acceptance))


def test_chains():
    assert chain(0) == Growmap((-1,)) and chain(0).tokens_per_call == 1
    assert chain(3).parents == (-1, 0, 1, 2) and chain(3).depth == 3
    refused(lambda: chain(-1), "-1")


def test_unknown_chances_are_not_guessed():
    refused(lambda: chain(2).reach, "no acceptance vector")
    refused(lambda: chain(2).tokens_per_call, "no acceptance vector")


def test_what_replaying_found_counts_more_than_the_product_of_v():
    growmap = Growmap((-1, 0, 0, 1), (0.5, 0.25), replayed=(1.0, 0.6, 0.2, 0.4))
    assert growmap.reach == (1.0, 0.6, 0.2, 0.4) and growmap.tokens_per_call == pytest.approx(2.2)
    for shares, said in {
        (1.0, 0.5): "2 entries for 4 nodes", (1.0, 0.6, 0.5, 0.1): "exceed its own", (1.0, 0.2, 0.2, 0.3): "exceed its own", (0.9, 0.6, 0.2, 0.4): "the root's is not 1",
        (1.0, -0.1, 0.2, 0.0): "share -0.1 of node 1", (1.0, math.nan, 0.2, 0.0): "share nan of node 1", (1.0, "0.6", 0.2, 0.0): "share '0.6' of node 1",
    }.items():
        refused(lambda shares=shares: Growmap((-1, 0, 0, 1), (0.5, 0.25), replayed=shares), said)


def test_hash_leaves_the_provenance_out():
    assert hash(Growmap((-1, 0), (0.5,), {"a": 1})) == hash(Growmap((-1, 0), (0.5,), {"b": 2}))


BAD_SHAPES = {
    "no root": ((), (), "parents start with []"),
    "root with a parent": ((0, 0), (), "parents start with [0]"),
    "two roots": ((-1, -1), (), "node 1 has parent -1"),
    "its own parent": ((-1, 1), (), "node 1 has parent 1"),
    "parent behind its child": ((-1, 2, 0), (), "node 1 has parent 2"),
    "depth first": ((-1, 0, 1, 0), (), "node 3 has parent 0, the node before it 1"),
    "children apart": ((-1, 0, 0, 1, 2, 1), (), "node 5 has parent 1, the node before it 2"),
    "a fraction": ((-1, 0, 0.5), (), "parent 0.5 of node 2"),
    "a truth value": ((-1, False), (), "parent False of node 1"),
    "a word": ((-1, "0"), (), "parent '0' of node 1"),
    "wider than the vector": ((-1, 0, 1, 1, 1), (0.5, 0.25), "node 1 has 3 children, the acceptance vector 2"),
    "a negative chance": ((-1, 0), (-0.1,), "v_1 is -0.1"),
    "a chance above 1": ((-1, 0), (1.5,), "v_1 is 1.5"),
    "a chance that is no number": ((-1, 0), (0.5, math.nan), "v_2 is nan"),
    "a chance that is a word": ((-1, 0), ("0.5",), "v_1 is '0.5'"),
    "a chance that is a truth value": ((-1, 0), (True,), "v_1 is True"),
    "chances above 1 in all": ((-1, 0), (0.7, 0.4), "sums to 1.1"),
}


@pytest.mark.parametrize("parents, acceptance, said", BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_no_growmap(parents, acceptance, said, tmp_path):
    """Neither made nor read from a file."""
    refused(lambda: Growmap(parents, acceptance), said)
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"format": "growmap-1", "parents": parents, "acceptance": acceptance, "replayed": [], "budget": len(parents), "depth": 1, "provenance": {}}))
    refused(lambda: load_growmap(path), f"{path}: ", said)


def test_provenance_is_a_dictionary():
    refused(lambda: Growmap((-1,), (), "by hand"), "provenance is 'by hand'")


def test_chances_may_exceed_1_by_rounding():
    assert Growmap((-1, 0), (0.5, 0.5 + 5e-7)).size == 2


# ---- our file ----

def test_json_round_trip(tmp_path):
    trees = BestTrees(random_vectors()[-1], 40, 6)
    growmap = trees.growmap(40, 6, {"model": "a/b", "prompts": 200, "temperature": 0.6, "times": [0.1, 0.2], "note": "τ ≤ 7"})
    path = tmp_path / "tree.json"
    for saved in (growmap, replace(growmap, replayed=growmap.reach), chain(2)):  # the second replaces the first
        save_growmap(path, saved)
        assert load_growmap(str(path)) == saved
    content = json.loads(path.read_text())
    assert content == {"format": "growmap-1", "parents": [-1, 0, 1], "acceptance": [], "replayed": [], "budget": 3, "depth": 2, "provenance": {}}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("change, said", [
    ({"format": "growmap-0"}, "growmap-1"), ({"format": None}, "growmap-1"), ({"budget": 4}, "budget is 4, but parents make it 3"),
    ({"depth": 1}, "depth is 1, but parents make it 2"), ({"parents": "-1"}, "parents is '-1'"), ({"acceptance": 0.5}, "acceptance is 0.5"), ({"replayed": 1}, "replayed is 1"), ({"replayed": [1, 0.5]}, "replayed has 2 entries for 3 nodes"),
    ({"provenance": None}, "provenance is None"), ({"width": 3}, "'width'"),
])
def test_json_that_contradicts_itself(change, said, tmp_path):
    path = tmp_path / "tree.json"
    save_growmap(path, chain(2))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(lambda: load_growmap(path), f"{path}: ", said)


@pytest.mark.parametrize("key", ["format", "parents", "acceptance", "budget", "depth", "provenance"])
def test_json_without_a_key(key, tmp_path):
    path = tmp_path / "tree.json"
    save_growmap(path, chain(2))
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    refused(lambda: load_growmap(path), f"{path}: ")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"PK\x03\x04"])
def test_no_json(content, tmp_path):
    path = tmp_path / "tree.json"
    path.write_bytes(content)
    refused(lambda: load_growmap(path), f"{path}: is not JSON")


@pytest.mark.parametrize("content", ["[1]", "null", "3"])
def test_json_of_something_else(content, tmp_path):
    path = tmp_path / "tree.json"
    path.write_text(content)
    refused(lambda: load_growmap(path), f"{path}: does not say")


@pytest.mark.parametrize("name", ["tree.json", "tree.pt"])
def test_paths_that_cannot_be_read_or_written(name, tmp_path):
    refused(lambda: load_growmap(tmp_path / name), name, "cannot be read")
    (tmp_path / name).mkdir()
    refused(lambda: load_growmap(tmp_path / name), name, "cannot be read")
    refused(lambda: save_growmap(tmp_path / "nowhere" / name, chain(1)), name, "cannot be written")


@pytest.mark.parametrize("fact", [{1}, math.inf, torch.ones(1), np.float32(1)])
def test_facts_that_json_cannot_hold(fact, tmp_path):
    refused(lambda: save_growmap(tmp_path / "tree.json", Growmap((-1,), (), {"fact": fact})), "provenance")
    assert not list(tmp_path.iterdir())


# ---- the reference's file ----

def reference_form(parents: tuple[int, ...]) -> dict:
    """What Sequoia's tree_search.py would save for these parents."""
    paths = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        paths.append([*paths[parent], node])
    successors = [[node for node, parent in enumerate(parents) if parent == above] for above in range(len(parents))]
    roots = [[node for node, path in enumerate(paths) if len(path) == level] for level in range(1, max(map(len, paths)) + 1)]
    mask = torch.tensor([[int(column in path) for column in range(len(parents))] for path in paths])
    return {"roots": roots, "branches": [[len(successors[node]) for node in level] for level in roots], "Successors": successors, "mask": mask,
            "depth": torch.tensor([len(path) - 1 for path in paths]), "size": len(parents)}


SHAPE = (-1, 0, 0, 0, 1, 1, 3)


@pytest.mark.parametrize("parents", [SHAPE, (-1,), (-1, 0, 1, 2, 3), breadth_first(forests(6)[50]), (-1, *[0] * 9, *range(1, 10))], ids=str)
def test_reference_form(parents, tmp_path):
    path = tmp_path / "tree.pt"
    torch.save(reference_form(parents), path)
    assert load_growmap(path) == Growmap(parents, (), {"converted_from": "tree.pt"})


def set_mask(row: int, column: int, value: int) -> Callable[[dict], None]:
    return lambda content: content["mask"].__setitem__((row, column), value)


def set_to(key: str, value: object) -> Callable[[dict], None]:
    return lambda content: content.__setitem__(key, value)


def crossed_successors(content: dict) -> None:
    """Nodes 4 and 6 change parents, so the children of node 1 are no neighbours; mask follows, depth and levels stay right."""
    content["Successors"] = [[1, 2, 3], [5, 6], [], [4], [], [], []]
    content["mask"][4], content["mask"][6] = torch.tensor([1, 0, 0, 1, 1, 0, 0]), torch.tensor([1, 1, 0, 0, 0, 0, 1])


INCONSISTENT = {
    "mask lacks an ancestor": (set_mask(4, 1, 0), "mask"),
    "mask lacks the root": (set_mask(6, 0, 0), "mask"),
    "mask lacks the node itself": (set_mask(5, 5, 0), "mask"),
    "mask shows a stranger": (set_mask(4, 2, 1), "mask"),
    "mask shows what comes later": (set_mask(1, 4, 1), "mask"),
    "mask counts twice": (set_mask(1, 0, 2), "mask"),
    "mask of another tree": (set_to("mask", reference_form((-1, *range(6)))["mask"]), "mask"),
    "mask of another size": (set_to("mask", torch.eye(6, dtype=torch.int64)), "mask"),
    "mask of fractions": (lambda content: set_to("mask", content["mask"] * 0.5)(content), "mask"),
    "mask that is a list": (lambda content: set_to("mask", content["mask"].tolist())(content), "mask"),
    "sparse mask": (lambda content: set_to("mask", content["mask"].to_sparse())(content), "mask"),
    "mask without numbers": (set_to("mask", torch.ones(7, 7, dtype=torch.int64, device="meta")), "mask"),
    "depth counts from 1": (lambda content: content["depth"].add_(1), "depth"),
    "depth of one node": (lambda content: content["depth"].__setitem__(3, 2), "depth"),
    "depth of another size": (set_to("depth", torch.zeros(6, dtype=torch.int64)), "depth"),
    "depth as a list": (set_to("depth", [0, 1, 1, 1, 2, 2, 2]), "depth"),
    "size without the root": (set_to("size", 6), "size is 6"),
    "size as a word": (set_to("size", "7"), "size is '7'"),
    "roots lack a level": (lambda content: content["roots"].pop(), "roots"),
    "roots in another order": (lambda content: content["roots"][1].reverse(), "roots"),
    "roots on the wrong level": (set_to("roots", [[0], [1, 2], [3, 4, 5, 6]]), "roots"),
    "roots are tensors": (set_to("roots", [torch.tensor([0])]), "roots"),
    "branches lack the leaves": (lambda content: content["branches"].pop(), "branches"),
    "branches beside their nodes": (lambda content: content["branches"][1].reverse(), "branches"),
    "branches of the wrong number": (set_to("branches", [[3], [2, 0, 2], [0, 0, 0]]), "branches"),
    "children apart": (crossed_successors, "Successors"),
    "children in another order": (lambda content: content["Successors"][0].reverse(), "Successors"),
    "a child twice": (set_to("Successors", [[1, 2, 3], [4, 5], [5], [6], [], [], []]), "Successors"),
    "a child missing": (set_to("Successors", [[1, 2, 3], [4, 5], [], [], [], [], []]), "Successors"),
    "a child that is no node": (set_to("Successors", [[1, 2, 3], [4, 5], [], [6, 7], [], [], []]), "Successors"),
    "a child of its own": (set_to("Successors", [[], [1, 2, 3], [4, 5], [6], [], [], []]), "node 1 has parent 1"),
    "no node": (set_to("Successors", []), "Successors"),
    "children as a tensor": (set_to("Successors", torch.zeros(7, 2, dtype=torch.int64)), "Successors"),
    "a missing key": (lambda content: content.pop("depth"), "keys"),
    "an unknown key": (set_to("tokens", 1), "keys"),
}


@pytest.mark.parametrize("spoil, said", INCONSISTENT.values(), ids=INCONSISTENT)
def test_reference_form_that_contradicts_itself(spoil, said, tmp_path):
    content = reference_form(SHAPE)
    spoil(content)
    path = tmp_path / "tree.pt"
    torch.save(content, path)
    refused(lambda: load_growmap(path), f"{path}: ", said)


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], 3, None], ids=["tensor", "list", "number", "none"])
def test_torch_file_of_something_else(content, tmp_path):
    path = tmp_path / "tree.pt"
    torch.save(content, path)
    refused(lambda: load_growmap(path), f"{path}: holds a {type(content).__name__}")


class Trap:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    path, sprung = tmp_path / "tree.pt", tmp_path / "sprung"
    torch.save(reference_form(SHAPE) | {"size": Trap(sprung)}, path)
    refused(lambda: load_growmap(path), f"{path}: ", "more than plain data")
    assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists()  # the trap works where it is allowed to


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # a damaged byte is read as one
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_torch_files(zipped, tmp_path):
    """Cut off or with bytes changed: read whole where the damage missed all that counts, and otherwise refused with a line."""
    path, rng, refusals = tmp_path / "tree.pt", random.Random(0), 0
    torch.save(reference_form(SHAPE), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for damage in range(150):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if damage % 3 == 0 else whole)
        for place in (rng.randrange(len(whole)) for _ in range(damage % 3 * 4)):
            damaged[place] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert load_growmap(path).parents == SHAPE
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refusals += 1
    assert refusals > 75
