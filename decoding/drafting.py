"""One round over a chain of drafted tokens: what independent drafts and the target's own exit share, with a judge (autojudge.py) or without."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from decoding.autojudge import AnyJudge, judge_chain, law_features
from decoding.draft_length import DraftLength
from decoding.sampling import Noise, Purpose, draw, draw_with_margin, no_law, policy_probs
from decoding.state import NO_DRAFT_LAW, NO_TARGET_LAW, DecodeState, Forward, RoundResult
from decoding.vanilla import vanilla_round
from decoding.verify import Verification, chain_choices, expected_acceptance, over_vocabulary, overlap, verify_chain

Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class ChainRound:
    """Drafts token after token, or none where not `drafts`, then verifies them in one target call.

    `judge` is asked where verification would reject (autojudge.py). The draft's `token_ids` (V_d,) name the tokens that it knows where these are not all of them, in
    order.
    """

    def __init__(self, state: DecodeState, length: DraftLength, verification: Verification, judge: AnyJudge | None = None) -> None:
        self.state, self.length, self.verification, self.judge, self.token_ids = state, length, verification, judge, state.draft.token_ids
        self.tokens: list[torch.Tensor] = []  # (B, 1) each: the last committed token, then the drafted ones
        self.rows: list[torch.Tensor] = []  # q (B, 1, V_d) of each drafted token
        self.signals: list[torch.Tensor] = []  # of the texts that have not ended (R, 1), see draw_draft
        self.seen: list[torch.Tensor] = []  # (B, 1, F) each, Judge.of_draft
        self._reads = None if judge is None else judge.of_draft
        self._began = time.perf_counter()
        self.drafts = length.goes_on(0, [])

    def draft(self, count: int, step: Step, advance: Callable[[int], None], key: object = None) -> None:
        """Draft while the length rule goes on: step(tokens, starts, i) feeds the last `count` committed tokens, later the last drafted one,
        and returns the logits (B, 1, V_d) that the i-th drafted token is drawn from; advance(i) counts it. `key` names what else it depends on.

        On the host nothing is drafted behind an end-of-text token. On a device to ask would be to wait: there it is drafted, and not counted.
        """
        goes_on = self.drafts
        while goes_on:
            index = len(self.rows)
            if index == 0:
                self.starts, pending = self.state.target.starts(), self.state.last(count)
                self.tokens.append(pending[:, -1:])
            with self.state.clock("draft"):
                pending, q, *signal = self.state.program(
                    self.state.draft.programs, ("draft", index, key, self.verification, self.length.wants_signals, self._reads, self.length.longest),
                    lambda tokens, starts, noise, i=index: self._take_step(step(tokens, starts, i), noise, starts, i), pending, self.starts,
                )
            advance(index)
            self.tokens.append(pending)
            self.rows.append(q)
            self.seen += [signal.pop()] if self._reads else []
            self.signals += signal if len(self.state.running) == self.state.target.batch else [each[self.state.running] for each in signal]
            if self.state.target.on_host and int(pending) in self.state.eos_ids:
                break
            goes_on = self.length.goes_on(len(self.rows), self.signals)

    def _take_step(self, logits: torch.Tensor, noise: Noise, starts: torch.Tensor, index: int) -> tuple[torch.Tensor, ...]:
        """`draw_draft`, and what the judge reads of this step (Judge.of_draft)."""
        drawn = self.draw_draft(logits, noise, starts, index)
        if self._reads == "state":
            return *drawn, self.state.draft.head.states().unflatten(0, (len(logits), -1))[:, -1:]
        if self._reads == "law":
            return *drawn, law_features(logits, drawn[0], self.token_ids, (index + 1) / self.length.longest)
        return drawn

    def draw_draft(self, logits: torch.Tensor, noise: Noise, starts: torch.Tensor, index: int) -> tuple[torch.Tensor, ...]:
        """The drafted token (B, 1), its q (B, 1, V_d) and, where the length rule wants it, a signal (B, 1) of how likely it is to be kept.

        Coupled drafting uses the noise that the target will use; its signal is the margin by which the token won.
        Rejection must not look at how a token was drawn: its signal is a function of q, the log odds of the largest entry.
        Greedy drafting: the distance of the two largest logits.
        """
        q = policy_probs(logits, self.state.policy)
        coupled = self.verification == "coupled"
        noise, purpose = (noise, Purpose.TOKEN) if coupled else (noise.of_round(starts), Purpose.DRAFT)
        place = starts[:, None] + index + 1
        if not self.length.wants_signals:
            return draw(q, noise, place, purpose, self.token_ids), q
        tokens, margin = draw_with_margin(q, noise, place, purpose, self.token_ids)
        if self.state.policy.temperature == 0:  # q is one-hot and tells nothing
            best, second = logits.topk(2).values.unbind(-1)
            return tokens, q, best - second
        return tokens, q, margin if coupled else q.amax(-1).logit()

    def verify(self, forward: Forward) -> list[RoundResult]:
        """Keep what verification keeps, given the target's logits (B, γ+1, V) = forward(tokens (B, γ+1), starts).

        Ends in the round's one wait for the device. Both caches are still to be cropped. Without drafted tokens it is a vanilla round.
        """
        results, recorded = self._decide(forward) if self.rows else (vanilla_round(self.state, forward), [])
        self.length.learn(self.signals, [results[row] for row in self.state.running], time.perf_counter() - self._began)
        if recorded:
            self.record(results, *recorded)
        return results

    def _decide(self, forward: Forward) -> tuple[list[RoundResult], list[torch.Tensor]]:
        """The results, and p and q where they are to be recorded."""
        def decide(tokens: torch.Tensor, q: torch.Tensor, starts: torch.Tensor, *seen_and_noise: torch.Tensor | Noise) -> tuple[torch.Tensor, ...]:
            *seen, noise = seen_and_noise
            logits = forward(tokens, starts)
            p = policy_probs(logits, self.state.policy)
            positions = starts[:, None] + torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            chain = self.verification, p, q, tokens[:, 1:], noise, positions, self.token_ids
            decision = torch.stack(verify_chain(*chain), 1) if self.judge is None else self._judge(tokens[:, 1:], logits, *chain_choices(*chain), *seen)
            decision[:, 0].masked_fill_(no_law(q).any(-1), NO_DRAFT_LAW).masked_fill_(no_law(p).any(-1), NO_TARGET_LAW)
            return (decision, p, q) if self.state.record_overlap else (decision,)

        tokens, q = torch.cat(self.tokens, 1), torch.cat(self.rows, 1)
        key = "verify", self.verification, self.state.record_overlap, self.judge, self.judge and self.state.eos_ids
        with self.state.clock("verify"):
            seen = [torch.cat(self.seen, 1)] if self.seen else []
            decision, *recorded = self.state.program(self.state.draft.programs, key, decide, tokens, q, self.starts, *seen)
            results = self.state.results(tokens[:, 1:], decision)
        self.state.target.advance(len(self.tokens))
        return results, recorded

    def _judge(
        self, drafted: torch.Tensor, logits: torch.Tensor, kept: torch.Tensor, instead: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See autojudge.judge_chain."""
        states = self.state.target.head.states().unflatten(0, logits.shape[:2]) if self.judge.reads_states else None
        return judge_chain(self.judge, self.judge.scores(drafted, logits, states, seen), kept, instead, drafted, self.state.eos_ids)

    def record(self, results: list[RoundResult], p: torch.Tensor, q: torch.Tensor) -> None:
        """Fill in `overlaps` and `expected` of every text's result from p (B, γ+1, V) and q (B, γ, V_d)."""
        with self.state.clock("record"):
            q = over_vocabulary(q, self.token_ids, p.shape[-1])
            for result, text_p, text_q in zip(results, p, q, strict=True):
                tested_p, tested_q = text_p[: result.tested], text_q[: result.tested]
                result.overlaps = overlap(tested_p, tested_q).tolist()
                result.expected = expected_acceptance(tested_p, tested_q, self.verification).tolist()
