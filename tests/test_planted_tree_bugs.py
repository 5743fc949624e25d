"""Every known bug of tree drafting and of its verification, planted: at least one check of test_tree_rules.py must fail on each."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch

import decoding.static_tree as static_tree
import decoding.verify as verify
from decoding.best_first import Growth, Pool
from decoding.children import Children, Chooser
from decoding.dynamic_tree import DynamicTree
from decoding.sampling import Noise
from decoding.static_tree import StaticTree
from decoding.tree_drafting import TreeRound
from decoding.verify import TreeRule
from test_tree_rules import (
    PLAIN,
    TWO_LEVELS,
    check_adaptive_round,
    check_all_accepted,
    check_best_first,
    check_drawn_children,
    check_first_coupled_child,
    check_law_behind_a_drawn_child,
    check_law_of_a_text,
    check_matching,
    check_matching_round,
    check_nodes,
    check_ranks,
    check_round,
    check_round_with_a_level_cost,
    check_shapes,
    check_zero_is_never_accepted,
    growing,
)


def plant(patch: pytest.MonkeyPatch, function: Callable, right: str, wrong: str) -> None:
    """Let `function` have `wrong` in its source where it has `right`, wherever it is held."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{function.__qualname__} has changed: plant this bug anew"
    home, made = sys.modules[function.__module__], {}
    exec(compile(source.replace(right, wrong), f"<planted in {function.__qualname__}>", "exec"), vars(home), made)
    owner, _, name = function.__qualname__.rpartition(".")
    holders = [vars(home)[owner]] if owner else [module for module in list(sys.modules.values()) if vars(module).get(name) is function]
    for holder in holders:
        patch.setattr(holder, name, made[name])


def fails(check: Callable, *arguments: object) -> None:
    with pytest.raises(AssertionError):
        check(*arguments)


# ---- the walk under rejection ----

@pytest.mark.parametrize(("right", "wrong"), [
    pytest.param("rest = rest.index_select(0, last)", "rest = p.index_select(0, last)", id="last token from p, not from the residual"),
    pytest.param("residual(r, d)", "r", id="R is not updated"),
    pytest.param("without(d, token)", "d", id="D is not updated"),
    pytest.param("residual(r, d)", "residual(r, without(d, token))", id="R updated with the D behind the child"),
    pytest.param("residual(r, d)", "residual(p.index_select(0, parent), d)", id="R of the last rejection only"),
    pytest.param("residual(r, d)", "residual(r, q.index_select(0, parent))", id="R updated with q, as for draws with replacement"),
    pytest.param(" & (offered > 0)", "", id="children that were not there to be drawn are tried"),
    pytest.param(" & open_.gather(0, parent) & (offered", " & (offered", id="siblings of an accepted child are tried"),
    pytest.param("reached.gather(0, parent) & ", "", id="children of a rejected node are tried"),
    pytest.param("offered < wanted", "wanted < offered", id="ratio upside down"),
    pytest.param("uniforms[child] * offered", "uniforms[child] * q.index_select(0, parent).gather(1, token[None])[0]", id="accepted by q, not by D"),
    pytest.param("uniforms[child]", "uniforms[int(parent)]", id="siblings share their uniform"),
    pytest.param("rest, left = p.clone(), q.clone()", "rest, left = p.clone(), q.roll(-1, 0)", id="another node's q"),
])
def test_wrong_walk(monkeypatch, right, wrong):
    plant(monkeypatch, verify.verify_swor, right, wrong)

    def check() -> None:
        check_nodes()
        check_round(StaticTree(TWO_LEVELS, "swor"), PLAIN, 2)

    fails(check)


def test_draft_law_that_is_not_renormalised(monkeypatch):
    monkeypatch.setattr(verify, "without", lambda law, tokens: law.scatter(-1, tokens[:, None], 0.0))
    fails(check_nodes)


def test_accepting_a_tie(monkeypatch):
    """`<=` instead of `<` keeps a token that the target cannot emit when u is 0."""
    plant(monkeypatch, verify.verify_swor, "offered < wanted", "offered <= wanted")
    fails(check_zero_is_never_accepted)


# ---- which children are drawn, and in which order they are tried ----

IN_DRAW_ORDER = "columns = z.topk(count, -1).indices"


@pytest.mark.parametrize("wrong", [
    pytest.param("columns = q.topk(count, -1).indices", id="the most likely tokens under the rule for drawn ones"),
    pytest.param("columns = z.topk(count, -1).indices.sort(-1).values", id="tried in the order of their ids"),
    pytest.param(f"{IN_DRAW_ORDER}; columns = columns.gather(-1, q.gather(-1, columns).argsort(-1, descending=True))", id="the most likely is tried first"),
    pytest.param(f"{IN_DRAW_ORDER}; columns = columns.gather(-1, q.gather(-1, columns).argsort(-1))", id="the most likely is tried last"),
])
def test_children_that_are_not_tried_in_draw_order(monkeypatch, wrong):
    plant(monkeypatch, Chooser._drawn, IN_DRAW_ORDER, wrong)
    fails(check_nodes)


def test_ranked_children_under_rejection(monkeypatch):
    """The published dynamic trees, which the constructor of a rule refuses: let it pass, and give the children their q."""
    def ranked(self: Chooser, logits: torch.Tensor, count: int, nodes: object) -> Children:
        return Chooser._top(self, logits, count, nodes)._replace(q=drawn(self, logits, count, nodes).q)

    drawn = Chooser._drawn
    monkeypatch.setattr(TreeRule, "__post_init__", lambda self: None)
    monkeypatch.setattr(Chooser, "_drawn", ranked)
    assert TreeRule("top_k", "swor").accept == "swor"
    fails(check_nodes)
    fails(check_round, growing(4, 2), PLAIN, 2)


def test_children_drawn_with_replacement(monkeypatch):
    """The law of texts stays right, as a token is not tried twice; but such children are fewer than they are taken for."""
    plant(monkeypatch, Chooser._drawn, IN_DRAW_ORDER, "columns = torch.stack([z.roll(j, 0).argmax(-1) for j in range(count)], -1)")
    fails(check_drawn_children, PLAIN)


@pytest.mark.parametrize("wrong", ["torch.full_like(tokens, fed)", "torch.arange(len(tokens), device=tokens.device)"])
def test_draft_noise_that_nodes_share(monkeypatch, wrong):
    """Those of one level, or those of all levels."""
    plant(monkeypatch, TreeRound.level_children, "torch.arange(fed - len(tokens), fed, device=tokens.device)", wrong)
    fails(check_round, growing(4, 2), PLAIN, 2)


@pytest.mark.parametrize("shift", [-1, 1])
def test_q_of_another_node_in_static_trees(monkeypatch, shift):
    """Or none, where it is a leaf's: then nothing is accepted, and the law stays right."""
    exact = static_tree._by_node
    monkeypatch.setattr(static_tree, "_by_node", lambda rows, shape: exact(rows, shape).roll(shift, 0))
    if shift == -1:
        fails(check_round, StaticTree(TWO_LEVELS, "swor"), PLAIN, 2)
    fails(check_all_accepted, "static, swor")


def test_q_of_another_node_in_trees_that_grow(monkeypatch):
    plant(monkeypatch, Pool.tree, "self.q[self.slots[kept].clamp(min=0)]", "self.q[(self.slots[kept] - 1).clamp(min=0)]")
    fails(check_round, growing(5, 2), PLAIN, 2)


# ---- which drawn children a tree keeps ----

@pytest.mark.parametrize("wrong", ["chances.log()", "(tried * chances).log()"])
def test_drawn_child_dropped_because_it_is_unlikely_itself(monkeypatch, wrong):
    """Whether a child is tried then depends on which it is."""
    plant(monkeypatch, Chooser._drawn, "torch.maximum(tried, chances).log()", wrong)
    fails(check_ranks, PLAIN)
    fails(check_adaptive_round)


def test_drawn_child_pruned_because_it_is_less_likely_than_its_sibling(monkeypatch):
    monkeypatch.setattr(DynamicTree, "growth", property(lambda plan: Growth(plan.budget, plan.depth, plan.top_k, plan.budget, plan.depth, prune=0.5)))
    fails(check_round, growing(5, 2), PLAIN, 2, 3)


def test_drawn_levels_that_are_left_out_as_unlikely(monkeypatch):
    """Each pass ends growth or not by what was drawn before it."""
    growth = Growth(3, 2, 2, beam=3, passes=2, level_cost=0.83)
    monkeypatch.setattr(DynamicTree, "growth", property(lambda plan: growth))
    fails(check_round_with_a_level_cost)


# ---- noise ----

def test_last_token_with_the_noise_of_the_children(monkeypatch):
    """Over many tokens 38 % become 42 %."""
    plant(monkeypatch, verify.verify_swor, "Purpose.RESIDUAL", "Purpose.DRAFT")
    fails(check_law_behind_a_drawn_child)


@pytest.mark.parametrize("name", ["static, swor", "dynamic, swor"])
def test_noise_that_is_not_fresh_in_each_round(monkeypatch, name):
    """The published code draws one table per prompt. Each token's marginal stays right; only pairs of tokens show it."""
    monkeypatch.setattr(Noise, "of_round", lambda noise, starts: noise)
    fails(check_law_of_a_text, name, PLAIN)


@pytest.mark.parametrize(("function", "right", "wrong"), [
    pytest.param(Chooser._drawn, "nodes.noise.of_round(nodes.starts)", "nodes.noise", id="draft"),
    pytest.param(verify.verify_swor, "noise.of_round(starts)", "noise", id="acceptance"),
])
def test_one_noise_that_is_not_fresh_in_each_round(monkeypatch, function, right, wrong):
    plant(monkeypatch, function, right, wrong)
    fails(check_law_of_a_text, "static, swor", PLAIN)


def test_coupled_children_with_the_noise_of_another_position(monkeypatch):
    """Texts stay exact, and rounds grow short."""
    plant(monkeypatch, Chooser._gumbel, "nodes.starts + 1 + nodes.depths", "nodes.starts + nodes.depths")
    for dtype in (torch.float32, torch.float64):
        fails(check_first_coupled_child, dtype)


# ---- matching ----

@pytest.mark.parametrize(("right", "wrong"), [
    pytest.param("starts + 1 + tree.depths", "starts + 2 + tree.depths", id="position off by one"),
    pytest.param("starts + 1 + tree.depths", "starts + 1 + torch.arange(len(tree))", id="position of the slot, not of the depth"),
    pytest.param("drawn[tree.parents.clamp(min=0)]", "drawn", id="compared with its own draw, not its parent's"),
    pytest.param("(agrees | ~tree.visible).all(-1)", "agrees", id="reached without its ancestors"),
    pytest.param("drawn.gather(0, last_of(reached))[0]", "drawn[0]", id="last token behind the root"),
])
def test_wrong_match(monkeypatch, right, wrong):
    plant(monkeypatch, verify.verify_match, right, wrong)

    def check() -> None:
        check_matching([-1, 0, 0, 0], 4, PLAIN)
        check_matching([-1, 0, 0, 1, 1], 3, PLAIN)

    fails(check)


@pytest.mark.parametrize(("function", "verification"), [(Chooser._top, "match"), (Chooser._gumbel, "coupled")])
def test_siblings_of_one_token(monkeypatch, function, verification):
    plant(monkeypatch, function, "self._named(columns)", "self._named(columns[:, :1].expand_as(columns))")
    fails(check_matching_round, StaticTree(TWO_LEVELS, verification), PLAIN)
    fails(check_shapes, "static" if verification == "coupled" else "static, match")


# ---- growth ----

@pytest.mark.parametrize(("function", "right", "wrong"), [
    pytest.param(Pool.with_children, "values = self.values[expanded, None] + children.values", "values = children.values", id="values not along the path"),
    pytest.param(Pool.frontier, "self.best(growth.budget)", "self.best(growth.beam)", id="only the best few are fed"),
    pytest.param(Pool.frontier, "& (self.depths < growth.depth) ", "", id="too deep"),
    pytest.param(Pool.best, "self.ranks.sort(descending=True, stable=True).indices", "torch.arange(len(self.ranks))", id="the first, not the best"),
])
def test_wrong_growth(monkeypatch, function, right, wrong):
    plant(monkeypatch, function, right, wrong)

    def check() -> None:
        for seed in range(3):
            check_best_first(seed, "match")

    fails(check)


def test_children_behind_an_end(monkeypatch):
    plant(monkeypatch, Pool.frontier, "fit &= self.tokens != token", "pass")
    fails(check_best_first, 0, "match", 0.0, frozenset({1, 6}))


def test_checks_that_passwithout_a_bug():
    """Those with other arguments here than in their own tests."""
    check_round(growing(5, 2), PLAIN, 2, 3)
    check_round(growing(5, 2), PLAIN, 2)
    check_round(growing(4, 2), PLAIN, 2)
    for seed in range(3):
        check_best_first(seed, "match")
    check_best_first(0, "match", 0.0, frozenset({1, 6}))
    check_matching_round(StaticTree(TWO_LEVELS, "coupled"), PLAIN)
