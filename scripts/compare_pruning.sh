#!/usr/bin/env bash
# Measures perplexity without 1, 2, … layers, removed by block influence, by query similarity, by both (TAPPA) and at random; then prints
# the order of removal.
# Usage: scripts/compare_pruning.sh DATA HELDOUT OUT [DEVICE]
#   DATA     texts to score layers on: a .txt file or a directory of .txt files
#   HELDOUT  other texts, for perplexity
# Environment variables: MODEL, LAYERS (largest number to remove), BETA, CONTEXT, DOCUMENTS and SEEDS (number of random orders); PYTHON
# sets the interpreter. Layers are scored once per OUT: a run with another BETA uses the same scores, one with another MODEL, DATA,
# CONTEXT or DOCUMENTS needs another OUT. Tables are printed, and saved in OUT/beta-<β>/ with a plot.
set -euo pipefail
refuse() { echo "compare_pruning.sh: $1" >&2; exit 2; }
[ $# -ge 3 ] || refuse "expected DATA HELDOUT OUT [DEVICE]"
data=$1 heldout=$2 out=$3 device=${4:-cpu} beta=${BETA:-0.3} context=${CONTEXT:-2048} documents=${DOCUMENTS:-16}
for place in "$data" "$heldout"; do [ -e "$place" ] || refuse "$place: no such file or directory"; done
folder=$out/beta-$beta scored="${MODEL:-} $data $context $documents"
mkdir -p "$folder"
attnpred() { "${PYTHON:-python3}" -m attention_predictor.cli "$@"; }
by=(--data "$data")
for scores in "$out"/beta-*/scores.json; do
    [ -e "$scores" ] || continue
    before=$(cat "${scores%.json}.of" 2>/dev/null || echo unknown)
    [ "$before" = "$scored" ] || refuse "$out holds scores of other settings: $before"
    by=(--scores "$scores")
done
echo "$scored" >"$folder/scores.of"
attnpred prune "${by[@]}" --sweep "$heldout" --layers "${LAYERS:-7}" --beta "$beta" --seeds "${SEEDS:-10}" --device "$device" \
    --context "$context" --documents "$documents" ${MODEL:+--model "$MODEL"} \
    --out "$folder" --plot "$folder/sweep.png" | tee "$folder/sweep.txt"
attnpred prune --plan-only --scores "$folder/scores.json" --beta "$beta" | tee "$folder/plan.txt"
