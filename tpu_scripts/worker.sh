#!/usr/bin/env bash
# What runs on one TPU VM; tpu_scripts/tpu.sh runs it on all of them. It needs nothing but bash.
#
#   usage: bash tpu_scripts/worker.sh COMMAND
#
#   setup [PYTHON]       makes .venv with the pinned versions and the `tpu` extra, then torus doctor
#   start [ARGUMENTS]    torus launch with these, which outlives this connection; on a slice it is
#                        told of the other workers. Nothing is done where one runs already
#   status               prints `running`, the exit status of the last one, or `none`
#   log OFFSET           prints what it said from this byte on
#   stop [SECONDS]       SIGTERM, and waits so long (90) for it to save and end
#
# What .torus/env holds, lines NAME=VALUE, becomes environment: keys belong there.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p -m 700 .torus

fail() {
  echo "worker.sh: $1" >&2
  exit 2
}

about() { # one fact about this VM, from its metadata server
  curl -fsS -m 5 --retry 3 -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" 2>/dev/null
}

runs() { # a number alone may be another process by now
  [ -f .torus/pid ] && grep -qzs launch "/proc/$(cat .torus/pid)/cmdline"
}

setup() {
  local python=${1:-python3} version constraints
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  constraints=constraints/py$version.txt
  [ -f "$constraints" ] ||
    fail "Python $version is not supported; there are pins for: $(ls constraints)"
  "$python" -m venv .venv
  # JAX names the libtpu it was built against; the pin here is for compiling ahead of time.
  grep -v '^libtpu==' "$constraints" >.venv/constraints.txt
  .venv/bin/pip install --quiet -c .venv/constraints.txt -e '.[tpu]'
  .venv/bin/torus doctor
}

start() {
  local endpoints workers
  if runs; then return; fi
  if [ -f .torus/env ]; then
    set -a
    # shellcheck source=/dev/null
    . .torus/env
    set +a
  fi
  if [ -z "${JAX_NUM_PROCESSES:-}" ]; then
    # Guessing would start as many runs of one host, in one folder, as there are workers.
    endpoints=$(about worker-network-endpoints) ||
      fail "no metadata server answers; without Cloud TPU set JAX_NUM_PROCESSES, 1 for one host"
    IFS=, read -ra workers <<<"$endpoints"
    JAX_NUM_PROCESSES=${#workers[@]}
    JAX_PROCESS_ID=$(about agent-worker-number)
    JAX_COORDINATOR_ADDRESS=$(cut -d: -f3 <<<"${workers[0]}"):8476
    export JAX_NUM_PROCESSES JAX_PROCESS_ID JAX_COORDINATOR_ADDRESS
  fi
  rm -f .torus/exit
  # The status is written whole, and only when the run has ended.
  # shellcheck disable=SC2016
  setsid nohup bash -c '
    .venv/bin/torus launch "$@" & child=$!
    echo "$child" >.torus/pid
    wait "$child" && status=0 || status=$?
    echo "$status" >.torus/exit.part && mv .torus/exit.part .torus/exit
  ' torus-launch "$@" </dev/null >>.torus/log 2>&1 &
  while [ ! -f .torus/exit ] && ! runs; do sleep 0.1; done
}

status() {
  if runs; then echo running; else cat .torus/exit 2>/dev/null || echo none; fi
}

stop() {
  local until=$((SECONDS + ${1:-90}))
  if runs; then kill -TERM "$(cat .torus/pid)"; fi
  while runs && [ "$SECONDS" -lt "$until" ]; do sleep 0.2; done
  if runs; then fail "still saving; it goes on by itself"; fi
}

command=${1:-}
case $command in
  setup | start | status | stop) shift && "$command" "$@" ;;
  log) tail -c "+$((${2:-0} + 1))" .torus/log ;;
  *)
    sed -n '4,13p' "$0" >&2
    exit 2
    ;;
esac
