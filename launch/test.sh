#!/usr/bin/env bash
# Runs the test suite in its own virtual environment; arguments go to pytest.
#
#   bash launch/test.sh                        everything but what is marked slow or network
#   bash launch/test.sh tests/nn -k mask -x
#   PYTHON=python3.13 bash launch/test.sh      with another Python, in an environment of its own
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
setup_python test,lint
exec "$python" -m pytest "$@"
