#!/usr/bin/env bash
# How many tokens does a target call give by chains, static trees, dynamic trees and SpecExec, draft by draft, and at what speed?
#
#   MODEL_PATH=assets/pydoc-llama-7m DRAFTS="runs/demo/ftlast/layer1/model_000300.safetensors runs/draft/model_001200" \
#     SPEC_PROMPT_DATASET=arithmetic bash sweeps/run_tree_study.sh
#   DRY_RUN=1 DRAFTS="exit.safetensors" bash sweeps/run_tree_study.sh
#
# One commands/sweep_settings.py for every draft (an exit's checkpoint, or the folder of an independent model) at every temperature; 0.7 goes with top-p
# 0.95. The same command continues an interrupted study and skips what is finished.
#
#   $OUTPUT_DIR/<last three parts of the draft's path>-t0.7/results.csv  $OUTPUT_DIR/<draft>-t0.7/plots/  $OUTPUT_DIR/logs/
#
# Settings (environment variables) and their defaults; --help says what they mean:
#   TEMPERATURES="0 0.7 1.0 1.5" TREE_BUDGETS="8 16 32 64" GAMMAS="2 4 6 8" VERIFICATIONS="rejection coupled match swor"
#   MODEL_PATH=meta-llama/Llama-3.2-1B-Instruct OUTPUT_DIR=runs/trees PYTHON=python3
#   left to the Python scripts unless set: SPEC_PROMPT_DATASET DATASET_PATH SPEC_NUM_PROMPTS SPEC_PROMPT_LEN SPEC_MAX_NEW
#   FIT_PROMPTS TREE_DEPTH SEED DEVICE TORCH_DTYPE NUM_THREADS; off unless set: COUNTS_ONLY DRY_RUN; no default: DRAFTS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=sweeps/sweep_lib.sh
source sweeps/sweep_lib.sh

setting DRAFTS "" "exits and model folders, separated by spaces"
setting TEMPERATURES "0 0.7 1.0 1.5" "sampling temperatures; 0.7 with top-p 0.95"
setting TREE_BUDGETS "8 16 32 64" "nodes of trees"
setting TREE_DEPTH "" "levels of static and dynamic trees"
setting GAMMAS "2 4 6 8" "drafted tokens of chains"
setting VERIFICATIONS "rejection coupled match swor" "of chains and trees"
setting MODEL_PATH meta-llama/Llama-3.2-1B-Instruct "the target: a Hugging Face id or a folder"
setting OUTPUT_DIR runs/trees "results, plots and logs"
setting SPEC_PROMPT_DATASET "" "data set of the prompts"
setting DATASET_PATH "" "local files in that data set's form"
setting SPEC_NUM_PROMPTS "" "prompts"
setting SPEC_PROMPT_LEN "" "tokens of a prompt"
setting SPEC_MAX_NEW "" "new tokens per prompt"
setting FIT_PROMPTS "" "prompts behind these that trees are fitted to"
setting SEED "" "seed"
setting COUNTS_ONLY "" "1: leave times and speeds out of the results, as the machine does other work as well"
setting DEVICE "" "auto, cpu or cuda"
setting TORCH_DTYPE "" "auto, bf16, fp16 or fp32"
setting NUM_THREADS "" "CPU threads of torch"
setting PYTHON python3 "interpreter"
setting DRY_RUN "" "1: print the commands, run and write nothing"
begin_sweep "$@"
[[ -n $DRAFTS ]] || user_error "DRAFTS is empty: name exits and model folders, separated by spaces"

# study_draft DRAFT TEMPERATURE: one benchmark.
study_draft() {
  local name flags=() top_p=1.0 kind=--checkpoint chain=self_speculative
  name=${1%.safetensors}
  name=$(basename "$(dirname "$(dirname "$name")")")-$(basename "$(dirname "$name")")-$(basename "$name")-t$2
  [[ $1 == *.safetensors ]] || { kind=--draft_model_path && chain=speculative; }
  [[ $2 != 0.7 ]] || top_p=0.95
  add_flags --model_path MODEL_PATH --spec_prompt_dataset SPEC_PROMPT_DATASET --dataset_path DATASET_PATH --spec_num_prompts SPEC_NUM_PROMPTS \
    --spec_prompt_length SPEC_PROMPT_LEN --spec_max_new_tokens SPEC_MAX_NEW --fit_prompts FIT_PROMPTS --tree_depth TREE_DEPTH --seed SEED --device DEVICE \
    --torch_dtype TORCH_DTYPE --num_threads NUM_THREADS
  [[ -z $COUNTS_ONLY ]] || flags+=(--counts_only)
  flags+=("$kind" "$1" --methods "$chain" static_tree dynamic_tree specexec)
  add_lists --gammas GAMMAS --verifications VERIFICATIONS --tree_budgets TREE_BUDGETS
  flags+=(--spec_temperature "$2" --spec_top_p "$top_p" --out_dir "$OUTPUT_DIR/$name")
  run_step "$name" "$OUTPUT_DIR/$name/results.csv" -m commands.sweep_settings "${flags[@]}"
}

words_of "$DRAFTS"
for draft in "${WORDS[@]}"; do
  words_of "$TEMPERATURES"
  for temperature in "${WORDS[@]}"; do
    study_draft "$draft" "$temperature"
  done
done
