#!/usr/bin/env bash
# Trains on a Cloud TPU: asks for it, installs Torus on every worker, runs `torus launch` there,
# follows it, asks for another when it is taken away, and gives it back.
#
#   usage: bash tpu_scripts/tpu.sh [--dry-run] COMMAND SETTINGS [-- ARGUMENTS of torus launch]
#
#   train    all of the below; deletes the TPU at the end, after Ctrl-C and after a failure
#   create   asks for the TPU and waits until it is there
#   setup    copies the last commit of this repository to every worker and installs it
#   run      starts torus launch on every worker where none runs; it outlives the connection
#   follow   shows the first worker's log until the run ends, and ends with its status
#   status   says whether there is a TPU, and what the run does on every worker
#   stop     makes the run save and end
#   delete   gives the TPU back
#
# SETTINGS is a file like tpu_scripts/example.env. --dry-run prints every command and runs none.
# A --workdir=gs://… is what makes a run go on after its TPU was taken away.
# Exit status: that of torus launch; 2 a mistake; 69 no TPU; 75 it was taken away; 130 Ctrl-C.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
exec 3>&1 # where --dry-run prints, also from inside $(…)

NAME='' ZONE='' TYPE='' VERSION='' PROJECT='' QUEUED=yes SPOT=no ENVIRONMENT='' PYTHON=python3
WAIT=86400 GRACE=90 POLL=30 TRIES=100
dry='' pretend=absent started='' shown=0

say() { echo "tpu.sh: $1" >&2; }

say_all() { # a text of several lines, as one
  say "$1: $(tr -s '[:space:]' ' ' <<<"$2" | cut -c 1-500)"
}

fail() { # status, text
  say "$2"
  exit "$1"
}

settings() { # reads the file; nothing in it is executed
  local line key value number=0
  [ -f "$1" ] || fail 2 "no settings file $1; see tpu_scripts/example.env"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1)) key=${line%%=*} value=${line#*=}
    case $line in '' | '#'*) continue ;; esac
    case $key in
      NAME | ZONE | TYPE | VERSION | PROJECT)
        [[ $value =~ ^[A-Za-z0-9.:_-]*$ ]] || fail 2 "$1:$number: $key is letters, digits and -"
        ;;
      ENVIRONMENT | PYTHON) ;;
      QUEUED | SPOT) [[ $value =~ ^(yes|no)$ ]] || fail 2 "$1:$number: $key is yes or no" ;;
      WAIT | GRACE | POLL | TRIES)
        [[ $value =~ ^[0-9]+$ ]] || fail 2 "$1:$number: $key is a whole number"
        ;;
      *) fail 2 "$1:$number: no setting '$key'; see tpu_scripts/example.env" ;;
    esac
    printf -v "$key" %s "$value"
  done <"$1"
  for key in NAME ZONE TYPE VERSION; do
    [ -n "${!key}" ] || fail 2 "$1: $key is missing"
  done
  if [ -n "$ENVIRONMENT" ] && [ ! -f "$ENVIRONMENT" ]; then
    fail 2 "$1: ENVIRONMENT: no file $ENVIRONMENT"
  fi
}

pause() { # a sleep that a signal ends at once
  sleep "$POLL" &
  wait "$!" || true
}

# ---------------------------------------------------------------- gcloud

do_it() { # a command, or its text with --dry-run
  if [ -z "$dry" ]; then "$@"; else printf '%q ' "$@" >&3 && echo >&3; fi
}

cloud() { do_it gcloud compute tpus "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet; }

on() { # worker number or all; arguments of worker.sh
  local which=$1 command
  shift
  command="bash torus/tpu_scripts/worker.sh$(printf ' %q' "$@")"
  cloud tpu-vm ssh "$NAME" "--worker=$which" "--command=$command"
}

kind() { if [ "$QUEUED" = yes ]; then echo queued-resources; else echo tpu-vm; fi; }

# A queued resource is deleted with its node.
deletion() { echo "$(kind) delete $NAME$(if [ "$QUEUED" = yes ]; then echo ' --force'; fi)"; }

is_gone() { # what gcloud said: only that this very resource does not exist
  # Accounts, projects and the program itself are "not found" as well, while a TPU costs money.
  grep -F ") NOT_FOUND: Resource 'projects/" <<<"$1" | grep -F "/locations/$ZONE/" |
    grep -qF "/$NAME' was not found"
}

state() { # absent, waiting, ready, lost (it was there), failed, or unknown (no answer)
  local text field=state
  if [ "$QUEUED" = yes ]; then field=state.state; fi
  if text=$(cloud "$(kind)" describe "$NAME" "--format=value($field)" 2>&1); then
    if [ -n "$dry" ]; then text=$pretend; fi
    case $(grep -xE '[A-Z_]+|absent' <<<"$text" | tail -n 1) in # a line among its warnings
      READY | ACTIVE) echo ready ;;
      FAILED) echo failed ;;
      SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | STOPPED) echo lost ;;
      absent) echo absent ;;
      *) echo waiting ;;
    esac
  elif is_gone "$text"; then
    echo absent
  else
    say_all "gcloud does not say whether $NAME is there" "$text"
    echo unknown
  fi
}

# ---------------------------------------------------------------- steps

ask() { # one request; a full zone is asked again until WAIT is over
  local text arguments
  arguments=("--version=$VERSION")
  if [ "$QUEUED" = yes ]; then arguments=("--node-id=$NAME" "--runtime-version=$VERSION"); fi
  if [ "$SPOT" = yes ]; then arguments+=(--spot); fi
  until text=$(cloud "$(kind)" create "$NAME" "--accelerator-type=$TYPE" "${arguments[@]}" 2>&1); do
    say_all "gcloud create" "$text"
    if ! grep -qi 'no more capacity' <<<"$text" || [ "$SECONDS" -ge "$1" ]; then
      fail 69 "$TYPE in $ZONE was refused"
    fi
    pause
  done
  pretend=READY
}

create() {
  local now until=$((SECONDS + WAIT)) unknown=0
  while [ "$SECONDS" -le "$until" ]; do
    now=$(state)
    case $now in
      ready) return ;;
      unknown) if [ "$((unknown += 1))" -ge 10 ]; then fail 69 "gcloud gives no answer"; fi ;;
      absent) ask "$until" && continue ;;
      failed) fail 69 "the request for $NAME failed; see: gcloud compute tpus $(kind) describe $NAME --zone=$ZONE" ;;
      lost) delete && continue ;;
    esac
    pause
  done
  fail 69 "no TPU within $WAIT s"
}

setup() { # called where `set -e` does not hold, so each step asks for the one before
  local folder all=("$NAME" --worker=all)
  folder=$(mktemp -d) &&
    do_it git -C "$here" archive --format=tar.gz -o "$folder/torus.tar.gz" HEAD &&
    cloud tpu-vm ssh "${all[@]}" --command='mkdir -p -m 700 torus/.torus' &&
    cloud tpu-vm scp "$folder/torus.tar.gz" "$NAME:torus/.torus/" --worker=all &&
    # An environment is copied, so that no command line or log holds a key.
    { [ -z "$ENVIRONMENT" ] ||
      cloud tpu-vm scp "$ENVIRONMENT" "$NAME:torus/.torus/env" --worker=all; } &&
    rm -rf "$folder" &&
    cloud tpu-vm ssh "${all[@]}" --command="cd torus && tar xzf .torus/torus.tar.gz && \
bash tpu_scripts/worker.sh setup $PYTHON"
}

run() {
  started=yes
  on all start "${arguments[@]}"
}

show_log() {
  local text
  text=$(on 0 log "$shown" 2>/dev/null && echo .) || return 0
  text=${text%.} # $(…) would eat the newlines at the end, and the offset with them
  printf %s "$text"
  shown=$((shown + $(printf %s "$text" | wc -c)))
}

verdict() { # of what the workers said: running, again (on some), or the status that counts
  local word worst=0 ended='' running=''
  for word in $1; do
    case $word in
      running) running=yes ;;
      0) ;;
      none) ended=yes ;;
      2 | 64 | 65 | 70 | 71) echo "$word" && return ;;
      *[!0-9]*) ;;
      *) ended=yes && worst=$((word > worst ? word : worst)) ;;
    esac
  done
  if [ -z "$running" ]; then echo "$worst"; elif [ -n "$ended" ]; then echo again; else echo running; fi
}

follow() {
  local text now
  while :; do
    case $(state) in
      absent | lost | failed) say "$NAME was taken away" && return 75 ;;
      ready)
        show_log
        if text=$(on all status 2>/dev/null); then
          now=$(verdict "${dry:+0}$text")
          case $now in
            running) ;;
            again) on all start "${arguments[@]}" ;; # one that ended joins the others again
            *) show_log && return "$now" ;;
          esac
        fi
        ;;
    esac
    pause
  done
}

delete() {
  # shellcheck disable=SC2046 # words of their own
  cloud $(deletion) || true # judged by what is there afterwards
  pretend=absent
  for _ in 1 2 3; do # the network may fail for a moment, and deleting take one
    if [ "$(state)" = absent ]; then return; fi
    pause
  done
  return 1
}

# ---------------------------------------------------------------- all of it

remains() {
  say "$NAME may still be there and cost money; delete it with:"
  say "  gcloud compute tpus $(deletion) --zone=$ZONE${PROJECT:+ --project=$PROJECT} --quiet"
}

finish() { # whatever ends `train`: the run saves, the TPU is deleted, or it is said that it is not
  local status=$?
  trap - EXIT
  trap 'remains; exit 130' INT TERM
  if [ "$status" -ne 0 ] && [ -n "$started" ]; then
    on all stop "$GRACE" || say "the run could not be asked to save"
  fi
  if ! delete; then remains; elif [ -z "$dry" ]; then say "$NAME is deleted"; fi
  exit "$status"
}

train() {
  local try status installed='' broken=0
  if [ "$(state)" = ready ]; then say "$NAME is there already; it is used, and deleted at the end"; fi
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  for ((try = 1; try <= TRIES; try++)); do
    create
    if { [ -n "$installed" ] || setup; } && run; then
      installed=yes status=0 broken=0
      follow || status=$?
    elif [ "$(state)" = ready ] && [ "$((broken += 1))" -lt 3 ]; then
      say "the workers could not be set up; once more"
      status=76
    else
      status=75
    fi
    case $status in
      69 | 73 | 76) say "it ended with $status and is started again" ;;
      75 | 77) # another TPU: this one was taken away, or a host of it computes wrongly
        if [ "$broken" -ge 3 ] || ! delete; then exit 75; fi
        installed='' started='' shown=0
        ;;
      *) return "$status" ;;
    esac
    pause
  done
  return "$status"
}

if [ "${1:-}" = --dry-run ]; then dry=yes && shift; fi
command=${1:-}
case $command in
  train | create | setup | run | follow | status | stop | delete) ;;
  *) sed -n '2,20p' "$0" >&2 && exit 2 ;;
esac
settings "${2:-settings.env}"
shift $(($# < 2 ? $# : 2))
if [ "${1:---}" != -- ]; then fail 2 "arguments of torus launch come after --, not '$1'"; fi
arguments=("${@:2}")
if [[ $command =~ ^(train|run)$ ]] && [ "${#arguments[@]}" -eq 0 ]; then
  fail 2 "$command: what should run? -- --config=… --workdir=gs://…"
fi
if [ -n "$dry" ]; then
  POLL=0
elif ! command -v gcloud >/dev/null; then
  fail 2 "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"
fi
case $command in
  status) say "$NAME: $(state)" && on all status ;;
  stop) on all stop "$GRACE" ;;
  delete) delete || { remains && exit 1; } ;;
  *) "$command" ;;
esac
