#!/usr/bin/env bash
# Installs Torus on one TPU VM (or on every worker of a slice, when run on all of them).
#
#   usage: bash tpu_scripts/setup_vm.sh [PYTHON]      default: python3
#
# Run it in the repository's root. It creates .venv with the pinned versions and the `tpu` extra,
# then lets `torus doctor` say what is wrong.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
constraints=constraints/py$version.txt
if [ ! -f "$constraints" ]; then
  echo "setup_vm.sh: Python $version is not supported; there are pins for: $(ls constraints)" >&2
  exit 2
fi
"$python" -m venv .venv
# JAX names the libtpu it was built against; the pin here is for compiling ahead of time.
grep -v '^libtpu==' "$constraints" > .venv/constraints.txt
.venv/bin/pip install --quiet -c .venv/constraints.txt -e '.[tpu]'
.venv/bin/torus doctor
