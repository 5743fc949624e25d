"""LLaVAs: text behind images is transformers' own, its law is the target's for every draft, and what an image shows changes what is written."""

from __future__ import annotations

import time

import pytest
import torch

from decoding.sampling import SamplingPolicy, policy_probs
from engine import static_llama, views
from engine.programs import Programs
from engine.static_llama import Span, StaticLlama
from engine.views import ImagePrompt, Shifted, View, forced_logits, view_of
from models import llava_target
from speculative import DecodeOptions, generate, generate_batch
from test_planted_tree_bugs import plant
from test_self_speculation import after_every_round
from test_tree_engine import as_on_device
from toy_llava import DRAFTS, PAD, PLACEHOLDER, ROWS, WRITTEN, Seer, asked, images, some_words, tiny_llava
from toy_models import COUPLED_TREES, TREES, chi_square_p, near, same_layers, tiny_llama

GREEDY, NUCLEUS, SAMPLED = SamplingPolicy(0.0), SamplingPolicy(0.7, top_p=0.95), SamplingPolicy(1.0)
NEVER = list(range(WRITTEN, ROWS))


@pytest.fixture(scope="module")
def seer() -> Seer:
    return Seer(tiny_llava())


def options_for(draft: torch.nn.Module, **options: object) -> dict:
    """A chain's method, where no other is named: an exit shares the target's blocks."""
    exit_ = hasattr(draft, "exit") and options.get("engine") != "transformers"
    return {"method": "self_speculative" if exit_ else "speculative", "max_new_tokens": 24, "seed": 3, **options}


@torch.inference_mode()
def transformers_text(seer: Seer, words: list[list[int]], pixels: torch.Tensor, count: int = 24) -> list[int]:
    """What LlavaForConditionalGeneration writes greedily, the tokens left out that must not be written."""
    ids = torch.tensor([seer.view(words, pixels).ids])
    out = seer.llava.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **({"pixel_values": pixels} if len(pixels) else {}), do_sample=False, max_new_tokens=count,
        suppress_tokens=NEVER, eos_token_id=None)
    return out[0, ids.shape[1] :].tolist()


# ---- equality ----

def check_greedy(seer: Seer, name: str, count: int = 3, **options: object) -> None:
    """Greedy text with the draft `name` is transformers', behind `count` prompts with one, two and no images."""
    draft, other = DRAFTS[name](seer)
    for number in range(count):
        words, pixels = some_words(shown := (1, 2, 0)[number % 3], number), images(shown, number)
        found = generate(seer.text, asked(seer, other, words, pixels), DecodeOptions(**options_for(draft, **options)), draft)
        assert found.tokens == transformers_text(seer, words, pixels), (name, number)
        assert found.stats.prompt_tokens == len(seer.view(words, pixels).ids) and found.stats.target_calls == len(found.stats.rounds)


@pytest.mark.parametrize("engine", ["static", "transformers"])
@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_chains_write_what_transformers_writes(seer, name, engine):
    check_greedy(seer, name, verification="rejection", engine=engine, gamma=3)
    check_greedy(seer, name, count=1, verification="coupled", engine=engine, gamma=3)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_trees_write_what_transformers_writes(seer, name, tree):
    check_greedy(seer, name, **TREES[tree])


def test_trees_through_transformers_forward_pass(seer):
    for name in ("text only", "llava"):
        check_greedy(seer, name, engine="transformers", **TREES["dynamic"])


@pytest.mark.parametrize("method", ["vanilla", "hf_generate"])
def test_without_a_draft(seer, method):
    for number in range(3):
        words, pixels = some_words(1, number), images(1, number)
        found = generate(seer.text, asked(seer, None, words, pixels), DecodeOptions(method=method, max_new_tokens=24))
        assert found.tokens == transformers_text(seer, words, pixels)
        assert found.stats.prompt_tokens == len(seer.view(words, pixels).ids) and found.stats.emitted == 24


def check_coupled(seer: Seer, name: str, policy: SamplingPolicy, count: int = 3, **options: object) -> float:
    """Coupled text is vanilla's, token for token; returns how many tokens a call gave."""
    draft, other = DRAFTS[name](seer)
    calls = emitted = 0
    for number in range(count):
        prompt = asked(seer, other, some_words(1, number), images(1, number))
        settings = options_for(draft, policy=policy, **options)
        plain = {key: value for key, value in settings.items() if key not in ("tree", "gamma", "verification")}
        vanilla = generate(seer.text, prompt, DecodeOptions(**{**plain, "method": "vanilla"}), prompt_id=number)
        found = generate(seer.text, prompt, DecodeOptions(**settings), draft, prompt_id=number)
        assert found.tokens == vanilla.tokens, (name, number)
        assert not set(found.tokens) & set(NEVER)
        calls, emitted = calls + found.stats.target_calls, emitted + found.stats.emitted
    return emitted / calls


@pytest.mark.parametrize("policy", [NUCLEUS, SAMPLED], ids=str)
@pytest.mark.parametrize("name", DRAFTS)
def test_coupled_text_is_vanillas(seer, name, policy):
    check_coupled(seer, name, policy, verification="coupled", gamma=3)
    for tree in COUPLED_TREES.values():
        check_coupled(seer, name, policy, count=1, **tree)


def test_a_draft_that_sees_the_same_is_accepted(seer):
    """The very same LLaVA as its own draft has everything accepted: its own vision, cache and places agree with the target's."""
    twin = Seer(tiny_llava())
    for options in ({"verification": "rejection", "gamma": 4}, {"verification": "coupled", "gamma": 4}):
        prompt = asked(seer, twin, some_words(2), images(2))
        stats = generate(seer.text, prompt, DecodeOptions(**options_for(twin.text, policy=SAMPLED, **options)), twin.text).stats
        assert all(one.accepted == one.proposed for one in stats.rounds)


# ---- the law ----

@torch.inference_mode()
def exact_law(seer: Seer, words: list[list[int]], pixels: torch.Tensor, policy: SamplingPolicy) -> torch.Tensor:
    """The joint law (V, V) of the first two tokens, from LlavaForConditionalGeneration."""
    ids = torch.tensor([[*seer.view(words, pixels).ids, token] for token in range(WRITTEN)])
    logits = seer.llava(input_ids=ids, pixel_values=pixels.repeat(WRITTEN, 1, 1, 1), use_cache=False).logits[:, -2:, :WRITTEN]
    first, second = policy_probs(logits[0, 0], policy), policy_probs(logits[:, 1], policy)
    return first[:, None] * second


def check_law(seer: Seer, name: str, runs: int = 400, **options: object) -> None:
    """The first two tokens have the law that transformers' model gives them."""
    policy = SamplingPolicy(1.0, top_k=4)
    draft, other = DRAFTS[name](seer)
    words, pixels = some_words(1, 4), images(1, 4)
    law, prompt, counts = exact_law(seer, words, pixels, policy), asked(seer, other, words, pixels), torch.zeros(WRITTEN, WRITTEN)
    rows = {model: view.image_embeddings() for model, view in prompt.views.items()}  # looked at once, as all runs look at the same
    prompt = ImagePrompt({model: View(view.ids, view.placeholder, view.encode_images and (lambda seen=rows[model]: seen.values)) for model, view in prompt.views.items()})
    settings = DecodeOptions(**options_for(draft, policy=policy, **{"max_new_tokens": 2, **options}))
    for number in range(runs):
        first, second = generate(seer.text, prompt, settings, draft, prompt_id=number).tokens
        counts[first, second] += 1
    assert not counts[law == 0].any(), "a token of probability 0 was written"
    assert chi_square_p(counts.flatten()[None], runs * law.flatten()[None]) > 1e-4


@pytest.mark.parametrize("name", ["text only", "exit with a block"])
def test_two_tokens_have_the_targets_law(seer, name):
    check_law(seer, name, verification="rejection", gamma=1)


def test_two_tokens_of_trees_have_the_targets_law(seer):
    check_law(seer, "text only", **TREES["static, swor"])
    check_law(seer, "llava", runs=300, **COUPLED_TREES["static"])


def test_the_law_of_another_image_is_found_out(monkeypatch):
    """The check fails where what decodes has the embeddings in another order than transformers."""
    plant(monkeypatch, views.ImageEmbeddings.write_into, "self.values[first:end]", "self.values[first:end].flip(0)")
    fails(check_law, Seer(tiny_llava()), "text only", verification="rejection", gamma=1)


# ---- images matter, and are looked at once ----

def test_pixels_change_what_is_written(seer):
    words = some_words(1)
    texts = [generate(seer.text, asked(seer, None, words, images(1, seed)), DecodeOptions(max_new_tokens=16)).tokens for seed in (0, 1)]
    assert texts[0] != texts[1]


def test_the_order_of_images_matters(seer):
    words, two = [[3], [3], [3]], images(2)
    texts = [generate(seer.text, asked(seer, None, words, pixels), DecodeOptions(max_new_tokens=16)).tokens for pixels in (two, two.flip(0))]
    assert texts[0] != texts[1]


LOOK_S = 0.03
METHODS = [{"gamma": 3}, TREES["dynamic"], TREES["static"], {"method": "vanilla"}, {"method": "hf_generate"}]


@pytest.mark.parametrize("options", METHODS, ids=["chain", "dynamic", "static", "vanilla", "hf"])
@pytest.mark.parametrize("name", DRAFTS)
def test_every_model_looks_once_and_within_the_prefills_time(seer, name, options, monkeypatch):
    looks = []
    exact = llava_target.VisionEncoder.__call__
    draft, other = DRAFTS[name](seer)

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        looks.append(self)
        time.sleep(LOOK_S)
        return exact(self, pixels)

    monkeypatch.setattr(llava_target.VisionEncoder, "__call__", look)
    prompt, settings = asked(seer, other, some_words(1), images(1)), DecodeOptions(**options_for(draft, **{"max_new_tokens": 2, **options}))
    stats = generate(seer.text, prompt, settings, draft).stats
    drafting = options.get("method") not in ("vanilla", "hf_generate")
    assert len(looks) == len(set(looks)) == (2 if drafting and name in ("llava", "other vision") else 1)
    assert stats.seconds["prefill"] >= LOOK_S * len(looks)


def test_an_exit_as_a_model_of_its_own_sees_what_the_target_saw(seer, monkeypatch):
    draft, _ = DRAFTS["exit"](seer)
    looks, exact = [], llava_target.VisionEncoder.__call__
    monkeypatch.setattr(llava_target.VisionEncoder, "__call__", lambda self, pixels: looks.append(self) or exact(self, pixels))
    words, pixels = some_words(1), images(1)
    found = generate(seer.text, asked(seer, None, words, pixels), DecodeOptions(method="speculative", max_new_tokens=24), draft)
    assert len(looks) == 1 and found.tokens == transformers_text(seer, words, pixels)


def test_a_captured_pass_is_not_replayed_with_another_shift(seer, monkeypatch):
    """Programs as on a GPU, which keep what a pass was made with: of two prompts whose drafts are shifted differently each has its own."""
    kept = {}

    def replay(self, key, function, *inputs):
        whole = (key, tuple(tensor.shape for tensor in inputs))
        return kept.setdefault(whole, function)(*inputs)

    as_on_device(monkeypatch)
    monkeypatch.setattr(Programs, "__call__", replay)
    draft, other = DRAFTS["text only"](seer)
    target = Seer(tiny_llava())
    for shown in (1, 2, 1):
        prompt = asked(target, other, some_words(shown), images(shown))
        vanilla = generate(target.text, prompt, DecodeOptions(max_new_tokens=24, policy=NUCLEUS, seed=1)).tokens
        found = generate(target.text, prompt, DecodeOptions(method="speculative", verification="coupled", max_new_tokens=24, policy=NUCLEUS, seed=1), draft)
        assert found.tokens == vanilla
    shifts = {part[-1][1] for key, _ in kept for part in [key] if isinstance(part[-1], tuple)}
    assert shifts == {4, 8}


# ---- caches ----

@pytest.mark.parametrize("options", [{"gamma": 3}, TREES["dynamic"]], ids=["chain", "tree"])
@pytest.mark.parametrize("name", DRAFTS)
def test_caches_equal_a_fresh_prefill_after_every_round(seer, name, options, monkeypatch):
    """Values by block, of the target and of a draft at its own places."""
    draft, other = DRAFTS[name](seer)
    prompt = asked(seer, other, some_words(1), images(1))

    def check(state) -> None:
        held = [(state.target, seer.text)]
        if isinstance(state.draft, (StaticLlama, Shifted)):
            held.append((state.draft, draft))
        for engine, model in held:
            view = view_of(prompt, model)
            text = [*view.ids, *state.committed[0][len(view_of(prompt, seer.text).ids) :]]
            length = engine.starts()[0].item()
            assert length >= len(view.ids) - 1 and length <= len(text) - 1
            fresh = StaticLlama(model, 256)
            fresh.prefill([text[:length]], [view.image_embeddings()])
            assert same_layers(engine.layers(), fresh.layers())

    rounds = after_every_round(monkeypatch, check)
    generate(seer.text, prompt, DecodeOptions(**options_for(draft, policy=NUCLEUS, **options)), draft)
    assert len(rounds) > 3


def test_prefill_in_pieces_that_cut_a_picture(seer, monkeypatch):
    words, pixels = [[1, 2], [5], [7, 8, 9]], images(2)
    wanted = transformers_text(seer, words, pixels)
    monkeypatch.setattr(static_llama, "PREFILL_CHUNK", 3)
    assert generate(seer.text, asked(seer, None, words, pixels), DecodeOptions(max_new_tokens=24)).tokens == wanted


def test_teacher_forced_logits_are_decodings(seer):
    """What trees are fitted to: the logits along a text behind an image."""
    words, pixels = some_words(1), images(1)
    prompt = asked(seer, None, words, pixels)
    text = generate(seer.text, prompt, DecodeOptions(max_new_tokens=12)).tokens
    assert forced_logits(seer.text, prompt, text).argmax(-1).tolist() == text
    exit_, _ = DRAFTS["exit"](seer)
    assert forced_logits(exit_, prompt, text).shape == (12, WRITTEN)


# ---- batches and mistakes ----

def test_texts_of_a_batch_are_those_of_their_own(seer):
    draft, other = DRAFTS["text only"](seer)
    prompts = [asked(seer, other, some_words(1, number), images(1, number)) for number in range(3)]
    options = DecodeOptions(**options_for(draft, verification="coupled", policy=NUCLEUS))
    together = generate_batch(seer.text, prompts, options, draft)
    assert [found.tokens for found in together] == [generate(seer.text, prompt, options, draft, prompt_id=number).tokens for number, prompt in enumerate(prompts)]
    mixed = [prompts[0], asked(seer, other, some_words(2), images(2))]
    with pytest.raises(ValueError, match="4, 8 tokens shorter than the target's: decode them one by one"):
        generate_batch(seer.text, mixed, options, draft)


def test_bad_prompts_name_the_mistake(seer):
    with pytest.raises(ValueError, match="4 placeholders for 8 embeddings"):
        generate(seer.text, ImagePrompt({seer.text: View([1, *[PLACEHOLDER] * 4, 2], PLACEHOLDER, lambda: seer.vision(images(2)))}), DecodeOptions())
    with pytest.raises(ValueError, match="must end in the same text token"):
        ImagePrompt({seer.text: View([1, PLACEHOLDER], PLACEHOLDER)})
    draft, _ = DRAFTS["text only"](seer)
    with pytest.raises(ValueError, match="no view for this LlamaForCausalLM"):
        generate(seer.text, asked(seer, None, some_words(1), images(1)), DecodeOptions(method="speculative"), draft)
    with pytest.raises(ValueError, match="drafts behind text only"):
        twin = Seer(tiny_llava())
        generate(seer.text, asked(seer, twin, some_words(1), images(1)), DecodeOptions(method="hf_assisted", max_new_tokens=4), twin.text)


def test_the_text_model_has_the_llavas_own_tensors_and_no_logits_for_placeholders(seer):
    assert seer.text.lm_head.weight.data_ptr() == seer.llava.lm_head.weight.data_ptr() and seer.text.model is seer.llava.model.language_model
    assert seer.text.config.vocab_size == WRITTEN and PLACEHOLDER not in range(WRITTEN) and PAD not in range(WRITTEN)
    with torch.inference_mode():
        ids = torch.tensor([[1, 2, 3]])
        assert near(seer.text(ids).logits, seer.llava(input_ids=ids).logits[..., :WRITTEN], 1e-12)


# ---- planted bugs: the checks above must fail on each ----

def fails(check, *arguments, **options) -> None:
    with pytest.raises(AssertionError):
        check(*arguments, **options)


def test_a_mask_by_which_images_see_what_follows_is_found(seer, monkeypatch):
    """Rows of a prefill that see each other both ways."""
    exact = static_llama.SpanView.__init__

    def init(self, place: Span, cache) -> None:
        exact(self, place, cache)
        self.causal = False

    monkeypatch.setattr(static_llama.SpanView, "__init__", init)
    fails(check_greedy, Seer(tiny_llava()), "llava", gamma=3)


def test_a_tree_mask_that_hides_the_image_is_found(seer, monkeypatch):
    exact = static_llama.SpanView._mask

    def mask(place: Span, cache) -> torch.Tensor:
        found = exact(place, cache).clone()
        if place.visible is not None:
            found[..., :2] = -torch.inf
        return found

    monkeypatch.setattr(static_llama.SpanView, "_mask", staticmethod(mask))
    fails(check_greedy, Seer(tiny_llava()), "exit", **TREES["dynamic"])


@pytest.mark.parametrize(("function", "right", "wrong"), [
    (views.ImageEmbeddings.write_into, "device=x.device) - start]", "device=x.device) - start - 1]"),
    (views.ImageEmbeddings.write_into, "self.values[first:end]", "self.values[first:end].flip(0)"),
    (llava_target.VisionEncoder.__call__, "config.vision_feature_layer", "-1"),
    (llava_target.VisionEncoder.__call__, "list(found.pooler_output)", "list(found.pooler_output)[::-1]"),
    (llava_target.as_text_model, "parameter.detach()[:vocab_size]", "parameter.detach()[-vocab_size:]"),
], ids=["one place off", "rows in reverse", "another layer", "images in reverse", "the last tokens"])
def test_planted_bugs_of_looking_are_found(monkeypatch, function, right, wrong):
    plant(monkeypatch, function, right, wrong)
    fails(check_greedy, Seer(tiny_llava()), "llava", gamma=3)


@torch.inference_mode()
def check_shifted(on_host: bool) -> None:
    """A draft at its own places, asked at the target's: logits of a chain and of a tree, behind a rollback, are those of the whole text."""
    model, shift, own = tiny_llama(5), 7, [3, 1, 4, 1, 5]
    engine = StaticLlama(model, 64)
    engine.on_host = on_host
    engine.start([len(own)], 8)
    engine.prefill([own[:-1]])
    shifted = Shifted(engine, shift)
    assert shifted.lengths == [len(own) - 1 + shift]
    starts = torch.tensor(shifted.lengths)
    assert near(shifted.forward(torch.tensor([[5, 9, 2]]), starts), model(torch.tensor([[*own, 9, 2]])).logits[:, -3:])
    shifted.advance(3)
    shifted.crop([len(own) + shift + 1])  # of the three, two stay
    assert engine.lengths == [len(own) + 1] and shifted.lengths == [len(own) + 1 + shift]
    visible = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)  # a root and two children
    found = shifted.forward_tree(torch.tensor([6, 7, 8]), torch.tensor(shifted.lengths), torch.tensor([0, 1, 1]), visible)
    for row, path in enumerate(([6], [6, 7], [6, 8])):
        assert near(found[row], model(torch.tensor([[*own, 9, *path]])).logits[0, -1])
    assert shifted.reach == (engine.reach, shift)  # a captured pass must not be replayed with another shift


@pytest.mark.parametrize("on_host", [True, False])
def test_a_shifted_draft_stands_at_its_own_places(on_host):
    check_shifted(on_host)


@pytest.mark.parametrize(("function", "right", "wrong"), [
    (views.Shifted.forward, "starts - self._shift", "starts"),
    (views.Shifted.forward_tree, "starts - self._shift", "starts"),
    (views.Shifted.crop, "length - self._shift", "length - self._shift + 1"),
    (views.Shifted.crop, "length - self._shift", "length"),
], ids=["chain places", "tree places", "crop by one", "crop by the target's"])
def test_planted_bugs_of_shifting_are_found(monkeypatch, function, right, wrong):
    plant(monkeypatch, function, right, wrong)
    fails(check_shifted, on_host=False)


# ---- on a device: places are tensors, trees of fixed shape ----

@pytest.mark.parametrize("name", ["other vision", "text only", "exit with a block"])
def test_as_on_a_device(name, monkeypatch):
    as_on_device(monkeypatch)
    seer = Seer(tiny_llava())
    check_greedy(seer, name, gamma=3)
    for tree in ("static", "dynamic"):
        check_coupled(seer, name, NUCLEUS, **COUPLED_TREES[tree])
