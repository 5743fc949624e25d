"""One round over a tree of drafted tokens: what static and growing trees share, for independent drafts and the target's own exits.

A round is: the root pass, which feeds the draft the root and what of the text it has not seen; passes over the nodes that get children, level
by level; one target call over all N nodes; the walk. What was accepted is kept in the target's cache. A draft gets it again in its next root
pass, which reads the same weights anyway: between rounds its cache holds nothing but text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from decoding.children import Children, Chooser, Nodes
from decoding.common_sense import verify_overwriting
from decoding.sampling import Noise, policy_probs
from decoding.state import NO_DRAFT_LAW, DecodeState, RoundResult, TreeCounts, check_finite
from decoding.tree import Tree
from decoding.verify import verify_match, verify_swor
from engine.shared_exit import SharedExit
from engine.static_llama import KEPT_WIDTHS


class ModelDraft:
    """An independent draft in a tree round. Of the committed tokens the last `pending` are not in its cache."""

    def __init__(self, state: DecodeState) -> None:
        self._model = state.draft
        self.pending = len(state.committed[0]) - self._model.lengths[0]
        self.key = None
        self.level, self.verify = self._model.forward_tree, state.target.forward_tree

    def root(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Logits (1, V_d) that follow the last of `tokens` (1, pending), which stands at `starts` (1,)."""
        return self._model.forward(tokens, starts + 1 - tokens.shape[1])[0, -1:]

    def count_root(self) -> None:
        """Take note of the root pass."""
        self._model.advance(self.pending)

    def keep(self, start: int, kept: torch.Tensor, nodes: int) -> None:
        """Of a verified tree it holds nothing."""


class ExitDraft:
    """The target's own exit in a tree round; what its own block has not seen it takes in the root pass."""

    pending = 1

    def __init__(self, state: DecodeState) -> None:
        self._target, self._exit = state.target, state.draft
        if self._exit.behind >= KEPT_WIDTHS:
            self._exit.catch_up()
        self.key = self._behind = self._exit.behind
        self.level, self.verify = self._exit.draft_tree, self._exit.verify_tree

    def root(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Logits (1, V_d) that follow `tokens` (1, 1), which stands at `starts` (1,)."""
        return self._exit.draft(tokens, starts, 0, self._behind)[0]

    def count_root(self) -> None:
        """Take note of the root pass."""
        self._exit.advance(self._behind, 1)
        self._exit.lengths = [fed + 1 for fed in self._target.lengths]

    def keep(self, start: int, kept: torch.Tensor, nodes: int) -> None:
        """Keep the hidden states of the nodes `kept` of a verified tree of `nodes` behind `start` tokens."""
        self._exit.keep(start, kept)
        self._exit.block_tokens += nodes * len(self._target.stack.blocks)


class TreeRound:
    """Of one text: `root_pass`, any number of `level_pass`, then `verify`."""

    def __init__(self, state: DecodeState, chooser: Chooser) -> None:
        self.state, self.chooser = state, chooser
        self.draft = ExitDraft(state) if isinstance(state.draft, SharedExit) else ModelDraft(state)
        self.starts, self.root = state.target.starts(), state.last()[0]
        self._key = (chooser.rule, chooser.coupling, state.eos_ids, state.common_sense)

    def program(self, key: object, function: Callable[..., tuple[torch.Tensor, ...]], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """function(*inputs, noise) as a program; see DecodeState."""
        return self.state.program(self.state.draft.programs, (key, self._key), function, *inputs)

    def root_pass(self, count: int) -> Children:
        """`count` children of the root."""
        def run(tokens: torch.Tensor, starts: torch.Tensor, noise: Noise) -> Children:
            zero = torch.zeros_like(starts)
            return self.chooser(self.draft.root(tokens, starts), count, Nodes(noise, starts, zero, zero))

        with self.state.clock("draft"):
            children = self.program(("root", count, self.draft.key), run, self.state.last(self.draft.pending), self.starts)
        self.draft.count_root()
        children = Children(*children)
        self._no_law = children.values[0, :1].isnan()
        return children

    def level_pass(
        self, key: object, work: Callable[..., tuple[torch.Tensor, ...]], inputs: tuple[torch.Tensor, ...], fixed: bool = True,
    ) -> tuple[torch.Tensor, ...]:
        """work(*inputs, starts, noise), in which `level_children` feeds the draft some nodes: a program, where its shapes are `fixed`."""
        with self.state.clock("draft"):
            if fixed:
                return self.program(("level", key), work, *inputs, self.starts)
            return work(*inputs, self.starts, self.state.noise)

    def level_children(self, count: int, tokens: torch.Tensor, depths: torch.Tensor, visible: torch.Tensor, starts: torch.Tensor, noise: Noise) -> Children:
        """`count` children of the nodes `tokens` (M,) at `depths` (M,), which see `visible` (M, W) of the W nodes fed so far, themselves the last. For a program."""
        fed = visible.shape[1]
        ids = torch.arange(fed - len(tokens), fed, device=tokens.device)
        return self.chooser(self.draft.level(tokens, starts, depths, visible), count, Nodes(noise, starts, depths, ids))

    def verify(self, tree: Tree, q: torch.Tensor, counts: TreeCounts) -> list[RoundResult]:
        """One target call over `tree`, the walk, and what is left of both caches. Ends in the round's one wait for the device.

        q (N, V) are the laws of each node's children, or (0, 0) where the rule does not look at them.
        """
        state = self.state
        expected = tree.expected
        if reserved(state):
            tree = state.common_sense.add_leaves(tree, state.eos_ids, trim=state.target.on_host)
        starts, text = self.starts, []
        if state.stale_from is not None:
            text = state.committed[0][state.stale_from : -1]
            state.target.crop([state.stale_from])
            tree, starts = tree.behind(torch.tensor(text, device=starts.device)), state.target.starts()

        def decide(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
            *tensors, expected, q, no_law, starts, noise = inputs
            tree = Tree(*tensors)
            logits = self.draft.verify(tree.tokens, starts, tree.depths, tree.visible)
            emitted, reached, drawn = self._walk(logits, tree, q, noise, starts, len(text))
            drawn = drawn.masked_fill(no_law & (drawn >= 0), NO_DRAFT_LAW)
            return (torch.cat([*(each.double() for each in (tree.tokens, emitted, tree.parents, reached)), drawn.double(), expected[None]]),)

        with state.clock("verify"):
            decision, = self.program(("verify", len(text)), decide, *tree.tensors(), expected, q, self._no_law, starts)
            return [self._result(decision.tolist(), len(text), counts)]

    def _walk(
        self, logits: torch.Tensor, tree: Tree, q: torch.Tensor, noise: Noise, starts: torch.Tensor, trunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens (N,) that nodes emit if they are reached, bool (N,), and the draw behind the last."""
        policy, sense = self.state.policy, self.state.common_sense
        if sense is not None and sense.mode == "overwrite":
            return verify_overwriting(logits, policy, tree, noise, starts, sense, trunk)
        if self.chooser.rule.accept == "swor":
            return tree.tokens, *verify_swor(policy_probs(logits, policy), q, tree, noise, starts)
        return tree.tokens, *verify_match(logits, policy, tree, noise, starts)

    def _result(self, decision: list[float], trunk: int, counts: TreeCounts) -> RoundResult:
        """The round's result; keeps the accepted nodes in the caches."""
        check_finite(int(decision[-2]))
        nodes = (len(decision) - 2) // 4
        tokens, emitted, parents, reached = ([int(value) for value in decision[i * nodes : (i + 1) * nodes]] for i in range(4))
        path = [node for node in range(nodes) if reached[node]]
        ends = next((place for place in range(trunk + 1, len(path)) if emitted[path[place]] in self.state.eos_ids), None)
        path = path[: None if ends is None else ends + 1]  # what lies behind an end of text does not count
        state, start = self.state, self.state.target.lengths[0]
        kept = torch.tensor(path, device=self.starts.device)
        state.target.note(nodes)
        state.target.keep(start, kept)
        self.draft.keep(start, kept, nodes)
        overwritten = [place for place, node in enumerate(path) if emitted[node] != tokens[node]]
        repairs = state.common_sense is not None and state.common_sense.repair
        state.stale_from = start + overwritten[0] if overwritten and repairs else None
        accepted = len(path) - 1 - trunk
        counts.nodes, counts.depth, counts.expected = nodes - trunk, depth_of(parents) - trunk, decision[-1]
        counts.rank = parents[: path[trunk + 1]].count(trunk) if accepted else None
        return RoundResult([*(emitted[node] for node in path[trunk + 1 :]), int(decision[-2])], proposed=counts.nodes - 1, accepted=accepted,
                           tested=accepted + (ends is None and path[-1] in parents), tree=counts)


def depth_of(parents: list[int]) -> int:
    """Levels below the first node."""
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return max(depths)


def reserved(state: DecodeState) -> int:
    """Nodes of a tree's budget that are not for the draft to fill."""
    return 0 if state.common_sense is None else state.common_sense.reserved
