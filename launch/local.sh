#!/usr/bin/env bash
# Runs jaxtl on this machine: on all its devices, or as several processes, to try out what many hosts will do.
#
#   launch/local.sh NAME [flags] [flags of jaxtl.main]
#
#   launch/local.sh digits --experiment=quickstart
#   launch/local.sh digits --processes=2 --experiment=quickstart
#
#   NAME                the run folder is runs/NAME, unless --workdir= names another
#   --accelerator=KIND  cpu, gpu or tpu; default: what JAX finds, and cpu with --processes
#   --processes=N       so many processes, which find each other on 127.0.0.1; with --accelerator=gpu each has a GPU
#   --port=N            where they do; default: a free one
#   --zone=ZONE         has no meaning here; taken so that the flags of other launchers do
#   --dry_run           print the commands, run none
#   --                  all that follows is for jaxtl.main, --help too
#
# All other arguments are for jaxtl.main, to the byte. $PYTHON is the Python that has jaxtl (default: python3).
# JAX_NUM_CPU_DEVICES=8 makes eight devices of the CPU.
#
# The same command again goes on with a run that was interrupted. Ctrl-C is passed on: the run is saved and ends; a
# second one ends it at once. When one of several processes fails, the others end, after 150 seconds
# ($JAXTL_LAUNCH_GRACE) by force.
# Exit status: that of jaxtl.main, of several the first that is not 0.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

accelerator="" processes="" port="" grace=${JAXTL_LAUNCH_GRACE:-150}

case ${1-} in "" | --help | -h) usage "${BASH_SOURCE[0]}" && exit 0 ;; esac
name=$1 && shift
check_name "$name"
while (($#)); do
  case $1 in
    --accelerator | --accelerator=*) accelerator=$(value "$1") ;;
    --processes | --processes=*) processes=$(value "$1") ;;
    --port | --port=*) port=$(value "$1") ;;
    --zone | --zone=*)
      zone=$(value "$1")
      say "--zone=$zone has no meaning on this machine"
      ;;
    --dry_run) dry_run=yes ;;
    --help | -h) usage "${BASH_SOURCE[0]}" && exit 0 ;;
    --) shift && passed+=("$@") && break ;;
    *) passed+=("$1") ;;
  esac
  shift
done
case $accelerator in
  "" | cpu | gpu | tpu) ;;
  *) die "--accelerator=$accelerator: expected cpu, gpu or tpu" ;;
esac
[[ $accelerator != tpu || ! $processes ]] || die "--processes: one process has all TPU devices of a machine"
if [[ ! $(passed_value workdir) ]]; then passed=("--workdir=runs/$name" "${passed[@]}"); fi

python=${PYTHON:-python3}
program=("$python" -m jaxtl.main)
if [[ $processes && ! $accelerator ]]; then accelerator=cpu; fi
if [[ $accelerator ]]; then program=(env "JAX_PLATFORMS=$accelerator" "${program[@]}"); fi

if [[ ! $processes ]]; then
  program+=("${passed[@]}")
  if [[ $dry_run ]]; then
    quoted "${program[@]}"
    echo
    exit 0
  fi
  say "+ $(quoted "${program[@]}")"
  exec "${program[@]}"
fi

[[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes=$processes: expected a whole number, 1 or more"
if [[ ! $port ]]; then
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
check_number --port "$port"

running=() # process groups
status=0
reaper=""

signal() {
  local group
  for group in "${running[@]}"; do kill "-$1" -- "-$group" 2>/dev/null || true; done
}

trap 'signal TERM' INT TERM HUP
trap 'signal KILL; if [[ $reaper ]]; then kill -KILL -- "-$reaper" 2>/dev/null || true; fi' EXIT
for ((index = 0; index < processes; index++)); do
  command=("${program[@]}" "--coordinator=127.0.0.1:$port" "--process_count=$processes" "--process_id=$index")
  if [[ $accelerator == gpu ]]; then command=(env "CUDA_VISIBLE_DEVICES=$index" "${command[@]}"); fi
  command+=("${passed[@]}")
  if [[ $dry_run ]]; then
    quoted "${command[@]}"
    echo
    continue
  fi
  say "+ $(quoted "${command[@]}")"
  set -m # each in a process group of its own: Ctrl-C comes once, from here
  "${command[@]}" </dev/null &
  set +m
  running+=("$!")
done

while ((${#running[@]})); do
  left=()
  for group in "${running[@]}"; do
    if kill -0 "$group" 2>/dev/null; then
      left+=("$group")
      continue
    fi
    ended=0
    wait "$group" || ended=$?
    if ((status == 0)); then status=$ended; fi
  done
  running=("${left[@]}")
  if ((status && ${#running[@]})) && [[ ! $reaper ]]; then
    say "a process ended with status $status: the others have $grace seconds to end"
    set -m
    { sleep "$grace" && signal KILL; } &
    reaper=$!
    set +m
  fi
  sleep 0.2 || true # Ctrl-C ends it
done
exit "$status"
