#!/usr/bin/env bash
# Everything that needs a GPU, the most valuable first, into one flat folder, and within a time limit.
#   bash benchmarks/gpu_suite.sh RESULTS_DIR [SECONDS]     570 seconds, start and imports included
# Called again with the same folder it continues: parts that passed for the same commit and hardware are not repeated,
# nor what the benchmarks had written. No network; what a bare machine lacks is in benchmarks/wheels.txt.
#   SUITE_DEVICE=cpu   everything in small form, without a GPU
#   KD_COMMIT=HASH     the commit, in a plain copy of a checkout that has no git to ask
# Exit status: 0 all parts passed, 1 a part failed, 2 no GPU or wrong arguments, 75 none failed but time ran out.
set -euo pipefail

started=$SECONDS
results="$(realpath -m -- "${1:?usage: bash benchmarks/gpu_suite.sh RESULTS_DIR [SECONDS]}")"
limit="${2:-570}"
[[ "$limit" =~ ^[1-9][0-9]*$ ]] || { echo "error: SECONDS = $limit is not a whole number above 0" >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# part -> its command; the loss is also told how long it has
tests=(python3 -m pytest -m gpu tests)
loss=(python3 benchmarks/loss.py --output "$results")
train_step=(python3 benchmarks/train_step.py --output "$results")
profile=(python3 -m pytest tests/profile --profile --profile-output "$results")
case "${SUITE_DEVICE:-cuda}" in
  cuda)
    loss+=(--device cuda --peers all)
    train_step+=(--device cuda)
    ;;
  cpu)
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
    loss+=(--device cpu --peers ours eager --shapes 16,32,160 --num-tokens 32 --divergences forward_kl
      --measure-seconds 0.1)
    train_step+=(--device cpu --small --steps 3)
    ;;
  *) echo "error: SUITE_DEVICE = $SUITE_DEVICE is neither cuda nor cpu" >&2 && exit 2 ;;
esac
[[ -z "${KD_COMMIT:-}" ]] || loss+=(--commit "$KD_COMMIT")
order=(tests loss train_step profile)
# Percent of the limit that a part is sure of: parts before it end early enough. The profile takes what is left.
declare -A share=([tests]=0 [loss]=30 [train_step]=30 [profile]=0)
declare -A outcome

main() {
  mkdir -p "$results"
  read_place
  local part
  for part in "${order[@]}"; do
    if passed_before "$part"; then
      outcome[$part]="passed in an earlier call"
    else
      run_part "$part"
    fi
  done
  summarise
}

# Sets hardware and commit. A commit that is not known, or has changes, is never the same as another.
read_place() {
  local lines
  mapfile -t lines < <(python3 -c '
from kd.metrics import environment
here = environment()
print(", ".join(here["gpus"]), here["commit"] or "", sep="\n")')
  hardware="${lines[0]:-}"
  commit="${KD_COMMIT:-${lines[1]:-}}"
  if [[ "${SUITE_DEVICE:-cuda}" == cpu ]]; then
    hardware=cpu
  elif [[ -z "$hardware" ]]; then
    echo "error: PyTorch sees no CUDA device here; SUITE_DEVICE=cpu runs everything in small form" >&2
    exit 2
  fi
}

passed_line() { echo "passed: $1 on $hardware, commit $commit"; }

passed_before() {
  [[ -n "$commit" && "$commit" != *+ && -e "$results/suite.txt" ]] &&
    grep -qxF -- "$(passed_line "$1")" "$results/suite.txt"
}

# Runs a part in the time that later, unfinished parts leave it; output to suite.txt, that of the tests to tests.txt.
run_part() {
  local part="$1" log="$results/suite.txt" status=0 begin=$SECONDS seconds
  local -n command="$part"
  seconds="$(seconds_for "$part")"
  if ((seconds <= 0)); then
    outcome[$part]="unfinished: no time was left"
    return
  fi
  [[ "$part" != tests ]] || log="$results/tests.txt"
  [[ "$part" != loss ]] || command+=(--seconds "$seconds")
  echo "== $part: ${command[*]}" | tee -a "$results/suite.txt"
  [[ "$part" != tests ]] || : >"$log"
  local size
  size="$(stat -c %s "$log")"
  timeout --kill-after=5 "$seconds" "${command[@]}" >>"$log" 2>&1 || status=$?
  local output
  output="$(tail -c "+$((size + 1))" "$log" | tail -n 25)"
  # The loss ends by itself when its seconds are over.
  if ((status == 124 || status == 137)) || [[ "$part" == loss && "$output" == *"cells not reached"* ]]; then
    outcome[$part]="unfinished after $((SECONDS - begin)) s"
  elif ((status != 0)); then
    outcome[$part]="failed with status $status after $((SECONDS - begin)) s"
    printf '%s\n' "$output"
  else
    outcome[$part]="passed in $((SECONDS - begin)) s"
    passed_line "$part" >>"$results/suite.txt"
  fi
}

seconds_for() {
  local part left=$((limit - (SECONDS - started))) is_later=false
  for part in "${order[@]}"; do
    if $is_later && ! passed_before "$part"; then
      ((left -= share[$part] * limit / 100, 1))
    fi
    [[ "$part" != "$1" ]] || is_later=true
  done
  echo "$left"
}

summarise() {
  local part status=0
  {
    [[ ! -e "$results/tests.txt" ]] || tail -n 1 "$results/tests.txt"
    [[ ! -e "$results/train_step.md" ]] || grep '^|' "$results/train_step.md"
    echo "== $hardware, commit ${commit:-unknown}, $((SECONDS - started)) of $limit s"
    for part in "${order[@]}"; do
      printf '%-10s  %s\n' "$part" "${outcome[$part]}"
    done
  } | tee -a "$results/suite.txt"
  for part in "${order[@]}"; do
    case "${outcome[$part]}" in
      failed*) status=1 ;;
      unfinished*) ((status == 1)) || status=75 ;;
    esac
  done
  return "$status"
}

main
