"""Coloured texts: every token has the colour of where it came from, whatever the tokenizer makes of letters."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from PIL import Image

import evaluate
from decoding.sampling import SamplingPolicy
from decoding.state import DecodeStats, RoundResult
from measuring.token_views import COLOURS, Card, Piece, as_ansi, as_html, card_of, kinds_of, legend, pieces, write_html, write_png
from speculative import DecodeOptions, generate
from test_commands import check_one_line, exit_path, run_main  # noqa: F401
from toy_models import TREES, native_llama, noisy_exit


def test_kinds_of_rounds():
    rounds = [RoundResult([1]), RoundResult([1, 2, 3], proposed=2, accepted=2), RoundResult([4, 5], proposed=3, accepted=1), RoundResult([6], proposed=2)]
    assert kinds_of(rounds, 99) == ["plain", "accepted", "accepted", "bonus", "accepted", "corrected", "corrected"]
    assert kinds_of(rounds, 3) == ["plain", "accepted", "accepted"]  # cut at an end


@pytest.mark.parametrize("options", [{"method": "self_speculative", "gamma": 3}, TREES["dynamic"], TREES["static, swor"]], ids=["chain", "tree", "swor"])
def test_kinds_agree_with_the_counts_of_a_generation(options):
    target = native_llama()
    found = generate(target, [1, 2, 3], DecodeOptions(policy=SamplingPolicy(1.0), max_new_tokens=40, **options), noisy_exit(target, 1, scale=0.02))
    kinds = kinds_of(found.stats.rounds, 10**9)
    assert kinds.count("accepted") == sum(one.accepted for one in found.stats.rounds) > 0
    assert kinds.count("corrected") == sum(one.tested > one.accepted for one in found.stats.rounds) > 0
    assert len(kinds) == sum(len(one.tokens) for one in found.stats.rounds) >= len(found.tokens)


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is an end without a text."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(token for token in tokens if token).decode("utf-8", errors="replace")


def test_a_letter_of_several_tokens_is_whole():
    text = "aß€😀<"
    tokens = [*text.encode(), 0]
    rounds = [RoundResult([token], proposed=0) for token in tokens]
    assert pieces(Bytes(), tokens, rounds) == [Piece(text, "plain")]
    rounds = [RoundResult(tokens[:3], proposed=2, accepted=2), RoundResult(tokens[3:], proposed=len(tokens), accepted=len(tokens) - 4)]
    found = pieces(Bytes(), tokens, rounds)
    assert "".join(piece.text for piece in found) == text and [piece.kind for piece in found] == ["accepted", "bonus", "accepted"]


def test_html_and_ansi_say_the_kinds():
    text = [Piece("<b>", "accepted"), Piece("x\n", "corrected"), Piece("y", "plain")]
    assert as_html(text) == (f'<span style="background:{COLOURS["accepted"][0]}" title="accepted">&lt;b&gt;</span>'
                             f'<span style="background:{COLOURS["corrected"][0]}" title="corrected">x\n</span><span style="background:#ffffff" title="plain">y</span>')
    assert as_ansi(text) == "\x1b[30;48;5;151m<b>\x1b[0m\x1b[30;48;5;216mx\n\x1b[0my"
    assert {piece.kind for piece in legend()} == set(COLOURS)


def test_a_sheet_has_every_card(tmp_path):
    image = Image.new("RGB", (900, 300), "red")
    cards = [Card("What?", [Piece("word " * 60, "accepted"), Piece("日本\x07\u202e\n\nx", "bonus")], "a note", (image, image)), Card("Without", [], "none")]
    write_png(tmp_path / "sheet.png", "Title", cards)
    write_html(tmp_path / "sheet.html", "Title <", cards)
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24)}
    tints = {tuple(int(COLOURS[kind][0][i : i + 2], 16) for i in (1, 3, 5)) for kind in ("accepted", "bonus")}
    assert {(255, 0, 0), *tints} <= colours
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "Title &lt;" in page and page.count('class="card"') == 2


def test_a_card_counts_its_tokens():
    stats = DecodeStats(emitted=3, target_calls=2, rounds=[RoundResult([65, 66], proposed=2, accepted=1), RoundResult([67])])
    card = card_of("Q", Bytes(), SimpleNamespace(tokens=[65, 66, 67], stats=stats))
    assert card.note == "3 tokens in 2 target calls; 1 of 2 drafted tokens kept"
    assert card.text == [Piece("A", "accepted"), Piece("B", "corrected"), Piece("C", "plain")]


def evaluation(model, exit_, folder, *words) -> list:  # noqa: ANN001
    return ["--model_path", model, "--checkpoint", exit_, "--quality_datasets", "arithmetic", "--quality_max_batches", 1, "--quality_batch_size", 2, "--max_length", 64,
            "--spec_num_prompts", 2, "--spec_prompt_length", 8, "--spec_max_new_tokens", 8, "--num_threads", 1, "--out_dir", folder, *words]


@pytest.mark.parametrize("method", ["auto", "dynamic_tree"])
def test_evaluate_shows_texts(tiny_target_path, exit_path, tmp_path, monkeypatch, capsys, method):  # noqa: F811
    words = evaluation(tiny_target_path, exit_path, tmp_path / "out", "--show", 2, "--method", method, "--fit_prompts", 2)
    assert run_main(evaluate, words, monkeypatch) == 0
    page = (tmp_path / "out" / "texts.html").read_text()
    assert page.count('class="card"') == 2 and "title=" in page and "\x1b[" not in capsys.readouterr().out  # no terminal, no colours
    plain = evaluation(tiny_target_path, exit_path, tmp_path / "plain", "--method", method, "--fit_prompts", 2)
    assert run_main(evaluate, plain, monkeypatch) == 0
    shown, hidden = (json.loads((tmp_path / name / "metrics.json").read_text())["settings_hash"] for name in ("out", "plain"))
    assert shown == hidden and not (tmp_path / "plain" / "texts.html").exists()


@pytest.mark.parametrize(("words", "message"), [(["--show", 3], "--show 3: must lie between 0 and --spec_num_prompts 2"), (["--show", 1, "--potential"], "decodes nothing")])
def test_show_names_mistakes(tiny_target_path, exit_path, tmp_path, monkeypatch, capsys, words, message):  # noqa: F811
    assert run_main(evaluate, evaluation(tiny_target_path, exit_path, tmp_path / "out", *words), monkeypatch) == 2
    check_one_line(capsys, message)
