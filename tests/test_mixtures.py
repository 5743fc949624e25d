"""Several data sets in one stream, batches shared by several processes, and batches made ahead: all resume exactly."""

from __future__ import annotations

import gc
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from running.command_line import UserError

import datasets
import pytest
import torch

from data import registry
from data.registry import DATASETS, check_mixture, fingerprint, open_mixture
from data.row_files import ExampleStream, MixedStream
from data_utils import BUCKET_BATCHES, EncodeOptions, PaddedBatches, Prefetched, held_out_by_source
from test_data_utils import equal, question_stream, text_stream


def hub_stream(count: int = 9) -> ExampleStream:
    """A stream of unknown length, with an unusable row."""
    rows = [{"text": "It rained. " * (1 + i % 3) + str(i)} for i in range(count)] + [{"text": ""}]
    return ExampleStream(DATASETS["fineweb"], datasets.Dataset.from_list(rows).to_iterable_dataset(), seed=0)


def mixed_stream(weights: tuple[float, ...] = (3, 1, 2), seed: int = 5) -> MixedStream:
    return MixedStream([text_stream(), question_stream(), hub_stream()], weights, seed)


STREAMS: dict[str, Callable[[], ExampleStream | MixedStream]] = {"plain": text_stream, "mixed": mixed_stream}


@pytest.fixture
def options(tokenizer) -> EncodeOptions:
    return EncodeOptions(tokenizer, max_length=24, batch_size=2)


# ---- mixtures ----

def test_each_source_goes_through_its_own_epochs_in_its_own_order():
    drawn = list(islice(mixed_stream(), 300))
    for source, make in enumerate((text_stream, question_stream, hub_stream)):
        found = [example for example in drawn if example["source"] == source]
        assert found == [{**example, "source": source} for example in islice(make(), len(found))] and len(found) > 30


def test_choice_depends_on_seed_and_number_alone():
    first, other_seed, same_shares = mixed_stream(), mixed_stream(seed=6), mixed_stream(weights=(6, 2, 4))
    choices = [first.source_of(n) for n in range(4000)]
    assert [example["source"] for example in islice(mixed_stream(), 200)] == choices[:200]
    assert choices != [other_seed.source_of(n) for n in range(4000)]
    assert choices == [same_shares.source_of(n) for n in range(4000)]
    counts = Counter(choices)
    for source, share in enumerate((3 / 6, 1 / 6, 2 / 6)):  # a fixed seed: no luck is involved
        assert abs(counts[source] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize("before", [0, 1, 5, 23, 60])
def test_mixed_stream_resumes_exactly_from_a_position_that_json_and_torch_keep(before, tmp_path):
    whole = list(islice(mixed_stream(), before + 40))
    first, second, third = mixed_stream(), mixed_stream(), mixed_stream()
    list(islice(iter(first), before))
    torch.save(first.position, tmp_path / "state.pt")
    second.position = json.loads(json.dumps(first.position))
    third.position = torch.load(tmp_path / "state.pt", weights_only=True)
    assert second.position == third.position == first.position and first.position["row"] == before
    assert list(islice(iter(second), 40)) == list(islice(iter(third), 40)) == whole[before:]


def test_skipped_rows_are_counted_by_source_and_epochs_are_told_by_name(capsys):
    stream = mixed_stream()
    list(islice(iter(stream), 100))
    assert stream.dataset.name == "slim_pj+gsm8k+fineweb" and stream.dataset.shares == (3 / 6, 1 / 6, 2 / 6)
    assert stream.skipped == {"of fineweb without text": stream.streams[2].skipped["without text"]} and stream.streams[2].skipped
    told = capsys.readouterr().err.splitlines()
    assert "fineweb: epoch 1 ends after 10 rows; the data begin anew" in told
    assert len(told) == sum(source.position["epoch"] for source in stream.streams)


def test_source_with_nothing_to_learn_is_named_though_the_others_are_fine(tokenizer):
    long = ExampleStream(DATASETS["gsm8k"], [{"question": "Why? " * 50, "answer": "So."}], seed=0)
    stream = MixedStream([text_stream(), long], [1, 1], seed=0)
    batches = PaddedBatches(stream, EncodeOptions(tokenizer, "assistant", max_length=16))
    with pytest.raises(UserError, match="2000 examples of gsm8k in a row have nothing to learn"):
        list(islice(batches, 5000))
    assert long.skipped == {"with nothing to learn in the first tokens": 2000} and not stream.streams[0].skipped


@pytest.fixture
def open_any(monkeypatch) -> list[str]:
    """Lets every data set hold its own name; the names that were opened."""
    opened = []

    def open_rows(dataset, split, path):
        opened.append(dataset.name)
        return [{"text": dataset.name}] * 3

    monkeypatch.setattr(registry, "open_rows", open_rows)
    return opened


@pytest.mark.parametrize(("names", "weights", "path", "message"), [
    (["pydoc", "c4"], [1.0], None, "--mix has 1 weights for 2 data sets; give one for each: --mix 1 1"),
    (["pydoc"], [1.0, 2.0], None, "--mix has 2 weights for 1 data sets; give one for each: --mix 1"),
    (["pydoc", "c4"], [1.0, 0.0], None, "--mix 1 0: must be positive numbers; leave out"),
    (["pydoc", "c4"], [-0.5, 1.0], None, "--mix -0.5 1: must be positive"),
    (["pydoc", "c4"], [math.nan, 1.0], None, "--mix nan 1: must be positive"),
    (["pydoc", "c4"], [math.inf, 1.0], None, "--mix inf 1: must be positive"),
    (["pydoc", "c4", "pydoc"], [1.0, 1.0, 1.0], None, "--dataset names pydoc twice; name it once"),
    (["oasst", "oasst1"], None, None, "--dataset names oasst twice"),
    (["pydoc", "c4"], None, "rows.jsonl", "--dataset_path rows.jsonl: holds the files of one data set, --dataset names 2"),
    (["pydoc", "c5"], None, None, "unknown data set 'c5': choose one of"),
])
def test_mixtures_that_cannot_be_are_one_line(names, weights, path, message, open_any):
    for refuse in (lambda: open_mixture(names, weights, "train", path), lambda: check_mixture(names, weights, path)):
        with pytest.raises(UserError) as error:
            refuse()
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not open_any


def test_one_name_is_a_plain_stream_and_several_are_mixed(open_any, tmp_path):
    for weights in (None, [], [0.3]):
        plain = open_mixture(["slim_pj"], weights, "train", str(tmp_path), seed=3)
        assert isinstance(plain, ExampleStream) and plain.seed == 3
    equal_parts, weighted = open_mixture(["slim_pj", "c4"], None, "train"), open_mixture(["slim_pj", "c4"], [1, 3], "train", seed=3)
    assert equal_parts.dataset.shares == (0.5, 0.5) and weighted.dataset.shares == (0.25, 0.75)
    assert weighted.seed == 3 and all(source.seed == 3 for source in weighted.streams)
    assert {(example["source"], example["text"]) for example in islice(weighted, 30)} == {(0, "slim_pj"), (1, "c4")}
    assert fingerprint(weighted) == {"dataset": "slim_pj+c4", "shares": [0.25, 0.75], "sources": [fingerprint(source) for source in weighted.streams]}


def test_held_out_batches_of_each_source(options):
    streams = [text_stream(count=30), question_stream()]
    held_out = held_out_by_source(streams, options, limit=4)
    assert {name: len(batches) for name, batches in held_out.items()} == {"slim_pj": 4, "gsm8k": 4}  # 7 questions
    assert all(batch["source"].shape == (len(batch["input_ids"]),) for batches in held_out.values() for batch in batches)


# ---- batches of a mixture, and of one data set, for one process and for several ----

def test_batches_say_which_source_each_row_is_of(options):
    by_text = {tuple(options.encode(example).input_ids): source for source, make in enumerate((text_stream, question_stream, hub_stream))
               for example in make().rest_of_epoch()}
    found = set()
    for batch in islice(PaddedBatches(mixed_stream(), options), 40):
        assert batch["source"].shape == (2,) and batch["source"].dtype == torch.int64
        for ids, mask, source in zip(batch["input_ids"], batch["attention_mask"], batch["source"].tolist(), strict=True):
            assert by_text[tuple(ids[mask.bool()].tolist())] == source
            found.add(source)
    assert found == {0, 1, 2}


@pytest.mark.parametrize("make_stream", STREAMS.values(), ids=STREAMS)
def test_batches_resume_exactly_at_any_position(make_stream, options, tmp_path):
    whole = list(islice(PaddedBatches(make_stream(), options), 42))
    batches = PaddedBatches(make_stream(), options)
    iterator, states = iter(batches), [json.dumps(batches.state_dict())]
    for _ in range(36):
        next(iterator)
        states.append(json.dumps(batches.state_dict()))
    for done in (0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 36):  # a bucket has 16
        resumed = PaddedBatches(make_stream(), options)
        resumed.load_state_dict(json.loads(states[done]))
        assert equal(list(islice(resumed, 5)), whole[done : done + 5])
        torch.save(json.loads(states[done]), tmp_path / "state.pt")
        assert torch.load(tmp_path / "state.pt", weights_only=True) == json.loads(states[done])


def test_resumed_run_does_not_tell_again_of_an_epoch_whose_bucket_it_reads_again(options, capsys):
    batches = PaddedBatches(text_stream(), options)  # 11 examples, 32 in a bucket
    iterator = iter(batches)
    list(islice(iterator, 3))
    assert len(capsys.readouterr().err.splitlines()) == 2
    resumed = PaddedBatches(text_stream(), options)
    resumed.load_state_dict(batches.state_dict())
    iterator = iter(resumed)
    list(islice(iterator, BUCKET_BATCHES - 3))
    assert not capsys.readouterr().err
    next(iterator)
    assert capsys.readouterr().err.splitlines() == [f"slim_pj: epoch {epoch} ends after 11 rows; the data begin anew" for epoch in (3, 4, 5)]


def rows_of(batch: dict) -> list[tuple]:
    """Each row of a batch without its padding: tokens, loss mask and source."""
    return [(ids[mask.bool()].tolist(), learned[mask.bool()].tolist(), int(source)) for ids, mask, learned, source
            in zip(batch["input_ids"], batch["attention_mask"], batch["loss_mask"], batch["source"], strict=True)]


@pytest.mark.parametrize("loss_on", ["all", "assistant"])
@pytest.mark.parametrize("make_stream", STREAMS.values(), ids=STREAMS)
def test_several_processes_see_together_what_one_sees(make_stream, loss_on, tokenizer, capsys):
    world, size, count = 3, 2, 40
    one = islice(PaddedBatches(make_stream(), EncodeOptions(tokenizer, loss_on, 24, world * size)), count)
    whole = [(rows_of(batch), batch["global_tokens"]) for batch in one]
    told = capsys.readouterr().err
    options = EncodeOptions(tokenizer, loss_on, 24, size)
    ranks = [PaddedBatches(make_stream(), options, (rank, world)) for rank in range(world)]
    parts = list(zip(*(islice(batches, count) for batches in ranks), strict=True))
    assert capsys.readouterr().err == told != ""  # one process speaks for all
    assert [sum(map(rows_of, part), []) for part in parts] == [rows for rows, _ in whole]
    for part, (_, tokens) in zip(parts, whole, strict=True):
        assert all(type(batch["global_tokens"]) is int and batch["global_tokens"] == tokens for batch in part)
        assert tokens == sum(int(batch["loss_mask"][:, 1:].sum()) for batch in part)
        assert all(len(batch["input_ids"]) == size for batch in part)
    assert ranks[0].state_dict() == ranks[1].state_dict() == ranks[2].state_dict()


def test_process_resumes_exactly_in_the_middle_of_a_bucket(options):
    whole = list(islice(PaddedBatches(mixed_stream(), options, (1, 2)), 30))
    batches = PaddedBatches(mixed_stream(), options, (1, 2))
    list(islice(iter(batches), 21))
    resumed = PaddedBatches(mixed_stream(), options, (1, 2))
    resumed.load_state_dict(batches.state_dict())
    assert equal(list(islice(resumed, 9)), whole[21:])


# ---- batches made ahead ----

class Numbers:
    """Batches 0, 1, 2, ... as one-element tensors, up to `end`; there it raises `error` or stops."""

    def __init__(self, end: int = 10**9, error: BaseException | None = None) -> None:
        self.next, self.end, self.error = 0, end, error
        self.made = threading.Semaphore(0)  # one permit for each batch that was made

    def __iter__(self) -> Iterator[dict]:
        while self.next < self.end:
            self.next += 1
            self.made.release()
            yield {"number": torch.tensor([self.next - 1]), "global_tokens": self.next}
        if self.error is not None:
            raise self.error

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.next = state["next"]


def wait_until_made(source: Numbers, count: int) -> None:
    for _ in range(count):
        assert source.made.acquire(timeout=60)


@pytest.mark.parametrize("make_stream", STREAMS.values(), ids=STREAMS)
def test_prefetched_batches_are_the_same_and_resume_exactly_though_the_thread_is_ahead(make_stream, options):
    whole = list(islice(PaddedBatches(make_stream(), options), 30))
    batches = Prefetched(PaddedBatches(make_stream(), options))
    iterator, states = iter(batches), [batches.state_dict()]
    for expected in whole[:20]:
        assert equal([next(iterator)], [expected])
        states.append(batches.state_dict())
    batches.close()
    assert batches.state_dict() == states[-1]
    for done in (0, 1, 7, 15, 16, 17, 20):
        resumed = Prefetched(PaddedBatches(make_stream(), options))
        resumed.load_state_dict(states[done])
        assert resumed.state_dict() == states[done]
        assert equal(list(islice(resumed, 5)), whole[done : done + 5])
        resumed.close()


def test_thread_is_ahead_by_depth_and_no_more_and_the_state_is_the_consumers():
    source = Numbers()
    batches = Prefetched(source, depth=3)
    assert batches.state_dict() == {"next": 0} and source.next == 0  # nothing is made before the first is wanted
    iterator = iter(batches)
    for taken in range(1, 6):
        assert next(iterator) == {"number": torch.tensor([taken - 1]), "global_tokens": taken}
        assert batches.state_dict() == {"next": taken}
    wait_until_made(source, 5 + 3)
    assert not source.made.acquire(timeout=0.2) and source.next == 8
    assert batches.state_dict() == {"next": 5}
    batches.close()


@pytest.mark.parametrize("error", [UserError("no usable example"), ValueError("broken"), KeyboardInterrupt()])
def test_error_comes_after_the_batches_that_were_made_before_it(error):
    batches = Prefetched(Numbers(end=4, error=error), depth=3)
    found = []
    with pytest.raises(type(error)) as raised:
        for batch in batches:
            found.append(int(batch["number"]))
    assert raised.value is error and found == [0, 1, 2, 3] and batches.state_dict() == {"next": 4}
    batches.close()


def test_source_that_ends_ends_the_iteration():
    assert [int(batch["number"]) for batch in Prefetched(Numbers(end=5), depth=2)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_close_ends_the_thread_and_the_iteration(taken):
    source = Numbers()
    batches = Prefetched(source, depth=2)
    iterator = iter(batches)
    for _ in range(taken):
        next(iterator)
    batches.close()
    batches.close()
    assert batches._thread is None if taken == 0 else not batches._thread.is_alive()
    made = source.next
    assert taken == 0 or list(iterator) == []
    assert source.next == made and batches.state_dict() == {"next": taken}


def test_thread_ends_with_the_object_that_nobody_holds():
    batches = Prefetched(Numbers(), depth=2)
    next(iter(batches))
    thread = batches._thread
    assert thread.daemon and thread.is_alive()
    del batches
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_batches_are_iterated_once_and_loaded_before():
    batches = Prefetched(Numbers())
    next(iter(batches))
    with pytest.raises(RuntimeError, match="make another Prefetched"):
        next(iter(batches))
    with pytest.raises(RuntimeError, match="before the first one"):
        batches.load_state_dict({"next": 0})
    batches.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_are_pinned(options):
    batches = Prefetched(PaddedBatches(text_stream(), options))
    batch = next(iter(batches))
    assert all(value.is_pinned() for name, value in batch.items() if name != "global_tokens") and type(batch["global_tokens"]) is int
    batches.close()
