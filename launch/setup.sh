# shellcheck shell=bash
# Sourced by demo.sh and test.sh. Makes a virtual environment if there is none, installs the
# package into it when what it depends on has changed, and sets `python` to its interpreter.
#
#   PYTHON=python3.13   which Python to use (default: python3, or the first of 3.13 … 3.11 that runs)
#   VENV=DIR            where the environment lies (default: .venv-3.11, one per Python version)

# Large pages for what glibc 2.35 or newer allocates; others ignore it: 2.1 -> 1.9 CPU seconds for a
# step of `bench clip_train`, 2.7 -> 2.6 for unet_train. Where freed memory is not kept between steps
# (the tests; `python -m dalle_jax` keeps it) more: 3.0 -> 2.1, 3.2 -> 2.7.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# usage: setup_python EXTRAS   (a comma-separated list for pip, e.g. test,lint)
setup_python() {
  local extras=$1 base version venv stamp wanted
  base=$(_find_python) || exit 1
  version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  venv=${VENV:-$PWD/.venv-$version}
  stamp=$venv/.installed-$extras
  wanted=$(cat setup.cfg pyproject.toml constraints.txt | cksum)" $version $PWD"
  python=$venv/bin/python
  if [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  if ! "$python" -c '' 2>/dev/null; then
    echo "making $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv" || {
      echo "error: $base cannot make a virtual environment; on Debian: apt install python3-venv" >&2
      exit 1
    }
  fi
  echo "installing the package and its dependencies (about a minute; only when they change)"
  # --no-compile: Python compiles what is imported, when it is (38 instead of 70 seconds of processor
  # time).
  "$python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint constraints.txt --editable ".${extras:+[$extras]}" || exit 1
  echo "$wanted" >"$stamp"
}

# Prints an interpreter of Python 3.11 or newer.
_find_python() {
  local name found shown=""
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    found=$(_runs "$name") || found=$(_in_pyenv "$name") || continue
    if "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$found"
      return
    fi
    shown+=" $name is $("$found" --version);"
  done
  echo "error: no Python 3.11 or newer:${shown:- ${PYTHON:-python3} does not run;}" \
    "name one with PYTHON=/path/to/python3.11" >&2
  exit 1
}

_runs() {
  "$1" -c '' >/dev/null 2>&1 && command -v "$1"
}

# pyenv's shims refuse a version that is installed but not switched on.
_in_pyenv() {
  local found
  command -v pyenv >/dev/null || return 1
  for found in "$(pyenv root)"/versions/*/bin/"$1"; do
    _runs "$found" && return
  done
  return 1
}
