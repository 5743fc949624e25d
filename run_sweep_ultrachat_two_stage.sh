#!/usr/bin/env bash
# At which layer should this target exit, and what does tuning the last block add to tuning the head?
#
#   bash run_sweep_ultrachat_two_stage.sh
#   LAYERS="7 11" MAX_STEPS_HEAD=2000 SPEC_T=0 bash run_sweep_ultrachat_two_stage.sh
#   DRY_RUN=1 bash run_sweep_ultrachat_two_stage.sh
#   bash launch_train_bg.sh two_stage bash run_sweep_ultrachat_two_stage.sh
#
# Stage 1 tunes the heads of all layers in one pass, stage 2 goes on from there with heads and last blocks. Then one
# evaluation of all exits, with plots. The same command continues an interrupted sweep and skips what is finished; other
# LAYERS need another OUTPUT_DIR.
#
#   $OUTPUT_DIR/head/layer7/  $OUTPUT_DIR/ftlast/layer7/  $OUTPUT_DIR/logs/  $EVAL_DIR/results.csv
#   (of a single layer without the folder layer7/)
#
# Settings (environment variables) and their defaults; --help says what they mean:
#   LAYERS="3 7 11"
#   LR_HEAD=5e-5 LR_SCHEDULE_HEAD=cosine MAX_STEPS_HEAD=5000 BATCH_SIZE_HEAD=8 GRAD_ACCUM_HEAD=4
#   LR_FTLAST=2e-5 LR_SCHEDULE_FTLAST=cosine MAX_STEPS_FTLAST=5000 BATCH_SIZE_FTLAST=8 GRAD_ACCUM_FTLAST=4
#   MODEL_PATH=meta-llama/Llama-3.2-1B-Instruct DATASET=ultrachat OUTPUT_DIR=runs/ultrachat_two_stage
#   EVAL_DIR=runs/ultrachat_two_stage/evaluation MAX_LENGTH=1024 KL_TEMP=1.0 WARMUP_RATIO=0.03
#   SAVE_EVERY=1000 EVAL_EVERY=500 TORCH_DTYPE=auto ATTN_IMPL=auto TORCH_COMPILE=0
#   QUALITY_DATASETS=ultrachat PYTHON=python3
#   left to the Python scripts unless set: MIX DATASET_PATH LOSS_TYPE LOSS_ON SEED DEVICE NUM_THREADS QUALITY_MAX_BATCHES
#   SPEC_PROMPT_DATASET SPEC_NUM_PROMPTS SPEC_PROMPT_LEN SPEC_MAX_NEW SPEC_T SPEC_TOP_P SPEC_TOP_K SPEC_GAMMA
#   SPEC_METHOD SPEC_VERIFICATION GROWMAP TREE_BUDGET; off unless set: DRAFT_VOCAB DRY_RUN
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=sweeps/sweep_lib.sh
source sweeps/sweep_lib.sh

setting LAYERS "3 7 11" "exits: the last kept block, 0-based"
setting LR_HEAD 5e-5 "peak learning rate of stage 1"
setting LR_SCHEDULE_HEAD cosine "linear, constant or cosine"
stage_settings HEAD
setting LR_FTLAST 2e-5 "peak learning rate of stage 2"
setting LR_SCHEDULE_FTLAST cosine "linear, constant or cosine"
stage_settings FTLAST
setting DRAFT_VOCAB "" "tokens that the heads know, the most frequent ones (unset: all)"
common_settings ultrachat ultrachat_two_stage
begin_sweep "$@"

[[ $LR_HEAD$LOSS_TYPE != *[[:space:]]* ]] || user_error "LR_HEAD=$LR_HEAD LOSS_TYPE=$LOSS_TYPE: stage 2 starts from one exit per layer; give one value each"

heads=(--ft_head ${DRAFT_VOCAB:+--draft_vocab_size "$DRAFT_VOCAB"})
train_exits head HEAD "$LAYERS" "${heads[@]}"
train_exits ftlast FTLAST "$LAYERS" "${heads[@]}" --ft_last_transformer --checkpoint_path "${TRAINED[@]}"
evaluate_checkpoints
