# shellcheck shell=bash disable=SC2034,SC2154
# How each job begins; *.sbatch source it. Sets run, recipe (of this task, when the job is an array) and task, the
# words before a script's name that start it in the environment of the job.

: "${work_dir:?submit with launch/submit.py}" "${code:?}" "${python_dir:?}" "${runs[0]:?}" "${recipes[0]:?}"

say() { printf '== %s\n' "$*"; }
# Until a script has traps of its own: a signal here finds nothing to save.
early=
trap 'early=USR1' USR1
trap 'early=TERM' TERM
begin() {
  [[ -z "$early" ]] && return
  say "failed: $early came before anything had begun, perhaps while --setup was sourced: submit again, with more time"
  exit 1
}
cd -- "$work_dir" || exit
PATH="$python_dir:$PATH"
if [[ -n "${setup:-}" ]]; then
  # shellcheck source=/dev/null
  source -- "$setup" || { # before set -u, for which few such files are written
    say "failed: --setup $setup, or its last command, has status $?"
    exit 1
  }
fi
set -euo pipefail

# As for launch/hosts.sh: KEY=VALUE lines, nothing in them expanded.
while IFS= read -r line || [[ -n "$line" ]]; do
  if [[ ! "$line" =~ ^[A-Za-z_][A-Za-z_0-9]*= ]]; then
    say "failed: launch/nodes.env: $line: write KEY=VALUE"
    exit 2
  fi
  export "${line?}"
done <"$code/launch/nodes.env"
# The copy's kd, not the one that is installed; srun hands all of this to the tasks.
# commit is empty when the code came as an archive.
export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}" KD_COMMIT="$commit"
# srun does not take the number of a task's cores from the job.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

index="${SLURM_ARRAY_TASK_ID:-0}"
run="${runs[index]}" recipe="${recipes[index]}"
task=("${container[@]}" python)
begin
say "$(date -Is): job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST: $run"

# Exit status of a mistake that another start would repeat (kd.constants.EXIT_USER_ERROR)
user_error=2
# Of a cell of a study: how it ended, into the study's file.
record() { "${task[@]}" -m kd.study.outcomes "$run" || say "the outcome could not be written to the study's file"; }
# A task of an array by its index: the id of its last task is that of the whole array.
requeue() { scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"; }
