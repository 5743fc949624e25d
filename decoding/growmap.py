"""Shapes of static draft trees: what one is, its file, and the best one for given acceptance rates (Sequoia, Chen et al. 2402.12374).

The model behind a shape is positional acceptance: the k-th child of any node is the one that verification keeps with chance v_k, whatever
the text and the depth. A tree is then worth the sum of its nodes' chances to be kept. What we do otherwise than the published code: the
whole vector counts (that code drops its last entry), and a depth of d costs d draft passes, as leaves are never fed to our draft.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

FORMAT = "growmap-1"
JSON_KEYS = ("format", "parents", "acceptance", "replayed", "budget", "depth", "provenance")
REFERENCE_KEYS = ("roots", "branches", "Successors", "mask", "depth", "size")
LARGEST = 2048  # nodes that BestTrees takes: its work and its scratch memory grow with their square, and int16 holds its choices
# What torch.load(weights_only=True) raised over 12,000 damaged files: each says that the bytes are no growmap.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error)


@dataclass(frozen=True)
class Growmap:
    """The shape of a draft tree, breadth first: node 0 is the root, the last committed token; the others are drafted tokens.

    `parents`: each node's parent, −1 for the root, in non-decreasing order, which says all at once: sorted by depth, then by parent, and
    children of a node together, in draw order. `acceptance`: v_1 … v_W, the chance that verification keeps a node's k-th child, given
    that it reached the node (the rest to 1 is the chance that it keeps none); empty where unknown. `provenance`: facts for the file.
    `replayed`: how often each node was on the accepted path in rounds over real texts; empty where that was not measured. Raises ValueError
    for any other shape, vector or shares.
    """

    parents: tuple[int, ...]
    acceptance: tuple[float, ...] = ()
    provenance: dict = field(default_factory=dict, hash=False)
    replayed: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_parents(self.parents)
        _check_acceptance(self.acceptance)
        _check_replayed(self.replayed, self.parents)
        if not isinstance(self.provenance, dict):
            raise ValueError(f"provenance is {self.provenance!r}; give a dictionary of facts")
        widest = max(self.children)
        if self.acceptance and widest > len(self.acceptance):
            raise ValueError(
                f"node {self.children.index(widest)} has {widest} children, the acceptance vector {len(self.acceptance)} entries; measure a longer vector")

    @property
    def size(self) -> int:
        """Nodes, the root included: what one target call verifies."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """Levels below the root: the draft passes of a round, and the most drafted tokens that it can keep."""
        return self.depths[-1]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Each node's distance from the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Each node's index among its siblings, from 0 in draw order; −1 for the root, which nothing drew."""
        ranks = [-1]
        for node in range(1, self.size):
            ranks.append(ranks[-1] + 1 if self.parents[node] == self.parents[node - 1] else 0)
        return tuple(ranks)

    @cached_property
    def children(self) -> tuple[int, ...]:
        """How many children each node has."""
        counts = [0] * self.size
        for parent in self.parents[1:]:
            counts[parent] += 1
        return tuple(counts)

    @cached_property
    def reach(self) -> tuple[float, ...]:
        """Each node's chance to lie on the accepted path, 1 for the root: what replaying found, or else the product of v over the path to it.

        Raises ValueError where both are unknown.
        """
        if self.replayed:
            return self.replayed
        if self.size > 1 and not self.acceptance:
            raise ValueError("the growmap has no acceptance vector, so nothing is known about its nodes' chances; measure one and build it anew")
        reach = [1.0]
        for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
            reach.append(reach[parent] * self.acceptance[rank])
        return tuple(reach)

    @property
    def tokens_per_call(self) -> float:
        """Expected tokens that a round emits, τ: the kept nodes below the root, and 1 for the correction or bonus, which the root's 1 stands for."""
        return math.fsum(self.reach)


def chain(length: int) -> Growmap:
    """The tree without branches: `length` drafted tokens one behind the other, so length + 1 nodes."""
    if length < 0:
        raise ValueError(f"a chain of {length} drafted tokens cannot be; give 0 or more")
    return Growmap(tuple(range(-1, length)))


def _check_parents(parents: Sequence[int]) -> None:
    """Raises ValueError unless `parents` is a tree in the order that Growmap describes."""
    for node, parent in enumerate(parents):
        if type(parent) is not int:
            raise ValueError(f"parent {parent!r} of node {node} is no whole number; give node numbers")
    if not parents or parents[0] != -1:
        raise ValueError(f"parents start with {list(parents[:1])}; give node 0, the root, parent -1")
    for node in range(1, len(parents)):
        if not 0 <= parents[node] < node:
            raise ValueError(f"node {node} has parent {parents[node]}, which is not among the nodes before it; number the nodes breadth first")
        if parents[node] < parents[node - 1]:
            raise ValueError(f"node {node} has parent {parents[node]}, the node before it {parents[node - 1]}; sort nodes by depth, then by parent")


def _check_acceptance(acceptance: Sequence[float]) -> None:
    """Raises ValueError unless `acceptance` holds chances of things of which one can happen at most."""
    for k, chance in enumerate(acceptance, start=1):
        if isinstance(chance, bool) or not isinstance(chance, (int, float)) or not 0 <= chance <= 1:
            raise ValueError(f"acceptance v_{k} is {chance!r}; give chances in [0, 1]")
    if math.fsum(acceptance) > 1 + 1e-6:
        raise ValueError(f"acceptance sums to {math.fsum(acceptance)}; one child is kept at most, so give chances with a sum of at most 1")


def _check_replayed(replayed: Sequence[float], parents: Sequence[int]) -> None:
    """Raises ValueError unless `replayed` is empty or holds a share for each node, the root's 1 and children's shares at most their parent's together."""
    if not replayed:
        return
    if len(replayed) != len(parents):
        raise ValueError(f"replayed has {len(replayed)} entries for {len(parents)} nodes; give one for each")
    left = []
    for node, (parent, share) in enumerate(zip(parents, replayed, strict=True)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"replayed share {share!r} of node {node}; give shares in [0, 1]")
        left.append(share)
        if parent >= 0:
            left[parent] -= share
    if replayed[0] != 1 or min(left) < -1e-6:
        raise ValueError("replayed shares of a node's children exceed its own, or the root's is not 1; measure them again")


# ---- files ----

def save_growmap(path: Path | str, growmap: Growmap) -> None:
    """Replace `path` by `growmap` in JSON, in one step; ValueError where that cannot be written."""
    path = Path(path)
    content = (FORMAT, growmap.parents, growmap.acceptance, growmap.replayed, growmap.size, growmap.depth, growmap.provenance)
    try:
        text = json.dumps(dict(zip(JSON_KEYS, content, strict=True)), allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: JSON cannot hold the provenance ({error}); give numbers, strings, lists and dictionaries") from error
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); give a path in a folder that can be written to") from error


def load_growmap(path: Path | str) -> Growmap:
    """The growmap in `path`: our JSON, or, named *.pt, a torch dictionary as Sequoia's tree_search.py writes it (it has no acceptance vector).

    Raises ValueError with the file and what is wrong with it. A .pt file is read as plain data: code in it is refused, not run.
    """
    path = Path(path)
    try:
        return _load_reference(path) if path.suffix == ".pt" else _load_json(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); build it, or give the path of another growmap") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load_json(path: Path) -> Growmap:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}); build it anew, or name it *.pt if it is a torch file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"does not say \"format\": \"{FORMAT}\"; build it anew")
    _check_keys(content, JSON_KEYS)
    for key in ("parents", "acceptance", "replayed"):
        if not isinstance(content[key], list):
            raise ValueError(f"{key} is {content[key]!r}; it must be a list")
    growmap = Growmap(tuple(content["parents"]), tuple(content["acceptance"]), content["provenance"], tuple(content["replayed"]))
    for key, found in (("budget", growmap.size), ("depth", growmap.depth)):
        if content[key] != found:
            raise ValueError(f"{key} is {content[key]!r}, but parents make it {found}; build the file anew")
    return growmap


def _check_keys(content: dict, keys: tuple[str, ...]) -> None:
    if set(content) != set(keys):
        raise ValueError(f"has the keys {sorted(map(str, content))}, and should have {sorted(keys)}; build it anew")


def _load_reference(path: Path) -> Growmap:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(f"is damaged or holds more than plain data ({type(error).__name__}), and is not read; build it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not a growmap's dictionary; build it anew")
    _check_keys(content, REFERENCE_KEYS)
    growmap = Growmap(_parents(content["Successors"]), provenance={"converted_from": path.name})
    _check_levels(content, growmap)
    _check_matrices(content, growmap)
    return growmap


def _parents(successors: object) -> tuple[int, ...]:
    """Parents of the nodes whose children `successors` lists: breadth first, the lists count 1, 2, 3 … one behind the other."""
    if not _is_lists_of_ints(successors):
        raise ValueError("Successors is not a list of lists of node numbers; build the file anew")
    named = [child for children in successors for child in children]
    if named != list(range(1, len(successors))):
        raise ValueError(f"Successors of its {len(successors)} nodes do not name 1, 2, 3 … in order, each node once; number the nodes breadth first")
    return (-1, *(node for node, children in enumerate(successors) for _ in children))


def _check_levels(content: dict, growmap: Growmap) -> None:
    """Raises ValueError unless size, roots (each level's nodes) and branches (their numbers of children) are those of `growmap`."""
    roots = [[] for _ in range(growmap.depth + 1)]
    for node, depth in enumerate(growmap.depths):
        roots[depth].append(node)
    branches = [[growmap.children[node] for node in level] for level in roots]
    if type(content["size"]) is not int or content["size"] != growmap.size:
        raise ValueError(f"size is {content['size']!r}, but Successors has {growmap.size} nodes; build the file anew")
    for key, expected in (("roots", roots), ("branches", branches)):
        if not _is_lists_of_ints(content[key]) or content[key] != expected:
            raise ValueError(f"{key} does not list level by level what Successors says; build the file anew")


def _check_matrices(content: dict, growmap: Growmap) -> None:
    """Raises ValueError unless mask (n, n), int64, marks each node's ancestors and itself, and depth (n,), int64, counts the ancestors."""
    closure = torch.eye(growmap.size, dtype=torch.int64)
    for node, parent in enumerate(growmap.parents[1:], start=1):
        closure[node] += closure[parent]
    for key, expected, meaning in (("mask", closure, "each node's ancestors and itself"), ("depth", closure.sum(1) - 1, "the mask's row sums less 1")):
        found = content[key]
        if not (isinstance(found, torch.Tensor) and found.dtype == torch.int64 and found.layout == torch.strided and found.device.type == "cpu"):
            raise ValueError(f"{key} is not a dense int64 tensor; build the file anew")
        if not torch.equal(found, expected):
            raise ValueError(f"{key} {tuple(found.shape)} is not {meaning} by Successors {tuple(expected.shape)}; build the file anew")


def _is_lists_of_ints(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and all(type(number) is int for number in row) for row in value)


# ---- the best shape ----

def most_nodes(width: int, depth: int) -> int:
    """Nodes of the largest tree of `depth` levels below the root in which no node has more than `width` children."""
    return sum(width**level for level in range(depth + 1))


class BestTrees:
    """Trees of most expected tokens per call, for every number of nodes n ≤ `size` and every depth d ≤ `depth` at once.

    `acceptance`: v_1 … v_W alone, without the padding in front and the chance of no child behind that published vectors carry.
    Sequoia's dynamic programme: with at most d levels below a node that has exactly b children and m nodes in all,
    T(m, d, b) = max over y of T(y, d, b−1) + v_b · max_b' T(m−y, d−1, b'): the last child takes m − y nodes, itself included, and the node
    with its other children y. T(1, d, 0) = 1, and −∞ where there is no tree. O(size²·depth·W) time, O(size·depth·W) int16 of choices.
    """

    def __init__(self, acceptance: Sequence[float], size: int, depth: int) -> None:
        self.acceptance, self.size, self.depth = tuple(map(float, acceptance)), size, depth
        _check_acceptance(self.acceptance)
        if not self.acceptance:
            raise ValueError("the acceptance vector is empty; give v_1 … v_W")
        if not 1 <= size <= LARGEST:
            raise ValueError(f"size {size} must lie in 1 … {LARGEST} nodes, the root included")
        if depth < 0:
            raise ValueError(f"depth {depth} must be 0 or more levels below the root")
        self._tokens = np.full((depth + 1, size + 1), -np.inf)  # max_b T, by depth and nodes
        self._tokens[:, 1] = 1.0
        self._children = np.zeros((depth + 1, size + 1), np.int16)  # the b that reaches it
        self._kept = np.zeros((depth + 1, min(len(self.acceptance), size - 1) + 1, size + 1), np.int16)  # the y that reaches T
        for d in range(1, depth + 1):
            self._solve(d)

    def _solve(self, d: int) -> None:
        """Fill in depth d from depth d − 1, one more child at a time, all (m, y) at once."""
        nodes = np.arange(self.size + 1)
        taken = nodes[:, None] - nodes  # (m, y): nodes of the last child's subtree
        subtree = np.where(taken > 0, self._tokens[d - 1][taken], -np.inf)
        impossible = np.isneginf(subtree)
        subtree[impossible] = 0.0  # 0 · ∞ has no value, so v_b = 0 needs them apart
        exactly = np.full((self._kept.shape[1], self.size + 1), -np.inf)  # T(m, d, b) at [b, m]
        exactly[0, 1] = 1.0
        for b in range(1, len(exactly)):
            tokens = exactly[b - 1] + np.where(impossible, -np.inf, self.acceptance[b - 1] * subtree)
            self._kept[d, b] = tokens.argmax(1)
            exactly[b] = tokens.max(1)
        self._tokens[d], self._children[d] = exactly.max(0), exactly.argmax(0)

    def tokens(self, n: int, d: int) -> float:
        """Most expected tokens per call of a tree of exactly n nodes, the root included, and at most d levels below it; −inf if there is none."""
        if not (1 <= n <= self.size and 0 <= d <= self.depth):
            raise ValueError(f"{n} nodes and {d} levels lie outside what was solved; ask for 1 … {self.size} nodes and 0 … {self.depth} levels")
        return float(self._tokens[d, n])

    def parents(self, n: int, d: int) -> tuple[int, ...]:
        """Parents, as in a Growmap, of a tree that reaches tokens(n, d); ValueError if there is none."""
        if self.tokens(n, d) == -np.inf:
            raise ValueError(f"no tree has {n} nodes on {d} levels with {len(self.acceptance)} children at most; ask for fewer nodes or more levels")
        parents, subtrees = [-1], [(n, d)]
        for node, (size, below) in enumerate(subtrees):  # grows on the way, so nodes come breadth first
            shares = self._shares(size, below)
            parents += [node] * len(shares)
            subtrees += [(share, below - 1) for share in shares]
        return tuple(parents)

    def _shares(self, n: int, d: int) -> list[int]:
        """Nodes of each child's subtree, in draw order, in the best tree of n nodes and d levels."""
        shares = []
        for b in range(int(self._children[d, n]), 0, -1):
            kept = int(self._kept[d, b, n])
            shares.append(n - kept)
            n = kept
        return shares[::-1]

    def growmap(self, n: int, d: int, provenance: dict) -> Growmap:
        """The tree of parents(n, d) with its acceptance vector. It may have fewer than d levels, where more do not help."""
        return Growmap(self.parents(n, d), self.acceptance, provenance)


def best_size(trees: BestTrees, draft_s: float, target_s: dict[int, float], overhead_s: float = 0.0) -> tuple[int, int, float]:
    """The number of nodes n, the levels d and the expected tokens per second of the tree that decodes fastest on this machine.

    `draft_s`: seconds of one draft pass, of which a tree of d levels takes d: the root's, and every level's but the last. `target_s`: for
    each n to choose from, seconds of the target call that verifies n nodes; 1 is decoding without a draft (n = 1, d = 0). `overhead_s`:
    seconds of a round outside both, whatever its tree. Of equals, the fewest nodes, then the fewest levels. Raises ValueError where a time
    is no time, or no n has a tree.
    """
    for name, seconds in (("draft_s", draft_s), ("overhead_s", overhead_s)):
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"{name} is {seconds}; give seconds, 0 or more")
    for n, seconds in target_s.items():
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"target_s[{n}] is {seconds}; give measured seconds")
    choices = [
        (n, d, trees.tokens(n, d) / (d * draft_s + target_s[n] + overhead_s)) for n in sorted(target_s) for d in range(trees.depth + 1)]
    best = max(choices, key=lambda choice: choice[2], default=(0, 0, -math.inf))
    if best[2] == -math.inf:
        raise ValueError(f"no tree has any of {sorted(target_s)} nodes on {trees.depth} levels; time the target with other numbers of nodes")
    return best
