# What the sweeps share: their common settings, one training step, one evaluation step, and how a step runs.
# Sourced by run_*.sh, which put this file's settings and their own into `--help`.
#
# A step shows its output and appends it to $OUTPUT_DIR/logs/<step>.log. When it ends well, its command is kept in
# $OUTPUT_DIR/logs/<step>.finished: a later start skips the step without starting Python as long as the command is
# the same and no file that it names, nor any in the target's and the data's folders, is newer. Otherwise the script starts and decides: it continues, skips what it
# has, or refuses settings that differ from those that its results were made with.
# shellcheck shell=bash

readonly EXIT_USER_ERROR=2
declare -a SETTINGS=() WORDS=() TRAINED=() CHECKPOINTS=() # CHECKPOINTS: what will be evaluated; TRAINED: those of the last pass
known_settings=' '
# Variables that look like settings: one that no sweep setting bears is a misspelling, and an error.
readonly SETTING_LIKE='^(SPEC|QUALITY|MAX_STEPS|BATCH_SIZE|GRAD_ACCUM|LR|LAYERS?|LEARNING_RATES?|LOSS|KL_TEMPS?|KINDS|OBJECTIVES|BEST|DRAFT_VOCAB)(_|$)'

# setting NAME DEFAULT HELP: an environment variable that overrides DEFAULT; one that stays empty is not passed on. The
# first call for a name counts, so that a sweep can give its own default to a common setting.
setting() {
  [[ $known_settings != *" $1 "* ]] || return 0
  known_settings+="$1 "
  SETTINGS+=("$1" "$2" "$3")
  [[ -n ${!1:-} ]] || printf -v "$1" '%s' "$2"
}

# words_of TEXT: set WORDS to the words of a setting that holds several values, whatever space parts them: `seq` puts each on
# a line of its own. A * in them is no pattern of file names.
words_of() {
  read -rd '' -a WORDS <<<"${1:-}" || true # it has met the end, and no NUL
}

# stage_settings STAGE: the size of a training stage, in settings that end in _STAGE ("": without a suffix); its learning
# rates are the sweep's own.
stage_settings() {
  local suffix=${1:+_$1}
  setting "MAX_STEPS$suffix" 5000 "optimizer steps"
  setting "BATCH_SIZE$suffix" 8 "examples per micro-batch"
  setting "GRAD_ACCUM$suffix" 4 "micro-batches per optimizer step"
}

# kind_settings KINDS LEARNING_RATE [LAYERS_PER_PASS]: a sweep over kinds of exit, trained in one stage without a name.
kind_settings() {
  setting KINDS "$1" "kinds of exit: parts joined by +, as train.py --help lists them"
  setting LR "$2" "peak learning rate; several make an exit each"
  setting LR_SCHEDULE cosine "linear, constant or cosine"
  setting LAYERS_PER_PASS "${3:-}" "layers trained together (unset: all); fewer take less memory"
}

# common_settings DATASET NAME: what every sweep has; DATASET is the default data set, NAME the sweep's folder in runs/.
common_settings() {
  setting MODEL_PATH meta-llama/Llama-3.2-1B-Instruct "the target: a Hugging Face id or a folder"
  setting DATASET "$1" "data set to train on, or several, separated by spaces and mixed"
  setting MIX "" "shares of several data sets (unset: equal)"
  setting DATASET_PATH "" "local files in that data set's form"
  setting OUTPUT_DIR "runs/$2" "training runs and logs"
  setting EVAL_DIR "$OUTPUT_DIR/evaluation" "results.csv and plots"
  setting MAX_LENGTH 1024 "longest sequence, in tokens"
  [[ $known_settings == *" KL_TEMPS "* ]] || setting KL_TEMP 1.0 "softens target and draft in the KL"
  setting WARMUP_RATIO 0.03 "share of the steps with a rising learning rate"
  setting SAVE_EVERY 1000 "steps between checkpoints, from which an interrupted run continues"
  setting EVAL_EVERY 500 "steps between validations"
  setting LOSS_TYPE "" "objective; several make an exit each"
  setting LOSS_ON "" "all tokens, or the assistant's"
  setting SEED "" "of training and of evaluation"
  setting TORCH_DTYPE auto "auto, bf16, fp16 or fp32"
  setting ATTN_IMPL auto "auto, sdpa, flash_attention_2 or eager (training)"
  setting TORCH_COMPILE 0 "1: train.py --torch_compile"
  setting DEVICE "" "auto, cpu or cuda"
  setting NUM_THREADS "" "CPU threads of torch"
  setting QUALITY_DATASETS "$DATASET" "data sets of the quality figures, separated by spaces"
  setting QUALITY_MAX_BATCHES "" "batches per data set"
  setting SPEC_PROMPT_DATASET "" "data set of the prompts for speculation"
  setting SPEC_NUM_PROMPTS "" "prompts"
  setting SPEC_PROMPT_LEN "" "tokens of a prompt"
  setting SPEC_MAX_NEW "" "new tokens per prompt"
  setting SPEC_T "" "sampling temperature; 0: greedy"
  setting SPEC_TOP_P "" "nucleus"
  setting SPEC_TOP_K "" "most likely tokens kept"
  setting SPEC_GAMMA "" "drafted tokens per round"
  setting SPEC_METHOD "" "self_speculative, speculative, static_tree, dynamic_tree or specexec"
  setting SPEC_VERIFICATION "" "chains: rejection or coupled; trees: coupled, match or swor"
  setting GROWMAP "" "shape of static trees, made by commands/build_growmap.py"
  setting TREE_BUDGET "" "nodes of dynamic trees"
  setting PYTHON python3 "interpreter"
  setting DRY_RUN "" "1: print the commands, run and write nothing"
}

# ---- the sweep ----

# begin_sweep "$@": answer --help, refuse what cannot work, and keep a second sweep out of the folder.
begin_sweep() {
  local lock
  if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    print_help
    exit 0
  fi
  (($# == 0)) || user_error "unknown argument $1: a sweep is set by environment variables; --help lists them"
  check_setting_names
  check_once LAYERS KL_TEMPS LR_SCHEDULES DRAFTS TEMPERATURES
  check_numbers
  [[ ${TORCH_COMPILE:=0} == [01] ]] || user_error "TORCH_COMPILE=$TORCH_COMPILE: give 0 or 1"
  [[ $DRY_RUN != 0 ]] || DRY_RUN=
  [[ -z $DRY_RUN ]] || return 0
  command -v "$PYTHON" >/dev/null || user_error "PYTHON=$PYTHON: no such command; run make setup and give PYTHON=.venv/bin/python"
  mkdir -p "$OUTPUT_DIR/logs"
  exec {lock}>"$OUTPUT_DIR/logs/.lock"
  flock --nonblock "$lock" || user_error "another sweep is at work in $OUTPUT_DIR; wait for it, or give another OUTPUT_DIR"
  export PYTHONUNBUFFERED=1 TQDM_DISABLE=1 # logs grow line by line, and hold no bars
  trap 'request_stop INT 130' INT
  trap 'request_stop TERM 143' TERM
  trap 'request_stop TERM 129' HUP
}

user_error() {
  echo "error: $1" >&2
  exit "$EXIT_USER_ERROR"
}

# The driver's header comment, then every setting with its meaning.
print_help() {
  local i driver=${BASH_SOURCE[-1]##*/}
  [[ -f $driver ]] || driver=sweeps/$driver
  sed -n '2,/^# Settings/{/^# Settings/d;s/^# \{0,1\}//p}' "$driver"
  printf 'Settings (environment variables; paths are relative to %s):\n' "$PWD"
  for ((i = 0; i < ${#SETTINGS[@]}; i += 3)); do
    printf '  %-22s %-36s  %s\n' "${SETTINGS[i]}" "${SETTINGS[i + 1]:-(not passed)}" "${SETTINGS[i + 2]}"
  done
}

check_setting_names() {
  local name
  while read -r name; do
    [[ ! $name =~ $SETTING_LIKE || $known_settings == *" $name "* ]] || user_error "unknown setting $name; known:$known_settings"
  done < <(compgen -e)
}

# check_once NAME...: refuse settings that a sweep goes through one by one and that name a value twice; Python refuses the other lists.
check_once() {
  local name twice
  for name; do
    words_of "${!name:-}"
    twice=$(printf '%s\n' "${WORDS[@]}" | sort | uniq -d | head -n 1)
    [[ -z $twice ]] || user_error "$name=${!name}: $twice stands twice; give each once"
  done
}

# check_numbers: refuse nan and infinities before the first step, though only a later one would be given them; names of files
# and folders are left alone.
check_numbers() {
  local i name word
  for ((i = 0; i < ${#SETTINGS[@]}; i += 3)); do
    name=${SETTINGS[i]}
    [[ $name != *PATH && $name != *DIR && $name != PYTHON && $name != DRAFTS && $name != GROWMAP ]] || continue
    words_of "${!name:-}"
    for word in "${WORDS[@]}"; do
      [[ ! ${word,,} =~ ^[+-]?(nan|inf|infinity)$ ]] || user_error "$name=${!name}: must be finite"
    done
  done
}

# train_exits RUN STAGE LAYERS FLAG...: train all exits of a stage in one pass into $OUTPUT_DIR/RUN, with the settings of
# STAGE ("": those without a suffix). Their checkpoints become TRAINED, and join CHECKPOINTS.
train_exits() {
  local run=$1 suffix=${2:+_$2} target_layers=$3 flags=()
  shift 3
  add_lists --target_layers target_layers --kinds KINDS
  flags+=("$@")
  add_flags --model_path MODEL_PATH
  add_lists --dataset DATASET --mix MIX --loss_type LOSS_TYPE --learning_rate "LR$suffix"
  add_flags --dataset_path DATASET_PATH --loss_on LOSS_ON --kl_temperature KL_TEMP --max_steps "MAX_STEPS$suffix" \
    --batch_size "BATCH_SIZE$suffix" --grad_accumulate_steps "GRAD_ACCUM$suffix" --lr_schedule "LR_SCHEDULE$suffix" \
    --warmup_ratio WARMUP_RATIO --max_length MAX_LENGTH --eval_every_steps EVAL_EVERY --save_every_steps SAVE_EVERY \
    --seed SEED --device DEVICE --torch_dtype TORCH_DTYPE --attn_implementation ATTN_IMPL --num_threads NUM_THREADS
  [[ $TORCH_COMPILE == 0 ]] || flags+=(--torch_compile)
  flags+=(--output_dir "$OUTPUT_DIR/$run" --run_name "${run//\//_}" --resume)
  run_step "${run//\//_}" "$OUTPUT_DIR/$run/final_checkpoint.txt" train.py "${flags[@]}"
  find_checkpoints "$OUTPUT_DIR/$run" "$target_layers"
  CHECKPOINTS+=("${TRAINED[@]}")
}

# train_kinds RUN LAYERS: train KINDS at LAYERS into $OUTPUT_DIR/RUN, in one pass or in one for every LAYERS_PER_PASS layers.
train_kinds() {
  local run=$1 target_layers group size i
  words_of "$2"
  target_layers=("${WORDS[@]}")
  [[ -z $LAYERS_PER_PASS || $LAYERS_PER_PASS =~ ^[1-9][0-9]*$ ]] || user_error "LAYERS_PER_PASS=$LAYERS_PER_PASS: give a positive number"
  size=${LAYERS_PER_PASS:-${#target_layers[@]}}
  for ((i = 0; i < ${#target_layers[@]}; i += size)); do
    group=${target_layers[*]:i:size}
    ((size >= ${#target_layers[@]})) || run=$1/layers${group// /_}
    train_exits "$run" "" "$group"
  done
}

# evaluate_checkpoints: one table and its plots over CHECKPOINTS.
evaluate_checkpoints() {
  evaluate_into evaluation "$EVAL_DIR"
}

# evaluate_into STEP FOLDER: the same under another name and in another folder.
evaluate_into() {
  local flags=(--checkpoint_glob "${CHECKPOINTS[@]}")
  add_lists --quality_datasets QUALITY_DATASETS
  add_flags --model_path MODEL_PATH --dataset_path DATASET_PATH --quality_max_batches QUALITY_MAX_BATCHES \
    --spec_prompt_dataset SPEC_PROMPT_DATASET --spec_num_prompts SPEC_NUM_PROMPTS --spec_prompt_length SPEC_PROMPT_LEN \
    --spec_max_new_tokens SPEC_MAX_NEW --spec_temperature SPEC_T --spec_top_p SPEC_TOP_P --spec_top_k SPEC_TOP_K \
    --gamma SPEC_GAMMA --method SPEC_METHOD --verification SPEC_VERIFICATION --growmap GROWMAP --tree_budget TREE_BUDGET --max_length MAX_LENGTH --kl_temperature KL_TEMP \
    --seed SEED --device DEVICE --torch_dtype TORCH_DTYPE --num_threads NUM_THREADS
  flags+=(--out_dir "$2")
  run_step "$1" "$2/results.csv" evaluate_checkpoints.py "${flags[@]}"
}

# add_flags --flag NAME ...: append `--flag value` to the caller's `flags` for every variable NAME that is set.
add_flags() {
  while (($#)); do
    [[ -z ${!2:-} ]] || flags+=("$1" "${!2}")
    shift 2
  done
}

# add_lists --flag NAME ...: the same for variables that hold several values.
add_lists() {
  while (($#)); do
    words_of "${!2:-}"
    ((${#WORDS[@]} == 0)) || flags+=("$1" "${WORDS[@]}")
    shift 2
  done
}

# find_checkpoints FOLDER LAYERS: set TRAINED to the final checkpoints of the run there (in a dry run perhaps placeholders).
find_checkpoints() {
  local marker=$1/final_checkpoint.txt name
  TRAINED=()
  if [[ -n $DRY_RUN && ! -f $marker ]]; then
    words_of "$2"
    for name in "${WORDS[@]}"; do TRAINED+=("$1/<final checkpoints of layer $name>"); done
    return 0
  fi
  while IFS= read -r name; do
    TRAINED+=("$1/$name")
    [[ -n $DRY_RUN || -f $1/$name ]] || user_error "$marker names $1/$name, which is not there; delete $1 to train it again"
  done <"$marker"
}

# ---- one step ----

# run_step NAME PRODUCT SCRIPT FLAG...: run `$PYTHON SCRIPT FLAG...`, which makes the file PRODUCT; a failure ends the sweep.
run_step() {
  local name=$1 product=$2 command status=0
  shift 2
  local log=$OUTPUT_DIR/logs/$name.log mark=$OUTPUT_DIR/logs/$name.finished
  printf -v command '%q ' "$@"
  if is_finished "$product" "$mark" "$command" "$@"; then
    echo "[$name] finished already, skipped${DRY_RUN:+: $PYTHON $command}"
    return 0
  fi
  echo "[$name] $PYTHON $command"
  [[ -z $DRY_RUN ]] || return 0
  printf '\n==== %s\n%s\n' "$(date '+%F %T')" "$PYTHON $command" >>"$log"
  run_logged "$log" "$PYTHON" "$@" || status=$?
  ((status != 0)) || [[ -f $product ]] || { echo "$1 ended well without making $product" >&2; status=1; }
  if ((status != 0)); then
    echo "[$name] exit status $status: the sweep stops here, and its command goes on from here. Log: $log" >&2
    exit "$status"
  fi
  printf '%s\n' "$command" >"$mark"
}

# is_finished PRODUCT MARK COMMAND ARGUMENT...
is_finished() {
  local product=$1 mark=$2 command=$3 argument folder
  [[ -f $product && -f $mark && $(<"$mark") == "$command" ]] || return 1
  if [[ ${product##*/} == final_checkpoint.txt ]]; then # train.py writes one that is gone again
    while IFS= read -r argument; do
      [[ -f ${product%/*}/$argument ]] || return 1
    done <"$product"
  fi
  shift 3
  for argument; do
    [[ ! -f $argument || ! $argument -nt $mark ]] || return 1
  done
  for folder in "$MODEL_PATH" "$DATASET_PATH"; do
    [[ ! -d $folder || -z $(find -L "$folder" -type f -newer "$mark" -print -quit) ]] || return 1
  done
}

child='' stopped_by='' # process at work; 128 + the signal that ended the sweep

# request_stop SIGNAL STATUS: pass the signal on to the step at work, which saves and ends; then the sweep does, too.
request_stop() {
  [[ -n $child ]] || exit "$2"
  stopped_by=$2
  kill -s "$1" "$child" 2>/dev/null || true
}

# run_logged LOG COMMAND...: run it with its output on the terminal and in LOG; returns its exit status.
run_logged() {
  local log=$1 pipe tee_pid status=0 seen
  shift
  exec {pipe}> >(trap '' INT TERM HUP; exec tee -a "$log")
  tee_pid=$!
  # A process group of its own (set -m): a signal to the sweep's group reaches the step through request_stop only. Two
  # of them would mean "do not even save".
  set -m
  "$@" </dev/null >&"$pipe" 2>&1 &
  child=$!
  set +m
  exec {pipe}>&-
  while true; do # wait returns early whenever a trap has run
    seen=$stopped_by
    wait "$child" && status=0 || status=$?
    [[ $stopped_by != "$seen" ]] || break
  done
  kill -TERM -- "-$child" 2>/dev/null || true # what the step has left running: it would hold the log open
  child=
  wait "$tee_pid" || true
  return "${stopped_by:-$status}"
}
