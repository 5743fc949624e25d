"""A vision tower's own lesson, before it becomes part of a LLaVA: every patch learns to tell what is in its quarter of a drawn picture.

LLaVA's towers come from CLIP, which learned from 400 million captioned pictures, and stay as they are. One that starts from nothing inside a LLaVA gets a useful gradient only
once the language model looks at it: colours came after a thousand steps, shapes not in two thousand (LOG.md). This lesson takes a minute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import CLIPVisionModel

from pictures import Sight
from row_files import ExampleStream
from shapes_dataset import COLOURS, PLACES, SHAPES, SIZES, Scene

TRAITS = {"colour": ("", *COLOURS), "shape": ("", *SHAPES), "size": ("", *SIZES)}  # of a quarter; "" where nothing is there
BATCH, WARMUP, PEAK_RATE, WEIGHT_DECAY = 64, 50, 2e-3, 0.05


def lesson_of(scene: Scene) -> torch.Tensor:
    """Which of its TRAITS each quarter has, int64 (4, 3)."""
    there = {one["place"]: one for one in scene}
    return torch.tensor([[names.index(there.get(place, {}).get(trait, "")) for trait, names in TRAITS.items()] for place in PLACES])


def by_patch(lesson: torch.Tensor, patches: int) -> torch.Tensor:
    """The traits of each patch's quarter, (B, patches, 3), from those of the quarters (B, 4, 3); patches row by row."""
    half = math.isqrt(patches) // 2
    return lesson.unflatten(1, (2, 2)).repeat_interleave(half, 1).repeat_interleave(half, 2).flatten(1, 2)


def pretrain_tower(tower: CLIPVisionModel, stream: ExampleStream, sight: Sight, layer: int, steps: int) -> float:
    """Train `tower`, whose hidden states at `layer` will be used, on the pictures of `stream`; returns the last step's share of right traits."""
    probe = nn.Linear(tower.config.hidden_size, sum(map(len, TRAITS.values()))).to(tower.device)
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    right = 0.0
    for step, (pixels, lesson) in enumerate(tqdm(islice(_batches(stream, sight), steps), total=steps, desc="tower", disable=None)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        states = tower(pixels.to(tower.device), output_hidden_states=True).hidden_states[layer][:, 1:]
        told, lesson = probe(states).split(list(map(len, TRAITS.values())), -1), by_patch(lesson, states.shape[1]).to(tower.device)
        sum(cross_entropy(logits.flatten(0, 1), lesson[..., trait].flatten()) for trait, logits in enumerate(told)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right = sum((logits.argmax(-1) == lesson[..., trait]).float().mean().item() for trait, logits in enumerate(told)) / len(TRAITS)
    return right


def _batches(stream: ExampleStream, sight: Sight) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    examples = iter(stream)
    while True:
        chosen = list(islice(examples, BATCH))
        yield torch.cat([sight.pixels(example["images"]) for example in chosen]), torch.stack([lesson_of(example["scene"]) for example in chosen])
