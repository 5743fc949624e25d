#!/usr/bin/env bash
# Start a long command that outlives this shell: in tmux where there is one, else with setsid and nohup.
#
#   bash launch_train_bg.sh two_stage bash run_sweep_ultrachat_two_stage.sh
#   MAX_STEPS_HEAD=2000 bash launch_train_bg.sh short_heads bash run_sweep_chat_layers.sh
#   bash launch_train_bg.sh layer7 python train.py --target_layer 7 ... --resume
#
# The command runs in the current folder and with the current environment. Its output goes to
# logs/<name>-<time>.log beside this script, whose last line will be its exit status. A name can be at work only once.
#
# Settings (environment variables):
#   LAUNCHER=tmux|nohup  how to start it (default: tmux where there is one)
#   LOG_DIR              folder of the logs (default: logs beside this script)
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

(($# >= 2)) || fail "usage: bash launch_train_bg.sh <name> <command> [argument...]"
name=$1
shift
[[ $name =~ ^[A-Za-z0-9_-]+$ ]] || fail "name '$name': use letters, digits, _ and - only"
command -v "$1" >/dev/null || fail "$1: no such command"
if [[ -z ${LAUNCHER:-} ]]; then
  LAUNCHER=$(command -v tmux >/dev/null && echo tmux || echo nohup)
fi
[[ $LAUNCHER == tmux || $LAUNCHER == nohup ]] || fail "LAUNCHER=$LAUNCHER: give tmux or nohup"
[[ $LAUNCHER == nohup ]] || command -v tmux >/dev/null || fail "LAUNCHER=tmux: there is no tmux here; install it, or give LAUNCHER=nohup"

LOG_DIR=${LOG_DIR:-$(dirname "${BASH_SOURCE[0]}")/logs}
mkdir -p "$LOG_DIR"
LOG_DIR=$(cd "$LOG_DIR" && pwd)
log=$LOG_DIR/$name-$(date +%Y%m%d-%H%M%S).log
lock=$LOG_DIR/.$name.lock # held by the running command, and let go by the kernel however that ends
flock --nonblock "$lock" true || fail "'$name' is at work already (logs: $LOG_DIR/$name-*.log); choose another name, or stop it first"
if [[ $LAUNCHER == tmux ]] && tmux has-session -t "=$name" 2>/dev/null; then
  fail "tmux has a session called '$name' already; choose another name"
fi

# A tmux server keeps the environment that it was started with, so the job carries this shell's own. It is a file that
# only its owner can read, and that deletes itself; where it does not come to that, this script does.
job=$(mktemp)
trap 'rm -f "$job"' EXIT
{
  (unset TERM TMUX TMUX_PANE && export -p)
  printf 'cd %q\nset --' "$PWD"
  printf ' %q' "$@"
  printf '\nlog=%q lock=%q\n' "$log" "$lock"
  cat <<'END'
rm -f "$0"
exec {held}>"$lock"
flock --nonblock "$held" || { echo "at work already under this name" | tee -a "$log" >&2; exit 2; }
exec > >(trap '' INT TERM HUP; exec tee -a "$log") 2>&1
trap : INT TERM HUP # the command decides what a signal means; this shell stays to write down how it ended
printf '%s in %s: ' "$(date '+%F %T')" "$PWD"
printf '%q ' "$@"
echo
status=0
"$@" || status=$?
echo "exit status $status at $(date '+%F %T')"
END
} >"$job"

if [[ $LAUNCHER == tmux ]]; then
  tmux new-session -d -s "$name" "exec bash $job" || fail "tmux does not start; see what it says above, or give LAUNCHER=nohup"
  attach="tmux attach -t $name    (leave it running with Ctrl-b d)"
  stop="tmux send-keys -t $name C-c"
else
  nohup setsid bash "$job" </dev/null >/dev/null 2>&1 &
  attach="not possible without tmux; follow the log"
  stop="kill -TERM -- -$!"
fi
for _ in {1..50}; do # until the job holds the lock, so that a second launch sees it
  [[ ! -s $log ]] || break
  sleep 0.1
done
[[ -s $log ]] || fail "'$name' has not started under $LAUNCHER; nothing is in $log"
cat <<END
'$name' runs under $LAUNCHER.
  log:    $log
  follow: tail -f $log
  attach: $attach
  stop:   $stop
END
