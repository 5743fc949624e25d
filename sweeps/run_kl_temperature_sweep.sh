#!/usr/bin/env bash
# At which temperature should target and draft be compared while an exit is distilled?
#
#   bash sweeps/run_kl_temperature_sweep.sh
#   KL_TEMPS="0.5 1 2" LAYERS=7 KINDS="head head+last_block" bash sweeps/run_kl_temperature_sweep.sh
#   DRY_RUN=1 bash sweeps/run_kl_temperature_sweep.sh
#   bash launch_train_bg.sh kl_temperatures bash sweeps/run_kl_temperature_sweep.sh
#
# Trains all exits in one pass per temperature, then evaluates all of them, with plots. <dataset>_kl compares them at
# temperature 1, <dataset>_kl_at_train_temperature tells each one's figure at its own. The same command continues an
# interrupted sweep and skips what is finished; more KL_TEMPS can join, other LAYERS or KINDS need another OUTPUT_DIR.
#
#   $OUTPUT_DIR/kl_temp2/layer7/  $OUTPUT_DIR/logs/  $EVAL_DIR/results.csv
#
# Settings (environment variables) and their defaults; --help says what they mean:
#   KL_TEMPS="1 2 4" LAYERS="3 7 11" KINDS=head
#   LR=5e-5 LR_SCHEDULE=cosine MAX_STEPS=5000 BATCH_SIZE=8 GRAD_ACCUM=4
#   MODEL_PATH=meta-llama/Llama-3.2-1B-Instruct DATASET=ultrachat OUTPUT_DIR=runs/kl_temperatures
#   EVAL_DIR=runs/kl_temperatures/evaluation MAX_LENGTH=1024 WARMUP_RATIO=0.03
#   SAVE_EVERY=1000 EVAL_EVERY=500 TORCH_DTYPE=auto ATTN_IMPL=auto TORCH_COMPILE=0
#   QUALITY_DATASETS=ultrachat PYTHON=python3
#   left to the Python scripts unless set: MIX DATASET_PATH LOSS_TYPE LOSS_ON SEED DEVICE NUM_THREADS QUALITY_MAX_BATCHES
#   SPEC_PROMPT_DATASET SPEC_NUM_PROMPTS SPEC_PROMPT_LEN SPEC_MAX_NEW SPEC_T SPEC_TOP_P SPEC_TOP_K SPEC_GAMMA
#   SPEC_METHOD SPEC_VERIFICATION GROWMAP TREE_BUDGET; off unless set: LAYERS_PER_PASS DRY_RUN
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=sweeps/sweep_lib.sh
source sweeps/sweep_lib.sh

setting KL_TEMPS "1 2 4" "temperatures that soften target and draft in the KL"
setting LAYERS "3 7 11" "exits: the last kept block, 0-based"
kind_settings head 5e-5
stage_settings ""
common_settings ultrachat kl_temperatures
begin_sweep "$@"

words_of "$KL_TEMPS"
for temperature in "${WORDS[@]}"; do
  KL_TEMP=$temperature train_kinds "kl_temp$temperature" "$LAYERS"
done
evaluate_checkpoints
