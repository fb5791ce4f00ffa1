#!/usr/bin/env bash
# Runs jaxtl on TPUs or GPUs of a Kubernetes cluster (GKE): fills in a manifest (gke_tpu.yaml, gke_gpu.yaml), applies
# it, shows the output of the first host, and deletes it. The cluster begins again after preemptions and failures.
#
#   launch/gke.sh NAME --accelerator=TYPE --image=IMAGE [flags] --workdir=gs://BUCKET/RUN [flags of jaxtl.main]
#
#   launch/gke.sh digits --accelerator=v5litepod-16 --image=REGISTRY/jaxtl-tpu --workdir=gs://my-bucket/digits \
#       --experiment=quickstart
#
#   NAME                   of the JobSet
#   --accelerator=TYPE     v5litepod-16, v6e-8, ..; or GPUs of each host: nvidia-h100-80gb:8
#   --image=IMAGE          with jaxtl in it, see launch/Dockerfile
#   --zone=ZONE            only on nodes there
#   --hosts=N              of GPUs, default 1; of TPUs, default as many as the smallest number of large machines
#   --spot                 on spot nodes
#   --restarts=N           how often all hosts begin again; default 20
#   --env=NAME=VALUE       environment variable; repeat for more. No secrets: the manifest shows them
#   --service_account=NAME of the cluster, which may write to the bucket; default: default
#   --context=CONTEXT      of kubectl, the cluster; --namespace=NAMESPACE there. Default: kubectl's
#   --template=FILE        a manifest of your own: for volumes, queues, other tolerations
#   --wait_minutes=N       for the first pod to run; default 720
#   --poll_seconds=N       between looks at it; default 10
#   --keep                 leave the JobSet when all is done or has failed, or after Ctrl-C, when it goes on
#   --dry_run              print the commands and the manifest, run none
#   --                     all that follows is for jaxtl.main, --help too
#
# All other arguments are for jaxtl.main, to the byte. The run folder must be on gs://, unless with --template. The
# cluster must have JobSet (kubectl apply --server-side -f of a release of https://jobset.sigs.k8s.io).
#
# Exit status: 0 when the run has finished, 1 when it has failed, 2 for a mistake, 130 after Ctrl-C, 3 when the JobSet
# could not be deleted: the command that does it is shown.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

accelerator="" image="" zone="" hosts="" spot="" restarts=20 account=default template="" keep=""
wait_minutes=720 environment=() kubectl=(kubectl)
pause=10

case ${1-} in "" | --help | -h) usage "${BASH_SOURCE[0]}" && exit 0 ;; esac
name=$1 && shift
check_name "$name"
while (($#)); do
  case $1 in
    --accelerator | --accelerator=*) accelerator=$(value "$1") ;;
    --image | --image=*) image=$(value "$1") ;;
    --zone | --zone=*) zone=$(value "$1") ;;
    --hosts | --hosts=*) hosts=$(value "$1") ;;
    --restarts | --restarts=*) restarts=$(value "$1") ;;
    --env | --env=*) environment+=("ENVIRONMENT=$(value "$1")") ;;
    --service_account | --service_account=*) account=$(value "$1") ;;
    --context | --context=*) kubectl+=("--context=$(value "$1")") ;;
    --namespace | --namespace=*) kubectl+=("--namespace=$(value "$1")") ;;
    --template | --template=*) template=$(value "$1") ;;
    --wait_minutes | --wait_minutes=*) wait_minutes=$(value "$1") ;;
    --poll_seconds | --poll_seconds=*) pause=$(value "$1") ;;
    --spot) spot=yes ;;
    --keep) keep=yes ;;
    --dry_run) dry_run=yes ;;
    --help | -h) usage "${BASH_SOURCE[0]}" && exit 0 ;;
    --) shift && passed+=("$@") && break ;;
    *) passed+=("$1") ;;
  esac
  shift
done
[[ $accelerator ]] || die "--accelerator=TYPE is missing, as in --accelerator=v5litepod-16 or =nvidia-h100-80gb:8"
[[ $image ]] || die "--image=IMAGE is missing; launch/Dockerfile makes one"
check_number --restarts "$restarts"
check_number --wait_minutes "$wait_minutes"
check_number --poll_seconds "$pause"
[[ ! $hosts || $hosts =~ ^[1-9][0-9]*$ ]] || die "--hosts=$hosts: expected a number of hosts"
[[ $template || $(passed_value workdir) == gs://?* ]] ||
  die "--workdir=gs://BUCKET/RUN is missing: what is on a pod's disk ends with it (a --template may have volumes)"
for each in "${environment[@]}"; do
  [[ $each =~ ^ENVIRONMENT=[A-Za-z_][A-Za-z_0-9]*= ]] || die "--env=${each#*=}: write --env=NAME=VALUE"
done
command -v python3 >/dev/null || die "python3 is needed here, to fill in the manifest"

# --- the manifest ----------------------------------------------------------------------------------------

# By number of chips, https://cloud.google.com/tpu/docs/v5e and v6e: slices of up to 8 chips are one machine, larger ones
# are of machines of 4.
topology() {
  case $1 in
    1) echo 1x1 ;; 4) echo 2x2 ;; 8) echo 2x4 ;; 16) echo 4x4 ;; 32) echo 4x8 ;; 64) echo 8x8 ;;
    128) echo 8x16 ;; 256) echo 16x16 ;;
    *) return 1 ;;
  esac
}

own=()
case $accelerator in
  v5litepod-* | v6e-*)
    chips=${accelerator##*-}
    shape=$(topology "$chips") || die "--accelerator=$accelerator: there are slices of 1, 4, 8, 16, .. 256 chips"
    if [[ ! $hosts ]]; then hosts=$((chips <= 8 ? 1 : chips / 4)); fi
    devices=$((chips / hosts))
    ((devices * hosts == chips)) || die "--hosts=$hosts does not divide the $chips chips of $accelerator"
    kind=tpu-v5-lite-podslice
    if [[ $accelerator == v6e-* ]]; then kind=tpu-v6e-slice; fi
    selector="\"cloud.google.com/gke-tpu-accelerator\": \"$kind\", \"cloud.google.com/gke-tpu-topology\": \"$shape\""
    template=${template:-$here/gke_tpu.yaml}
    own+=("OWN=--distributed=auto")
    ;;
  *:*)
    devices=${accelerator##*:} kind=${accelerator%:*} hosts=${hosts:-1}
    [[ $devices =~ ^[1-9][0-9]*$ && $kind =~ ^[a-z0-9-]+$ ]] ||
      die "--accelerator=$accelerator: write KIND:NUMBER, as in nvidia-h100-80gb:8"
    selector="\"cloud.google.com/gke-accelerator\": \"$kind\""
    template=${template:-$here/gke_gpu.yaml}
    if ((hosts > 1)); then
      own+=("OWN=--coordinator=$name-workers-0-0.$name:55527" "OWN=--process_count=$hosts")
      # shellcheck disable=SC2016  # for Kubernetes
      own+=('OWN=--process_id=$(JOB_COMPLETION_INDEX)')
    fi
    ;;
  *) die "--accelerator=$accelerator: expected v5litepod-CHIPS, v6e-CHIPS, or GPUs as KIND:NUMBER" ;;
esac
tolerations="[]"
if [[ $zone ]]; then
  [[ $zone =~ ^[a-z0-9-]+$ ]] || die "--zone=$zone: expected a zone, as in us-west4-a"
  selector+=", \"topology.kubernetes.io/zone\": \"$zone\""
fi
if [[ $spot ]]; then
  selector+=", \"cloud.google.com/gke-spot\": \"true\""
  tolerations='[{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}]'
fi
render=(
  python3 "$here/render.py" "$template" "NAME=$name" "RESTARTS=$restarts" "HOSTS=$hosts" "DEVICES=$devices"
  "IMAGE=$image" "SERVICE_ACCOUNT=$account" "NODE_SELECTOR={$selector}" "TOLERATIONS=$tolerations"
  "${own[@]}" "${environment[@]}" -- "${passed[@]}"
)
manifest=${JAXTL_CACHE:-$HOME/.cache/jaxtl}/launch/$name.yaml

# --- steps -----------------------------------------------------------------------------------------------

there=""   # set: the JobSet exists, or may
streamed="" # the pod whose output has been shown

apply() {
  there=yes # from here on, whatever the command answers
  run "${kubectl[@]}" apply --filename="$manifest"
}

delete_once() { run "${kubectl[@]}" delete jobset "$name" --ignore-not-found --wait; }

delete() {
  if retried 5 delete_once; then
    there=""
    return 0
  fi
  say "##########################################################################################"
  say "THE JOBSET $name COULD NOT BE DELETED; its nodes cost money. Delete it by hand:"
  say "    $(quoted "${kubectl[@]}" delete jobset "$name")"
  say "##########################################################################################"
  return 1
}

clean_up() {
  if [[ ! $dry_run ]]; then rm -f "$manifest"; fi
  [[ $there ]] || return 0
  if [[ $keep ]]; then
    say "the JobSet $name is kept. Its output, and to delete it:"
    say "    $(quoted "${kubectl[@]}" logs --follow "--selector=$first")"
    say "    $(quoted "${kubectl[@]}" delete jobset "$name")"
    return 0
  fi
  delete
}

# Shows the output of the first host until it ends; done: every line has been shown once.
stream() {
  local pod=$1
  # A connection that was lost and is made again repeats the last lines.
  if [[ $pod == "$streamed" ]]; then
    run "${kubectl[@]}" logs --follow --tail=10 "$pod" || return 0
  else
    run "${kubectl[@]}" logs --follow "$pod" && streamed=$pod
  fi
  return 0
}

# --- all of it -------------------------------------------------------------------------------------------

pods='{range .items[*]}{.metadata.name} {.status.phase}{"\n"}{end}'
first="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
if [[ $dry_run ]]; then
  "${render[@]}" | sed 's/^/# /'
else
  command -v kubectl >/dev/null || die "kubectl is not installed: https://kubernetes.io/docs/tasks/tools"
  mkdir -p "${manifest%/*}"
  "${render[@]}" >"$manifest"
fi
at_the_end clean_up
ask "${kubectl[@]}" get jobset "$name" --ignore-not-found --output=name ||
  die "the cluster does not answer, or has no JobSet, see above"
[[ ! $answer ]] || die "there is a JobSet $name already: take another name, or $(quoted "${kubectl[@]}" delete jobset "$name")"
retried 3 apply || die "the manifest could not be applied, see above"

silent=0 begun="" end=$((SECONDS + wait_minutes * 60)) last=""
while :; do
  state="unknown, the cluster does not answer"
  if ask "${kubectl[@]}" get jobset "$name" --output="jsonpath={.status.terminalState}"; then state=$answer; fi
  pod=""
  if ask "${kubectl[@]}" get pods --selector="$first" --output="jsonpath=$pods"; then
    pod=${answer##*$'\n'} silent=0 # of several the last: others are of a run before it, and being deleted
  else
    silent=$((silent + 1))
  fi
  if [[ $dry_run ]]; then
    run "${kubectl[@]}" logs --follow "POD"
    break
  fi
  phase=${pod##* } pod=pod/${pod%% *}
  if [[ "$pod $phase" != "$last" ]]; then say "$name: ${pod#pod/} ${phase:-waits for nodes}"; fi
  last="$pod $phase"
  case $phase in
    Running) begun=yes && stream "$pod" ;;
    Succeeded | Failed) if [[ $pod != "$streamed" ]]; then begun=yes && stream "$pod"; fi ;;
  esac
  case $state in
    Completed) break ;;
    Failed)
      say "error: the run has failed, see above"
      exit 1
      ;;
  esac
  if ((silent == 5)); then
    say "error: the cluster does not answer"
    exit 1
  fi
  if [[ ! $begun ]] && ((SECONDS >= end)); then
    die "no $accelerator was to be had within $wait_minutes minutes; --wait_minutes= waits longer"
  fi
  sleep "$pause"
done
