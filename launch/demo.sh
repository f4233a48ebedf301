#!/usr/bin/env bash
# The whole path on two CPU cores: problems -> traces of the teacher -> distillation on two ranks -> scores.
# DEMO_TRACES, DEMO_STEPS and DEMO_PROBLEMS shorten it; DEMO_RECIPE chooses another length, such as tiny_trunc25.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
export DS_ACCELERATOR=cpu OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

recipe="${DEMO_RECIPE:-tiny_trunc50}"
traces="${DEMO_TRACES:-1064}"
steps="${DEMO_STEPS:-200}"
problems="${DEMO_PROBLEMS:-300}"
run="runs/demo/$recipe"
rm -rf "$run" # a demo starts anew; training itself never overwrites a run

say() { printf '\n== %s\n' "$*"; }

say "1. problems: distinct sets for training, selection and report"
python -m kd.tasks.arithmetic --output build/tiny

say "2. traces: the teacher solves $traces training problems"
OMP_NUM_THREADS=2 python launch/generate.py --recipe "$recipe" --problems build/tiny/train_problems.jsonl \
  --output "build/tiny/traces_$traces.jsonl" --limit "$traces" --batch-size 266

say "3. distil: teacher and student as two ZeRO-3 engines on two ranks ($recipe, $steps steps)"
OMP_NUM_THREADS=1 deepspeed --num_gpus 2 --no_local_rank launch/train.py --recipe "$recipe" \
  --set run.output_dir=runs/demo --set "data.path=build/tiny/traces_$traces.jsonl" \
  --set "training.max_steps=$steps" --set "training.checkpoint_every=$(((steps + 1) / 2))" \
  --set "data.num_train=$((traces - 64))"

say "4. score: greedy answers to $problems problems that no training set holds"
OMP_NUM_THREADS=2 python launch/evaluate.py --recipe "$recipe" --limit "$problems" --output "$run/evaluation" \
  --model recipes/assets/tiny/teacher --label teacher \
  --model recipes/assets/tiny/student_base --label "student before" \
  --model "$run/export/best" --label "student after"
