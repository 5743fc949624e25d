"""Imports go to lower levels only, so commands never import commands nor rounds rounds; `decoding/` imports only itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The tens are the tiers, from what everything stands on to what a user starts; the ones order a tier within itself.
LEVELS = {
    -1: "command_line",
    0: "answers hub machine_speed processes decoding.native decoding.matmul decoding.programs decoding.tree decoding.exactness decoding.growmap decoding.vlm frozen_linear",
    1: "generation_settings row_files results presets record_file records decoding.sampling decoding.kv_cache decoding.static_llama",
    2: "image_inputs decoding.verify decoding.shared_exit decoding.common_sense",
    3: "data_utils decoding.state decoding.children decoding.autojudge",
    4: "decoding.draft_length decoding.vanilla",
    5: "decoding.drafting decoding.tree_drafting",
    6: "decoding.best_first",
    10: "target_model teacher_cache training_loop losses plot_parts arithmetic_dataset c4_dataset cnn_dataset fineweb_dataset gsm8k_dataset llava_dataset lmsys_dataset"
        " mt_bench_dataset oasst_dataset openwebtext_dataset pydoc_dataset shapes_dataset share_gpt_dataset slim_pj_dataset ultrachat_dataset xsum_dataset",
    11: "tower_pretraining llava_target metrics capacity_plots",
    12: "plots",
    13: "judge_plots tree_plots",
    20: "text_datasets truncated_llama followers decoding.chain decoding.self_speculation decoding.static_tree decoding.dynamic_tree"
        " decoding.specexec decoding.hf_peers",
    21: "pretraining tuned_llama plain_llama planted",
    30: "speculative",
    31: "judges judge_mining tuning tree_tuning",
    32: "potential tree_args",
    40: "evaluation bench_prompts token_views",
    41: "bench_methods bench_records",
    42: "bench_args image_prompts planted_llava",
    43: "bench_runs",
    50: "train evaluate evaluate_checkpoints pretrain_draft_model prove export_draft sweep_settings benchmark_torch_compile pretrain_llava tune build_followers build_growmap"
        " generate_dataset benchmark_training train_judge evaluate_judge benchmark benchmark_llava validate_results validate_configs plot_results",
}
LEVEL_OF = {module: level for level, modules in LEVELS.items() for module in modules.split()}


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names that `path` imports anywhere, inside functions too; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [path.parent.name if node.level else "", node.module]))
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def broken_rules(root: Path) -> list[str]:
    """One sentence for every import in `root` that breaks the rule, and for every module that has no level."""
    files = {path.stem: path for path in root.glob("*.py")}
    files |= {f"decoding.{path.stem}": path for path in root.glob("decoding/*.py") if path.stem != "__init__"}
    found = [f"{module} has no level: add it to LEVELS in {Path(__file__).name}" for module in sorted(files.keys() - LEVEL_OF.keys())]
    for module in files.keys() & LEVEL_OF.keys():
        for imported in files.keys() & LEVEL_OF.keys() & set(imported_names(files[module])):
            if LEVEL_OF[imported] >= LEVEL_OF[module]:
                found.append(f"{module} (level {LEVEL_OF[module]}) imports {imported} (level {LEVEL_OF[imported]})")
            if module.startswith("decoding.") and not imported.startswith("decoding."):
                found.append(f"{module} imports {imported}, which lies above decoding/")
    return found


def test_imports_go_to_lower_levels():
    assert not broken_rules(ROOT)


def test_decoding_package_is_empty_of_code():
    assert not (ROOT / "decoding" / "__init__.py").read_text().strip()


def test_every_kind_of_breach_is_found(tmp_path: Path):
    (tmp_path / "decoding").mkdir()
    modules = {"train": "def f():\n    import evaluate", "evaluate": "", "unheard_of": "", "command_line": "", "results": "from train import x",
               "decoding/chain": "from . import hf_peers", "decoding/hf_peers": "from command_line import UserError"}
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    found = " | ".join(broken_rules(tmp_path))
    for breach in ("train (level 50) imports evaluate", "unheard_of has no level", "results (level 1) imports train",
                   "decoding.chain (level 20) imports decoding.hf_peers", "decoding.hf_peers imports command_line, which lies above"):
        assert breach in found
    assert len(broken_rules(tmp_path)) == 5
