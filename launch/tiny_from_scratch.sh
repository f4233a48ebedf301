#!/usr/bin/env bash
# Make the two models of the embedded default anew, from a fresh seed, by the recipes tiny_scratch_*:
#   bash launch/tiny_from_scratch.sh SEED      -> build/tiny_scratch/assets/{teacher,student_base,manifest.json}
# What recipes/assets/tiny ships was made so. Ten minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
export DS_ACCELERATOR=cpu OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

seed="${1:?usage: tiny_from_scratch.sh SEED}"
build=build/tiny_scratch
rm -rf "$build" runs/scratch
python -m kd.demo.arithmetic --output "$build" --seed "$seed"
python -m kd.demo.tiny_models --output "$build/assets"
for model in teacher student_base; do
  for stage in 1 2; do
    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 --no_local_rank launch/train.py \
      --recipe "tiny_scratch_${model}_$stage" --set run.output_dir=runs/scratch --set "run.seed=$seed"
  done
  cp "runs/scratch/tiny_scratch_${model}_2/export/last/model.safetensors" "$build/assets/$model/"
done
OMP_NUM_THREADS=2 python launch/evaluate.py --recipe tiny_scratch_teacher_2 --output "$build/scores" \
  --model "$build/assets/teacher" --label teacher --model "$build/assets/student_base" --label student_base
python -m kd.demo.manifest --assets "$build/assets" --problem-sets "$build" --scores "$build/scores" --seed "$seed"
