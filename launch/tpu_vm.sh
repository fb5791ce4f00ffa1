#!/usr/bin/env bash
# Runs jaxtl on a Cloud TPU, a single VM or a slice of many: requests it (a queued resource), installs, runs on all
# workers, begins again when it is preempted, shows the output, deletes it.
#
#   launch/tpu_vm.sh NAME --zone=ZONE --accelerator=TYPE [flags] --workdir=gs://BUCKET/RUN [flags of jaxtl.main]
#
#   launch/tpu_vm.sh digits --zone=us-west4-a --accelerator=v5litepod-8 --spot --workdir=gs://my-bucket/digits \
#       --experiment=quickstart --set pretrain.train.epochs=100
#
#   NAME                 of the TPU VM and of its request
#   --zone=ZONE          where; `gcloud compute tpus locations list`
#   --accelerator=TYPE   v5litepod-8, v5litepod-256, v6e-8, ..; `gcloud compute tpus accelerator-types list --zone=ZONE`
#   --project=PROJECT    default: gcloud's
#   --spot               cheaper, and may be preempted
#   --runtime=VERSION    of the TPU software; default: by the accelerator
#   --create=FLAG        one more flag of `gcloud compute tpus queued-resources create`; repeat for more
#   --install=WHAT       a checkout (default: this one), a .whl, or what pip takes: git+https://.., jaxtl==0.1.0
#   --copy=PATH          a file or folder that every worker needs, into the folder that jaxtl runs in; repeat for more
#   --setup=COMMAND      run there on every worker after the installation: fetch data, for example
#   --env=NAME=VALUE     environment variable of jaxtl; repeat for more. No secrets: they show in the list of processes
#   --restarts=N         how often it begins again after a preemption or a failure; default 20
#   --wait_minutes=N     for the TPU to be had; default 720
#   --poll_seconds=N     between looks at the request, and between attempts; default 30
#   --keep               use NAME where it is there already, and leave it when all is done or has failed
#   --dry_run            print the commands, run none
#   --                   all that follows is for jaxtl.main, --help too
#
# All other arguments are for jaxtl.main, to the byte. --distributed=auto is added. The run folder must be on gs://
# (the VM's disk goes with it), unless with --keep; a run that was preempted goes on from its last checkpoint.
#
# Exit status: that of jaxtl.main; 2 is a mistake and not tried again; 130 after Ctrl-C, when all has been deleted; 3
# when something could not be deleted: THEN IT COSTS MONEY until the command that is shown has been given by hand.
# Nothing can be deleted when this process is killed with SIGKILL or the machine goes down.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

zone="" accelerator="" project="" spot="" runtime="" install=$(dirname "$here") setup="" keep=""
restarts=20 wait_minutes=720 create=() copies=() environment=()

case ${1-} in "" | --help | -h) usage "${BASH_SOURCE[0]}" && exit 0 ;; esac
name=$1 && shift
check_name "$name"
while (($#)); do
  case $1 in
    --zone | --zone=*) zone=$(value "$1") ;;
    --accelerator | --accelerator=*) accelerator=$(value "$1") ;;
    --project | --project=*) project=$(value "$1") ;;
    --runtime | --runtime=*) runtime=$(value "$1") ;;
    --create | --create=*) create+=("$(value "$1")") ;;
    --install | --install=*) install=$(value "$1") ;;
    --copy | --copy=*) copies+=("$(value "$1")") ;;
    --setup | --setup=*) setup=$(value "$1") ;;
    --env | --env=*) environment+=("$(value "$1")") ;;
    --restarts | --restarts=*) restarts=$(value "$1") ;;
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
[[ $zone ]] || die "--zone=ZONE is missing; gcloud compute tpus locations list shows them"
[[ $accelerator ]] || die "--accelerator=TYPE is missing, as in --accelerator=v5litepod-8"
check_number --restarts "$restarts" && check_number --wait_minutes "$wait_minutes"
check_number --poll_seconds "$pause"
if [[ $(passed_value workdir) != gs://?* && ! $keep ]]; then
  die "--workdir=gs://BUCKET/RUN is missing: what is on the VM's disk is deleted with it (or --keep the VM)"
fi
for each in "${copies[@]}"; do
  [[ -e $each ]] || die "--copy=$each: there is no such file or folder"
done
for each in "${environment[@]}"; do
  [[ $each =~ ^[A-Za-z_][A-Za-z_0-9]*= ]] || die "--env=$each: write --env=NAME=VALUE"
done
if [[ ! $runtime ]]; then
  case $accelerator in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) die "--accelerator=$accelerator: which software it needs is not known here; give --runtime=VERSION" ;;
  esac
fi
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"

where=(--zone="$zone")
if [[ $project ]]; then where+=(--project="$project"); fi
where+=(--quiet)
requests=(gcloud compute tpus queued-resources)
machines=(gcloud compute tpus tpu-vm)
folder=jaxtl-$name # on the workers, in the home folder
stage=${JAXTL_CACHE:-$HOME/.cache/jaxtl}/launch/$folder # what is copied there
there=""    # set: NAME exists, or may
ready=""    # set: jaxtl is installed on it
begun=""    # set: jaxtl has been run
package=""  # for pip, on the workers, quoted for the shell there
uploads=""  # set: there is something in the stage

# --- steps -----------------------------------------------------------------------------------------------

# Puts what the workers need into one folder, before anything is paid for.
prepare() {
  local each
  if [[ ! $dry_run ]]; then
    rm -rf "$stage"
    mkdir -p "$stage"
  fi
  if [[ -d $install ]]; then
    run python3 -m pip wheel --quiet --no-deps --wheel-dir="$stage" "$install" ||
      die "$install: no wheel could be built, see above; --install= takes a .whl too"
    package="\"\$(ls -t ./jaxtl-*.whl | head -n 1)\"" uploads=yes # on a VM that was kept may be older ones
  elif [[ $install == *.whl && $install != *://* ]]; then
    [[ -f $install ]] || die "--install=$install: there is no such file"
    run cp "$install" "$stage/"
    package=$(quoted "./${install##*/}") uploads=yes
  else
    package=$(quoted "$install")
  fi
  for each in "${copies[@]}"; do
    run cp -R "${each%/}" "$stage/"
    uploads=yes
  done
}

# Asks what the service says of NAME: ACTIVE, WAITING_FOR_RESOURCES, .. , or nothing where it does not exist.
ask_state() {
  ask "${requests[@]}" list "${where[@]}" --filter="name ~ \"/queuedResources/$name\$\"" --format="value(state.state)"
}

request() {
  local status=0 flags=(--node-id="$name" --accelerator-type="$accelerator" --runtime-version="$runtime")
  if [[ $spot ]]; then flags+=(--spot); fi
  there=yes # from here on it may exist, whatever the command answers
  run "${requests[@]}" create "$name" "${flags[@]}" "${create[@]}" "${where[@]}" || status=$?
  if ((status == 2)); then die "gcloud does not take this command, see above"; fi
  if ((status)); then delete || exit 3; fi # what was made in part, before the next attempt
  return "$status"
}

# Waits until the VM is there; 1: it will not be.
wait_for_it() {
  local state before="" silent=0 end=$((SECONDS + wait_minutes * 60))
  while :; do
    state="unknown, the service does not answer"
    if ask_state; then silent=0 state=$answer; else silent=$((silent + 1)); fi
    if [[ $dry_run ]]; then return 0; fi
    if [[ $state != "$before" ]]; then say "$name: ${state:-not there}"; fi
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | "") return 1 ;;
    esac
    if ((silent == 5)); then return 1; fi
    if ((SECONDS >= end)); then
      die "no $accelerator was to be had in $zone within $wait_minutes minutes; --wait_minutes= waits longer"
    fi
    sleep "$pause"
  done
}

upload() { run "${machines[@]}" scp --recurse "$stage" "$name:" --worker=all "${where[@]}"; }

on_all() { run "${machines[@]}" ssh "$name" --worker=all "${where[@]}" --command="$1"; }

# The images come with Python 3.10, and jaxtl needs 3.11: uv fetches one where need be. gcsfs is for gs://.
setup_command() {
  cat <<END
set -eu; mkdir -p $folder; cd $folder; PATH="\$HOME/.local/bin:\$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || uv venv --quiet --python '>=3.11' .venv
uv pip install --quiet --python .venv/bin/python --reinstall-package jaxtl $package 'jax[tpu]' gcsfs
$setup
END
}

# What runs outlives the connection: its output goes to a file, which is shown. When a connection is lost, gcloud gives
# the command again, and it finds the same run going on. Another run is told to save and to end first.
run_command() {
  local attempt=$1 id program
  program=$(quoted env PYTHONUNBUFFERED=1 "${environment[@]}" .venv/bin/python -m jaxtl.main --distributed=auto "${passed[@]}")
  id=$(printf '%s' "$program" | cksum | cut -d ' ' -f 1)-$attempt
  cat <<END
cd $folder || exit 1
if [ "\$(cat id 2>/dev/null)" = $id ] && kill -0 "\$(cat pid)" 2>/dev/null; then
  lines=20
else
  if [ -f pid ] && kill -TERM "-\$(cat pid)" 2>/dev/null; then
    for second in \$(seq 120); do kill -0 "-\$(cat pid)" 2>/dev/null || break; sleep 1; done
    kill -KILL "-\$(cat pid)" 2>/dev/null
  fi
  rm -f status; echo $id >id; lines=+1
  : >jaxtl.log # here: tail may be there before what runs in the background is
  setsid sh -c $(quoted "$program; echo \$? >status") >>jaxtl.log 2>&1 </dev/null &
  echo \$! >pid
fi
tail --pid="\$(cat pid)" --sleep-interval=0.2 --lines=\$lines --follow jaxtl.log
wait # where tail could not, or ended early: what runs is what counts
exit "\$(cat status 2>/dev/null || echo 1)"
END
}

# Whether NAME is as it was when it was made; where it is not, it was preempted.
well() {
  ask_state && [[ $answer == ACTIVE ]] &&
    ask "${machines[@]}" describe "$name" "${where[@]}" --format="value(state)" && [[ $answer == READY ]]
}

# It may never have come into being, or be gone already: then there is nothing to delete.
delete_once() {
  run "${requests[@]}" delete "$name" --force "${where[@]}" || { ask_state && [[ ! $answer ]]; }
}

# Deletes NAME if it exists, or may; 1, and loud: that failed.
delete() {
  [[ $there ]] || return 0
  if retried 5 delete_once; then
    there="" ready=""
    return 0
  fi
  say "##########################################################################################"
  say "$name COULD NOT BE DELETED AND COSTS MONEY. Delete it by hand:"
  say "    $(quoted "${requests[@]}" delete "$name" --force "${where[@]}")"
  say "##########################################################################################"
  return 1
}

clean_up() {
  if [[ ! $dry_run ]]; then rm -rf "$stage"; fi
  [[ $there ]] || return 0
  if [[ $keep ]]; then
    say "$name is kept, with what runs on it, and costs money. The same command goes on with it; to delete it:"
    say "    $(quoted "${requests[@]}" delete "$name" --force "${where[@]}")"
    return 0
  fi
  say "deleting $name; please wait"
  delete
}

# Requests, installs and runs, as far as that has not been done. Status: that of jaxtl.main, or of what failed before it.
attempt() {
  if [[ ! $there ]]; then retried 3 request || return; fi
  if [[ ! $ready ]]; then
    wait_for_it || return
    if [[ $uploads ]]; then retried 3 upload || return 1; fi
    retried 3 on_all "$(setup_command)" || return 1
    ready=yes begun=yes
  fi
  on_all "$(run_command "$1")"
}

# --- all of it -------------------------------------------------------------------------------------------

at_the_end clean_up
prepare
ask_state || die "the service does not answer, see above: is gcloud set up (gcloud auth login, --project=PROJECT)?"
if [[ $answer ]]; then
  [[ $keep ]] || die "there is a $name in $zone already ($answer): take another name, or --keep to use it and leave it"
  there=yes
fi
for ((restart = 0; ; restart++)); do
  status=0
  attempt "$restart" || status=$?
  if ((status == 0)); then break; fi
  if [[ $ready ]] && ((status == 2)); then die "jaxtl.main says what is wrong, see above"; fi
  if ((restart == restarts)); then
    say "error: status $status; --restarts=$restarts allows no further restart"
    exit "$status"
  fi
  if [[ ! $there && ! $begun ]]; then
    die "$accelerator cannot be requested in $zone, see above"
  elif [[ ! $there ]]; then
    say "$accelerator could not be requested: again, restart $((restart + 1)) of $restarts"
  elif well; then
    [[ $ready ]] || die "jaxtl cannot be installed on $name, see above"
    say "status $status, and $name is well: again on it, restart $((restart + 1)) of $restarts"
  else
    say "$name was preempted or lost: anew, restart $((restart + 1)) of $restarts"
    delete || exit 3
  fi
  sleep "$pause"
done
