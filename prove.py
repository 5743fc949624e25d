"""Prove on your own target and drafts that speculation changes no output: exit status 0 if every check holds, else 1.

    python prove.py --model_path assets/pydoc-llama-7m --checkpoint_glob "runs/demo/*/layer*/model_*.safetensors" \\
        --spec_prompt_dataset pydoc --spec_num_prompts 50 --spec_max_new_tokens 64 --out_dir runs/demo/proof

Checked at T = 0, T = 0.7 with top-p 0.95, and T = 1:
    identity    a draft that equals the target has every proposal accepted, under both verifications
    greedy      greedy speculative text equals greedy text
    coupled     coupled text equals vanilla sampling's for the same seed, token for token
    tree        so does text drafted in trees: static ones, dynamic ones, SpecExec's
    acceptance  rejection's acceptance agrees with Σ min(p, q) over all tested positions, |z| < 4
    calls       one target call per round

A pass over several tokens rounds differently from a pass over one, so a token may flip where two scores are equal to
rounding. Where texts part, the target's scores of both tokens are compared: closer than TIE_GAP is a near tie, which is
counted apart and is no failure. In fp32, the default here, they are rare; in bf16 they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from running.command_line import parse_args, run

import pandas as pd
import torch
from torch import nn

from decoding.draft_length import AdaptiveLength
from decoding.dynamic_tree import DynamicTree
from decoding.growmap import Growmap
from decoding.sampling import Noise, Purpose, SamplingPolicy, policy_probs
from decoding.specexec import SpecExec
from decoding.state import DecodeStats
from decoding.static_tree import StaticTree
from measuring.evaluation import SpeculationArgs, choose_prompts
from measuring.metrics import acceptance_z
from measuring.round_costs import LONGEST
from models.target_model import Target, eos_token_ids, load_target
from running.run_files import new_output_dir, record_run, write_json
from speculative import DecodeOptions, Generation, generate
from truncated_llama import Exit, TruncatedLlama, find_checkpoints, load_exit, read_exit_info

POLICIES = {"T=0": SamplingPolicy(0.0), "T=0.7 top-p=0.95": SamplingPolicy(0.7, top_p=0.95), "T=1": SamplingPolicy(1.0)}
MAX_Z, MIN_TESTED = 4.0, 20_000
TIE_GAP = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-1}  # of logits, or of log p plus noise
TREES = {  # each verified by the target's own draws
    "static_tree": StaticTree(Growmap((-1, 0, 0, 0, 0, 1, 1, 1, 2, 5, 5, 9))), "dynamic_tree": DynamicTree(budget=16), "specexec": SpecExec(budget=16, depth=8),
}
RESULTS_NAME = "proof.json"


@dataclass(kw_only=True)
class Args(SpeculationArgs):
    """Prove exactness."""

    checkpoint_glob: list[str] = field(default_factory=list, metadata={"help": "globs or paths of exits (default: untuned exits only)"})
    torch_dtype: Literal["auto", "bf16", "fp16", "fp32"] = field(default="fp32", metadata={"help": "auto: bf16 on cuda, fp32 on cpu"})
    tf32: bool = field(default=False, metadata={"help": "TF32 for fp32 matrix products on cuda"})

    @property
    def longest(self) -> int:
        return max(super().longest, *(tree.depth for tree in TREES.values()))


class Prover:
    """Decodes every prompt with every draft, policy and verification, and keeps count of what holds."""

    def __init__(self, target: Target, prompts: list[list[int]], args: Args) -> None:
        self.target, self.prompts, self.args = target, prompts, args
        self.rows: list[dict] = []
        self.tested: list[DecodeStats] = []
        self.gamma = AdaptiveLength([1 + 0.3 * n for n in range(LONGEST + 1)]) if args.gamma == "auto" else int(args.gamma)  # any costs do: exactness hangs on none
        self.vanilla = {label: [generation.tokens for generation in self.decode(policy)] for label, policy in POLICIES.items()}

    def decode(self, policy: SamplingPolicy, draft: nn.Module | None = None, **way: object) -> Iterator[Generation]:
        """One generation per prompt, drafted in `way`, DecodeOptions' fields; vanilla without a draft."""
        options = DecodeOptions(
            policy=policy, gamma=self.gamma, max_new_tokens=self.args.spec_max_new_tokens, eos_ids=eos_token_ids(self.target), seed=self.args.seed,
            record_overlap=True, engine=self.args.engine, **way,
        )
        return (generate(self.target.model, prompt, options, draft, prompt_id=i) for i, prompt in enumerate(self.prompts))

    def record(self, check: str, draft: str, policy: str, held: list[bool], near_ties: int = 0) -> None:
        """Keep and print one line: of `held`, all must be true but for the near ties."""
        passed = sum(held) + near_ties == len(held)
        self.rows.append({"check": check, "draft": draft, "policy": policy, "held": sum(held), "near_ties": near_ties, "of": len(held), "passed": passed})
        ties = f", {near_ties} near ties" if near_ties else ""
        print(f"{'pass' if passed else 'FAIL'}  {check:10} {sum(held)}/{len(held)}{ties}  {policy}  {draft}", flush=True)

    def prove_draft(self, name: str, draft: nn.Module, is_target: bool) -> None:
        """All checks of one draft."""
        for label, policy in POLICIES.items():
            for verification in ("rejection", "coupled"):
                found = list(self.decode(policy, draft, method=self.args.method_for(self.target, draft), verification=verification))
                setting = f"{label}, {verification}"
                self.record("calls", name, setting, [g.stats.target_calls == len(g.stats.rounds) for g in found])
                if is_target:
                    self.record("identity", name, setting, [all(r.accepted == r.proposed for r in g.stats.rounds) for g in found])
                if verification == "coupled" or policy.temperature == 0:
                    self.compare_texts("coupled" if verification == "coupled" else "greedy", name, label, [g.tokens for g in found])
                else:
                    self.tested += [generation.stats for generation in found]
            for method, tree in TREES.items():
                found = list(self.decode(policy, draft, method=method, tree=tree))
                self.record("calls", name, f"{label}, {method}", [g.stats.target_calls == len(g.stats.rounds) for g in found])
                self.compare_texts("tree", name, label, [g.tokens for g in found])

    def compare_texts(self, check: str, name: str, label: str, texts: list[list[int]]) -> None:
        """Record how many texts are vanilla's, and how many part from it at a near tie."""
        pairs = list(zip(texts, self.vanilla[label], strict=True))
        held = [text == vanilla for text, vanilla in pairs]
        gap = TIE_GAP[self.target.model.dtype]
        ties = [i for i, (text, vanilla) in enumerate(pairs) if text != vanilla and self.score_gap(i, text, vanilla, POLICIES[label]) < gap]
        self.record(check, name, label, held, near_ties=len(ties))

    @torch.inference_mode()
    def score_gap(self, index: int, text: list[int], vanilla: list[int], policy: SamplingPolicy) -> float:
        """Distance of the target's scores (logit, or log p + g) of the two tokens at which prompt `index`'s texts part."""
        at = next(i for i, (a, b) in enumerate(zip(text, vanilla, strict=False)) if a != b)
        context = self.prompts[index] + vanilla[:at]
        scores = self.target.model(torch.tensor([context], device=self.target.model.device)).logits[0, -1:]
        if policy.temperature > 0:
            noise = Noise.of(self.args.seed, index, self.target.model.device)
            position = torch.tensor([len(context)], device=self.target.model.device)
            scores = policy_probs(scores, policy).log() - noise.exponential(position, scores.shape[-1], Purpose.TOKEN).log()
        return float((scores[0, text[at]] - scores[0, vanilla[at]]).abs())

    def prove_acceptance(self) -> None:
        """The z of all rejection rounds together."""
        tested = sum(r.tested for stats in self.tested for r in stats.rounds)
        z = acceptance_z(self.tested)
        described = "nothing varies" if z is None else f"z = {z:.2f}"
        self.record("acceptance", f"{described} over {tested} tested positions", "T > 0, rejection", [z is None or abs(z) < MAX_Z])
        if tested < MIN_TESTED:
            print(f"      (fewer than {MIN_TESTED} positions: raise --spec_num_prompts or --spec_max_new_tokens for a sharper check)")


def planned_exits(target: Target, paths: list[str]) -> dict[str, Callable[[], Exit]]:
    """Name -> how to load that exit: the target itself, the untuned exit in the middle, and every checkpoint."""
    last = target.model.config.num_hidden_layers - 1
    untuned = {f"{name}, layer {layer}": partial(Exit, target.model, layer) for name, layer in (("target", last), ("untuned", last // 2))}
    return {**untuned, **{path: partial(lambda path: load_exit(path, target)[0], path) for path in paths}}


def report(rows: list[dict], path: Path) -> int:
    """Print what held and return the exit status."""
    failed = sum(not row["passed"] for row in rows)
    print(pd.DataFrame(rows).groupby("check")[["held", "near_ties", "of"]].sum().to_string())
    print(f"{f'{failed} checks FAILED' if failed else 'every check holds'}: {path}")
    return 1 if failed else 0


def main() -> int:
    args = parse_args(Args)
    args.check()
    paths = find_checkpoints(args.checkpoint_glob) if args.checkpoint_glob else []
    for path in paths:
        read_exit_info(path)
    folder = new_output_dir(args.out_dir, RESULTS_NAME, "a proof")
    data = args.open_data()
    target = load_target(args.model_path, args)
    record_run(folder, args, args.facts(target, data))
    prover = Prover(target, choose_prompts(target, args, data), args)
    for number, (name, load) in enumerate(planned_exits(target, paths).items()):
        prover.prove_draft(name, TruncatedLlama(target.model, load()), is_target=number == 0)
    prover.prove_acceptance()
    write_json(folder / RESULTS_NAME, prover.rows)
    return report(prover.rows, folder / RESULTS_NAME)


if __name__ == "__main__":
    run(main)
