#!/usr/bin/env bash
# Record the pocket model's attention on text and on planted tasks, train the default predictor and the published
# architecture on it, and judge both on other text. Usage: scripts/train_predictor.sh TEXTS HELDOUT OUT [DEVICE]
#   TEXTS    a directory of .txt files to learn from; HELDOUT another one to be judged on
#   OUT      where recordings, checkpoints and the table go; copy OUT/time-filters over predictor/weights/default to
#            ship it
set -euo pipefail
texts=$1 heldout=$2 out=$3 device=${4:-cpu}

python scripts/plant_tasks.py --data "$texts" --out "$out/tasks.jsonl" --documents 140 --questions 8 --seed 11
for data in "$out/tasks.jsonl" "$texts"; do
    attnpred record --data "$data" --out "$out/histories" --per-file 1 --device "$device" --dtype float32
done
attnpred train --data "$out/histories" --out "$out/time-filters" --steps 1200 --batch 16 --log-every 400
attnpred train --data "$out/histories" --out "$out/paper" --arch paper --loss mse --horizon 1 --steps 1200 --batch 16
rules=(
    --rule "last row, ahead: predictor,predictor=last,late_fetch=0"
    --rule "exponential average, ahead: predictor,predictor=ema,late_fetch=0"
    --rule "mean of the window, ahead: predictor,predictor=mean,late_fetch=0"
    --rule "quest, previous query: quest-ahead"
    --rule "paper, ahead: predictor,predictor=$out/paper,late_fetch=0"
    --rule "time-filters, ahead: predictor,predictor=$out/time-filters,late_fetch=0"
    --rule "time-filters, a quarter late: predictor,predictor=$out/time-filters"
)
attnpred eval recovery --data "$heldout" --questions 200 --recovery 4 --device "$device" --dtype float32 \
    --out "$out/questions.json" --rule full --rule streaming "${rules[@]}"
attnpred eval recovery --data "$heldout" --tail 128 --documents 20 --device "$device" --dtype float32 \
    --out "$out/tails.json" "${rules[@]}"
