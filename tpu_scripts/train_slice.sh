#!/usr/bin/env bash
# Starts the same `torus train` on every worker of a TPU slice.
#
#   usage: bash tpu_scripts/train_slice.sh TPU_NAME ZONE FOLDER -- --config=llama3_8b --workdir=gs://…
#
# FOLDER is where setup_vm.sh was run on the workers. JAX finds the other workers by itself on Cloud
# TPU; the command is the one you would run on a single machine.
set -euo pipefail
if [ "$#" -lt 5 ] || [ "$4" != "--" ]; then
  sed -n '2,7p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 folder=$3
shift 4
quoted=$(printf ' %q' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd $(printf %q "$folder") && TORUS_DISTRIBUTED=1 .venv/bin/torus train$quoted"
