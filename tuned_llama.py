"""The frozen full model with exits trained beside it: one pass gives the teacher's hidden states and every exit's.

Logits are V numbers a position, 128k in Llama 3: those of a whole batch would be most of what training holds. They are made, compared and forgotten
some rows at a time, forward and backward, teacher's and drafts' together; between the chunks there are only hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaForCausalLM

from decoding.state import NO_TARGET_LAW, check_logits
from training.frozen_linear import fast_linears
from training.losses import LOSS_TYPES, LossType, grade, learned_rows, learned_tokens
from training.teacher_cache import TeacherCache, text_keys
from truncated_llama import Exit, prepare_pass

CHUNK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}  # of logits in fp32: on the CPU what its caches hold, on a GPU enough for its units
MIN_CHUNK_ROWS = {"cpu": 128, "cuda": 1024}  # a chunk adds to a head's whole gradient, V·D numbers: with fewer rows that would be most of its work


class States(NamedTuple):
    """What a frozen pass leaves: the teacher's normed last hidden state (B, T, D), hidden states behind prefixes, and what blocks get beside them."""

    teacher: torch.Tensor
    at_prefix: dict[int, torch.Tensor]
    pass_inputs: dict


class Chunk(NamedTuple):
    """Some learned positions: the teacher's logits (N, V), each exit's hidden states (N, D) behind its own block, and the tokens (N,) to predict.

    The exits' logits are made one after the other, so that those of one exit are all that there are.
    """

    teacher: torch.Tensor
    hidden: list[torch.Tensor]
    tokens: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """What an exit is trained for: see losses.grade."""

    loss_type: LossType = "kl_divergence"
    temperature: float = 1.0


class TunedLlama(nn.Module):
    """The frozen target and the exits that read its hidden states. Only the exits are parameters of this module.

    Under a bf16 target the exits' products run in bf16, their tensors stay in fp32. `compiled`: the target's blocks and the loss run through torch.compile.
    With a `cache`, texts whose last hidden states it holds go through the exits' blocks only.
    """

    def __init__(self, target: LlamaForCausalLM, exits: list[Exit], compiled: bool = False, cache: TeacherCache | None = None) -> None:
        super().__init__()
        self.exits = nn.ModuleList(exits)
        self._frozen = (target.requires_grad_(False).eval(),)  # in a tuple, so that it is not registered as a submodule
        self._cache = cache
        self._blocks, self._grade = tuple(target.model.layers), grade
        if compiled:
            self._blocks, self._grade = tuple(torch.compile(block, dynamic=True) for block in self._blocks), torch.compile(grade, dynamic=True)
            torch._dynamo.config.cache_size_limit = 4 * len(LOSS_TYPES)  # recompilations: the loss once for each objective, with and without a trimmed vocabulary

    @property
    def target(self) -> LlamaForCausalLM:
        return self._frozen[0]

    def learn(self, batch: dict[str, torch.Tensor], objectives: list[Objective], scale: float) -> list[dict[str, torch.Tensor]]:
        """Add the gradients of scale × loss over the batch's learned tokens to every exit's parameters.

        Returns, for each exit and each of these tokens (N,), its loss, Σ min(p, q) and the mass of p that it cannot know.
        """
        with self._autocast():
            states, hidden = self._hidden(batch)
            pieces = [[piece.detach().requires_grad_(rows.requires_grad) for piece in rows.split(self._rows)] for rows in hidden]
            found: list[list[dict[str, torch.Tensor]]] = [[] for _ in self.exits]
            for chunk in self._chunks(batch, states, pieces):
                for exit_, objective, rows, own in zip(self.exits, objectives, chunk.hidden, found, strict=True):
                    draft = exit_.logits(rows)
                    graded = self._grade(objective.loss_type, chunk.teacher, draft.detach(), chunk.tokens, objective.temperature, exit_.token_ids)
                    draft.backward(graded.gradient.mul_(scale).to(draft.dtype))
                    own.append({"loss": graded.loss, "overlap": graded.overlap, "lost_mass": graded.lost_mass})
            for rows, parts in zip(hidden, pieces, strict=True):
                if rows.requires_grad:
                    rows.backward(torch.cat([part.grad for part in parts]))
        return [{name: torch.cat([part[name] for part in own]) for name in own[0]} for own in found]

    @torch.no_grad()
    def compare(self, batch: dict[str, torch.Tensor], look: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]) -> None:
        """look(number of an exit, teacher's logits (N, V), its logits (N, V_d), tokens to predict (N,)) at all learned positions, some at a time.

        Raises FloatingPointError where the teacher's logits are not finite: nothing could be learned from them.
        """
        with self._autocast():
            states, hidden = self._hidden(batch)
            for chunk in self._chunks(batch, states, [rows.split(self._rows) for rows in hidden]):
                check_logits(chunk.teacher, NO_TARGET_LAW)
                for number, (exit_, rows) in enumerate(zip(self.exits, chunk.hidden, strict=True)):
                    look(number, chunk.teacher, exit_.logits(rows), chunk.tokens)

    def _autocast(self) -> torch.autocast:
        in_bf16 = self.target.dtype == torch.bfloat16  # under fp16, gradients would underflow: the exit stays in fp32
        return torch.autocast(self.target.device.type, torch.bfloat16, enabled=in_bf16)

    @property
    def _rows(self) -> int:
        """Positions of a chunk."""
        device = self.target.device.type
        return max(MIN_CHUNK_ROWS[device], CHUNK_BYTES[device] // (4 * self.target.config.vocab_size))

    def _hidden(self, batch: dict[str, torch.Tensor]) -> tuple[States, list[torch.Tensor]]:
        """A frozen pass, and the hidden states (N, D) of learned positions behind each exit's own block."""
        states = self._states(batch["input_ids"], batch["attention_mask"], batch.get("inputs_embeds"))
        return states, [learned_rows(exit_.through_block(states.at_prefix[exit_.prefix], states.pass_inputs), batch["loss_mask"]) for exit_ in self.exits]

    def _states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, inputs_embeds: torch.Tensor | None = None) -> States:
        """A frozen pass, which leaves its last states in the cache, or takes them from there."""
        if self._cache is None:
            return self.frozen_pass(input_ids, attention_mask, inputs_embeds=inputs_embeds)
        keys = text_keys(input_ids, attention_mask)
        known = self._cache.find(keys, input_ids.shape[1])
        if known is not None:
            return self.frozen_pass(input_ids, attention_mask, known.to(input_ids.device))
        states = self.frozen_pass(input_ids, attention_mask)
        self._cache.keep(keys, states.teacher, attention_mask)
        return states

    def _chunks(self, batch: dict[str, torch.Tensor], states: States, pieces: list[tuple[torch.Tensor, ...]]) -> Iterator[Chunk]:
        teacher = learned_rows(states.teacher, batch["loss_mask"]).split(self._rows)
        tokens = learned_tokens(batch["input_ids"], batch["loss_mask"]).split(self._rows)
        for number, (rows, predicted) in enumerate(zip(teacher, tokens, strict=True)):
            with torch.no_grad(), fast_linears(rows):
                logits = self.target.lm_head(rows)
            yield Chunk(logits, [parts[number] for parts in pieces], predicted)

    @torch.no_grad()
    def frozen_pass(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, teacher: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None,
    ) -> States:
        """`input_ids` (B, T), or embeddings, through all of the target's blocks; where the `teacher`'s last states are known, through those below the deepest exit."""
        hidden, pass_inputs = prepare_pass(self.target, input_ids, attention_mask, inputs_embeds=inputs_embeds)
        wanted = {exit_.prefix for exit_ in self.exits}
        at_prefix = {0: hidden}
        with fast_linears(hidden):
            for count, block in enumerate(self._blocks if teacher is None else self._blocks[: max(wanted)], start=1):
                hidden = block(hidden, **pass_inputs)
                if count in wanted:
                    at_prefix[count] = hidden
        return States(self.target.model.norm(hidden) if teacher is None else teacher, at_prefix, pass_inputs)
