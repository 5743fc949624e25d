"""Which drafted tokens matter: labels for judges, mined without annotation (AutoJudge 2504.20039, algorithm 1).

The target's greedy answer to a prompt is walked from left to right. Where the draft would have said something else, its token is put in and the target goes on from
there: if the final answer stays the same the token was unimportant, and the text with it is walked on from; if not, it was important, and the text stays.
Judged one by one instead, hardly any token is important, as the target mends one slip; so, if draft and target alone end with
different answers, at least one token is labelled important. For draft mode: tokens that the draft drew, and whether rejection verification would keep them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from running.command_line import UserError

import torch
from torch import nn

from data.answers import final_answer, same_answer
from decoding.autojudge import law_features
from decoding.sampling import Noise, Purpose, SamplingPolicy, draw, policy_probs
from decoding.verify import accepts
from engine.static_llama import KEPT_WIDTHS, Parts, StaticLlama, why_unsupported
from models.target_model import Target, eos_token_ids
from speculative import context_length
from truncated_llama import TruncatedLlama

NO_ANSWER, TOO_LONG = "the target gives no answer", "too long for the context"
LABEL_POLICY = SamplingPolicy(1.0)  # that tokens of draft mode are drawn and labelled with


@dataclass(frozen=True)
class Question:
    """Prompt `index` of a data set, as token ids."""

    index: int
    ids: list[int]


@dataclass(frozen=True)
class Swap:
    """The draft's token in place of the target's at `position` of a response, and what came of it; the states (D,) are those behind the draft's token."""

    position: int
    target_token: int
    draft_token: int
    important: bool
    draft_state: torch.Tensor
    target_state: torch.Tensor


@dataclass
class Search:
    """One prompt on its way: the `response` that is walked (the end-of-text token included), what the draft would say at each of its places, and where the walk
    is. `skipped` says why there is nothing to walk."""

    question: Question
    skipped: str | None = None
    response: list[int] = field(default_factory=list)
    answer: str | None = None
    guesses: list[int] = field(default_factory=list)
    cursor: int = 0
    swaps: list[Swap] = field(default_factory=list)

    @property
    def mismatch(self) -> int | None:
        """The first place from the cursor on where the draft would say something else."""
        places = range(self.cursor, len(self.response))
        return next((i for i in places if self.guesses[i] != self.response[i]), None)

    @property
    def swapped(self) -> list[int]:
        """The response up to the mismatch, with the draft's token there."""
        place = self.mismatch
        return [*self.response[:place], self.guesses[place]]


# ---- the models' passes, many texts at a time ----

class Reader:
    """A model's passes over up to `batch` texts together: each text gets what it gets alone, up to rounding."""

    def __init__(self, model: nn.Module, capacity: int, batch: int) -> None:
        """Raises UserError for a model that StaticLlama cannot run."""
        whole, parts = (model.target, model.parts()) if isinstance(model, TruncatedLlama) else (model, None)
        reason = why_unsupported(whole, parts)
        if reason is not None:
            raise UserError(f"a judge cannot be mined with {reason}; use a plain Llama")
        self.engine, self.batch = StaticLlama(whole, capacity + KEPT_WIDTHS, batch, parts or Parts.of(whole)), batch

    def start(self, texts: list[list[int]]) -> None:
        """Forget all, and take in `texts` (a list of up to `batch`)."""
        self.engine.crop([0] * self.batch)  # engine.start would write zeros over the whole cache, a third of the time of a swap here
        self.engine.rotary.start([len(text) for text in texts] + [0] * (self.batch - len(texts)))
        self.engine.prefill(texts)

    def feed(self, tokens: list[list[int]]) -> torch.Tensor:
        """Logits (B, T, V_d) behind further tokens of each text, T of the longest; shorter ones are padded."""
        width = max(map(len, tokens))
        rows = [row + [0] * (width - len(row)) for row in tokens + [[]] * (self.batch - len(tokens))]
        return self.engine.append(torch.tensor(rows, device=self.engine.device))[: len(tokens)]

    def ids(self, columns: torch.Tensor) -> torch.Tensor:
        """The tokens that stand at `columns` of the logits."""
        return columns if self.engine.token_ids is None else self.engine.token_ids[columns]

    @torch.inference_mode()
    def guesses(self, texts: list[tuple[list[int], list[int]]]) -> list[list[int]]:
        """For every (prompt, response) the most likely token at each place of the response."""
        self.start([prompt[:-1] for prompt, _ in texts])
        given = [[prompt[-1], *response[:-1]] for prompt, response in texts]
        found: list[list[int]] = [[] for _ in texts]
        for begin in range(0, max(map(len, given)), KEPT_WIDTHS):
            best = self.ids(self.feed([tokens[begin : begin + KEPT_WIDTHS] for tokens in given]).argmax(-1)).tolist()
            for tokens, row in zip(found, best, strict=True):
                tokens += row
        return [tokens[: len(response)] for tokens, (_, response) in zip(found, texts, strict=True)]

    @torch.inference_mode()
    def states(self, texts: list[list[int]]) -> torch.Tensor:
        """Hidden states (B, D) behind the final norm, of the last token of each text; fp32 on the CPU."""
        self.start([text[:-1] for text in texts])
        self.feed([text[-1:] for text in texts])
        return self.engine.head.states()[: len(texts)].cpu()

    @torch.inference_mode()
    def continued(self, texts: list[list[int]], most: list[int], ends: frozenset[int]) -> tuple[list[list[int]], torch.Tensor]:
        """What follows each text greedily, up to an end-of-text token or `most` tokens; and `states`."""
        self.start([text[:-1] for text in texts])
        logits = self.feed([text[-1:] for text in texts])
        states, found = self.engine.head.states()[: len(texts)].cpu(), [[] for _ in texts]
        open_ = [count > 0 for count in most]
        while any(open_):
            drawn = self.ids(logits[:, -1].argmax(-1)).tolist()
            for row, token in enumerate(drawn):
                if open_[row]:
                    found[row].append(token)
                    open_[row] = token not in ends and len(found[row]) < most[row]
            if any(open_):
                logits = self.feed([[token] for token in drawn])
        return found, states


# ---- paper mode ----

class Miner:
    """Walks the target's answers to prompts, `batch` of them together; the answer to a prompt does not depend on the others."""

    def __init__(self, target: Target, draft: nn.Module, max_new_tokens: int, longest_prompt: int, batch: int) -> None:
        """Prompts of more than `longest_prompt` tokens are skipped. Raises UserError for models that StaticLlama cannot run."""
        capacity = longest_prompt + max_new_tokens
        self.target, self.tokenizer, self.ends = Reader(target.model, capacity, batch), target.tokenizer, eos_token_ids(target)
        self.draft, self.max_new_tokens, self.longest_prompt, self.batch = Reader(draft, capacity, batch), max_new_tokens, longest_prompt, batch

    def run(self, questions: Iterator[Question]) -> Iterator[Search]:
        """All questions' searches, finished, in order. Those that are slow do not hold up the others' passes."""
        waiting: list[Search] = []
        more = True
        while waiting or more:
            unfinished = [search for search in waiting if search.mismatch is not None]
            if more and len(unfinished) < self.batch:
                asked = list(islice(questions, self.batch))
                more = len(asked) == self.batch
                waiting += self.begin(asked)
            elif unfinished:
                self.step(unfinished[: self.batch])
            while waiting and waiting[0].mismatch is None:
                yield waiting.pop(0)

    def begin(self, questions: list[Question]) -> list[Search]:
        """The target's own answers, and what the draft would say at each place of them."""
        searches = [Search(question, TOO_LONG if len(question.ids) > self.longest_prompt else None) for question in questions]
        fit = [search for search in searches if search.skipped is None]
        if fit:
            responses, _ = self.target.continued([search.question.ids for search in fit], [self.max_new_tokens] * len(fit), self.ends)
            for search, response in zip(fit, responses, strict=True):
                search.answer = self.read(response)
                if search.answer is None:
                    search.skipped = NO_ANSWER
                else:
                    search.response = response
            self.guess([search for search in fit if search.skipped is None])
        return searches

    def step(self, searches: list[Search]) -> None:
        """Put the draft's token in at the next mismatch of each, let the target go on, and label the token by the answer."""
        swapped = [search.swapped for search in searches]
        texts = [search.question.ids + response for search, response in zip(searches, swapped, strict=True)]
        most = [0 if response[-1] in self.ends else self.max_new_tokens - len(response) for response in swapped]
        rests, target_states = self.target.continued(texts, most, self.ends)
        draft_states, changed = self.draft.states(texts), []
        for search, begun, rest, *states in zip(searches, swapped, rests, draft_states, target_states, strict=True):
            place, response = search.mismatch, begun + rest
            important = not same_answer(self.read(response), search.answer)
            search.swaps.append(Swap(place, search.response[place], begun[-1], important, *states))
            search.cursor = place + 1
            if not important:
                search.response = response
                changed.append(search)
        self.guess(changed)

    def guess(self, searches: list[Search]) -> None:
        """What the draft would say at each place of the responses."""
        if searches:
            found = self.draft.guesses([(search.question.ids, search.response) for search in searches])
            for search, guesses in zip(searches, found, strict=True):
                search.guesses = guesses

    def read(self, response: list[int]) -> str | None:
        """The final answer of a response."""
        return final_answer(self.tokenizer.decode(response, skip_special_tokens=True))


# ---- draft mode ----

@dataclass(frozen=True)
class Drafted:
    """Tokens that the draft drew behind a prompt: LAW_FEATURES (N, 7) and whether rejection verification keeps each, bool (N,)."""

    question: Question
    features: torch.Tensor
    accepted: torch.Tensor


@torch.inference_mode()
def draft_labels(target: Reader, draft: Reader, question: Question, max_new_tokens: int, gamma: int, seed: int, ends: frozenset[int]) -> Drafted:
    """The draft goes on from a prompt in its own words, drawn at temperature 1 in windows of `gamma`; each token is kept with chance min(1, p/q). Readers of one text."""
    noise = Noise.of(seed, [question.index], draft.engine.device)
    draft.start([question.ids[:-1]])
    tokens, laws, features = [question.ids[-1]], [], []
    while len(tokens) <= max_new_tokens and not (features and tokens[-1] in ends):
        logits = draft.feed([tokens[-1:]])
        q = policy_probs(logits, LABEL_POLICY)
        drawn = draw(q, noise, torch.tensor([[len(tokens)]], device=q.device), Purpose.DRAFT, draft.engine.token_ids)
        features.append(law_features(logits, drawn, draft.engine.token_ids, ((len(tokens) - 1) % gamma + 1) / gamma)[0, 0])
        columns = drawn if draft.engine.token_ids is None else torch.searchsorted(draft.engine.token_ids, drawn)
        laws.append(q.gather(-1, columns[..., None])[0, 0, 0])
        tokens.append(int(drawn))
    target.start([question.ids[:-1]])
    chances = [policy_probs(target.feed([tokens[i : i + KEPT_WIDTHS]]), LABEL_POLICY)[0] for i in range(0, len(tokens) - 1, KEPT_WIDTHS)]
    p = torch.cat(chances)[: len(laws)].gather(-1, torch.tensor(tokens[1:], device=draft.engine.device)[:, None])
    uniforms = noise.uniform(torch.arange(1, len(tokens), device=p.device)[None], Purpose.ACCEPT)[0]
    accepted = accepts(p, torch.stack(laws)[:, None], torch.zeros_like(uniforms, dtype=torch.int64), uniforms)
    return Drafted(question, torch.stack(features).cpu(), accepted.cpu())


def longest_prompt(target: Target, draft: nn.Module, max_new_tokens: int) -> int:
    """Most tokens of a prompt that both contexts hold beside the new ones."""
    return min(context_length(model.config) for model in (target.model, draft)) - max_new_tokens - KEPT_WIDTHS
