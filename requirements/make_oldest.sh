#!/usr/bin/env bash
# Make the virtual environment of make test-oldest: Python 3.12 with the versions of oldest.txt, its torch named as NVIDIA's
# container 25.01 names its own. A second run finds nothing to do.
#
#   bash requirements/make_oldest.sh .venv-oldest
#
# Settings (environment variables):
#   OLDEST_PYTHON  (default: python3.12)
#   PIP_FLAGS      for pip install
set -euo pipefail

readonly NAMED=2.6.0a0+ecf3bae40a.nv25.01

venv=${1:?usage: make_oldest.sh VENV}
folder=$(dirname "${BASH_SOURCE[0]}")
python=${OLDEST_PYTHON:-python3.12}
wanted="$NAMED $(cksum <"$folder/oldest.txt")"
if [[ $(cat "$venv/.oldest" 2>/dev/null) != "$wanted" ]]; then
  "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
    { echo "error: $python is no Python 3.12 that makes virtual environments; name one by OLDEST_PYTHON" >&2; exit 2; }
  "$python" -m venv --clear "$venv"
  read -rd '' -a flags <<<"${PIP_FLAGS:-}" || true
  "$venv/bin/python" -m pip install "${flags[@]}" -r "$folder/oldest.txt"
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  sed -i "s/^__version__ = .*/__version__ = '$NAMED'/" "$packages/torch/version.py"
  sed -i "s/^Version: .*/Version: $NAMED/" "$packages"/torch-2.6.0*.dist-info/METADATA
  echo "$wanted" >"$venv/.oldest"
fi
touch "$venv/.installed" # make setup takes it for done
