"""The embedded LLaVA really looks: it names what held-out images show; its three drafts change none of its words."""

from __future__ import annotations

import os
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from commands import benchmark_llava
from commands.benchmark_llava import EMBEDDED_DRAFT, EMBEDDED_LLAVA
from data.shapes import QUESTION, draw
from decoding.sampling import SamplingPolicy
from engine.views import ImagePrompt, View
from harness.image_prompts import ImageQuestion, as_prompt, drawn_questions
from models.llava_target import load_llava, load_llava_draft
from models.target_model import ASSETS, DeviceArgs, eos_token_ids
from running.record_file import read_records
from speculative import DecodeOptions, generate
from test_commands import run_main
from toy_models import COUPLED_TREES
from truncated_llama import TruncatedLlama, load_exit

CPU = DeviceArgs(device="cpu", torch_dtype="fp32")
BLIND, EXIT = ASSETS / "shapes-llava-blind", ASSETS / "shapes-llava-exit" / "layer1.safetensors"
IMAGES, ENOUGH = 60, 0.95


@pytest.fixture(scope="module")
def target():
    return load_llava(str(EMBEDDED_LLAVA), CPU)


@pytest.fixture(scope="module", params=["small llava", "text only", "exit"])
def drafted(request, target) -> SimpleNamespace:
    """A draft, how a chain is drafted with it, and who looks."""
    if request.param == "exit":
        exit_, _ = load_exit(EXIT, target)
        return SimpleNamespace(model=TruncatedLlama(target.model, exit_), method="self_speculative", models=(target,))
    draft = load_llava_draft(str(EMBEDDED_DRAFT if request.param == "small llava" else BLIND), CPU, target)
    return SimpleNamespace(model=draft.model, method="speculative", models=(target, draft))


def some_questions(count: int) -> list[ImageQuestion]:
    return list(islice(drawn_questions(QUESTION), count))


def right_captions(target, show) -> float:
    """Share of captions of held-out images that name all shapes with their colours and no others; show(view) is what the model is given."""
    right, ends = 0, eos_token_ids(target)
    for question in some_questions(IMAGES):
        prompt = as_prompt(question, (target,))
        view, = prompt.given().views.values()
        found = generate(target.model, ImagePrompt({target.model: show(view)}), DecodeOptions(max_new_tokens=96, eos_ids=ends))
        right += prompt.is_right(target.tokenizer.decode(found.tokens, skip_special_tokens=True))
    return right / IMAGES


def test_captions_name_what_held_out_images_show(target):
    assert right_captions(target, lambda view: view) >= ENOUGH


def test_captions_of_what_is_not_seen_are_wrong(target):
    """The same questions with blank rows in the place of images: the answers come from the pixels."""
    assert right_captions(target, lambda view: View(view.ids, view.placeholder, lambda: torch.zeros_like(view.encode_images()))) < 0.2


def test_another_image_gives_another_text(target):
    scenes = [[{"place": "top left", "size": "large", "colour": colour, "shape": "circle"}] for colour in ("red", "blue")]
    texts = []
    for scene in scenes:
        prompt = as_prompt(ImageQuestion(QUESTION, (lambda scene=scene: draw(scene, seed=1),), scene), (target,))
        texts.append(target.tokenizer.decode(generate(target.model, prompt.given(), DecodeOptions(max_new_tokens=60, eos_ids=eos_token_ids(target))).tokens))
        assert prompt.is_right(texts[-1])
    assert "red circle" in texts[0].lower() and "blue circle" in texts[1].lower()


def test_greedy_text_is_transformers_with_every_draft(target, drafted):
    whole, ends = LlavaForConditionalGeneration.from_pretrained(EMBEDDED_LLAVA, dtype=torch.float32), eos_token_ids(target)
    for question in some_questions(3):
        prompt = as_prompt(question, drafted.models)
        ids = torch.tensor([prompt.input_ids])
        with torch.inference_mode():
            out = whole.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=target.images.pixels(question.images), do_sample=False, max_new_tokens=96,
                suppress_tokens=list(range(target.model.config.vocab_size, whole.config.text_config.vocab_size)))
        wanted = out[0, ids.shape[1] :].tolist()
        for options in ({"method": drafted.method, "gamma": 4}, COUPLED_TREES["dynamic"], COUPLED_TREES["static"]):
            found = generate(target.model, prompt.given(), DecodeOptions(max_new_tokens=96, eos_ids=ends, **options), drafted.model)
            assert found.tokens == wanted
            assert sum(one.accepted for one in found.stats.rounds) > 0.3 * found.stats.emitted  # a draft that is of use


def test_sampled_text_of_coupled_decoding_is_vanillas(target, drafted):
    policy, ends = SamplingPolicy(0.6, top_p=0.9), eos_token_ids(target)
    for number, question in enumerate(some_questions(3)):
        prompt = as_prompt(question, drafted.models).given()
        shared = {"policy": policy, "max_new_tokens": 96, "eos_ids": ends, "seed": 4}
        vanilla = generate(target.model, prompt, DecodeOptions(**shared), prompt_id=number)
        for options in ({"method": drafted.method, "gamma": 4, "verification": "coupled"}, COUPLED_TREES["dynamic"]):
            assert generate(target.model, prompt, DecodeOptions(**shared, **options), drafted.model, prompt_id=number).tokens == vanilla.tokens


def test_it_is_small_and_says_where_it_comes_from():
    folders = [EMBEDDED_LLAVA, EMBEDDED_DRAFT, BLIND, EXIT.parent]
    assert sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors")) < 6_000_000
    provenance = (EMBEDDED_LLAVA / "README.md").read_text()
    assert all(command in provenance for command in ("commands.pretrain_llava", "commands.pretrain_draft_model", "train.py"))


def test_without_flags_the_embedded_models_decode_and_records_name_no_machine(tmp_path, monkeypatch):
    words = ["--device", "cpu", "--num_threads", 1, "--method", "vanilla", "speculative", "--end", 2, "--fit_prompts", 1, "--max_new_tokens", 16, "--sheet", 0, "--out", tmp_path]
    assert run_main(benchmark_llava, words, monkeypatch) == 0
    named = {(record["target_model"], record["draft_model"]) for record in read_records(tmp_path / "results.jsonl")}
    assert named == {tuple(os.path.relpath(path) for path in (EMBEDDED_LLAVA, EMBEDDED_DRAFT))}
