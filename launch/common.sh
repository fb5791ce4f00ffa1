# shellcheck shell=bash
# What the launchers share: lines to the user, quoting, commands that are shown before they are run, bounded retries,
# and the promise that what was made is deleted however a launcher ends. Sourced, never run.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "launch: error: bash ${BASH_VERSION} is too old, 4.4 is needed; on macOS: brew install bash" >&2
  exit 2
fi

dry_run=""            # set: commands are printed on standard output, and nothing is run
pause=30              # seconds between polls, and between attempts
child=""              # process group of the command that is running
passed=()             # arguments for jaxtl.main
answer=""             # what `ask` was answered

say() { printf 'launch: %s\n' "$*" >&2 || true; }

# What the user can mend: one line, status 2.
die() {
  say "error: $*"
  exit 2
}

# Prints the words so that a POSIX shell reads the very same words again.
quoted() {
  local word text="" quote="'\\''"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$quote}'" ;;
    esac
    text+=" $word"
  done
  printf '%s' "${text# }"
}

# Prints the help of a launcher: the comment that follows its first line.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$1"; }

# The value of --flag=value, which must not be empty.
value() {
  [[ $1 == *=?* ]] || die "write ${1%%=*}=VALUE"
  printf '%s' "${1#*=}"
}

# Whether jaxtl.main is given a flag, and what its last value is.
passed_value() {
  local word found=""
  for word in "${passed[@]}"; do
    case $word in "--$1="* | "-$1="*) found=${word#*=} ;; esac
  done
  printf '%s' "$found"
}

check_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "NAME comes first: small letters, digits and hyphens, at most 40, as in digits-1; found '$1' (--help shows more)"
}

check_number() { [[ $2 =~ ^[0-9]+$ ]] || die "$1=$2: expected a whole number"; }

# Shows a command and runs it. Signals to the launcher are heard while it runs: it is waited for in the background, in
# a process group of its own, so that Ctrl-C reaches the launcher alone, which ends the group.
run() {
  if [[ $dry_run ]]; then
    quoted "$@"
    echo
    return 0
  fi
  say "+ $(quoted "$@")"
  local status=0
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child" || status=$?
  child=""
  return "$status"
}

# Shows a command and keeps what it prints in `answer`.
ask() {
  answer=""
  if [[ $dry_run ]]; then
    quoted "$@"
    echo
    return 0
  fi
  say "+ $(quoted "$@")"
  # shellcheck disable=SC2034  # read by the launchers
  answer=$("$@" </dev/null)
}

# Runs a command up to $1 times, and says a line each time that it fails.
retried() {
  local most=$1 attempt status=0
  shift
  for ((attempt = 1; attempt <= most; attempt++)); do
    status=0
    "$@" || status=$?
    ((status)) || return 0
    say "attempt $attempt of $most failed with status $status: $(quoted "$@" | cut -c -120)"
    ((attempt == most)) || sleep "$pause"
  done
  return "$status"
}

end_child() {
  [[ $child ]] || return 0
  kill -TERM -- "-$child" 2>/dev/null || true
  child=""
}

# Has `$1` (a function: delete what was made, status not 0 where that failed) called however the launcher ends. From
# then on a second Ctrl-C does not stop it.
at_the_end() {
  local clean=$1
  # shellcheck disable=SC2064  # the name of the function is known now
  trap "ended $clean" EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 141' PIPE
  trap 'exit 143' TERM
}

ended() {
  local status=$?
  trap '' HUP INT PIPE TERM
  set +e
  end_child
  "$1" || status=3
  exit "$status"
}
