"""Prove on your own target and drafts that speculation changes no output: exit status 0 if every check holds, else 1.

    python prove.py --model_path assets/pydoc-llama-7m --checkpoint_glob "runs/demo/*/layer*/model_*.safetensors" \\
        --spec_prompt_dataset pydoc --spec_num_prompts 50 --spec_max_new_tokens 64 --out_dir runs/demo/proof

Checked at T = 0, T = 0.7 with top-p 0.95, and T = 1:
    identity    a draft that equals the target has every proposal accepted, under both verifications
    greedy      greedy speculative text equals greedy text
    coupled     coupled text equals vanilla sampling's for the same seed, token for token
    acceptance  rejection's acceptance agrees with Σ min(p, q) over all tested positions, |z| < 4
    calls       one target call per round
Equality is exact in fp32 (the default here). In bf16 a pass over several tokens rounds differently from a pass over
one, so near ties may flip: the counts then say how often.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass, field

import pandas as pd
from torch import nn

from command_line import UserError, parse_args, run
from decoding.sampling import SamplingPolicy
from decoding.state import DecodeStats
from evaluation import SpeculationArgs, choose_prompts
from metrics import acceptance_z
from results import make_output_dir, record_run, write_json
from speculative import DecodeOptions, Generation, generate
from target_model import Target, eos_token_ids, load_target
from truncated_llama import Exit, TruncatedLlama, load_exit, read_exit_info

POLICIES = {"T=0": SamplingPolicy(0.0), "T=0.7 top-p=0.95": SamplingPolicy(0.7, top_p=0.95), "T=1": SamplingPolicy(1.0)}
MAX_Z, MIN_TESTED = 4.0, 20_000


@dataclass(kw_only=True)
class Args(SpeculationArgs):
    """Prove exactness."""

    checkpoint_glob: list[str] = field(default_factory=list, metadata={"help": "globs or paths of exits (default: untuned exits only)"})
    torch_dtype: str = field(default="fp32", metadata={"help": "fp32, bf16 or fp16; equality is exact in fp32"})

    def paths(self) -> list[str]:
        """The matching checkpoints, each readable. Raises UserError."""
        paths = sorted({path for pattern in self.checkpoint_glob for path in glob.glob(pattern)})
        if self.checkpoint_glob and not paths:
            raise UserError(f"no checkpoint matches {' '.join(self.checkpoint_glob)}; train.py prints each checkpoint's path")
        for path in paths:
            read_exit_info(path)
        return paths


class Prover:
    """Decodes every prompt with every draft, policy and verification, and keeps count of what holds."""

    def __init__(self, target: Target, prompts: list[list[int]], args: Args) -> None:
        self.target, self.prompts, self.args = target, prompts, args
        self.rows: list[dict] = []
        self.tested: list[DecodeStats] = []

    def texts(self, policy: SamplingPolicy, draft: nn.Module | None = None, verification: str = "rejection") -> list[Generation]:
        """One generation per prompt; vanilla without a draft."""
        options = DecodeOptions(
            method="vanilla" if draft is None else "speculative", policy=policy, gamma=self.args.gamma, verification=verification,
            max_new_tokens=self.args.spec_max_new_tokens, eos_ids=eos_token_ids(self.target), seed=self.args.seed, record_overlap=True,
        )
        return [generate(self.target.model, prompt, options, draft, prompt_id=i) for i, prompt in enumerate(self.prompts)]

    def record(self, check: str, draft: str, policy: str, holds: list[bool]) -> None:
        self.rows.append({"check": check, "draft": draft, "policy": policy, "held": sum(holds), "of": len(holds), "passed": all(holds)})
        print(f"{'pass' if all(holds) else 'FAIL'}  {check:10} {sum(holds)}/{len(holds)}  {policy}  {draft}", flush=True)

    def prove_draft(self, name: str, draft: nn.Module, is_target: bool) -> None:
        """All checks of one draft."""
        for label, policy in POLICIES.items():
            vanilla = [generation.tokens for generation in self.texts(policy)]
            for verification in ("rejection", "coupled"):
                found = self.texts(policy, draft, verification)
                self.record("calls", name, f"{label}, {verification}", [g.stats.target_calls == len(g.stats.rounds) for g in found])
                if is_target:
                    self.record("identity", name, f"{label}, {verification}", [all(r.accepted == r.proposed for r in g.stats.rounds) for g in found])
                if verification == "coupled" or policy.temperature == 0:
                    check = "coupled" if verification == "coupled" else "greedy"
                    self.record(check, name, label, [g.tokens == text for g, text in zip(found, vanilla, strict=True)])
                else:
                    self.tested += [generation.stats for generation in found]

    def prove_acceptance(self) -> None:
        """The z of all rejection rounds together."""
        tested = sum(r.tested for stats in self.tested for r in stats.rounds)
        z = acceptance_z(self.tested)
        self.record("acceptance", f"z = {z:.2f} over {tested} tested positions", "T > 0, rejection", [abs(z) < MAX_Z])
        if tested < MIN_TESTED:
            print(f"      (fewer than {MIN_TESTED} positions: raise --spec_num_prompts or --spec_max_new_tokens for a sharper check)")


def drafts(target: Target, paths: list[str]) -> dict[str, nn.Module]:
    """Name -> draft: the target itself, the untuned exit in the middle, and every checkpoint."""
    last = target.model.config.num_hidden_layers - 1
    untuned = {f"{name}, layer {layer}": Exit(target.model, layer) for name, layer in (("target", last), ("untuned", last // 2))}
    exits = {**untuned, **{path: load_exit(path, target)[0] for path in paths}}
    return {name: TruncatedLlama(target.model, exit_) for name, exit_ in exits.items()}


def main() -> int:
    args = parse_args(Args)
    args.check()
    paths = args.paths()
    folder = make_output_dir(args.out_dir)
    data = args.open_data()
    target = load_target(args.model_path, args)
    prover = Prover(target, choose_prompts(target, args, data), args)
    for number, (name, draft) in enumerate(drafts(target, paths).items()):
        prover.prove_draft(name, draft, is_target=number == 0)
    prover.prove_acceptance()
    record_run(folder, args)
    write_json(folder / "proof.json", prover.rows)
    failed = sum(not row["passed"] for row in prover.rows)
    print(pd.DataFrame(prover.rows).groupby("check")[["held", "of"]].sum().to_string())
    print(f"{'every check holds' if not failed else f'{failed} checks FAILED'}: {folder / 'proof.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
