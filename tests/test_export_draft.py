"""Exported drafts: the same logits, the same folder form, the same acceptance in transformers' own speculation, and refusals."""

import json
from dataclasses import dataclass
from pathlib import Path

from running.command_line import UserError

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import export_draft
from decoding.sampling import SamplingPolicy
from models.plain_llama import as_llama, why_not_a_llama
from models.target_model import DeviceArgs, Target, load_target, tokenizer_hash, weights_hash
from test_commands import check_one_line, run_main
from toy_models import decode, noisy_exit, some_prompts, tiny_llama
from truncated_llama import Exit, ExitForm, ExitInfo, ExitKind, TruncatedLlama, save_exit

GAMMA = 4
LAYER = 1


@dataclass(frozen=True)
class Export:
    """One exported exit, and the draft that it must equal, fp32."""

    target: Target
    draft: TruncatedLlama
    checkpoint: Path
    folder: Path


def save_target(folder: Path, tokenizer, **overrides) -> Target:
    """A saved fp32 toy with two end-of-text ids, as instruction-tuned Llamas have."""
    model = tiny_llama(vocab_size=len(tokenizer), **overrides).float()
    for name, ids in (("bos", 0), ("eos", [1, 6]), ("pad", 2)):
        setattr(model.generation_config, f"{name}_token_id", ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_target(str(folder), DeviceArgs(device="cpu"))


def save_checkpoint(path: Path, target: Target, exit_: Exit) -> Path:
    info = ExitInfo(target_layer=exit_.target_layer, kind=ExitKind(exit_.form, ("head",)), target_name=target.name,
                    target_hash=weights_hash(target.model), tokenizer_hash=tokenizer_hash(target.tokenizer))
    save_exit(path, exit_, info)
    return path


def export_arguments(target: Target, checkpoint: Path, out_dir: Path, **flags) -> list:
    return ["--model_path", target.name, "--checkpoint", checkpoint, "--out_dir", out_dir, *(f"--{name}={value}" for name, value in flags.items())]


@pytest.fixture(scope="module", params=[False, True], ids=["head", "own_block"])
def export(request, tmp_path_factory, tokenizer) -> Export:
    root = tmp_path_factory.mktemp("export")
    target = save_target(root / "target", tokenizer)
    draft = noisy_exit(target.model, LAYER, own_block=request.param)
    checkpoint = save_checkpoint(root / "exit.safetensors", target, draft.exit)
    with pytest.MonkeyPatch.context() as patch:
        assert run_main(export_draft, export_arguments(target, checkpoint, root / "draft"), patch) == 0
    return Export(target, draft, checkpoint, root / "draft")


# ---- what was written ----

def test_logits_equal_the_exits_own(export):
    """On 300 tokens, where the RoPE scaling's original context ends at 128."""
    tokens = torch.randint(export.target.model.config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(export.folder)
    torch.testing.assert_close(loaded(tokens).logits, export.draft(tokens).logits, atol=1e-5, rtol=0)


def test_folder_is_a_plain_llama_with_the_targets_tokenizer(export):
    loaded, target, tokenizer = AutoModelForCausalLM.from_pretrained(export.folder), export.target.model, AutoTokenizer.from_pretrained(export.folder)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == LAYER + 1
    assert not loaded.config.tie_word_embeddings
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert loaded.config.rope_parameters == target.config.rope_parameters
    changed = {name for name, value in loaded.config.to_dict().items() if value != target.config.to_dict()[name]}
    assert changed - {"_name_or_path", "dtype", "architectures"} == {"num_hidden_layers", "tie_word_embeddings"}
    assert tokenizer.get_vocab() == export.target.tokenizer.get_vocab() and tokenizer.chat_template == export.target.tokenizer.chat_template
    drafting = loaded.generation_config
    assert (drafting.bos_token_id, drafting.eos_token_id, drafting.pad_token_id) == (0, [1, 6], 2)
    assert (drafting.num_assistant_tokens, drafting.num_assistant_tokens_schedule, drafting.assistant_confidence_threshold) == (GAMMA, "constant", 0)


def test_older_readers_find_the_rope_settings(export):
    older = json.loads((export.folder / "config.json").read_text())
    del older["rope_parameters"]
    assert older["rope_theta"] == 10_000 and "rope_theta" not in older["rope_scaling"]
    assert LlamaConfig(**older).rope_parameters == export.target.model.config.rope_parameters


def test_unscaled_rope_survives(tmp_path, monkeypatch, tokenizer):
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    target = save_target(tmp_path / "target", tokenizer, rope_parameters=rope)
    checkpoint = save_checkpoint(tmp_path / "exit.safetensors", target, Exit(target.model, LAYER))
    assert run_main(export_draft, export_arguments(target, checkpoint, tmp_path / "draft"), monkeypatch) == 0
    assert LlamaConfig.from_pretrained(tmp_path / "draft").rope_parameters == rope
    written = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (500_000.0, None)


def test_record_says_how_the_folder_was_made(export):
    record = json.loads((export.folder / "export" / "config.json").read_text())
    assert record["checkpoint"] == str(export.checkpoint) and record["exit"]["target_hash"] == weights_hash(export.target.model)
    assert {path.name for path in (export.folder / "export").iterdir()} == {"cmd.txt", "config.json", "manifest.json"}


@pytest.mark.parametrize(("flag", "dtype"), [("auto", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)])
def test_stored_dtype_is_the_targets_unless_one_is_given(tmp_path, monkeypatch, tokenizer, flag, dtype):
    target = save_target(tmp_path / "target", tokenizer)
    target.model.bfloat16().save_pretrained(tmp_path / "target")
    exit_ = Exit(target.model, LAYER).float()
    exit_.head.weight += 1e-4 * torch.arange(len(exit_.head.weight))[:, None]  # values that bf16 lacks
    checkpoint = save_checkpoint(tmp_path / "exit.safetensors", target, exit_)
    assert run_main(export_draft, export_arguments(target, checkpoint, tmp_path / "draft", torch_dtype=flag), monkeypatch) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert loaded.dtype == loaded.config.dtype == dtype
    assert torch.equal(loaded.lm_head.weight, exit_.head.weight.to(dtype))


def test_tensors_that_share_storage_in_memory_are_copied(tmp_path):
    target = tiny_llama().float()
    for block in target.model.layers:
        projections = [getattr(block.self_attn, f"{name}_proj") for name in "qkv"]
        joined = torch.cat([projection.weight for projection in projections])
        for projection, part in zip(projections, joined.split([len(p.weight) for p in projections]), strict=True):
            projection.weight = nn.Parameter(part, requires_grad=False)
    exit_ = Exit(target, LAYER, ExitForm("last"))
    draft = as_llama(target, exit_)
    draft.save_pretrained(tmp_path)
    tokens = torch.tensor([some_prompts(2)[1]])
    reference = TruncatedLlama(target, exit_)(tokens).logits
    target.get_parameter("model.layers.0.self_attn.q_proj.weight").zero_()
    for model in (draft, AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(model(tokens).logits, reference, atol=1e-5, rtol=0)


# ---- in transformers' own speculation ----

def without_end(path: str | Path) -> LlamaForCausalLM:
    """The model at `path`, fp64, with neither end-of-text nor padding id.

    With a padding id, transformers 5.23 hides every token of that id from the assistant, even a generated one: it drops a
    mask of ones, and in every round makes the assistant a new one from the ids. The text stays right, acceptance falls.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def greedy_text(target: LlamaForCausalLM, prompt: list[int], max_new_tokens: int, draft: LlamaForCausalLM | None = None) -> list[int]:
    """What transformers generates behind `prompt`."""
    inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
    return target.generate(**inputs, assistant_model=draft, max_new_tokens=max_new_tokens, do_sample=False)[0, len(prompt) :].tolist()


def test_transformers_text_is_the_targets_own(export):
    target, draft = (AutoModelForCausalLM.from_pretrained(path) for path in (export.target.name, export.folder))
    texts = [greedy_text(target, prompt, 40) for prompt in some_prompts(6)]
    assert [greedy_text(target, prompt, 40, draft) for prompt in some_prompts(6)] == texts
    assert max(map(len, texts)) == 40


def test_transformers_accepts_what_this_suite_accepts(export, monkeypatch):
    """Accepted tokens of every greedy round, transformers' with the folder against ours with the exit.

    With R tokens to go transformers drafts min(γ, R−1), this suite always γ: the drafts begin alike, so min(accepted,
    R−1) of them are kept there. That cuts only rounds with R ≤ γ; all others are compared as they are.
    """
    kept: list[int] = []
    update = AssistedCandidateGenerator.update_candidate_strategy

    def record(self, input_ids, scores, num_matches):
        kept.append(int(num_matches))
        update(self, input_ids, scores, num_matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", record)
    target, draft = without_end(export.target.name), without_end(export.folder)
    own_draft = TruncatedLlama(target, export.draft.exit)
    all_kept, new_tokens = [], 48
    for prompt in some_prompts(8):
        kept.clear()
        text = greedy_text(target, prompt, new_tokens, draft)
        tokens, stats = decode(target, own_draft, prompt, policy=SamplingPolicy(0), gamma=GAMMA, max_new_tokens=new_tokens)
        assert text == tokens
        expected, to_go = [], new_tokens
        for round_ in stats.rounds:
            expected.append(min(round_.accepted, to_go - 1))
            to_go -= expected[-1] + 1
        assert kept == expected and to_go == 0
        all_kept += kept
    assert {0, GAMMA} < set(all_kept)  # the comparison saw full, partial and empty acceptance


# ---- refusals ----

def other_block(**shape) -> LlamaDecoderLayer:
    return LlamaDecoderLayer(tiny_llama(**shape).config, layer_idx=0)


class Shortcut(Exit):
    """An exit that adds its input to what the head reads."""

    def forward(self, hidden, pass_inputs, logits_to_keep=0):
        return self.head(hidden + self.norm(hidden))[:, -logits_to_keep:]


PLANTED = {
    "trimmed head": ({"head": nn.Linear(32, 40, bias=False)}, r"its head is \(40, 32\), not the full vocabulary's \(64, 32\)"),
    "low-rank head": ({"head": nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 64, bias=False))}, "its head is a Sequential"),
    "biased head": ({"head": nn.Linear(32, 64)}, "its head has a bias"),
    "layer norm": ({"norm": nn.LayerNorm(32)}, "its norm is a LayerNorm"),
    "epsilon": ({"norm": LlamaRMSNorm(32, eps=0.1)}, r"its norm has \(shape, epsilon\) \(\(32,\), 0.1\)"),
    "foreign block": ({"block": nn.TransformerEncoderLayer(32, 4)}, "its block is a TransformerEncoderLayer"),
    "narrow block": ({"block": other_block(intermediate_size=48)}, "differs from the target's in mlp.down_proj.weight, mlp.gate_proj.weight"),
    "other heads": ({"block": other_block(num_attention_heads=8, num_key_value_heads=4)}, "differs from the target's in head_dim"),
    "biased block": ({"block": other_block(mlp_bias=True)}, "differs from the target's in mlp.down_proj.bias"),
    "adapter": ({"adapter": nn.Linear(32, 32)}, "parts that a Llama lacks: adapter"),
    "temperature": ({"temperature": nn.Parameter(torch.ones(1))}, "parts that a Llama lacks: temperature"),
}


@pytest.mark.parametrize(("parts", "message"), PLANTED.values(), ids=PLANTED)
def test_exits_of_other_kinds_are_refused_by_name(parts, message):
    target = tiny_llama()
    exit_ = Exit(target, LAYER)
    assert why_not_a_llama(exit_, target.config) is None
    for name, part in parts.items():
        setattr(exit_, name, part)
    with pytest.raises(UserError, match=f"cannot be exported as a plain Llama: .*{message}"):
        as_llama(target, exit_)


def test_exit_with_its_own_forward_is_refused_by_name():
    target = tiny_llama()
    assert "a Shortcut makes its logits in another way" in why_not_a_llama(Shortcut(target, LAYER), target.config)


def test_mistakes_get_one_line_and_leave_nothing(export, tmp_path, monkeypatch, capsys, tokenizer):
    out = tmp_path / "out"
    other = save_target(tmp_path / "other", tokenizer, seed=5)
    double = save_target(tmp_path / "double", tokenizer)
    double.model.double().save_pretrained(tmp_path / "double")
    (tmp_path / "file").touch()
    for target, changes, message in (
        (export.target, {"out_dir": export.folder}, "exists already and is not written over; choose another --out_dir"),
        (export.target, {"out_dir": tmp_path / "file" / "draft"}, "cannot write to .*file"),
        (export.target, {"checkpoint": tmp_path / "none.safetensors"}, "no checkpoint at .*none.safetensors"),
        (export.target, {"gamma": 0}, "--gamma 0: must be at least 1"),
        (other, {}, "belongs to another target"),
        (double, {}, "is stored as torch.float64; give --torch_dtype bf16 or fp16 or fp32"),
    ):
        arguments = export_arguments(target, **{"checkpoint": export.checkpoint, "out_dir": out, **changes})
        assert run_main(export_draft, arguments, monkeypatch) == 2
        check_one_line(capsys, message)
    assert not list(tmp_path.glob("out*"))


def test_planted_exit_is_refused_on_the_command_line(export, tmp_path, monkeypatch, capsys):
    load = export_draft.load_exit

    def load_low_rank(path, target):
        exit_, info = load(path, target)
        exit_.head = nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 320, bias=False))
        return exit_, info

    monkeypatch.setattr(export_draft, "load_exit", load_low_rank)
    assert run_main(export_draft, export_arguments(export.target, export.checkpoint, tmp_path / "out"), monkeypatch) == 2
    check_one_line(capsys, "this exit cannot be exported as a plain Llama: its head is a Sequential")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_partial_results_that_is_not_its_own_stays(export, tmp_path, monkeypatch):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    assert run_main(export_draft, export_arguments(export.target, export.checkpoint, tmp_path / "out"), monkeypatch) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"] and (tmp_path / "out.partial" / "thesis.tex").exists()


def test_usage_is_printed_for_both_engines(export, tmp_path, monkeypatch, capsys):
    assert run_main(export_draft, export_arguments(export.target, export.checkpoint, tmp_path / "out", gamma=2), monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "target.generate(**inputs, assistant_model=draft)" in printed
    assert f"""--speculative-config '{{"model": "{tmp_path / 'out'}", "num_speculative_tokens": 2, "method": "draft_model"}}'""" in printed
