"""LLaVAs from the command line: making one, distilling its exit, benchmarking it; images and questions that are broken; models that are refused."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, MistralConfig, Qwen2VLConfig

import train
import tuned_llama
from commands import benchmark_llava, pretrain_draft_model, pretrain_llava, validate_results
from data import llava as llava_dataset
from data import shapes
from data.images import open_image, with_images
from data.row_files import ExampleStream, SkipRow
from data_utils import EncodeOptions, PaddedBatches, encode_prompt, encode_with_images, held_out_batches
from engine.views import view_of
from harness.image_prompts import ImageQuestion, as_prompt, drawn_questions, file_questions, folder_questions, readable
from models import llava_target
from models.llava_target import load_chat_tokenizer, load_llava, load_llava_draft, text_vocab_size
from models.target_model import DeviceArgs, weights_hash
from running.record_file import read_records
from running.run_files import read_config
from speculative import DecodeOptions, generate
from test_commands import check_one_line, run_main
from test_tuning import time_little
from training import training_loop
from truncated_llama import TruncatedLlama, load_exit

TINY = ["--dataset", "shapes", "--max_steps", "2", "--batch_size", "2", "--max_length", "160", "--num_threads", "1", "--device", "cpu"]
SHAPE = ["--hidden_size", "64", "--intermediate_size", "96", "--image_size", "28", "--vision_hidden_size", "16", "--vision_intermediate_size", "32",
         "--vision_num_hidden_layers", "3", "--vision_num_attention_heads", "2", "--tower_steps", "1"]
QUESTION = "Can you tell me what is in the image?"
CPU = DeviceArgs(device="cpu", torch_dtype="fp32")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    """A LLaVA, a smaller one with other patches, and a text-only Llama, as their commands make them; images and questions."""
    root = tmp_path_factory.mktemp("llava")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_llava, "TOKENIZER_EXAMPLES", 50)
        patch.setattr(pretrain_llava, "NAMED_SCENES", 2)
        patch.setattr(pretrain_llava, "CAPTION_TOKENS", 4)
        patch.setattr(pretrain_llava, "VALIDATION_BATCHES", 1)
        patch.setattr(pretrain_draft_model, "VALIDATION_BATCHES", 1)
        patch.setattr(pretrain_draft_model, "NUM_SAMPLES", 1)
        patch.setitem(shapes.NUM_ROWS, "train", 300)
        run = root / "target"
        assert run_main(pretrain_llava, [*TINY, *SHAPE, "--num_hidden_layers", "3", "--patch_size", "14", "--train_tokenizer_size", "320", "--output_dir", run], patch) == 0
        target = run / "model_000002"
        assert run_main(pretrain_llava, [*TINY, *SHAPE, "--num_hidden_layers", "1", "--patch_size", "7", "--tokenizer_path", target, "--output_dir", root / "draft"], patch) == 0
        words = ["--dataset", "shapes", "--tokenizer_path", target, "--hidden_size", "64", "--intermediate_size", "96", "--num_hidden_layers", "1", "--num_attention_heads", "4",
                 "--num_key_value_heads", "2", "--max_steps", "1", "--batch_size", "2", "--max_length", "64", "--num_threads", "1", "--output_dir", root / "blind"]
        assert run_main(pretrain_draft_model, words, patch) == 0
        assert run_main(shapes, ["--out_dir", root / "images", "--count", "3"], patch) == 0
    return SimpleNamespace(root=root, target=str(target), draft=str(root / "draft/model_000002"), blind=str(root / "blind/model_000001"), images=root / "images",
                           run=run)


@pytest.fixture(scope="module")
def llava(models) -> llava_target.LlavaTarget:
    return load_llava(models.target, CPU, models.images)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    time_little(monkeypatch)


# ---- what transformers makes of the same ----

@pytest.mark.parametrize("count", [0, 1, 2])
def test_prompts_are_transformers_processors(models, llava, count):
    """Tokens, placeholders and pixels of a chat are those of the saved processor."""
    names = tuple(f"shapes_test_000{index}.png" for index in range(count))
    prompt = as_prompt(ImageQuestion(QUESTION, names), (llava,))
    processor = AutoProcessor.from_pretrained(models.target)
    messages = with_images([{"role": "user", "content": QUESTION}], count)
    opened = [Image.open(models.images / name) for name in names]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    wanted = processor(images=opened or None, text=text, return_tensors="pt", add_special_tokens=False)
    assert prompt.input_ids == wanted["input_ids"][0].tolist()
    view = view_of(prompt.given(), llava.model)
    assert view.ids == prompt.input_ids and (view.encode_images is None) == (count == 0)
    if count:
        model = LlavaForConditionalGeneration.from_pretrained(models.target, dtype=torch.float32)
        with torch.inference_mode():
            out = model.generate(**wanted, do_sample=False, max_new_tokens=12, eos_token_id=None,
                                 suppress_tokens=list(range(llava.model.config.vocab_size, model.config.text_config.vocab_size)))
        found = generate(llava.model, prompt.given(), DecodeOptions(max_new_tokens=12)).tokens
        assert found == out[0, len(prompt.input_ids) :].tolist()


def test_a_checkpoint_without_processor_settings_and_template_is_read(models, llava, tmp_path):
    """As llava-hf's first conversions: no patch_size, no strategy, no template; LLaVA 1.5's is used, with the BOS of the tokenizer."""
    for file in Path(models.target).iterdir():
        if file.name not in ("chat_template.jinja", "processor_config.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((Path(models.target) / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    old = load_llava(str(tmp_path), CPU)
    assert old.images.image_seq_length == llava.images.image_seq_length == 4 and weights_hash(old.model) == weights_hash(llava.model)
    ids = encode_prompt(old.tokenizer, {"messages": [{"role": "user", "content": "What?"}]}, num_images=1)
    assert old.tokenizer.decode(ids) == "<s>USER: <image>\nWhat? ASSISTANT:" and ids.count(old.tokenizer.bos_token_id) == 1


def test_rows_of_a_image_follow_from_the_model(models):
    """28 pixels in patches of 14 are 4 rows, of 7 16; with the class token, which the strategy "full" keeps, one more."""
    draft = load_llava(models.draft, CPU)
    assert (draft.images.image_seq_length, draft.vision.shape) == (16, (3, 28, 28))
    config = draft.vision._model.config
    config.vision_feature_select_strategy = "full"
    assert len(draft.vision(torch.zeros(2, 3, 28, 28))) == 34


# ---- what is refused ----

def changed(models, folder: Path, **config: object) -> str:
    """A copy of the target with a changed configuration."""
    for file in Path(models.target).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return str(folder)


def refused(capsys, monkeypatch, message: str, *words: object) -> None:
    assert run_main(benchmark_llava, [*words, "--out", "unused", "--device", "cpu"], monkeypatch) == 2
    check_one_line(capsys, message)
    assert not Path("unused").exists()


def test_models_of_other_kinds_are_refused_by_name(models, tmp_path, tiny_target_path, capsys, monkeypatch):
    Qwen2VLConfig().save_pretrained(tmp_path / "qwen")
    refused(capsys, monkeypatch, r"qwen is a qwen2_vl model, whose images have positions of several dimensions \(M-RoPE\)", "--target", tmp_path / "qwen")
    (tmp_path / "mistral").mkdir()
    refused(capsys, monkeypatch, "is a llava model around a mistral model", "--target", changed(models, tmp_path / "mistral", text_config=MistralConfig().to_dict()))
    refused(capsys, monkeypatch, "is a llama model; here a LLaVA 1.5 model around a Llama is needed", "--target", tiny_target_path)
    (tmp_path / "next").mkdir()
    refused(capsys, monkeypatch, "is a llava_next model", "--target", changed(models, tmp_path / "next", model_type="llava_next", image_grid_pinpoints=[[28, 28]]))
    refused(capsys, monkeypatch, "draft.* is a qwen2_vl model|qwen is a qwen2_vl model", "--target", models.target, "--model", tmp_path / "qwen")


def test_vocabularies_that_do_not_fit_are_refused(models, llava, tmp_path):
    tokenizer, config = load_chat_tokenizer(models.target), llava.vision._model.config
    size = len(tokenizer)
    assert text_vocab_size("x", tokenizer, config) == llava.model.config.vocab_size == size - 2 and config.text_config.vocab_size > size
    with pytest.raises(llava_target.UserError, match=r"<image> is token 318 of its tokenizer, but image_token_index is 5"):
        text_vocab_size("x", tokenizer, SimpleNamespace(image_token_id=5, text_config=config.text_config))
    with pytest.raises(llava_target.UserError, match=r"token 7 .* must never be written, but lies among the 318 that may"):
        text_vocab_size("x", tokenizer, SimpleNamespace(image_token_id=size - 2, pad_token_id=7, text_config=config.text_config))
    with pytest.raises(llava_target.UserError, match="<image> is token 318, but vocab_size is 300"):
        text_vocab_size("x", tokenizer, SimpleNamespace(image_token_id=size - 2, text_config=SimpleNamespace(vocab_size=300, pad_token_id=-1)))
    tokenizer.pad_token = tokenizer.eos_token  # is written, as the end of a text; <pad> is the configuration's
    assert text_vocab_size("x", tokenizer, config) == size - 2
    unknown = tokenizer.unk_token_id
    tokenizer.convert_tokens_to_ids = lambda token: unknown
    with pytest.raises(llava_target.UserError, match="<image> is token 2 of its tokenizer"):
        text_vocab_size("x", tokenizer, config)


def test_drafts_that_do_not_fit_are_refused(models, llava, tiny_target_path, tmp_path):
    with pytest.raises(llava_target.UserError, match="have different tokenizers"):
        load_llava_draft(str(tiny_target_path), CPU, llava)
    for path in (models.draft, models.blind):
        assert load_llava_draft(path, CPU, llava).model.config.vocab_size == llava.model.config.vocab_size


def test_images_of_another_size_than_the_tower_are_refused(models, tmp_path):
    path = changed(models, tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_processor"]["crop_size"] = {"height": 20, "width": 28}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(llava_target.UserError, match="makes images of 3 x 20 x 28, its vision tower takes 3 x 28 x 28"):
        load_llava(path, CPU)


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "magic"], "--method magic: choose from vanilla"),
    (["--start", "5", "--end", "5"], "must be numbers with 0 <= start < end"),
    (["--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
    (["--sheet", "-1"], "--sheet -1: must not be negative"),
    (["--temperature", "-1"], "--temperature -1.0 must be 0 "),
    (["--gamma", "x"], "--gamma x: must be auto"),
    (["--model", "a", "--checkpoint", "b"], "give one draft"),
    (["--growmap", "nowhere.json"], "nowhere.json"),
    (["--checkpoint", "nowhere.safetensors"], "no checkpoint at nowhere"),
    (["--target", "nowhere/model"], "no model at nowhere/model"),
    (["--random_init", "llama-3.2-1b"], "is a llama model"),
    (["--random_init", "no-shape"], "no shape no-shape: give one of llava-1.5-7b,"),
    (["--random_init", "llava-1.5-7b", "--image_dir", "x"], "leave out --model_path and --image_dir"),
])
def test_mistakes_get_one_line(models, capsys, monkeypatch, words, message):
    refused(capsys, monkeypatch, message, *(words if "--target" in words else ["--target", models.target, *words]))


# ---- questions and images ----

def test_broken_and_missing_images_are_counted_and_left_out(models, tmp_path, capsys):
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes((models.images / "shapes_test_0000.png").read_bytes())
    (tmp_path / "b.jpg").write_bytes(b"no image")
    whole = (models.images / "shapes_test_0001.png").read_bytes()
    (tmp_path / "d.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("no image, and no suffix of one")
    questions = folder_questions(tmp_path, QUESTION)
    assert [question.name for question in questions] == ["a.png", "b.jpg", "c.png", "d.png"]
    assert [question.name for question in readable([*questions, ImageQuestion(QUESTION, ("gone.png",))], tmp_path)] == ["a.png", "c.png"]
    assert "3 rows skipped (2 whose image is broken, 1 whose image is missing)" in capsys.readouterr().err
    assert readable(questions[1:2], tmp_path) == []


def test_images_are_opened_when_they_are_needed(models, monkeypatch):
    """Of a folder of many, those between start and end, and those behind that are fitted to; in a bucket of training examples all stay closed."""
    opened = []
    exact = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path).name) or exact(path))
    args = benchmark_llava.Args(image_dir=str(models.images), start=1, end=2, fit_prompts=1)
    measured, behind = args.chosen()
    assert [one.name for one in (*measured, *behind)] == opened == ["shapes_test_0001.png", "shapes_test_0002.png"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "CMYK"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    suffix = "tiff" if mode in ("CMYK", "I;16") else "png"
    Image.new(mode, (9, 7)).save(tmp_path / f"x.{suffix}")
    assert open_image(f"x.{suffix}", tmp_path).mode == "RGB"


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2: JSONDecodeError"), ('{"question_id": 1, "image": "a.png"}', "KeyError: 'text'"), ('{"text": 3}', "text must be a string"), ("[]", "line 2"),
    ('{"text": "x", "scene": "red circle"}', "scene a list of shapes"),
    ('{"text": "x", "image": [1]}', "a row whose image is no file name"), ('{"text": "<image> <image> x", "image": "a.png"}', "a row with another number of images than of <image>"),
])
def test_broken_questions_name_the_line(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 0, "image": ["a.png", "b.png"], "text": "<image> and <image>?"}\n' + line + "\n")
    with pytest.raises(llava_target.UserError, match=re.escape(message)):
        file_questions(path)


def test_questions_in_llavas_form(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [{"question_id": 7, "image": "a.png", "text": "x", "category": "detail"}, {"text": "y"}, {"image": ["a", "b"], "text": "<image> z <image>"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [(one.name, one.images, one.text) for one in file_questions(path)] == [
        ("7", ("a.png",), "x"), ("2", (), "y"), ("3", ("a", "b"), "<image> z <image>")]


def test_llava_instruct_rows():
    row = {"id": "1", "image": "x.jpg", "conversations": [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A bus."}]}
    assert llava_dataset.parse(row) == {
        "messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A bus."}], "images": ["x.jpg"], "loss_on": "assistant"}
    with pytest.raises(SkipRow, match="another number of images"):
        llava_dataset.parse({**row, "image": ["x.jpg", "y.jpg"]})
    assert llava_dataset.parse({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})["images"] == []


# ---- training on images ----

def test_placeholders_are_never_learned_and_answers_are(llava):
    example = shapes.parse(shapes.make_row("train", 3))
    encoded = encode_with_images(llava.tokenizer, example, llava.images)
    assert encoded.input_ids.count(llava.images.image_token_id) == 4 and len(encoded.images) == 1
    learned = [token for token, mask in zip(encoded.input_ids, encoded.loss_mask, strict=True) if mask]
    answers = " ".join(message["content"] + llava.tokenizer.eos_token for message in example["messages"] if message["role"] == "assistant")
    assert "".join(llava.tokenizer.decode(learned).split()) == "".join(answers.split())
    everything = encode_with_images(llava.tokenizer, {**example, "loss_on": "all"}, llava.images)
    assert not any(mask for token, mask in zip(everything.input_ids, everything.loss_mask, strict=True) if token == llava.images.image_token_id)
    assert sum(everything.loss_mask) == len(everything.input_ids) - 4 - 1


def test_examples_whose_images_do_not_fit_or_are_broken_are_counted(llava, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"x")
    chat = {"conversations": [{"from": "human", "value": "a b c d e f g"}, {"from": "gpt", "value": "b"}]}
    rows = [{**chat, "image": "gone.png"}, {**chat, "image": "broken.png"}, {**chat, "image": ["shapes_test_0000.png"] * 6}, {**chat, "image": "shapes_test_0000.png"}]
    stream = ExampleStream(llava_dataset.DATASET, rows, seed=0)
    options = EncodeOptions(llava.tokenizer, max_length=30, batch_size=1, images=llava.images)
    (llava.images.image_dir / "broken.png").write_bytes(b"x")
    batch, = held_out_batches(stream, options, 4)
    (llava.images.image_dir / "broken.png").unlink()
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    assert set(stream.skipped) == {"whose image is missing", "whose image is broken", "whose images take more than --max_length tokens"}


def test_a_batch_has_the_images_of_its_texts_in_order(llava):
    rows = [shapes.make_row("train", index) for index in range(64)]
    batch = next(iter(PaddedBatches(ExampleStream(shapes.DATASET, rows, 0), EncodeOptions(llava.tokenizer, "assistant", 160, 4, llava.images))))
    embedded = llava.embed(batch["input_ids"], batch["pixel_values"])
    for row in range(4):
        alone = llava.embed(batch["input_ids"][row : row + 1], batch["pixel_values"][row : row + 1])
        assert torch.allclose(embedded[row], alone[0], atol=1e-5)
    assert not torch.allclose(embedded[0], llava.embed(batch["input_ids"][:1], batch["pixel_values"][1:2])[0], atol=1e-5)


def train_flags(models, output: Path, **changes: object) -> list[str]:
    flags = {"model_path": models.target, "dataset": "shapes", "target_layers": 1, "kinds": "head+last_block", "max_steps": 3, "batch_size": 2, "max_length": 160,
             "learning_rate": 1e-2, "num_threads": 1, "device": "cpu", "output_dir": output, **changes}
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def test_an_exit_of_a_llava_is_distilled_resumed_and_drafts(models, llava, tmp_path, monkeypatch, capsys):
    """Stopped behind its second step and resumed, to the last bit; then it drafts."""
    monkeypatch.setitem(shapes.NUM_ROWS, "train", 300)
    monkeypatch.setattr(train, "VALIDATION_BATCHES", 1)
    assert run_main(train, train_flags(models, tmp_path / "whole"), monkeypatch) == 0
    with monkeypatch.context() as patch:
        stop_behind(patch, 2)
        assert run_main(train, train_flags(models, tmp_path / "cut"), patch) == 128 + signal.SIGTERM
    assert not (tmp_path / "cut" / "model_000003.safetensors").exists()
    assert run_main(train, [*train_flags(models, tmp_path / "cut"), "--resume"], monkeypatch) == 0
    whole, cut = (load_file(tmp_path / name / "model_000003.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    exit_, info = load_exit(tmp_path / "whole" / "model_000003.safetensors", llava)
    assert (info.target_layer, str(info.kind)) == (1, "head+last_block") and exit_.head.out_features == llava.model.config.vocab_size
    prompt = as_prompt(ImageQuestion(QUESTION, ("shapes_test_0000.png",)), (llava,)).given()
    vanilla, drafted = (generate(llava.model, prompt, DecodeOptions(method=method, max_new_tokens=12), TruncatedLlama(llava.model, exit_)).tokens
                        for method in ("vanilla", "self_speculative"))
    assert drafted == vanilla


def stop_behind(patch, step: int) -> None:
    """Let a scheduler's signal arrive in training step `step`, from 1."""
    exact, steps = training_loop.train_step, []

    def train_step(*arguments):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return exact(*arguments)

    patch.setattr(training_loop, "train_step", train_step)


def test_the_teacher_sees_the_images(models, llava, tmp_path, monkeypatch):
    """The same texts with other pixels make other states; without them a training that forgot to look would pass unseen."""
    rows = [shapes.make_row("train", index) for index in range(32)]
    batch = next(iter(PaddedBatches(ExampleStream(shapes.DATASET, rows, 0), EncodeOptions(llava.tokenizer, "assistant", 160, 2, llava.images))))
    model = tuned_llama.TunedLlama(llava.model, [])
    seen, other = (model.frozen_pass(batch["input_ids"], batch["attention_mask"], inputs_embeds=llava.embed(batch["input_ids"], pixels)).teacher
                   for pixels in (batch["pixel_values"], -batch["pixel_values"]))
    whole = llava.vision._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch["pixel_values"]).logits
    found = llava.model.lm_head(seen)
    mask = batch["attention_mask"].bool()
    assert torch.allclose(found[mask], whole[..., : found.shape[-1]][mask], atol=1e-4)
    assert not torch.allclose(seen, other, atol=1e-3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"teacher_cache": "cache"}, "tells texts apart, not their images"), ({"dataset": "llava_instruct"}, "give their folder as --image_dir"),
    ({"image_dir": "nowhere"}, "--image_dir nowhere: no such folder"),
])
def test_training_refuses_what_does_not_go_with_images(models, tmp_path, monkeypatch, capsys, changes, message):
    assert run_main(train, train_flags(models, tmp_path / "run", **changes), monkeypatch) == 2
    check_one_line(capsys, message)


def test_a_llama_takes_no_image_folder(models, tiny_target_path, tmp_path, monkeypatch, capsys):
    assert run_main(train, train_flags(models, tmp_path / "run", model_path=tiny_target_path, image_dir=models.images), monkeypatch) == 2
    check_one_line(capsys, "sees no images; leave it out")


# ---- making a LLaVA ----

def test_pretraining_resumes_and_keeps_tower_and_tokenizer(models, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_llava, "NAMED_SCENES", 1)
    monkeypatch.setattr(pretrain_llava, "CAPTION_TOKENS", 2)
    monkeypatch.setattr(pretrain_llava, "VALIDATION_BATCHES", 1)
    monkeypatch.setitem(shapes.NUM_ROWS, "train", 300)
    words = [*TINY, *SHAPE, "--num_hidden_layers", "1", "--tokenizer_path", models.target]
    assert run_main(pretrain_llava, [*words, "--output_dir", tmp_path / "whole"], monkeypatch) == 0
    with monkeypatch.context() as patch:
        stop_behind(patch, 1)
        assert run_main(pretrain_llava, [*words, "--output_dir", tmp_path / "a"], patch) == 128 + signal.SIGTERM
    assert not (tmp_path / "a" / "model_000002").exists()
    assert run_main(pretrain_llava, [*words, "--output_dir", tmp_path / "a", "--resume"], monkeypatch) == 0
    whole, cut = ({path.name: path.read_bytes() for path in (tmp_path / name / "model_000002").iterdir()} for name in ("whole", "a"))
    assert whole == cut
    saved, tower = load_file(tmp_path / "a" / "model_000002" / "model.safetensors"), load_file(tmp_path / "a" / "tower.safetensors")
    weight = next(tensor for name, tensor in saved.items() if name.endswith("patch_embedding.weight"))
    assert torch.equal(weight, next(tensor for name, tensor in tower.items() if name.endswith("patch_embedding.weight")).to(torch.bfloat16))  # it stays as it was taught


@pytest.mark.parametrize(("words", "message"), [
    (["--hidden_size", "30"], "--hidden_size 30 is no multiple of --num_attention_heads 4"), (["--tower_steps", "-1"], "--tower_steps -1: must be 0"),
    (["--dataset", "llava_instruct"], "--tower_steps 1: must be 0 for --dataset llava_instruct"), (["--train_tokenizer_size", "300"], "give one of --train_tokenizer_size 512"),
    (["--vision_num_hidden_layers", "1"], "must be at least 2"), (["--max_length", "4000"], "exceeds --max_position_embeddings"),
])
def test_pretraining_names_mistakes(models, tmp_path, monkeypatch, capsys, words, message):
    assert run_main(pretrain_llava, [*TINY, *SHAPE, "--tokenizer_path", models.target, *words, "--output_dir", tmp_path / "x"], monkeypatch) == 2
    check_one_line(capsys, message)


# ---- the benchmark ----

def bench(models, out: Path, *words: object) -> list:
    return ["--target", models.target, "--end", 2, "--fit_prompts", 1, "--max_new_tokens", 8, "--tree_budget", 6, "--tree_depth", 2, "--parallel_branches", 3,
            "--num_threads", 1, "--device", "cpu", "--sheet", 1, "--out", out, *words]


@pytest.mark.parametrize("draft", ["llava", "text only", "exit"])
def test_benchmark_measures_every_method_resumes_and_shows(models, draft, tmp_path, monkeypatch, capsys):
    words = {"llava": ["--model", models.draft], "text only": ["--model", models.blind], "exit": ["--checkpoint", noisy_checkpoint(models)]}[draft]
    assert run_main(benchmark_llava, bench(models, tmp_path, *words), monkeypatch) == 0
    records = read_records(tmp_path / "results.jsonl")
    ok = {record["method"]: record for record in records if record["status"] == "ok" and not record["summary"]}
    assert set(ok) == {*benchmark_llava.METHODS} - ({"self_speculative"} if draft != "exit" else set())
    assert all(record["lossless"] and record["dataset"] == "shapes" and "correct_by_prompt" in record for record in ok.values())
    assert ok["vanilla"]["total_prompt_tokens"] == ok["hf_generate"]["total_prompt_tokens"] > 2 * 4
    assert run_main(validate_results, ["--strict", "--path", tmp_path], monkeypatch) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<img") == 1 and QUESTION in page
    capsys.readouterr()
    assert run_main(benchmark_llava, bench(models, tmp_path, *words), monkeypatch) == 0
    assert "nothing left to do" in capsys.readouterr().out


def noisy_checkpoint(models) -> Path:
    """An exit at layer 1, trained for no step to speak of."""
    path = models.root / "exit"
    if not path.exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(shapes.NUM_ROWS, "train", 300)
            patch.setattr(train, "VALIDATION_BATCHES", 1)
            assert run_main(train, train_flags(models, path, max_steps=1), patch) == 0
    return path / "model_000001.safetensors"


def test_benchmark_of_files_counts_broken_images_and_takes_a_slice(models, tmp_path, monkeypatch, capsys):
    rows = [{"question_id": 0, "image": "gone.png", "text": "a?"}, *({"question_id": i, "image": f"shapes_test_000{i}.png", "text": f"{i}?"} for i in range(3)), {"text": "No image?"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", models.blind, "--image_dir", models.images, "--questions", tmp_path / "q.jsonl", "--method", "vanilla", "speculative", "--end", 9]
    assert run_main(benchmark_llava, bench(models, tmp_path / "out", *words), monkeypatch) == 0
    assert "1 rows skipped (1 whose image is missing)" in capsys.readouterr().err
    vanilla, = (record for record in read_records(tmp_path / "out" / "results.jsonl") if record["method"] == "vanilla" and not record["summary"])
    assert vanilla["prompts"] == 4 and "correct_by_prompt" not in vanilla
    assert run_main(benchmark_llava, bench(models, tmp_path / "two", *words, "--start", 3, "--end", 5), monkeypatch) == 0
    vanilla, = (record for record in read_records(tmp_path / "two" / "results.jsonl") if record["method"] == "vanilla" and not record["summary"])
    assert vanilla["prompts"] == 2
    assert run_main(benchmark_llava, bench(models, tmp_path / "none", *words, "--start", 30, "--end", 50), monkeypatch) == 2
    check_one_line(capsys, "--start 30 --end 50: no question there")


def test_other_images_under_the_same_names_are_other_prompts(models, tmp_path, monkeypatch):
    for index in (0, 1):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / "x.png").write_bytes((models.images / f"shapes_test_000{index}.png").read_bytes())
        assert run_main(benchmark_llava, bench(models, tmp_path / "out", "--image_dir", tmp_path / "a", "--method", "vanilla", "--model", models.blind), monkeypatch) == 0
    runs = [record for record in read_records(tmp_path / "out" / "results.jsonl") if not record["summary"]]
    assert len({record["dataset_sha256"] for record in runs}) == len({record["resume_key"] for record in runs}) == 2


def test_random_weights_with_planted_acceptance(models, tmp_path, monkeypatch):
    shape = json.loads((Path(models.target) / "config.json").read_text())
    shape["text_config"]["num_hidden_layers"] = 4
    shape["image_token_index"] = 304  # what an exit knows is a multiple of 16
    (tmp_path / "config.json").write_text(json.dumps(shape))
    words = ["--random_init", tmp_path, "--planted_alpha", "0.7", "--temperature", "1", "--top_p", "1", "--method", "vanilla", "self_speculative", "dynamic_tree"]
    flags = [word for word in bench(models, tmp_path / "out", *words) if word not in ("--target", models.target)]
    assert run_main(benchmark_llava, [*flags, "--end", 8, "--max_new_tokens", 64], monkeypatch) == 0
    found = {record["method"]: record for record in read_records(tmp_path / "out" / "results.jsonl") if not record["summary"]}
    assert found["self_speculative"]["backend"] == "toy" and abs(found["self_speculative"]["spec_overlap"] - 0.7) < 0.06
    assert not (tmp_path / "out" / "sheet.png").exists()


@pytest.mark.parametrize("method", ["vanilla", "speculative", "static_tree", "dynamic_tree"])
def test_a_hub_model_fails_at_the_download_with_one_line(models, method, tmp_path, monkeypatch, capsys):
    """The reference's command lines, with no hub in reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words = ["--model", "anthonycmu/llava-1.5-160m", "--target", "llava-hf/llava-1.5-7b-hf", "--image_dir", models.images, "--prompt", QUESTION,
             "--temperature", "0.6", "--top_p", "0.9", "--method", method, "--start", "0", "--end", "200"]
    assert run_main(benchmark_llava, [*words, "--out", tmp_path / "out"], monkeypatch) == 2
    check_one_line(capsys, "no model at llava-hf/llava-1.5-7b-hf")


def test_a_checkpoint_without_its_vision_tower_is_refused(models, tmp_path):
    """It would look with random eyes."""
    path = changed(models, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(llava_target.UserError, match=r"lacks \d+ tensors of its configuration, such as model.vision_tower"):
        load_llava(path, CPU)


def test_a_configuration_of_the_original_code_is_refused(models, tmp_path):
    with pytest.raises(llava_target.UserError, match="was saved for LlavaLlamaForCausalLM, the form of the original code"):
        load_llava(changed(models, tmp_path, architectures=["LlavaLlamaForCausalLM"]), CPU)


def test_how_models_see_is_part_of_what_figures_depend_on(models, tmp_path):
    """Another projector, layer or image processor is another measurement."""
    seen = {load_llava(models.target, CPU).sees_as}
    for number, change in enumerate(({"vision_feature_layer": -1}, {})):
        (tmp_path / str(number)).mkdir()
        path = changed(models, tmp_path / str(number), **change)
        if not change:
            tensors = load_file(Path(path) / "model.safetensors")
            name = next(name for name in tensors if "multi_modal_projector.linear_2.weight" in name)
            save_file({**tensors, name: tensors[name] * 2}, Path(path) / "model.safetensors", metadata={"format": "pt"})
        seen.add(load_llava(path, CPU).sees_as)
    (tmp_path / "2").mkdir()
    path = changed(models, tmp_path / "2")
    settings = json.loads((tmp_path / "2" / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "2" / "processor_config.json").write_text(json.dumps(settings))
    assert len(seen | {load_llava(path, CPU).sees_as}) == 4


LLAVA_HF_TEMPLATE = (  # as llava-hf's checkpoints have it: no BOS, no EOS, a space behind every text
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


def test_answers_end_in_eos_under_templates_that_leave_it_out(llava, models):
    """As LLaVA was trained: `ASSISTANT: answer</s>USER: …`; what the template writes behind is not learned."""
    tokenizer = load_chat_tokenizer(models.target)
    tokenizer.chat_template = LLAVA_HF_TEMPLATE
    turns = [{"role": role, "content": text} for role, text in (("user", "What?"), ("assistant", "A red ring."), ("user", "Where?"), ("assistant", "There."))]
    encoded = encode_with_images(tokenizer, {"messages": turns, "images": [lambda: None], "loss_on": "assistant"}, llava.images)
    learned = tokenizer.decode([token for token, learn in zip(encoded.input_ids, encoded.loss_mask, strict=True) if learn])
    assert "".join(learned.split()) == "Aredring.</s>There.</s>" and encoded.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encode_prompt(tokenizer, {"messages": turns[:1]}, num_images=1)) == "<s>USER: <image>\nWhat? ASSISTANT:"


def test_padding_tokens_in_a_text_are_not_learned(llava):
    chat = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a <pad> b"}], "loss_on": "assistant"}
    encoded = encode_with_images(llava.tokenizer, chat, llava.images)
    assert llava.tokenizer.pad_token_id in encoded.input_ids
    assert all(token < llava.model.config.vocab_size for token, learn in zip(encoded.input_ids, encoded.loss_mask, strict=True) if learn)


def test_a_template_that_takes_no_images_gets_one_line(llava, models):
    tokenizer = load_chat_tokenizer(models.target)
    tokenizer.chat_template = "{% for message in messages %}{{ 'x' + message['content'] }}{% endfor %}"
    with pytest.raises(llava_target.UserError, match="takes no images"):
        as_prompt(ImageQuestion("x", ("a.png",)), (replace(llava, tokenizer=tokenizer),))


def test_only_questions_for_everything_have_an_answer_to_check():
    assert next(drawn_questions(QUESTION)).scene is not None and next(drawn_questions("How many shapes are there?")).scene is None


def test_a_torn_weights_file_gets_one_line(models, tmp_path):
    path = changed(models, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(llava_target.UserError, match="cannot be read"):
        load_llava(path, CPU)


def test_a_run_is_recorded(models):
    config = read_config(models.run)
    assert config["hidden_size"] == 64 and "tokenizer_hash" in config
