"""Step times: every implementation does the same work, and what fails or differs is a row that says so."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

import benchmark_torch_compile as benchmark
from engine import static_llama
from measuring import machine_speed
from plotting import exits
from test_commands import check_one_line, run_main
from toy_models import native_llama, tiny_llama
from truncated_llama import Exit, TruncatedLlama

CONTEXT, WIDTHS = 9, [1, 3]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """No waiting between turns, and a buffer that is summed at once."""
    monkeypatch.setattr(benchmark, "SETTLE_SECONDS", 0)
    monkeypatch.setitem(machine_speed.BUFFER_BYTES, "cpu", 1 << 16)


def command(out_dir, **changes) -> list[str]:
    flags = {"out_dir": out_dir, "contexts": CONTEXT, "widths": WIDTHS, "modes": "none", "repeats": 1, "num_threads": 1, "exit_layers": 1, **changes}
    return [str(text) for name, value in flags.items() if value is not None
            for text in (f"--{name}", *(value if isinstance(value, list) else [value]))]


def cell_figures(model: LlamaForCausalLM, width: int, *modes: str) -> dict[str, dict]:
    """What measure_cell finds for `model`."""
    args = benchmark.Args(out_dir="unused", widths=[width], modes=list(modes) or ["none"])
    tokens = torch.randint(64, (1, CONTEXT + width), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        works, failed = benchmark.try_all(benchmark.implementations(model, tokens[:, :CONTEXT], args))
        return {**benchmark.measure_cell(works, tokens[:, CONTEXT:].clone(), 1), **failed}


def test_rows_figure_and_table(tiny_target_path, tmp_path, monkeypatch, capsys):
    assert run_main(benchmark, command(tmp_path, model_path=tiny_target_path), monkeypatch) == 0
    rows = json.loads((tmp_path / "step_times.json").read_text())
    assert [(row["variant"], row["blocks"], row["width"], row["implementation"]) for row in rows] == [
        (*variant, width, name) for variant in (("full", 4), ("exit 1", 2)) for width in WIDTHS
        for name in ("transformers", "transformers static", "engine", "engine torch")]
    config = AutoConfig.from_pretrained(tiny_target_path)
    block = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 64 + 2 * 32  # queries and output, keys and values, mlp, norms
    for row in rows:
        assert set(row) <= set(benchmark.COLUMNS) and row["max_logit_difference"] < 1e-4 and row["steps"] == 3
        assert row["bytes_per_step"] == 4 * (row["blocks"] * (block + 2 * CONTEXT * 16) + 32 + 32 * config.vocab_size)
        assert row["ms_per_step_q1"] <= row["ms_per_step"] <= row["ms_per_step_q3"]
        assert row["roofline_share"] == pytest.approx(row["bytes_per_step"] / (row["ms_per_step"] / 1000) / row["bandwidth_bytes_per_s"])
        assert row["implementation"] != "transformers" or row["speedup"] == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"cmd.txt", "config.json", "manifest.json", "plots"}
    assert len(exits.step_times(exits.read_step_times(tmp_path / "step_times.json")).axes) == 2
    assert "exit 1" in capsys.readouterr().out
    assert run_main(benchmark, command(tmp_path), monkeypatch) == 2
    check_one_line(capsys, "holds step times already; choose another --out_dir")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 does not compile the forward pass of transformers; the row says so")
def test_compiled_steps_give_the_same_logits():
    figures = cell_figures(benchmark.first_blocks(tiny_llama().float(), 1), 3, "default")["transformers+compile default"]
    assert figures["max_logit_difference"] < 1e-4 and figures["compile_seconds"] > 0 and len(figures["seconds"]) == 3


def test_a_mode_that_does_not_compile_is_a_row_and_a_line(tiny_target_path, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: no g++\nmore")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    assert run_main(benchmark, command(tmp_path, model_path=tiny_target_path, modes="default", exit_layers=None, widths=1), monkeypatch) == 0
    rows = {row["implementation"]: row for row in json.loads((tmp_path / "step_times.json").read_text())}
    failed = rows["transformers+compile default"]
    assert failed["error"] == "RuntimeError: backend='inductor' raised: InvalidCxxCompiler: no g++" and "ms_per_step" not in failed
    assert all("ms_per_step" in row for name, row in rows.items() if row is not failed)
    assert "    transformers+compile default: RuntimeError" in capsys.readouterr().out


@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_other_logits_are_an_error(monkeypatch, shift):
    exact = benchmark.EngineSteps.step
    monkeypatch.setattr(benchmark.EngineSteps, "step", lambda self, tokens: exact(self, tokens) + shift)
    figures = cell_figures(tiny_llama().float(), 2)
    assert "differ by" in figures["engine"]["error"] and "seconds" not in figures["engine"]
    assert "max_logit_difference" in figures["engine"] or shift != 0.01
    assert "seconds" in figures["transformers static"]


def test_a_model_that_the_engine_cannot_run_is_a_row():
    model = tiny_llama(hidden_act="gelu").float()
    assert cell_figures(model, 1)["engine"] == {"error": "ValueError: StaticLlama cannot run the activation 'gelu' (known: silu)"}


def test_steps_leave_no_trace():
    """A step that stayed in the cache would shift the next one's position, and with it the logits, by far more than rounding."""
    model = tiny_llama().float()
    tokens = torch.arange(CONTEXT + 2)[None]
    args = benchmark.Args(out_dir="unused", modes=["none"])
    with torch.inference_mode():
        whole = model(input_ids=tokens).logits[:, CONTEXT:]
        for name, make in benchmark.implementations(model, tokens[:, :CONTEXT], args).items():
            works = make()
            for width in (2, 1, 2):
                logits, _ = benchmark.timed_step(works, tokens[:, CONTEXT : CONTEXT + width])
                torch.testing.assert_close(logits, whole[:, :width], rtol=0, atol=1e-4, msg=name)


def test_first_blocks_are_the_untuned_exit_in_the_same_memory():
    model, tokens = tiny_llama(), torch.arange(7)[None]
    short = benchmark.first_blocks(model, 2)
    torch.testing.assert_close(short(tokens).logits, TruncatedLlama(model, Exit(model, 1))(tokens, use_cache=False).logits)
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in short.parameters()) and model.config.num_hidden_layers == 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="without a compiler the engine has no C++ to leave out")
def test_engine_torch_runs_no_cpp(monkeypatch):
    model, tokens = native_llama(), torch.arange(CONTEXT)[None]
    made = benchmark.implementations(model, tokens, benchmark.Args(out_dir="unused", modes=["none"]))
    engines = {name: make() for name, make in made.items() if name.startswith("engine")}
    called = []
    monkeypatch.setattr(static_llama.NativeStack, "run", lambda *_: called.append("blocks"))
    monkeypatch.setattr(static_llama.Head, "_run_native", lambda self, x: called.append("head") or x.new_zeros(len(x), 64))
    with torch.inference_mode():
        engines["engine torch"].step(tokens[:, :1])
        assert not called
        engines["engine"].step(tokens[:, :1])
    assert called == ["blocks", "head"]


def test_known_config_is_llama_3_2_1b():
    args = benchmark.Args(out_dir="unused", config="llama-3.2-1b", exit_layers=[1, 14])
    args.check()
    with torch.device("meta"):
        model = LlamaForCausalLM(args.load_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_235_814_400
    assert static_llama.why_unsupported(model) is None


def test_random_weights_follow_the_seed(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    path = str(tmp_path / "config.json")
    first, again, other = (benchmark.load_model(benchmark.Args(out_dir="unused", config=path, seed=seed, torch_dtype="bf16")) for seed in (0, 0, 1))
    assert first.dtype == torch.bfloat16 and first.lm_head.weight is first.model.embed_tokens.weight
    assert torch.equal(first.lm_head.weight, again.lm_head.weight) and not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(("changes", "message"), [
    ({"config": "llama-9-1b"}, "no such folder or file; known names: llama-3.2-1b"),
    ({"config": "llama-3.2-1b", "model_path": "x"}, "give either --model_path MODEL or --config CONFIG"),
    ({"exit_layers": 15}, "--exit_layers 15: this model has 16 blocks, so choose 0 to 14"),
    ({"contexts": [128, 4096]}, "the context of this model is 4096 tokens: lower --contexts or --widths"),
    ({"widths": [0, 1]}, "--widths 0: must be at least 1"),
    ({"widths": 65}, "--widths 65: must be at most 64"),
    ({"modes": ["none", "default"]}, "--modes none: choose from default, .*, or none alone"),
    ({"repeats": 0}, "--repeats 0: must be at least 1"),
])
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, changes, message):
    assert run_main(benchmark, command(tmp_path / "out", **changes), monkeypatch) == 2
    check_one_line(capsys, message)
    assert not (tmp_path / "out").exists()


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch):
    times = iter([0.5, 0.25] * 5)
    monkeypatch.setattr(machine_speed, "_host_seconds", lambda work: work() and next(times))
    assert machine_speed.memory_bandwidth("cpu") == (1 << 16) / 0.25


def test_figure_of_errors_alone_is_left_out(tmp_path, capsys):
    (tmp_path / "step_times.json").write_text(json.dumps([{"implementation": "engine", "error": "RuntimeError: x"}]))
    assert exits.plot_step_times(tmp_path) == [] and "step_times: left out" in capsys.readouterr().out
