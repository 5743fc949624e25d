"""The teacher's states on disk: the same gradients from fewer blocks, whatever was killed, and for one target only."""

from __future__ import annotations

from pathlib import Path

from running.command_line import UserError

import pytest
import torch

from toy_models import some_batch, tiny_llama
from training.losses import LOSS_TYPES
from training.teacher_cache import TeacherCache, text_keys
from truncated_llama import Exit, ExitKind
from tuned_llama import Objective, TunedLlama


@pytest.fixture(scope="module")
def model():
    return tiny_llama().float()


def cache_in(folder: Path, target_hash: str = "a", dtype: torch.dtype = torch.float32, width: int = 32) -> TeacherCache:
    return TeacherCache(str(folder), target_hash, width, dtype)


def find(cache: TeacherCache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    return cache.find(text_keys(ids, mask), ids.shape[1])


def keep(cache: TeacherCache, ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor) -> None:
    cache.keep(text_keys(ids, mask), states, mask)


def learned(model, cache: TeacherCache | None, batch: dict, layers: tuple[int, ...] = (0, 1)) -> tuple[list[torch.Tensor], int]:
    """The gradients of exits at `layers`, and how many blocks of the target ran."""
    exits = [Exit(model, layer, ExitKind.parse("head+last_block").form) for layer in layers]
    for exit_ in exits:
        for parameter in exit_.own_parameters().values():
            parameter.requires_grad_(True)
    runs: list[int] = []
    hooks = [block.register_forward_hook(lambda *_: runs.append(1)) for block in model.model.layers]
    TunedLlama(model, exits, cache=cache).learn(batch, [Objective(LOSS_TYPES[0])] * len(exits), 0.1)
    for hook in hooks:
        hook.remove()
    return [parameter.grad for exit_ in exits for parameter in exit_.own_parameters().values()], len(runs)


def test_texts_seen_before_need_only_the_exits_blocks(model, tmp_path):
    """The same gradients to the last bit; in another process's cache as well; a batch with one new text is computed whole."""
    batch, depth = some_batch(), model.config.num_hidden_layers
    plain, whole = learned(model, None, batch)
    first, runs = learned(model, cache := cache_in(tmp_path), batch)
    again, fewer = learned(model, cache, batch)
    elsewhere, there = learned(model, cache_in(tmp_path), batch)
    assert (whole, runs, fewer, there) == (depth, depth, 1, 1)  # an exit with its own block 1 reads what block 0 makes
    for others in (first, again, elsewhere):
        assert all(map(torch.equal, plain, others))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 0] += 1
    wanted, _ = learned(model, None, changed)
    found, runs = learned(model, cache, changed)
    assert runs == depth and all(map(torch.equal, wanted, found))


def test_a_text_is_found_in_a_batch_of_another_width(tmp_path):
    cache = cache_in(tmp_path, width=4, dtype=torch.bfloat16)
    ids, states = torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0]]), torch.randn(2, 4, 4).bfloat16()
    keep(cache, ids, (ids > 0).long(), states)
    longer = torch.tensor([[5, 6, 0, 0, 0, 0]])
    found = find(cache, longer, (longer > 0).long())
    assert torch.equal(found[0, :2], states[1, :2]) and not found[0, 2:].any()
    assert find(cache, longer, torch.tensor([[1, 1, 1, 0, 0, 0]])) is None  # three tokens, the last of id 0


@pytest.mark.parametrize("place", [0, 20, 39])
def test_texts_that_differ_in_one_token_are_two(place):
    """Wherever it stands: chats of one system prompt begin alike."""
    ids = torch.arange(40).repeat(2, 1)
    ids[1, place] = 63
    first, second = text_keys(ids, torch.ones_like(ids))
    assert first != second and text_keys(ids[:1, :39], torch.ones(1, 39)) != [first]


def test_what_a_killed_process_left_torn_is_computed_again(tmp_path):
    """An entry without its rows, and half an entry."""
    ids, states = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.randn(2, 3, 4)
    mask = torch.ones_like(ids)
    for name, cut in (("0.states", -5), ("0.index", -7)):
        folder = tmp_path / name
        killed = cache_in(folder, width=4)
        keep(killed, ids, mask, states)
        del killed
        path = folder / name
        path.write_bytes(path.read_bytes()[:cut])
        cache = cache_in(folder, width=4)
        assert torch.equal(find(cache, ids[:1], mask[:1]), states[:1]) and find(cache, ids, mask) is None
        other, more = torch.tensor([[7, 8, 9]]), torch.randn(1, 3, 4)
        keep(cache, other, mask[:1], more)
        del cache
        last = cache_in(folder, width=4)
        assert {path.name for path in folder.glob("*.states")} == {"0.states"}
        assert torch.equal(find(last, other, mask[:1]), more) and find(last, ids[1:], mask[1:]) is None  # not what was written in its place
        keep(last, ids, mask, states)
        assert torch.equal(find(last, ids, mask), states)


def test_processes_at_the_same_time_write_files_of_their_own(tmp_path):
    first, second = cache_in(tmp_path, width=4), cache_in(tmp_path, width=4)
    ids, states = torch.tensor([[1, 2], [3, 4]]), torch.randn(2, 2, 4)
    mask = torch.ones_like(ids)
    keep(first, ids[:1], mask[:1], states[:1])
    keep(second, ids[1:], mask[1:], states[1:])
    assert {path.name for path in tmp_path.glob("*.states")} == {"0.states", "1.states"}
    assert torch.equal(find(cache_in(tmp_path, width=4), ids, mask), states)


def test_states_of_another_target_are_refused(tmp_path):
    cache_in(tmp_path / "used")
    with pytest.raises(UserError, match="another target or dtype"):
        cache_in(tmp_path / "used", target_hash="b")
    with pytest.raises(UserError, match="another target or dtype"):
        cache_in(tmp_path / "used", dtype=torch.bfloat16)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    with pytest.raises(UserError, match="holds other files"):
        cache_in(tmp_path / "thesis")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    cache = cache_in(tmp_path, width=4)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.teacher_cache._write", full)
    ids = torch.tensor([[1, 2]])
    with pytest.raises(UserError, match="No space left on device"):
        keep(cache, ids, torch.ones_like(ids), torch.randn(1, 2, 4))
