"""The processes of one training run: `accelerate launch` starts them, or there is one alone."""

from __future__ import annotations

import os

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # FSDP asks for it, and torch 2.6 has it for GPUs alone


def shards_target() -> bool:
    """Whether `accelerate launch --use_fsdp` asks several processes to share the target."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("ACCELERATE_USE_FSDP") == "true"


class Processes:
    """This process among the `count` that train together. All methods but the properties must be called by all of them, in the same order."""

    def __init__(self, device: torch.device) -> None:
        """Joins the others, where the launcher's environment variables say that there are some."""
        self.device, self.rank, self.count = device, 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if not distributed.is_initialized():
                distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def place(self, target: nn.Module, exits: list[nn.Module]) -> None:
        """Move a Llama that was loaded on the CPU here, its blocks a part in each process, and the exits, whole.

        FSDP gathers a block when it is needed and frees it behind it. Blocks are most of a target; embeddings, norm and head stay whole, as every chunk of
        logits needs the head, and exits too: they are small, and all processes make the same steps with them.
        """
        mesh = init_device_mesh(self.device.type, (self.count,))
        for block in target.model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)  # else it would stay whole behind its first pass, as an outermost module does
        for part in (target.model.embed_tokens, target.model.norm, target.model.rotary_emb, target.lm_head, *exits):
            part.to(self.device)

    def share(self, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """This process's `batches`; one without learned tokens where there are too few, as all must pass the blocks of a target in parts equally often."""
        missing = -len(batches) % self.count
        empty = [batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])} for batch in batches[:1] * missing]
        return (batches + empty)[self.rank :: self.count]

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count > 1:
            for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def totals(self, values: list[torch.Tensor]) -> torch.Tensor:
        """The sums over all processes of some single numbers, fp64 on the CPU."""
        total = torch.stack(values).double().to(self.device)
        self.add_up([total])
        return total.cpu()

    def any(self, signal: int | None) -> int:
        """The largest of all processes' signals, 0 where none has one: all stop at the same step."""
        if self.count == 1:
            return signal or 0
        found = torch.tensor(signal or 0, device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def agree(self, value: int) -> bool:
        """Whether all processes have the same `value`."""
        if self.count == 1:
            return True
        bounds = torch.tensor([value, -value], device=self.device)
        distributed.all_reduce(bounds, distributed.ReduceOp.MAX)
        return int(bounds[0]) == -int(bounds[1])

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Part from the others."""
        if self.count > 1:
            distributed.destroy_process_group()
