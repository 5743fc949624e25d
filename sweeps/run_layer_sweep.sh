#!/usr/bin/env bash
# At which layer should this target exit, and what does an own last block add to an own head?
#
#   bash sweeps/run_layer_sweep.sh
#   MODEL_PATH=assets/pydoc-llama-7m DATASET=pydoc KINDS=head LR=3e-3 bash sweeps/run_layer_sweep.sh
#   DRY_RUN=1 bash sweeps/run_layer_sweep.sh
#   bash launch_train_bg.sh layers bash sweeps/run_layer_sweep.sh
#
# Trains every kind of exit at every layer, some layers in a pass, then evaluates all exits, with plots. With the default
# KINDS it is also the study of head only against head and last block. The same command continues an interrupted sweep and
# skips what is finished; other LAYERS or KINDS need another OUTPUT_DIR.
#
# An own head of Llama-3.2-1B takes 4.2 GB while it is trained (weights, gradients and moments in fp32), an own block 1 GB:
# the two kinds at all 16 layers together would take 150 GB, in passes of 4 layers 38 GB, beside the target.
#
#   $OUTPUT_DIR/exits/layers4_5_6_7/layer7-head+last_block/  $OUTPUT_DIR/logs/  $EVAL_DIR/results.csv
#   (with all layers in one pass without the folder layers4_5_6_7/)
#
# Settings (environment variables) and their defaults; --help says what they mean:
#   LAYERS="0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15" KINDS="head head+last_block" LAYERS_PER_PASS=4
#   LR=5e-5 LR_SCHEDULE=cosine MAX_STEPS=5000 BATCH_SIZE=8 GRAD_ACCUM=4
#   MODEL_PATH=meta-llama/Llama-3.2-1B-Instruct DATASET=ultrachat OUTPUT_DIR=runs/layers
#   EVAL_DIR=runs/layers/evaluation MAX_LENGTH=1024 KL_TEMP=1.0 WARMUP_RATIO=0.03
#   SAVE_EVERY=1000 EVAL_EVERY=500 TORCH_DTYPE=auto ATTN_IMPL=auto TORCH_COMPILE=0
#   QUALITY_DATASETS=ultrachat PYTHON=python3
#   left to the Python scripts unless set: MIX DATASET_PATH LOSS_TYPE LOSS_ON SEED DEVICE NUM_THREADS QUALITY_MAX_BATCHES
#   SPEC_PROMPT_DATASET SPEC_NUM_PROMPTS SPEC_PROMPT_LEN SPEC_MAX_NEW SPEC_T SPEC_TOP_P SPEC_TOP_K SPEC_GAMMA
#   SPEC_METHOD SPEC_VERIFICATION GROWMAP TREE_BUDGET; off unless set: DRY_RUN
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=sweeps/sweep_lib.sh
source sweeps/sweep_lib.sh

setting LAYERS "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15" "exits: the last kept block, 0-based"
kind_settings "head head+last_block" 5e-5 4
stage_settings ""
common_settings ultrachat layers
begin_sweep "$@"

train_kinds exits "$LAYERS"
evaluate_checkpoints
