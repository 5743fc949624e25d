#!/usr/bin/env bash
# List the wheels that an aarch64 machine with Python 3.12 gets, as in NVIDIA's containers on a GH200: what install_dependencies.sh
# and the optional parts bring, torch and what comes with it aside, for the oldest torch admitted and for a current one.
# Every one is asked of pip for that platform; a package without a wheel is listed as such, and the exit status is then 1.
#
#   bash requirements/aarch64_wheels.sh > docs/aarch64-wheels.txt        # or make aarch64-wheels
#
# Settings (environment variables):
#   PYTHON  whose pip asks, and for which uv is installed if it is missing (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=requirements/aarch64_platforms.sh
source requirements/aarch64_platforms.sh

readonly OPTIONAL=(tensorboard wandb bitsandbytes)

main() {
  local folder failed=0
  python=${PYTHON:-.venv/bin/python}
  folder=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$folder'" EXIT
  "$python" -m uv --version >/dev/null 2>&1 || "$python" -m pip install --quiet uv >&2
  echo "# Wheels for aarch64, Python 3.12, glibc 2.28 and later, on $(date -u +%F): bash requirements/aarch64_wheels.sh"
  wheels requirements.txt 2.6.0 "$folder"
  wheels requirements/newest.txt 2.13.0 "$folder"
  ((failed == 0)) || exit 1
}

wheels() {
  local file=$1 torch=$2 folder=$3 pin
  rm -f "$folder/pins.txt" # uv would prefer what it chose before
  printf '\n# %s, beside torch %s\n' "$file" "$torch"
  printf '%s\n' "${OPTIONAL[@]}" >"$folder/optional.txt"
  echo "torch==$torch" >"$folder/held.txt"
  "$python" -m uv pip compile --quiet --python-platform aarch64-manylinux_2_28 --python-version 3.12 --no-header --no-annotate \
    --constraint "$folder/held.txt" "$file" requirements/dev.txt "$folder/optional.txt" -o "$folder/pins.txt" >&2
  while read -r pin; do
    [[ $pin =~ ^(torch|triton|nvidia-.*|cuda-.*)== ]] || wheel "$pin" "$folder"
  done <"$folder/pins.txt"
}

wheel() {
  rm -f "$2"/*.whl
  if PIP_CONSTRAINT='' "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 312 "${PLATFORMS[@]/#/--platform=}" -d "$2" "$1" >/dev/null 2>&1; then
    echo "$1 $(basename "$2"/*.whl)"
  else
    echo "$1 no wheel"
    failed=1
  fi
}

main "$@"
