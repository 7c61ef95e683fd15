# shellcheck shell=bash
# demo.sh, local_cluster.sh and test.sh source this file. It creates a virtual environment, installs
# the package into it if its dependencies have changed, and sets `python` to its interpreter.
#
#   PYTHON=python3.13   the Python to use (default: the first of 3.12, 3.13, 3.11 and python3 that
#                       runs; on 3.11 the newest JAX is 0.10.2)
#   VENV=DIR            folder of the environment (default: .venv-3.12, one per Python version)

# glibc 2.35 and newer then allocates large pages; older versions ignore it. A step of
# `bench clip_train` takes 1.9 instead of 2.1 CPU seconds, one of unet_train 2.6 instead of 2.7. If
# freed memory returns to the system between steps, as in the tests but not under
# `python -m dalle_jax`, they take 2.1 instead of 3.0 and 2.7 instead of 3.2.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# usage: setup_python EXTRAS   (a comma-separated list for pip, e.g. test,lint)
setup_python() {
  local extras=$1 base version venv stamp requirements
  base=$(_find_python) || exit 1
  version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  venv=${VENV:-$PWD/.venv-$version}
  stamp=$venv/.installed-$extras
  requirements=$(cat setup.cfg pyproject.toml constraints.txt | cksum)" $version $PWD"
  python=$venv/bin/python
  if [[ -x $python && -f $stamp && $(<"$stamp") == "$requirements" ]]; then
    return
  fi
  if ! "$python" -c '' 2>/dev/null; then
    echo "creating $venv with $("$base" --version)"
    "$base" -m venv --clear "$venv" || {
      echo "error: $base cannot create a virtual environment; on Debian: apt install python3-venv" >&2
      exit 1
    }
  fi
  echo "installing the package and its dependencies (about a minute; only when they change)"
  # --no-compile: Python compiles a module at its first import, which takes 38 instead of 70 seconds
  # of processor time in total.
  "$python" -m pip install --quiet --disable-pip-version-check --no-compile \
    --constraint constraints.txt --editable ".${extras:+[$extras]}" || exit 1
  echo "$requirements" >"$stamp"
}

# Prints an interpreter of Python 3.11 or newer.
_find_python() {
  local name interpreter versions=""
  for name in ${PYTHON:-python3.12 python3.13 python3.11 python3}; do
    interpreter=$(_runs "$name") || interpreter=$(_in_pyenv "$name") || continue
    if "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$interpreter"
      return
    fi
    versions+=" $name is $("$interpreter" --version);"
  done
  echo "error: no Python 3.11 or newer:${versions:- ${PYTHON:-python3} does not run;}" \
    "name one with PYTHON=/path/to/python3.11" >&2
  exit 1
}

_runs() {
  "$1" -c '' >/dev/null 2>&1 && command -v "$1"
}

# The interpreter under pyenv's versions: its shims refuse an installed version that is not active.
_in_pyenv() {
  local interpreter
  command -v pyenv >/dev/null || return 1
  for interpreter in "$(pyenv root)"/versions/*/bin/"$1"; do
    _runs "$interpreter" && return
  done
  return 1
}
