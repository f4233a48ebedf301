# shellcheck shell=bash disable=SC2034,SC2154
# How each job begins, and one that trains or fills a cache ends; *.sbatch source it. Sets run, recipe (of this task, when the job is an array) and task, the
# words before a script's name that start it in the environment of the job.

: "${work_dir:?submit with launch/submit.py}" "${code:?}" "${python_dir:?}" "${runs[0]:?}" "${recipes[0]:?}"

say() { printf '== %s\n' "$*"; }
# Until a script has traps of its own: a signal here finds nothing to save.
early=
trap 'early=USR1' USR1
trap 'early=TERM' TERM
begin() {
  [[ -z "$early" ]] && return
  say "failed: $early came before the job had begun, perhaps while it sourced --setup: submit again with more time"
  exit 1
}
cd -- "$work_dir" || exit
PATH="$python_dir:$PATH"
if [[ -n "${setup:-}" ]]; then
  # shellcheck source=/dev/null
  source -- "$setup" || { # before set -u, for which few such files are written
    say "failed: --setup $setup, or its last command, returned status $?"
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
record() { "${task[@]}" -m kd.study.outcomes "$run" || say "could not write the outcome to the study's file"; }
# A task of an array by its index: the id of its last task is that of the whole array.
requeue() { scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"; }

# The first rank that fails ends the others, which would wait for it.
srun_ends=(--kill-on-bad-exit=1)

# Where ranks meet: the first node of the job.
meeting_point() {
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR="${nodes[0]}"
  export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
}

# A script of launch/ on all ranks, until it ends: srun starts a task per GPU (the deepspeed launcher would die of USR1).
# Sets status, told where a signal came, and told_to_end where that was TERM.
on_all_ranks() {
  meeting_point
  # Before srun starts: a signal that came in between would be lost, and nothing saved.
  srun='' told='' told_to_end=''
  trap 'tell USR1' USR1                  # ahead of the time limit: --signal
  trap 'told_to_end=yes; tell TERM' TERM # of scancel, of preemption, or of a node that fails
  begin
  srun --export=ALL "${srun_ends[@]}" "${srun_options[@]}" "${task[@]}" "$code/launch/$1" --recipe "$recipe" "${@:2}" &
  srun=$!
  if [[ -n "$told" ]]; then kill -USR1 "$srun" || true; fi
  while
    woken=
    wait "$srun" && status=0 || status=$?
    [[ -n "$woken" ]] # a trapped signal ends wait, and not srun
  do :; done
}
tell() { # srun passes USR1 on to the tasks, and would end them of TERM
  woken=yes told=yes
  say "$1: telling the ranks to save"
  [[ -z "$srun" ]] || kill -USR1 "$srun" || true
}

# Ends a job whose ranks left no $marker. $begun_at and $ended_at count what is saved, $saved and $newest say it, and
# $interrupted is set where the ranks saved because of a signal. Requeued, unless a TERM came, is what got further: after
# a signal always, after a failure up to $restarts times.
end_unfinished() {
  local restarted="$folder/restarted-$index" failures # how often after a failure
  failures="$(cat -- "$restarted" 2>/dev/null || echo 0)"
  if [[ -n "$told_to_end" ]]; then
    [[ -n "$interrupted" ]] || saved="$newest"
    say "told to end by TERM (scancel, preemption, or a node that failed), $saved: if SLURM requeues the job, it" \
      "continues by itself; otherwise submit the same again"
  elif [[ -n "$interrupted" ]]; then
    if ((ended_at == begun_at)); then
      say "interrupted at $unit $ended_at, where it began: not requeued, since it would get no further"
      record
    elif requeue; then
      say "interrupted, $saved: requeued"
    else
      say "interrupted, $saved, but SLURM does not requeue it: submit the same again to continue"
    fi
  else
    say "failed: srun returned status $status, and there is no $marker; $newest"
    if ((status != user_error && ended_at > begun_at && failures < restarts)); then
      echo "$((failures + 1))" >"$restarted"
      requeue && say "requeued, since it left a new $what: restart $((failures + 1)) of at most $restarts" &&
        exit "$((status ? status : 1))"
    fi
    record
  fi
  exit "$((status ? status : 1))"
}
