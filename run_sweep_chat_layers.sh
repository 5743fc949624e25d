#!/usr/bin/env bash
# How good does an exit get, layer by layer, when only its head is tuned on ShareGPT chats?
#
#   bash run_sweep_chat_layers.sh
#   DATASET_PATH="data/sharegpt/*.json" LAYERS="5 9" bash run_sweep_chat_layers.sh
#   DRY_RUN=1 bash run_sweep_chat_layers.sh
#   bash launch_train_bg.sh chat_layers bash run_sweep_chat_layers.sh
#
# Tunes one head per layer, all in one pass, then evaluates the exits, with plots. The same command continues an
# interrupted sweep and skips what is finished; other LAYERS need another OUTPUT_DIR.
#
#   $OUTPUT_DIR/head/layer7/ (head/ of a single layer)  $OUTPUT_DIR/logs/  $EVAL_DIR/results.csv
#
# Settings (environment variables) and their defaults; --help says what they mean:
#   LAYERS="3 7 11 15"
#   LR_HEAD=5e-5 LR_SCHEDULE_HEAD=cosine MAX_STEPS_HEAD=5000 BATCH_SIZE_HEAD=8 GRAD_ACCUM_HEAD=4
#   MODEL_PATH=meta-llama/Llama-3.2-1B-Instruct DATASET=share_gpt OUTPUT_DIR=runs/chat_layers
#   EVAL_DIR=runs/chat_layers/evaluation MAX_LENGTH=1024 KL_TEMP=1.0 WARMUP_RATIO=0.03
#   SAVE_EVERY=1000 EVAL_EVERY=500 TORCH_DTYPE=auto ATTN_IMPL=auto TORCH_COMPILE=0
#   QUALITY_DATASETS=share_gpt PYTHON=python3
#   left to the Python scripts unless set: MIX DATASET_PATH LOSS_TYPE LOSS_ON SEED DEVICE NUM_THREADS QUALITY_MAX_BATCHES
#   SPEC_PROMPT_DATASET SPEC_NUM_PROMPTS SPEC_PROMPT_LEN SPEC_MAX_NEW SPEC_T SPEC_TOP_P SPEC_TOP_K SPEC_GAMMA
#   SPEC_METHOD SPEC_VERIFICATION GROWMAP TREE_BUDGET; off unless set: DRY_RUN
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=sweeps/sweep_lib.sh
source sweeps/sweep_lib.sh

setting LAYERS "3 7 11 15" "exits: the last kept block, 0-based"
setting LR_HEAD 5e-5 "peak learning rate"
setting LR_SCHEDULE_HEAD cosine "linear, constant or cosine"
stage_settings HEAD
common_settings share_gpt chat_layers
begin_sweep "$@"

train_exits head HEAD "$LAYERS" --ft_head
evaluate_checkpoints
