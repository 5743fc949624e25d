"""A vision tower's own lesson, before it becomes part of a LLaVA: every patch learns to tell what is in its quarter of a drawn image.

LLaVA's towers come from CLIP, which learned from 400 million captioned images, and stay as they are. One that starts from nothing inside a LLaVA gets a useful gradient only
once the language model looks at it, trait by trait and late (docs/log.md). This lesson takes a minute.
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

from data.images import ImageInputs
from data.row_files import ExampleStream
from data.shapes import COLOURS, PLACES, SHAPES, SIZES, Scene

TRAITS = {"colour": ("", *COLOURS), "shape": ("", *SHAPES), "size": ("", *SIZES)}  # of a quarter; "" where nothing is there
REPORT_EVERY = 100
BATCH, WARMUP, PEAK_RATE, WEIGHT_DECAY = 64, 50, 2e-3, 0.05


def quarter_labels(scene: Scene) -> torch.Tensor:
    """Which of its TRAITS each quarter has, int64 (4, 3)."""
    there = {one["place"]: one for one in scene}
    return torch.tensor([[names.index(there.get(place, {}).get(trait, "")) for trait, names in TRAITS.items()] for place in PLACES])


def patch_labels(labels: torch.Tensor, patches: int) -> torch.Tensor:
    """The traits of each patch's quarter, (B, patches, 3), from those of the quarters (B, 4, 3); patches row by row, an even number in a row."""
    half = math.isqrt(patches) // 2
    return labels.unflatten(1, (2, 2)).repeat_interleave(half, 1).repeat_interleave(half, 2).flatten(1, 2)


def pretrain_tower(tower: CLIPVisionModel, stream: ExampleStream, images: ImageInputs, layer: int, steps: int) -> float:
    """Train `tower`, whose hidden states at `layer` will be used, on the images of `stream`; returns the last step's share of right traits."""
    probe = nn.Linear(tower.config.hidden_size, sum(map(len, TRAITS.values()))).to(tower.device)
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    accuracy = 0.0
    bar = tqdm(islice(_batches(stream, images), steps), total=steps, desc="tower", disable=None)
    for step, (pixels, labels) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        states = tower(pixels.to(tower.device), output_hidden_states=True).hidden_states[layer][:, 1:]
        logits = probe(states).split(list(map(len, TRAITS.values())), -1)
        labels = patch_labels(labels, states.shape[1]).to(tower.device)
        sum(cross_entropy(rows.flatten(0, 1), labels[..., trait].flatten()) for trait, rows in enumerate(logits)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accuracy = sum((rows.argmax(-1) == labels[..., trait]).float().mean().item() for trait, rows in enumerate(logits)) / len(TRAITS)
        bar.set_postfix(accuracy=accuracy)
        if bar.disable and (step + 1) % REPORT_EVERY == 0:
            print(f"tower step {step + 1}/{steps} accuracy {accuracy:.4f}", flush=True)
    return accuracy


def _batches(stream: ExampleStream, images: ImageInputs) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    examples = iter(stream)
    while True:
        chosen = list(islice(examples, BATCH))
        yield torch.cat([images.pixels(example["images"]) for example in chosen]), torch.stack([quarter_labels(example["scene"]) for example in chosen])
