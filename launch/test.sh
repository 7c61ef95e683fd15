#!/usr/bin/env bash
# Runs the test suite in its own virtual environment; arguments go to pytest.
#
#   bash launch/test.sh                        all tests except those marked slow
#   bash launch/test.sh tests/nn -k mask -x
#   PYTHON=python3.13 bash launch/test.sh      with another Python, in its own environment
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
setup_python test,lint
jobs=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN || echo 1)
if (($# == 0 && jobs > 1)); then # a single file starts faster without workers
  set -- -n "$((jobs < 4 ? jobs : 4))" --dist=worksteal
fi
exec "$python" -m pytest "$@"
