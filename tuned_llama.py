"""The frozen full model with exits trained beside it: one pass gives the teacher's logits and every exit's."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM

from truncated_llama import Exit, prepare_pass


class TunedLlama(nn.Module):
    """The frozen target and the exits that read its hidden states. Only the exits are parameters of this module."""

    def __init__(self, target: LlamaForCausalLM, exits: list[Exit]) -> None:
        super().__init__()
        self.exits = nn.ModuleList(exits)
        self._frozen = (target.requires_grad_(False).eval(),)  # in a tuple, so that it is not registered as a submodule

    @property
    def target(self) -> LlamaForCausalLM:
        return self._frozen[0]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Teacher logits (B, T, V) and one draft logits (B, T, V) per exit, in their own dtypes."""
        with torch.no_grad():
            hidden, pass_inputs = prepare_pass(self.target, input_ids, attention_mask)
            wanted = {exit_.prefix for exit_ in self.exits}
            at_prefix = {0: hidden}
            for count, block in enumerate(self.target.model.layers, start=1):
                hidden = block(hidden, **pass_inputs)
                if count in wanted:
                    at_prefix[count] = hidden
            teacher = self.target.lm_head(self.target.model.norm(hidden))
        return teacher, [exit_(at_prefix[exit_.prefix], pass_inputs) for exit_ in self.exits]
