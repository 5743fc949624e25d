#!/usr/bin/env bash
# How much capacity should an exit have, of which kind, at which layer, and for which objective should it be trained?
#
#   bash sweeps/run_capacity_study.sh
#   LAYERS="1 3" MAX_STEPS=300 BEST=1:head+last_block bash sweeps/run_capacity_study.sh
#   DRY_RUN=1 bash sweeps/run_capacity_study.sh
#   bash launch_train_bg.sh capacity bash sweeps/run_capacity_study.sh
#
# Trains every kind of exit at all layers in one pass and evaluates them, with plots; then trains the best of them (BEST, or
# the one with the largest spec_predicted_speedup) for every objective in one pass and evaluates these. By default on the
# embedded target. The same command continues an interrupted study and skips what is finished; other LAYERS or KINDS need
# another OUTPUT_DIR.
#
#   $OUTPUT_DIR/kinds/layer3-rank64/  $EVAL_DIR/results.csv  $OUTPUT_DIR/logs/
#   $OUTPUT_DIR/objectives/layer1-head+last_block/lk/  $EVAL_DIR/objectives/results.csv
#
# Settings (environment variables) and their defaults; --help says what they mean:
#   LAYERS="1 3 7 11" KINDS="head rank64 rank128 translator last_block head+last_block attention_block head+attention_block full_block head+full_block head+vocab1024 head+last_block+vocab1024"
#   OBJECTIVES="kl_divergence cross_entropy combined reverse_kl total_variation lk"
#   LR=3e-3 LR_SCHEDULE=cosine MAX_STEPS=1000 BATCH_SIZE=8 GRAD_ACCUM=1
#   MODEL_PATH=assets/pydoc-llama-7m DATASET=pydoc OUTPUT_DIR=runs/capacity
#   EVAL_DIR=runs/capacity/evaluation MAX_LENGTH=256 KL_TEMP=1.0 WARMUP_RATIO=0.03
#   SAVE_EVERY=500 EVAL_EVERY=250 TORCH_DTYPE=auto ATTN_IMPL=auto TORCH_COMPILE=0
#   QUALITY_DATASETS=pydoc PYTHON=python3
#   left to the Python scripts unless set: MIX DATASET_PATH LOSS_TYPE LOSS_ON SEED DEVICE NUM_THREADS QUALITY_MAX_BATCHES
#   SPEC_PROMPT_DATASET SPEC_NUM_PROMPTS SPEC_PROMPT_LEN SPEC_MAX_NEW SPEC_T SPEC_TOP_P SPEC_TOP_K SPEC_GAMMA
#   SPEC_METHOD SPEC_VERIFICATION GROWMAP TREE_BUDGET; off unless set: BEST LAYERS_PER_PASS DRY_RUN
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=sweeps/sweep_lib.sh
source sweeps/sweep_lib.sh

setting LAYERS "1 3 7 11" "exits: the last kept block, 0-based"
setting OBJECTIVES "kl_divergence cross_entropy combined reverse_kl total_variation lk" "objectives of the best exit"
setting BEST "" "LAYER:KIND to train for the objectives (unset: the one with the largest predicted speedup)"
kind_settings "head rank64 rank128 translator last_block head+last_block attention_block head+attention_block full_block head+full_block head+vocab1024 head+last_block+vocab1024" 3e-3
setting MAX_STEPS 1000 "optimizer steps"
setting GRAD_ACCUM 1 "micro-batches per optimizer step"
stage_settings ""
setting MODEL_PATH assets/pydoc-llama-7m "the target: a Hugging Face id or a folder"
setting MAX_LENGTH 256 "longest sequence, in tokens"
setting SAVE_EVERY 500 "steps between checkpoints, from which an interrupted run continues"
setting EVAL_EVERY 250 "steps between validations"
common_settings pydoc capacity
begin_sweep "$@"
[[ -z $BEST || $BEST =~ ^[0-9]+:.+$ ]] || user_error "BEST=$BEST: give LAYER:KIND, such as BEST=1:head+last_block"

# best_exit TABLE: print LAYER:KIND of its trained exit with the largest predicted speedup.
best_exit() {
  "$PYTHON" -c '
import sys

import pandas as pd

path = sys.argv[1]
table = pd.read_csv(path)
trained = table[~table["kind"].isin(["untuned", "target"])]
speedups = trained.get("spec_predicted_speedup", pd.Series(dtype=float)).dropna()
if speedups.empty:
    sys.exit(f"error: {path}: no trained exit with a spec_predicted_speedup; give BEST=LAYER:KIND")
best = table.loc[speedups.idxmax()]
print(f"{best.target_layer}:{best.kind}")
' "$1"
}

train_kinds kinds "$LAYERS"
evaluate_checkpoints

if [[ -z $BEST ]]; then
  if [[ -n $DRY_RUN ]]; then BEST='<layer>:<kind>'; else BEST=$(best_exit "$EVAL_DIR/results.csv"); fi
  echo "[best] $BEST has the largest predicted speedup"
fi
layer=${BEST%%:*} kind=${BEST#*:} CHECKPOINTS=()
KINDS=$kind LOSS_TYPE=$OBJECTIVES train_exits "objectives/layer$layer-$kind" "" "$layer"
evaluate_into evaluation_objectives "$EVAL_DIR/objectives"
