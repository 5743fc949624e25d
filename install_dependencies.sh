#!/usr/bin/env bash
# Install what the suite needs on a bare Ubuntu or Debian, host or image: from apt what is missing, and a virtual environment
# with the tested versions. A second run finds nothing to do. Drivers are never touched.
#
#   ./install_dependencies.sh                  # .venv with the CPU build of torch
#   ./install_dependencies.sh --gpu            # with the CUDA build
#   ./install_dependencies.sh --keep_torch     # in an NVIDIA container: with the container's own torch (docs/gpu.md)
#
# Flags:
#   --gpu               install the CUDA build of torch; needs an NVIDIA driver
#   --gpu_later         the same without a driver: for an image, which meets its driver when it runs
#   --keep_torch        install no torch: the virtual environment sees the packages of python3, and its torch and numpy stay
#   --venv PATH         the virtual environment (default: .venv beside this script)
#   --allow_eol_ubuntu  go on with a release of Ubuntu, or Debian, that gets no more updates
#   --help
#
# A virtual environment keeps the kind of torch that it was made with, until a flag names another; then it is made anew.
# On other systems, and without root or sudo, there is only the virtual environment; a line says what is missing.
#
# Settings (environment variables):
#   SYSTEM_PYTHON    makes the virtual environment (default: python3.11, else another from 3.10 to 3.13; with --keep_torch python3)
#   PIP_FLAGS        for every pip install
#   TORCH_VERSION    (default: that of requirements/constraints.txt)
#   TORCH_INDEX_URL  an index with builds of torch, asked beside pip's own
#   PIP_CONSTRAINT   as pip reads it; NVIDIA's containers set it, and it is followed, unless pip fails with it
#   OS_RELEASE       names the release of this system (default: /etc/os-release)
set -euo pipefail

readonly PYTHONS=(3.11 3.12 3.13 3.10) # the tested one first
# What a Python has of what is needed here: its version, and words for the rest.
readonly PROBE='
import importlib.metadata, importlib.util, os, sys, sysconfig
have = ["%d.%d" % sys.version_info[:2]]
have += [word for word, module in (("venv", "ensurepip"), ("pip", "pip")) if importlib.util.find_spec(module)]
have += ["headers"] if os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")) else []
for name in ("torch", "numpy"):
    have += [name + "==" + found.version for found in importlib.metadata.distributions(name=name)][:1]
have += ["packages=" + sysconfig.get_path("purelib")] if sys.prefix != sys.base_prefix else [] # it is a virtual environment itself
print(*have)'

main() {
  local kind='' driver='' venv='' allow_eol='' python python_has packages torch
  parse_flags "$@"
  [[ -z $venv || $venv == /* ]] || venv=$PWD/$venv
  cd "$(dirname "${BASH_SOURCE[0]}")"
  venv=${venv:-.venv}
  check_release
  [[ -z $driver ]] || nvidia-smi -L >/dev/null 2>&1 ||
    fail "--gpu: no NVIDIA driver answers (nvidia-smi -L); install one, or leave the flag out for the CPU build of torch"
  [[ -n $kind ]] || read -r kind _ 2>/dev/null <"$venv/.installed" || kind=cpu
  install_packages
  choose_torch
  if [[ -x $venv/bin/python && $(cat "$venv/.installed" 2>/dev/null) == "$(ingredients)" ]]; then
    touch "$venv/.installed" 2>/dev/null || true # make compares times
    say "nothing more to do: $venv has $torch and the suite's other packages"
    return
  fi
  make_venv
  fill_venv
  ingredients >"$venv/.installed"
  say "$(chosen)"
}

parse_flags() {
  while (($#)); do
    case $1 in
      --gpu) kind=cuda driver=needed ;;
      --gpu_later) kind=cuda ;;
      --keep_torch) kind=own ;;
      --allow_eol_ubuntu) allow_eol=1 ;;
      --venv)
        [[ -n ${2:-} ]] || fail "--venv: give a path"
        venv=$2
        shift
        ;;
      --help | -h)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
        exit
        ;;
      *) fail "unknown argument $1; --help lists the flags" ;;
    esac
    shift
  done
}

fail() {
  echo "error: $1" >&2
  exit 2
}

say() {
  echo "==== $1"
}

# Free updates end for Ubuntu after five years (20.04: May 2025), for Debian with its long-term support (11: August 2026).
# The line also falls where a release's own Python (3.8, 3.9) is too old for the suite. Ubuntu's short-lived releases between
# two long-lived ones are not told apart, and other systems are not judged.
check_release() {
  local id version oldest
  [[ -r ${OS_RELEASE:=/etc/os-release} ]] || return 0
  # shellcheck disable=SC1090
  read -r id version < <(. "$OS_RELEASE" && echo "${ID:-} ${VERSION_ID:-}")
  case $id in
    ubuntu) oldest=22.04 ;;
    debian) oldest=12 ;;
    *) return 0 ;;
  esac
  [[ -z $version || -n $allow_eol ]] || ((${version%%.*} >= ${oldest%%.*})) ||
    fail "$id $version gets no more updates; move to $oldest or later, or give --allow_eol_ubuntu"
}

# ---- apt ----

install_packages() {
  local as_root=env
  find_missing
  [[ -n $python || -z ${SYSTEM_PYTHON:-} ]] || fail "SYSTEM_PYTHON=$SYSTEM_PYTHON: no such Python, or not one from 3.10 to 3.13"
  [[ -z $python ]] || ((${#packages[@]})) || return 0
  (($(id -u) == 0)) || as_root=sudo
  if command -v apt-get >/dev/null && command -v "$as_root" >/dev/null; then
    "$as_root" apt-get update || say "apt-get update failed; going on with the lists that are here"
    [[ -n $python ]] || mapfile -t -O "${#packages[@]}" packages < <(apt_python)
    say "apt-get install ${packages[*]}"
    "$as_root" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${packages[@]}"
    find_missing
  fi
  [[ -n $python ]] || fail "there is no Python from 3.10 to 3.13; install one with its venv module, and name it by SYSTEM_PYTHON"
  can_make_venv || fail "$python makes no virtual environments; as root: apt-get install python${python_has%% *}-venv"
  ((${#packages[@]} == 0)) || echo "warning: going on without ${packages[*]}, which apt-get would install for root" >&2
}

# Sets `packages` to apt's names of what is missing, but for a Python where there is none.
find_missing() {
  local command
  packages=()
  for command in make g++ git; do # git: results name the revision that made them
    command -v "$command" >/dev/null || packages+=("$command")
  done
  [[ -e /etc/ssl/certs/ca-certificates.crt ]] || packages+=(ca-certificates) # for downloads from the hub
  find_python
  [[ -n $python ]] || return 0
  can_make_venv || packages+=("python${python_has%% *}-venv")
  [[ $python_has == *" headers"* ]] || packages+=("python${python_has%% *}-dev") # torch.compile compiles against them
}

# A virtual environment that sees python3's packages takes its pip from there, too.
can_make_venv() {
  [[ $python_has == *" venv"* || ($kind == own && $python_has == *" pip"*) ]]
}

# Sets `python` to the first that will do and `python_has` to what it has, or both to nothing.
find_python() {
  local candidates=(python3.11 python3 "${PYTHONS[@]/#/python}") # the release's own before other versions
  [[ $kind != own ]] || candidates=(python3)
  [[ -z ${SYSTEM_PYTHON:-} ]] || candidates=("$SYSTEM_PYTHON")
  for python in "${candidates[@]}"; do
    python_has=$("$python" -c "$PROBE" 2>/dev/null) || continue
    [[ " ${PYTHONS[*]} " != *" ${python_has%% *} "* ]] || return 0
  done
  python='' python_has=''
}

# Packages of the first Python that apt has, release candidates aside (Ubuntu 22.04's python3.11 is one).
apt_python() {
  local name candidate
  for name in "${PYTHONS[@]/#/python}"; do
    candidate=$(LC_ALL=C apt-cache policy "$name" | sed -n 's/^ *Candidate: //p')
    [[ -n $candidate && $candidate != "(none)" && $candidate != *~rc* ]] || continue
    printf '%s\n' "$name" "$name-venv" "$name-dev"
    return
  done
}

# ---- the virtual environment ----

# Sets `torch` to what pip is to install, or to what the system's Python has.
choose_torch() {
  torch=torch==${TORCH_VERSION:-$(sed -n 's/^torch==//p' requirements/constraints.txt)}
  case $kind in
    cpu) # pip's own index has CUDA builds for Linux, which bring gigabytes of CUDA packages
      [[ $(uname -s) != Linux || $torch == *+* ]] || torch+=+cpu
      ! nvidia-smi -L >/dev/null 2>&1 || say "an NVIDIA driver is here: --gpu would install the CUDA build of torch"
      ;;
    own)
      [[ $python_has == *torch==* ]] || fail "--keep_torch: $python has no torch; leave the flag out, or give --gpu"
      torch=$(version_of torch)
      check_range
      ;;
  esac
}

# The word "NAME==VERSION" of what the Python has, or nothing.
version_of() {
  local word
  for word in $python_has; do
    [[ $word != "$1"==* ]] || echo "$word"
  done
}

# Python's own torch has to lie in the range of requirements/common.txt.
check_range() {
  local range lowest excluded
  range=$(sed -n 's/^torch>=//p' requirements/common.txt)
  lowest=${range%,<*} excluded=${range#*,<}
  (($(release "${torch#*==}") >= $(release "$lowest"))) ||
    fail "--keep_torch: $torch of $python is too old: needs $lowest or newer; take a newer container (NVIDIA's from 24.11 on), or leave the flag out and give --gpu"
  (($(release "${torch#*==}") < $(release "$excluded"))) ||
    fail "--keep_torch: $torch of $python is too new: tested below $excluded; take an older container, or leave the flag out and give --gpu"
}

# The first two numbers of a version as one that can be compared: 2.6.0a0 is 2006.
release() {
  local major minor
  IFS=. read -r major minor _ <<<"$1"
  echo $((major * 1000 + minor))
}

# What the virtual environment is made of, in a line; its file .installed holds that of the last installation.
ingredients() {
  echo "$kind python${python_has%% *} $torch $(cat requirements/{common,newest,dev,constraints}.txt | cksum)"
}

make_venv() {
  local made_for make=("$python" -m venv) fields=1,2 wanted="$kind python${python_has%% *}"
  if [[ ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv" 2>/dev/null) ]]; then
    fail "--venv $venv: is there already, and is no virtual environment"
  fi
  [[ $kind != own ]] || fields=1-3 wanted+=" $torch" # another torch takes another transformers
  made_for=$(cut -d ' ' -f "$fields" "$venv/.installed" 2>/dev/null) || true
  if [[ -n $made_for && $made_for != "$wanted" ]] || [[ -e $venv/pyvenv.cfg && ! -x $venv/bin/python ]]; then
    say "$venv was made for another kind of torch or Python (${made_for:-gone}): made anew"
    make+=(--clear)
  fi
  [[ $kind != own ]] || make+=(--system-site-packages)
  [[ $kind != own || $python_has != *" pip"* ]] || make+=(--without-pip)
  "${make[@]}" "$venv"
  if [[ $kind == own && $python_has == *" packages="* ]]; then
    echo "${python_has##* packages=}" >"$venv/lib/python${python_has%% *}/site-packages/keep_torch.pth"
  fi
  if [[ $kind == own && ! -e $venv/bin/pip ]]; then # the container's pip, for this environment
    # shellcheck disable=SC2016
    printf '#!/bin/sh\nexec "$(dirname "$0")/python" -m pip "$@"\n' >"$venv/bin/pip"
    chmod +x "$venv/bin/pip"
  fi
  rm -f "$venv/.installed" # until all is in place
}

fill_venv() {
  local install constraints=$venv/constraints.txt
  constrain >"$constraints"
  read -rd '' -a install <<<"-m pip install ${PIP_FLAGS:-}" || true # its flags may stand on several lines
  install+=(-c "$constraints")
  if [[ $kind != own ]]; then
    "$venv/bin/python" "${install[@]}" ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$torch" || torch_by_uv
  fi
  install_suite || without_container_constraints
  check_torch
}

install_suite() {
  "$venv/bin/python" "${install[@]}" -r requirements/newest.txt -r requirements/dev.txt
}

# A container pins all that it brings, at times lower than the suite's packages need. The virtual environment is not the
# container's: newer versions in it replace nothing outside, and what is compiled against each other (torch, numpy) is held.
without_container_constraints() {
  [[ $kind == own && -n ${PIP_CONSTRAINT:-} ]] || exit 1
  say "PIP_CONSTRAINT=$PIP_CONSTRAINT did not let pip finish (see above): trying once more without it, in $venv alone, with $(constrain | tr '\n' ' ')held"
  PIP_CONSTRAINT='' install_suite
}

# Exactly the torch that was chosen, so that no other build can take its place, and the tested versions. Those need Python
# 3.11, and may not fit what a container brings: there the ranges decide, and the container's numpy is held too, because its
# torch was compiled against it.
constrain() {
  [[ $kind == own || $python_has == 3.10* ]] || sed '/^torch==/d' requirements/constraints.txt
  [[ $kind != own ]] || version_of numpy
  echo "$torch"
}

# Where pip's index has no CPU build: uv knows where PyTorch keeps them.
torch_by_uv() {
  [[ $kind == cpu ]] || fail "pip found no $torch; name an index that has it by TORCH_INDEX_URL"
  "$venv/bin/python" "${install[@]}" uv
  VIRTUAL_ENV=$venv "$venv/bin/uv" pip install --torch-backend=cpu "$torch"
}

# The chosen torch has to be in place, and transformers has to accept it; one that does not switches PyTorch off.
check_torch() {
  local problem
  case $kind in
    cuda)
      "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        fail "pip found a build of torch without CUDA; name another index by TORCH_INDEX_URL, e.g. https://download.pytorch.org/whl/cu130"
      ;;
    own)
      [[ " $("$venv/bin/python" -c "$PROBE") " == *" $torch "* ]] ||
        fail "$venv does not see $torch of $python; give the Python that it is installed for by SYSTEM_PYTHON"
      ;;
  esac
  problem=$("$venv/bin/python" -c 'from transformers.models.llama.modeling_llama import LlamaForCausalLM' 2>&1) ||
    fail "$torch and transformers $(transformers_version) do not work together: ${problem##*$'\n'}"
}

transformers_version() {
  "$venv/bin/python" -c 'import importlib.metadata; print(importlib.metadata.version("transformers"))'
}

# One line: what stands in the virtual environment, and why.
chosen() {
  local why='the tested versions'
  case $kind in
    own) why="the torch is $python's own, and this transformers works with it" ;;
    *) [[ -z ${TORCH_VERSION:-} && $python_has != 3.10* ]] || why='this transformers works with this torch' ;;
  esac
  echo "$venv has $torch and transformers $(transformers_version): $why"
}

main "$@"
