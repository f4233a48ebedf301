#!/usr/bin/env bash
# Begin or continue a run on the hosts of a hostfile (hostfile.example), by DeepSpeed's launcher over pdsh and ssh:
#   bash launch/hosts.sh [--restarts N] HOSTFILE --recipe NAME [more arguments of launch/train.py]
# Where ssh is forbidden, on each host, N being its place in the hostfile, counted from 0:
#   bash launch/hosts.sh --node-rank N HOSTFILE --recipe NAME [...]
#
# On TERM, USR1, HUP or Ctrl-C the ranks save and stop; a second signal kills them. After a dead rank or host the run is
# restarted, if the start before left a new checkpoint. The run folder decides the exit status, not the launcher: 0 with
# SUCCESS, 85 with INTERRUPTED, 2 for bad arguments, 1 otherwise.
set -euo pipefail

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PATH="$(dirname "$launch")/.venv/bin:$PATH"
usage="usage: hosts.sh [--restarts N | --node-rank N] HOSTFILE --recipe NAME [more arguments of launch/train.py]"
grace_seconds=30    # for other hosts once one has failed, and for ranks that are told to end
reboot_seconds=1800 # a restart waits so long for a host that does not answer
restarts=0 node_rank="" stopping="" group=""

say() { printf '%s\n' "$*" >&2 || true; } # the terminal may have gone
die() {
  say "error: $*"
  exit 2
}
fail() {
  say "failed: $*"
  exit 1
}

# DeepSpeed reads the file for pdsh; this does it for --node-rank, and for the launcher itself.
export_nodes_env() {
  local line number=0 plain='^[A-Za-z_][A-Za-z0-9_]*=[^"'\''`$\%]*$'
  while IFS= read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    [[ "$line" =~ $plain ]] || die "$DS_ENV_FILE, line $number: $line: write KEY=VALUE without quotes, \`, \$, \\ or %," \
      "which shells would change; remove empty lines and comments, which DeepSpeed would read as KEY=VALUE"
    export "${line?}"
  done <"$DS_ENV_FILE"
}

# A command on every host, or with --node-rank on this one; fails when a host cannot be reached.
on_hosts() {
  if [[ -n "$node_rank" ]]; then bash -c "$1"; else pdsh -S -w "$(IFS=,; echo "${hosts[*]}")" "$1"; fi
}

# To the ranks and not to DeepSpeed's launcher of each host, which would kill them after half a minute.
tell_ranks() {
  on_hosts "for launcher in \$(pgrep -f '$launchers'); do pkill -$1 -P \$launcher; done; ${2:-true}"
}

# What this run has running on any host saves if it can, and is gone when this returns.
end_ranks() {
  local status=0
  tell_ranks TERM "for i in \$(seq $grace_seconds); do pgrep -f '$launchers' >/dev/null || exit 0; sleep 1; done" ||
    status=$?
  tell_ranks KILL || status=$?
  return "$status"
}

# As DeepSpeed must get an argument for pdsh: it puts one with a space between double quotes, and others as they are.
through_pdsh() {
  local text="${1//%/%%}"
  if [[ "$text" == *" "* ]]; then
    text="${text//\\/\\\\}" text="${text//\$/\\\$}"
    printf '%s\n' "${text//\`/\\\`}"
  else
    printf '%q\n' "$text"
  fi
}

# The launcher's output, until it ends. It waits for all hosts: when one has failed and another still waits for it
# after the grace time, as ranks may do in NCCL, end_ranks makes room.
follow() {
  local line status failed_at=""
  while true; do
    status=0
    IFS= read -r -t 5 line || status=$?
    if ((status == 0)); then
      printf '%s\n' "$line" || true
      if [[ ! -s "$first_error" && "$line" =~ (^|[[:space:]])([A-Za-z_.]*Error|error): ]]; then
        printf '%s' "$line" >"$first_error"
      fi
      [[ "$line" != pdsh@*": ssh exited with exit code "* ]] || failed_at="${failed_at:-$SECONDS}"
    else
      printf '%s' "$line" || true
      ((status > 128)) || return 0 # else a time-out, with a part of a line
    fi
    if [[ -n "$failed_at" ]] && ((SECONDS > failed_at + grace_seconds)); then
      say "a host has failed and another still waits for it: ending the ranks"
      end_ranks || true
      failed_at=""
    fi
  done
}

run_launcher() {
  local argument arguments=() how=(--no_ssh --node_rank "$node_rank") follower
  if [[ -n "$node_rank" ]]; then
    arguments=("$@")
  else
    how=(--force_multi --no_ssh_check) # force_multi: a hostfile of one host means that host, not this one
    for argument in "$@"; do arguments+=("$(through_pdsh "$argument")"); done
  fi
  set -m # its own process group, so that Ctrl-C reaches only this script
  deepspeed --hostfile "$hostfile" "${how[@]}" --no_local_rank --master_addr "$master_addr" \
    --master_port "$master_port" "$launch/train.py" --resume auto "${arguments[@]}" </dev/null 2>&1 | follow &
  follower=$!
  group="$(jobs -p %+)"
  set +m
  while kill -0 "$follower" 2>/dev/null; do
    if [[ -n "$stopping" ]]; then
      tell_ranks TERM || true # again, for ranks that were not there yet
      sleep 5
    else
      sleep 1 & # short, for a signal just before `wait` does not end it
      wait "$!" || true
    fi
  done
}

# shellcheck disable=SC2329 # called by the trap
stop() {
  trap '[[ -z "$group" ]] || kill -KILL -- "-$group" 2>/dev/null || true' HUP INT TERM USR1
  stopping=yes
  say "told to stop: the ranks save at their next step; a second signal kills them within $grace_seconds s"
}

newest_checkpoint() {
  { find "$run/checkpoints" -maxdepth 1 -name 'step_*[0-9]' 2>/dev/null || true; } | sort -V | tail -n 1
}

while [[ "${1:-}" == --restarts || "${1:-}" == --node-rank ]]; do
  [[ "${2:-}" =~ ^[0-9]+$ ]] || die "$1 ${2:-}: give a whole number; $usage"
  if [[ "$1" == --restarts ]]; then restarts="$2"; else node_rank="$2"; fi
  shift 2
done
hostfile="${1:-}"
[[ -f "$hostfile" ]] || die "HOSTFILE '$hostfile': no such file; $usage"
shift
found="$(python -m kd.cluster.hostfile -- "$hostfile")"
mapfile -t hosts <<<"$found"
[[ -z "$node_rank" ]] || ((node_rank < ${#hosts[@]})) || die "--node-rank $node_rank: $hostfile has ${#hosts[@]} hosts"
for argument in "$@"; do
  [[ "$argument" != --resume* ]] || die "$argument: every start here continues from the newest whole checkpoint; to" \
    "use another one, start once with deepspeed --hostfile $hostfile launch/train.py --resume PATH ..."
done
DS_ENV_FILE="$(realpath "${DS_ENV_FILE:-$launch/nodes.env}")"
export DS_ENV_FILE
export_nodes_env
found="$(python "$launch/train.py" --print-run "$@")"
run="${found%$'\n'*}"
if [[ -e "$run/SUCCESS" ]]; then
  say "done already: $run/SUCCESS"
  exit 0
fi

master_addr="${MASTER_ADDR:-${hosts[0]}}"
master_port="${MASTER_PORT:-${found##*$'\n'}}" # the run's own: a start finds what is left of the one before it
python -m kd.cluster.hostfile --master-addr "$master_addr" -- "$hostfile" >/dev/null
launchers="^[^ ]+ -u -m deepspeed.launcher.launch .*--master_addr=$master_addr --master_port=$master_port "
# A host that does not answer for a minute has failed, and nothing asks for a password.
export PDSH_RCMD_TYPE=ssh
PDSH_SSH_ARGS_APPEND+=" -oBatchMode=yes -oServerAliveInterval=15 -oServerAliveCountMax=4" # after what is set already
export PDSH_SSH_ARGS_APPEND

first_error="$(mktemp)" # the first line that names one, of all starts since the last progress
trap 'rm -f -- "$first_error"' EXIT
trap stop HUP INT TERM USR1
for ((attempt = 0; ; attempt++)); do
  before="$(newest_checkpoint)"
  deadline=$((SECONDS + (attempt ? reboot_seconds : 0)))
  until end_ranks || [[ -n "$stopping" ]]; do
    ((SECONDS < deadline)) || fail "a host of $hostfile cannot be reached by ssh; the lines above say which and why"
    sleep 15
  done
  if [[ -z "$stopping" ]]; then
    rm -f "$run/INTERRUPTED"
    : >"$first_error"
    run_launcher "$@"
  fi
  end_ranks || say "a host cannot be reached; its ranks end by themselves within run.watchdog_minutes"
  if [[ -e "$run/SUCCESS" ]]; then
    say "done: the student is in $run/export"
    exit 0
  fi
  after="$(newest_checkpoint)"
  if [[ -e "$run/INTERRUPTED" ]]; then
    say "interrupted: $after is saved, and the same command continues from it"
    exit 85
  fi
  if [[ -n "$stopping" || "$after" == "$before" ]] || ((attempt == restarts)); then break; fi
  say "failed: start $((attempt + 2)) of at most $((restarts + 1)) continues from $after"
done
why="the first error above says why"
[[ ! -s "$first_error" ]] || why="$why, $(<"$first_error")"
[[ -z "$stopping" ]] || why="it was told to stop before it had finished a step that it could save"
fail "$why; the same command starts again from ${after:-the beginning}"
