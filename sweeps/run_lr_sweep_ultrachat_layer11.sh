#!/usr/bin/env bash
# Which learning rate and schedule tune the head of one exit best?
#
#   bash sweeps/run_lr_sweep_ultrachat_layer11.sh
#   LAYER=7 LEARNING_RATES="1e-4 3e-4" LR_SCHEDULES=cosine bash sweeps/run_lr_sweep_ultrachat_layer11.sh
#   DRY_RUN=1 bash sweeps/run_lr_sweep_ultrachat_layer11.sh
#   bash launch_train_bg.sh lr_sweep bash sweeps/run_lr_sweep_ultrachat_layer11.sh
#
# Tunes the head once for every pair of rate and schedule, the rates of a schedule in one pass, then evaluates all of
# them, with plots. The same command continues an interrupted sweep and skips what is finished; other LEARNING_RATES need
# another OUTPUT_DIR.
#
#   $OUTPUT_DIR/head/layer11_cosine/lr5e-05/  $OUTPUT_DIR/logs/  $EVAL_DIR/results.csv
#
# Settings (environment variables) and their defaults; --help says what they mean:
#   LAYER=11 LEARNING_RATES="2e-5 5e-5 1e-4" LR_SCHEDULES="linear constant cosine"
#   MAX_STEPS_HEAD=5000 BATCH_SIZE_HEAD=8 GRAD_ACCUM_HEAD=4
#   MODEL_PATH=meta-llama/Llama-3.2-1B-Instruct DATASET=ultrachat OUTPUT_DIR=runs/lr_sweep
#   EVAL_DIR=runs/lr_sweep/evaluation MAX_LENGTH=1024 KL_TEMP=1.0 WARMUP_RATIO=0.03
#   SAVE_EVERY=1000 EVAL_EVERY=500 TORCH_DTYPE=auto ATTN_IMPL=auto TORCH_COMPILE=0
#   QUALITY_DATASETS=ultrachat PYTHON=python3
#   left to the Python scripts unless set: MIX DATASET_PATH LOSS_TYPE LOSS_ON SEED DEVICE NUM_THREADS QUALITY_MAX_BATCHES
#   SPEC_PROMPT_DATASET SPEC_NUM_PROMPTS SPEC_PROMPT_LEN SPEC_MAX_NEW SPEC_T SPEC_TOP_P SPEC_TOP_K SPEC_GAMMA
#   SPEC_METHOD SPEC_VERIFICATION GROWMAP TREE_BUDGET; off unless set: DRY_RUN
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=sweeps/sweep_lib.sh
source sweeps/sweep_lib.sh

setting LAYER 11 "the exit: the last kept block, 0-based"
setting LEARNING_RATES "2e-5 5e-5 1e-4" "peak learning rates"
setting LR_SCHEDULES "linear constant cosine" "schedules"
stage_settings HEAD
common_settings ultrachat lr_sweep
begin_sweep "$@"

words_of "$LR_SCHEDULES"
for schedule in "${WORDS[@]}"; do
  LR_HEAD=$LEARNING_RATES LR_SCHEDULE_HEAD=$schedule train_exits "head/layer${LAYER}_$schedule" HEAD "$LAYER" --ft_head
done
evaluate_checkpoints
