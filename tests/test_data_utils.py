"""From examples to tokens: masks, the fixed date, batches and their exact resuming."""

from __future__ import annotations

import copy
import re
from itertools import islice

from running.command_line import UserError

import pytest
import torch

from data.registry import DATASETS
from data.row_files import ExampleStream, SkipRow, one_turn
from data_utils import DATE_STRING, EncodeOptions, PackedBatches, PaddedBatches, collate, encode_example, encode_prompt, held_out_batches, render_chat

CHAT = {"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does the function do?"}, {"role": "assistant", "content": "It adds two numbers."},
    {"role": "user", "content": "Ada has 12 apples?"}, {"role": "assistant", "content": "Yes: \u00e4pples \U0001f34e."},
]}
LLAMA_LIKE_TEMPLATE = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|system|>Today Date: {{ date_string }}<|end|>"
    "{% for message in messages %}<|{{ message['role'] }}|>\n\n{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
REWRITING_TEMPLATE = "{{ bos_token }}{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def text_stream(count: int = 11, seed: int = 0, name: str = "slim_pj") -> ExampleStream:
    rows = [{"text": "The quick brown fox jumps. " * (1 + i * 7 % 5) + str(i)} for i in range(count)]
    return ExampleStream(DATASETS[name], rows, seed)


def question_stream(count: int = 7) -> ExampleStream:
    return ExampleStream(DATASETS["gsm8k"], [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(count)], seed=1)


NO_SYSTEM_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BROKEN_TEMPLATES = {"{% for message in messages %}": "Unexpected end of template", "{{ today_as_text() }}": "'today_as_text' is undefined",
                    "{{ messages[0]['content'] + 1 }}": "can only concatenate str", "{{ messages[0]['content'] | shout }}": "No filter named 'shout'"}


# ---- chat and masks ----

@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_chats_that_the_template_refuses_are_rows_to_skip(tokenizer, loss_on):
    tokenizer = with_template(tokenizer, NO_SYSTEM_TEMPLATE)
    for encode in (encode_prompt, lambda tokenizer, example: encode_example(tokenizer, example, loss_on)):
        with pytest.raises(SkipRow, match=r"^whose chat the template refuses \(System role not supported\)$"):
            encode(tokenizer, CHAT)
        assert encode(tokenizer, {"messages": CHAT["messages"][1:]})


@pytest.mark.parametrize(("template", "reason"), BROKEN_TEMPLATES.items())
def test_a_template_that_fails_on_any_chat_is_one_line(tokenizer, template, reason):
    tokenizer = with_template(tokenizer, template)
    for encode in (encode_prompt, encode_example):
        with pytest.raises(UserError, match=rf"^the chat template of .* is broken \({re.escape(reason)}.*\); mend it, or use another model$"):
            encode(tokenizer, CHAT)


def test_refused_chats_are_counted_where_batches_are_made(tokenizer):
    rows = [{"messages": CHAT["messages"][i % 2 :]} for i in range(6)]
    options = EncodeOptions(with_template(tokenizer, NO_SYSTEM_TEMPLATE), batch_size=1)
    held_out, endless = (ExampleStream(DATASETS["ultrachat"], rows, 0, shuffle=False) for _ in range(2))
    assert len(held_out_batches(held_out, options, 10)) == 3
    assert next(iter(PaddedBatches(endless, options)))["input_ids"].shape[0] == 1
    for stream in (held_out, endless):
        assert stream.skipped.keys() == {"whose chat the template refuses (System role not supported)"}


def test_all_but_the_first_token_are_learned(tokenizer):
    for example in (CHAT, {"text": "The quick brown fox."}):
        encoded = encode_example(tokenizer, example)
        assert encoded.loss_mask == [False, *[True] * (len(encoded.input_ids) - 1)]
        assert encoded.input_ids.count(tokenizer.bos_token_id) == 1 and encoded.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", [None, LLAMA_LIKE_TEMPLATE])
def test_exactly_the_answers_and_their_ends_are_learned(tokenizer, template):
    tokenizer = with_template(tokenizer, template or tokenizer.chat_template)
    encoded = encode_example(tokenizer, CHAT, loss_on="assistant")
    assert tokenizer.decode(encoded.input_ids) == render_chat(tokenizer, CHAT["messages"])
    learned = [token for token, is_learned in zip(encoded.input_ids, encoded.loss_mask, strict=True) if is_learned]
    answers = [message["content"] for message in CHAT["messages"] if message["role"] == "assistant"]
    assert tokenizer.decode(learned) == "".join(f"{answer}<|end|>" for answer in answers)
    assert encoded.loss_mask[0] is False


def test_example_may_ask_for_loss_on_its_answer(tokenizer):
    example = {**one_turn("Ada?", "Yes."), "loss_on": "assistant"}
    assert encode_example(tokenizer, example, loss_on="all") == encode_example(tokenizer, one_turn("Ada?", "Yes."), loss_on="assistant")


def test_prompt_is_what_precedes_the_last_answer(tokenizer):
    prompt, whole = encode_prompt(tokenizer, CHAT), encode_example(tokenizer, CHAT, loss_on="assistant")
    assert whole.input_ids[: len(prompt)] == prompt
    assert all(whole.loss_mask[len(prompt) :]) and not whole.loss_mask[len(prompt) - 1]
    question = {"messages": CHAT["messages"][:2]}
    assert tokenizer.decode(encode_prompt(tokenizer, question)).endswith("do?<|end|><|assistant|>")


def test_date_is_fixed(tokenizer):
    rendered = render_chat(with_template(tokenizer, LLAMA_LIKE_TEMPLATE), CHAT["messages"])
    assert f"Today Date: {DATE_STRING}<|end|>" in rendered


def test_template_that_rewrites_earlier_turns_is_refused_for_masks_only(tokenizer):
    tokenizer = with_template(tokenizer, REWRITING_TEMPLATE)
    assert encode_example(tokenizer, CHAT).input_ids
    with pytest.raises(UserError, match="--loss_on all"):
        encode_example(tokenizer, CHAT, loss_on="assistant")


def test_tokenizer_without_template_is_refused(tokenizer):
    with pytest.raises(UserError, match="has no chat template"):
        encode_example(with_template(tokenizer, None), CHAT)


def test_collate_pads_on_the_right(tokenizer):
    encoded = [encode_example(tokenizer, {"text": text}) for text in ("The fox.", "The quick brown fox jumps.")]
    batch = collate(encoded)
    lengths = [len(example.input_ids) for example in encoded]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"][0, : lengths[0]].tolist() == encoded[0].input_ids
    assert (batch["input_ids"][0, lengths[0] :] == 0).all() and not batch["loss_mask"][0, lengths[0] :].any()


# ---- batches ----

def equal(left: list[dict], right: list[dict]) -> bool:
    def same(a: object, b: object) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return all(a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True))


@pytest.fixture(params=["padded", "packed", "packed_two"])
def make_batches(request, tokenizer):
    options = EncodeOptions(tokenizer, max_length=24, batch_size=2)
    makers = {
        "padded": lambda: PaddedBatches(text_stream(), options),
        "packed": lambda: PackedBatches([text_stream()], options),
        "packed_two": lambda: PackedBatches([text_stream(), question_stream()], options),
    }
    return makers[request.param]


def test_batches_resume_exactly_at_any_position(make_batches):
    whole = list(islice(make_batches(), 42))
    batches = make_batches()
    iterator, states = iter(batches), [batches.state_dict()]
    for _ in range(36):
        next(iterator)
        states.append(batches.state_dict())
    for done in (0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 36):
        resumed = make_batches()
        resumed.load_state_dict(states[done])
        assert resumed.state_dict() == states[done]  # saving again before the next batch loses nothing
        assert equal(list(islice(resumed, 5)), whole[done : done + 5])


def test_padded_batches_hold_every_example_once_per_epoch(tokenizer):
    options = EncodeOptions(tokenizer, max_length=64, batch_size=4)
    stream = text_stream(count=64)
    batches = list(islice(PaddedBatches(stream, options), 16))
    rows = [tuple(ids[mask.bool()].tolist()) for batch in batches for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    expected = {tuple(options.encode({"text": row["text"]}).input_ids) for row in stream.rows}
    assert len(rows) == 64 and set(rows) == expected
    assert stream.position == {"epoch": 0, "row": 64}
    assert all(batch["source"].tolist() == [0] * 4 for batch in batches)
    assert all(batch["global_tokens"] == int(batch["loss_mask"][:, 1:].sum()) for batch in batches)


def test_buckets_are_cut_into_batches_in_orders_of_their_own(tokenizer):
    """Else every bucket would begin with batches of one length: with the shortest, say."""
    rows = [{"text": "fox " * (1 + i)} for i in range(48)]
    batches = PaddedBatches(ExampleStream(DATASETS["slim_pj"], rows, 0), EncodeOptions(tokenizer, batch_size=1))
    widths = [batch["input_ids"].shape[1] for batch in islice(batches, 48)]
    orders = {tuple(sorted(bucket).index(width) for width in bucket) for bucket in (widths[:16], widths[16:32], widths[32:])}
    assert len(orders) == 3 and tuple(range(16)) not in orders


def test_examples_with_nothing_to_learn_are_counted_and_end_in_an_error(tokenizer):
    stream = ExampleStream(DATASETS["gsm8k"], [{"question": "Why? " * 50, "answer": "So."}], seed=0)
    with pytest.raises(UserError, match="have nothing to learn; raise --max_length"):
        next(iter(PaddedBatches(stream, EncodeOptions(tokenizer, "assistant", max_length=16))))
    assert stream.skipped["with nothing to learn in the first tokens"] == 2_000


def test_packed_rows_are_full_and_epochs_end_together(tokenizer):
    long, short = text_stream(count=40), question_stream(count=10)
    batches = PackedBatches([long, short], EncodeOptions(tokenizer, max_length=32, batch_size=2))
    tokens = []
    for batch in islice(batches, 60):
        assert batch["input_ids"].shape == (2, 32)
        tokens += batch["input_ids"].flatten().tolist()
        progress = [stream.position["epoch"] + stream.position["row"] / stream.num_rows for stream in (long, short)]
        assert abs(progress[0] - progress[1]) <= 1 / 10 + 1e-9
    finished = sum(stream.position["epoch"] * stream.num_rows + stream.position["row"] for stream in (long, short))
    assert tokens.count(tokenizer.eos_token_id) in (finished - 1, finished)  # the last one may still be in the buffer


def test_packed_batches_refuse_empty_data_and_a_mix_with_a_hub_stream(tokenizer):
    options = EncodeOptions(tokenizer, max_length=8, batch_size=1)
    with pytest.raises(UserError, match="no usable example"):
        next(iter(PackedBatches([text_stream(count=0)], options)))
    endless = ExampleStream(DATASETS["fineweb"], iter([]), seed=0)
    with pytest.raises(UserError, match="fineweb.*give it alone"):
        PackedBatches([text_stream(), endless], options)
