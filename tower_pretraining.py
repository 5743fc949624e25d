"""A vision tower's own lesson, before it becomes part of a LLaVA: to tell what is in each quarter of a drawn picture.

LLaVA's towers come from CLIP, which learned from 400 million captioned pictures. One that starts from nothing inside a LLaVA sees its first useful gradient only when the
language model already looks at it; this lesson takes a minute instead.
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


def quarters(states: torch.Tensor) -> torch.Tensor:
    """Means (B, 4, D) over each quarter's patches of `states` (B, patches, D), patches row by row, in the order of PLACES."""
    half = math.isqrt(states.shape[1]) // 2
    grid = states.unflatten(1, (2, half, 2, half))
    return grid.mean((2, 4)).flatten(1, 2)


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
        told, lesson = probe(quarters(states)).split(list(map(len, TRAITS.values())), -1), lesson.to(tower.device)
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
