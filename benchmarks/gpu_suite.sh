#!/usr/bin/env bash
# Everything that needs a GPU, the most valuable first, into one flat folder, and within a time limit.
#   bash benchmarks/gpu_suite.sh RESULTS_DIR [SECONDS]     570 seconds, start and imports included
# Called again with the same folder it continues: parts that passed for the same commit and hardware are not repeated,
# nor is what the benchmarks had written. No network; what a bare machine lacks is in benchmarks/wheels.txt.
#   SUITE_DEVICE=cpu   everything in small form, without a GPU
#   KD_COMMIT=HASH     the commit, in a plain copy of a checkout that has no git to ask
# Exit status: 0 all parts passed, 1 a part failed, 2 no GPU or wrong arguments, 75 none failed but time ran out.
set -euo pipefail

started=$SECONDS
results="$(realpath -m -- "${1:?usage: bash benchmarks/gpu_suite.sh RESULTS_DIR [SECONDS]}")"
limit="${2:-570}"
device="${SUITE_DEVICE:-cuda}"
parts=(train_step loss profile tests)
# Percent of the limit that a part is sure of: parts before it end early enough. The first takes what is left.
declare -A share=([train_step]=0 [loss]=20 [profile]=5 [tests]=15)
# The loss benchmark ends its own processes when its seconds are over, so that none is left on the GPU: its imports and
# that take this long.
loss_margin=15
declare -A outcome

main() {
  [[ "$limit" =~ ^[1-9][0-9]*$ ]] || stop "SECONDS = $limit is not a whole number above 0"
  [[ "$device" == cuda || "$device" == cpu ]] || stop "SUITE_DEVICE = $device is neither cuda nor cpu"
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  PATH="$PWD/.venv/bin:$PATH"
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  [[ "$device" == cuda ]] || export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
  read_place
  mkdir -p -- "$results"
  scratch="$(mktemp -d)"
  trap 'rm -rf -- "$scratch"' EXIT
  local part
  for part in "${parts[@]}"; do
    if passed_before "$part"; then
      outcome[$part]="passed in an earlier call"
    else
      run_part "$part"
    fi
  done
  summarise
}

stop() {
  echo "error: $1" >&2
  exit 2
}

# Sets hardware and commit.
read_place() {
  local place lines
  place="$(python3 -c '
from kd.runs.environment import environment
here = environment()
print(", ".join(here["gpus"]), here["commit"] or "", sep="\n")')" || stop "kd cannot be imported here, see above"
  mapfile -t lines <<<"$place"
  hardware="${lines[0]}"
  commit="${lines[1]:-}"
  [[ "$device" == cuda ]] || hardware=CPU
  [[ -n "$hardware" ]] || stop "PyTorch sees no CUDA device here; SUITE_DEVICE=cpu runs everything in small form"
}

passed_line() { echo "passed: $1 on $hardware, commit $commit"; }

# A commit that is not known, or has uncommitted changes ("+"), is never the same as another.
passed_before() {
  [[ -n "$commit" && "$commit" != *+ && -e "$results/suite.txt" ]] &&
    grep -qxF -- "$(passed_line "$1")" "$results/suite.txt"
}

# Sets command to what a part runs in so many seconds.
set_command() {
  local part="$1" seconds="$2"
  local -A small=(
    [tests]="-n 2 tests/losses" # all are skipped: fewer to collect
    [loss]="--peers ours --divergences forward_kl --shapes 16,32,160 --num-tokens 32 --measure-seconds 0.1"
    [train_step]="--small --steps 2 --layouts zero3_zero3,gpu_zero2"
    [profile]="-k cpu-64-96"
  )
  # The tests compile some hundred kernels, on a core each.
  local -A full=([tests]="-n 8 tests" [loss]="--peers all" [train_step]="" [profile]="-k cuda")
  case "$part" in
    tests) command=(python3 -m pytest -m gpu --continue-on-collection-errors) ;;
    loss)
      command=(python3 benchmarks/loss.py --output "$results" --device "$device" --seconds "$((seconds - loss_margin))")
      ;;
    train_step) command=(python3 benchmarks/train_step.py --output "$results" --device "$device") ;;
    profile) command=(python3 -m pytest tests/profile --profile --profile-output "$scratch") ;;
  esac
  local -a form
  read -ra form <<<"$([[ "$device" == cuda ]] && echo "${full[$part]}" || echo "${small[$part]}")"
  command+=("${form[@]}")
}

# Runs a part in the time that later, unfinished parts leave it; output to suite.txt, that of the tests to tests.txt.
run_part() {
  local part="$1" log="$results/suite.txt" status=0 begin=$SECONDS seconds size output
  local -a command
  seconds="$(seconds_for "$part")"
  if ((seconds <= 0)) || [[ "$part" == loss && "$seconds" -le "$loss_margin" ]]; then
    outcome[$part]="unfinished: no time was left"
    return
  fi
  set_command "$part" "$seconds"
  echo "== $part, at most $seconds s: ${command[*]}" | tee -a "$log"
  if [[ "$part" == tests ]]; then
    log="$results/tests.txt"
    : >"$log"
  fi
  size="$(stat -c %s -- "$log")"
  timeout --kill-after=5 "$seconds" "${command[@]}" >>"$log" 2>&1 || status=$?
  [[ "$part" != profile ]] || collect_profile
  output="$(tail -c "+$((size + 1))" -- "$log" | tail -n 25)"
  if ((status == 124 || (status == 137 && SECONDS - begin >= seconds))); then
    outcome[$part]="unfinished after $((SECONDS - begin)) s"
  elif [[ "$part" == loss && "$output" == *"cells not reached"* ]]; then
    outcome[$part]="unfinished after $((SECONDS - begin)) s"
  elif ((status != 0)); then
    outcome[$part]="failed with status $status after $((SECONDS - begin)) s"
    echo "$output"
  else
    outcome[$part]="passed in $((SECONDS - begin)) s"
    passed_line "$part" >>"$results/suite.txt"
  fi
}

# A table and an archive of the traces, for the folder is to hold a few files: eight in all.
collect_profile() {
  [[ ! -e "$scratch/profile.csv" ]] || cp -- "$scratch/profile.csv" "$results"
  tar -C "$scratch" -czf "$results/profile_traces.tar.gz" .
}

# Seconds left for a part, less the shares of later parts that have not passed.
seconds_for() {
  local part left=$((limit - (SECONDS - started))) is_later=false
  for part in "${parts[@]}"; do
    if $is_later && ! passed_before "$part"; then
      left=$((left - share[$part] * limit / 100))
    fi
    [[ "$part" != "$1" ]] || is_later=true
  done
  echo "$left"
}

# Prints what came of each part; returns the exit status.
summarise() {
  local part status=0
  {
    [[ ! -e "$results/tests.txt" ]] || tail -n 1 -- "$results/tests.txt"
    # Rows of a call whose time ran out too, and none of another commit
    ! grep -qs "commit ${commit:-None};" -- "$results/train_step.md" || grep '^|' -- "$results/train_step.md"
    echo "== $hardware, commit ${commit:-unknown}, $((SECONDS - started)) of $limit s"
    for part in "${parts[@]}"; do
      printf '%-10s  %s\n' "$part" "${outcome[$part]}"
    done
  } | tee -a "$results/suite.txt"
  for part in "${parts[@]}"; do
    case "${outcome[$part]}" in
      failed*) return 1 ;;
      unfinished*) status=75 ;;
    esac
  done
  return "$status"
}

main
