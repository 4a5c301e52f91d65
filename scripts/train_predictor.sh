#!/usr/bin/env bash
# Record the pocket model's attention on text and on planted tasks, then train the default predictor and the published
# architecture on it. Usage: scripts/train_predictor.sh TEXTS OUT [DEVICE]
#   TEXTS  a directory of .txt files, none of which the result is judged on
#   OUT    where recordings and checkpoints go; copy OUT/time-filters over predictor/weights/default to ship it
set -euo pipefail
texts=$1 out=$2 device=${3:-cpu}

python scripts/plant_tasks.py --data "$texts" --out "$out/tasks.jsonl" --documents 240
attnpred record --data "$texts" --out "$out/histories" --per-file 1 --steps 192 --device "$device" --dtype float32
attnpred record --data "$out/tasks.jsonl" --out "$out/histories" --steps 192 --device "$device" --dtype float32
# First where the mass of the next step will be; then what the next 24 need, from rows as noisy as the sketch's.
attnpred train --data "$out/histories" --out "$out/first" --steps 1600 --horizon 1 --noise 0 --device "$device"
attnpred train --data "$out/histories" --out "$out/time-filters" --init "$out/first" --steps 420 --batch 16 --lr 3e-3 \
    --horizon 24 --noise 0.5 --device "$device"
attnpred train --data "$out/histories" --out "$out/paper" --arch paper --loss mse --horizon 1 --noise 0 --steps 1500 --device "$device"
