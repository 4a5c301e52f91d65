#!/usr/bin/env bash
# Record the pocket model's attention on text and on planted tasks, train the default predictor and the published
# architecture on it, and evaluate both on other text.
# Usage: scripts/train_predictor.sh TEXTS HELDOUT OUT [DEVICE] [MORE…]
#   TEXTS    a directory of .txt files to train on; HELDOUT: another one to evaluate on
#   MORE     further documents to evaluate on, without questions, such as LongBench's .jsonl files
#   OUT      directory for recordings, checkpoints and the table; copy OUT/time-filters over predictor/weights/default to
#            ship it
# PYTHON says by which interpreter. Run again, it goes on with a training that was interrupted, and keeps a predictor that is there.
# Larger or smaller: CONTEXT (tokens), DOCUMENTS (recorded), STEPS (of training), QUESTIONS, JUDGED (tails of documents, of each place).
# A small trial of all its steps: CONTEXT=1500 DOCUMENTS=4 STEPS=20 QUESTIONS=8 JUDGED=2 scripts/train_predictor.sh …
set -euo pipefail
[ $# -ge 3 ] || { echo "train_predictor.sh: expected TEXTS HELDOUT OUT [DEVICE] [MORE…]" >&2; exit 2; }
texts=$1 heldout=$2 out=$3 device=${4:-cpu} more=("${@:5}")
context=${CONTEXT:-8192} documents=${DOCUMENTS:-240} steps=${STEPS:-1200} questions=${QUESTIONS:-200} judged=${JUDGED:-30}
python=${PYTHON:-python3} here=$(cd "$(dirname "$0")" && pwd)
[ "$documents" -ge 4 ] || { echo "train_predictor.sh: DOCUMENTS: $documents is not allowed: expected at least 4" >&2; exit 2; }
attnpred() { "$python" -m attention_predictor.cli "$@"; }

"$python" "$here/plant_tasks.py" --data "$texts" --out "$out/tasks.jsonl" --documents "$documents" \
    --questions 8 --context "$context" --seed 11
record=(attnpred record --out "$out/histories" --per-file 1 --max-tokens "$context" --device "$device" --dtype float32)
"${record[@]}" --data "$out/tasks.jsonl"
"${record[@]}" --data "$texts" --documents $((documents / 4))
train() { # NAME OPTIONS…
    attnpred train --data "$out/histories" --out "$out/$1" --steps "$steps" --batch 16 --resume \
        --device "$([ "$device" = cpu ] && echo cpu || echo auto)" "${@:2}"
}
train time-filters
train paper --arch paper --loss mse --horizon 1
rules=(
    --rule "last row, ahead: predictor,predictor=last,late_fetch=0"
    --rule "exponential average, ahead: predictor,predictor=ema,late_fetch=0"
    --rule "mean of the window, ahead: predictor,predictor=mean,late_fetch=0"
    --rule "quest, previous query: quest-ahead"
    --rule "paper, ahead: predictor,predictor=$out/paper,late_fetch=0"
    --rule "time-filters, ahead: predictor,predictor=$out/time-filters,late_fetch=0"
    --rule "time-filters, a quarter late: predictor,predictor=$out/time-filters"
)
judge=(attnpred eval recovery --context "$context" --device "$device" --dtype float32 "${rules[@]}")
"${judge[@]}" --rule full --rule streaming --data "$heldout" --tasks kv,facts --questions "$questions" --per-document 10 \
    --recovery 6 --out "$out/questions"
for data in "$heldout" "${more[@]}"; do
    "${judge[@]}" --data "$data" --tail 64 --per-file 2 --documents "$judged" --recovery 6 --out "$out/tails-$(basename "$data")"
done
