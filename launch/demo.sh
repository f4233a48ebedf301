#!/usr/bin/env bash
# Run all stages on two CPU cores: problems -> traces of the teacher -> distillation on two ranks -> scores.
#   bash launch/demo.sh [--from-scratch SEED]     --from-scratch trains a new teacher and student base first
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
models=recipes/assets/tiny
rm -rf "$run" # a demo starts anew; training itself never overwrites a run

say() { printf '\n== %s\n' "$*"; }

if [[ "${1:-}" == --from-scratch ]]; then
  say "0. models: teacher and student base, pre-trained from seed ${2:?--from-scratch SEED}"
  bash launch/tiny_from_scratch.sh "$2"
  models=build/tiny_scratch/assets
fi
pair=(--set "teacher.model=$models/teacher" --set "student.model=$models/student_base")
traces_file="build/tiny/traces_${traces}_$(sha256sum "$models/teacher/model.safetensors" | cut -c 1-8).jsonl"

say "1. problems: distinct sets for training, selection and report"
python -m kd.demo.arithmetic --output build/tiny

say "2. traces: the teacher solves $traces training problems"
OMP_NUM_THREADS=2 python launch/generate.py --recipe "$recipe" "${pair[@]}" \
  --problems build/tiny/train_problems.jsonl --output "$traces_file" --limit "$traces" --batch-size 266
cp "$traces_file" build/tiny/traces.jsonl # where the recipes tiny_* look

say "3. distil: teacher and student as two ZeRO-3 engines on two ranks ($recipe, $steps steps)"
OMP_NUM_THREADS=1 deepspeed --quiet --num_gpus 2 --no_local_rank launch/train.py --recipe "$recipe" "${pair[@]}" \
  --set run.output_dir=runs/demo --set "data.path=$traces_file" \
  --set "training.max_steps=$steps" --set "training.checkpoint_every=$(((steps + 1) / 2))"

say "4. score: greedy answers to $problems problems that no training set holds"
OMP_NUM_THREADS=2 python launch/evaluate.py --recipe "$recipe" --limit "$problems" --output "$run/evaluation" \
  --model "$models/teacher" --label teacher \
  --model "$models/student_base" --label "student before" \
  --model "$run/export/best" --label "student after"
