#!/usr/bin/env bash
# Which layers can be spared? Perplexity without 1, 2, … layers, removed by block influence, by query similarity, by both (TAPPA) and
# at random; then the same layers' plan. Usage: scripts/compare_pruning.sh DATA HELDOUT OUT [DEVICE]
#   DATA     texts by which layers are scored; HELDOUT, others, by which what is left is judged: .txt files or directories of them
# MODEL, LAYERS (at most), BETA, CONTEXT, DOCUMENTS and SEEDS (random orders) make it another or a larger one. Layers are scored once:
# another BETA in the same OUT takes their scores. Tables are printed, and kept in OUT/beta-<β>/ with a plot.
set -euo pipefail
data=$1 heldout=$2 out=$3 device=${4:-cpu} beta=${BETA:-0.3}
for place in "$data" "$heldout"; do
    [ -e "$place" ] || { echo "compare_pruning.sh: $place: no such file or directory" >&2; exit 2; }
done
folder=$out/beta-$beta
mkdir -p "$folder"
by=(--data "$data")
for scores in "$out"/beta-*/scores.json; do
    [ -e "$scores" ] && by=(--scores "$scores")
done
attnpred prune "${by[@]}" --sweep "$heldout" --layers "${LAYERS:-7}" --beta "$beta" --seeds "${SEEDS:-10}" --device "$device" \
    --context "${CONTEXT:-2048}" --documents "${DOCUMENTS:-16}" ${MODEL:+--model "$MODEL"} \
    --out "$folder" --plot "$folder/sweep.png" | tee "$folder/sweep.txt"
attnpred prune --plan-only --scores "$folder/scores.json" --beta "$beta" | tee "$folder/plan.txt"
