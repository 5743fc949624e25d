"""Drawn pictures: what is said of them is what is drawn, held-out scenes are new, and a tower can learn to tell them apart."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest
import torch

from data import shapes
from data.registry import fingerprint, open_stream
from data.shapes import COLOURS, NUM_ROWS, PLACES, SHAPES, SIZES, caption, draw, make_row, make_scene, named_shapes, names_all, parse, scene_key
from test_commands import check_one_line, run_main
from training import tower_pretraining
from training.tower_pretraining import TRAITS, patch_labels, quarter_labels


def test_rows_are_a_function_of_split_and_index():
    assert make_row("train", 5) == make_row("train", 5) != make_row("train", 6)
    assert make_row("train", 5) != make_row("test", 5)
    example = parse(make_row("train", 5))
    assert example["images"][0]().tobytes() == parse(make_row("train", 5))["images"][0]().tobytes()


def test_held_out_scenes_are_in_no_training_row():
    held_out = {scene_key(make_row("test", index)["scene"]) for index in range(200)}
    assert len(held_out) > 100
    assert not held_out & {scene_key(make_row(split, index)["scene"]) for split in ("train", "validation") for index in range(1000)}


def test_captions_name_what_is_there():
    for index in range(200):
        scene, rng = make_row("train", index)["scene"], random.Random(index)
        text = caption(scene, rng)
        assert names_all(text, scene)
        assert all(f"{one['size']} {one['colour']} {one['shape']}" in text.lower() and one["place"] in text for one in scene)


def test_a_caption_that_is_wrong_in_one_word_or_says_too_much_is_wrong():
    scene = [{"place": "top left", "size": "large", "colour": "red", "shape": "circle"}, {"place": "top right", "size": "small", "colour": "blue", "shape": "ring"}]
    right = "A large red circle is at the top left. A small blue ring is at the top right."
    assert names_all(right, scene) and names_all("Blue ring, RED Circle.", scene)
    for wrong in (right.replace("red", "blue"), right.replace("ring", "cross"), right + " A red circle.", right.replace("A large red circle", "A large red"), ""):
        assert not names_all(wrong, scene)
    assert named_shapes(right) == [("blue", "ring"), ("red", "circle")]
    crossed = "A large blue circle is at the top left. A small red ring is at the top right."
    assert not names_all(crossed, scene)


def test_all_questions_are_asked_and_answered_truly():
    asked = Counter()
    for index in range(400):
        row = make_row("train", index)
        for question, answer in row["turns"]:
            asked[question.split()[0]] += 1
            if question.startswith("Is there"):
                (colour, shape), = named_shapes(question)
                there = any((one["colour"], one["shape"]) == (colour, shape) for one in row["scene"])
                assert answer.startswith("Yes" if there else "No")
            if question.startswith("What is at"):
                there = next((one for one in row["scene"] if question == f"What is at the {one['place']}?"), None)
                assert ("nothing" in answer) == (there is None) and (there is None or named_shapes(answer) == [(there["colour"], there["shape"])])
    assert set(asked) == {"Can", "Describe", "What", "How", "Is"} and min(asked.values()) > 10


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_quarter_in_its_colour(shape):
    for place, (column, row) in PLACES.items():
        picture = draw([{"place": place, "size": "large", "colour": "red", "shape": shape}], seed=3)
        red = torch.tensor([[picture.getpixel((x, y)) == COLOURS["red"] for x in range(112)] for y in range(112)])
        inside = red[row * 56 : row * 56 + 56, column * 56 : column * 56 + 56]
        assert inside.sum() == red.sum() > 250


def test_pictures_of_all_shapes_and_sizes_differ():
    found = {draw([{"place": "top left", "size": size, "colour": "red", "shape": shape}], seed=3).tobytes() for size in SIZES for shape in SHAPES}
    assert len(found) == len(SIZES) * len(SHAPES)


def test_the_data_set_is_one_of_the_suites():
    stream = open_stream("shapes", "validation")
    assert stream.num_rows == NUM_ROWS["validation"] and fingerprint(stream)["rows"] == NUM_ROWS["validation"]
    example = next(iter(stream))
    assert example["messages"][-1]["role"] == "assistant" and example["loss_on"] == "assistant" and len(example["images"]) == 1
    with pytest.raises(IndexError):
        stream.rows[NUM_ROWS["validation"]]


@pytest.mark.parametrize(("words", "message"), [(["--count", "0"], "--count 0: must lie between 1"), (["--split", "all"], "--split all: choose one of")])
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, words, message):
    assert run_main(shapes, ["--out_dir", tmp_path, *words], monkeypatch) == 2
    check_one_line(capsys, message)


def test_lessons_say_what_is_where():
    scene = [{"place": "bottom left", "size": "small", "colour": "white", "shape": "ring"}]
    lesson = quarter_labels(scene)
    names = [[list(values)[index] for values, index in zip(TRAITS.values(), row, strict=True)] for row in lesson.tolist()]
    assert names == [["", "", ""], ["", "", ""], ["white", "ring", "small"], ["", "", ""]]
    patches = patch_labels(lesson[None], 16)[0].view(4, 4, 3)
    assert (patches[2:, :2] == lesson[2]).all() and (patches[:2] == 0).all() and (patches[2:, 2:] == 0).all()


def test_a_tower_learns_its_lesson(monkeypatch):
    """At a fresh tower's chance level first, well above it some steps later."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from data.images import ImageInputs

    monkeypatch.setattr(tower_pretraining, "WARMUP", 5)
    image_inputs = ImageInputs(0, 4, CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}))
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14))
    first, later = (tower_pretraining.pretrain_tower(tower, open_stream("shapes", "train", seed=seed), image_inputs, -2, steps) for seed, steps in ((0, 1), (1, 60)))
    assert first < 0.4 < 0.6 < later


def test_scenes_have_every_count():
    rng = random.Random(0)
    assert {len(make_scene(rng)) for _ in range(100)} == {1, 2, 3, 4}
    assert len(list(islice(iter(shapes.Rows("test")), 3))) == 3
