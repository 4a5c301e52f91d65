#!/usr/bin/env bash
# Makes timings of docs/results.md on one GPU: parts of a step, decoding against context, several sequences, a
# context of half a million tokens, and a 24 GB card simulated by a memory limit.
# Usage: scripts/bench_decode.sh OUT [SHAPE] [MORE…]
#   OUT      directory for the results, as text and JSON lines; a later run times parts of a step again, but decoding only where
#            the JSON lines lack it
#   SHAPE    a shape of `attnpred bench decode --shape` (default: llama-3.1-8b)
#   MORE     further options of `attnpred bench decode`, such as --steps 20
# A trial on a CPU, in minutes: DEVICE=cpu CONTEXTS=1024,2048 LONG=4096 LONGEST=8192 scripts/bench_decode.sh OUT tiny
# PYTHON sets the interpreter.
# Half a million tokens of the 8B shape need 64 GiB of host memory; so do four sequences of 128K tokens.
set -euo pipefail
[ $# -ge 1 ] || { echo "bench_decode.sh: expected OUT [SHAPE] [MORE…]" >&2; exit 2; }
out=$1 shape=${2:-llama-3.1-8b} more=("${@:3}")
device=${DEVICE:-cuda} contexts=${CONTEXTS:-1024,8192,32768,131072} long=${LONG:-131072} longest=${LONGEST:-524288}
mkdir -p "$out"
attnpred() { "${PYTHON:-python3}" -m attention_predictor.cli "$@"; }

part() { # NAME PART OPTIONS…: one part, as text
    echo "attnpred bench ${*:2}" | tee "$out/$1.txt"
    attnpred bench "${@:2}" --device "$device" | tee -a "$out/$1.txt"
}
decode() { # NAME OPTIONS…: a sweep; the table as text, its rows as JSON lines
    echo "attnpred bench decode --shape $shape --synthetic ${*:2} ${more[*]}" | tee "$out/$1.txt"
    attnpred bench decode --shape "$shape" --synthetic --device "$device" --out "$out/$1.jsonl" "${@:2}" "${more[@]}" |
        tee -a "$out/$1.txt"
}

few=()
[ "$device" = cpu ] && few=(--repeats 3)
part attention_1 attention "${few[@]}"
part attention_16 attention --batch 16 "${few[@]}"
part sketch_32k sketch --context 32768 "${few[@]}"
part sketch_long sketch --context "$long" "${few[@]}"
part gather gather "${few[@]}"
[ "$device" = cpu ] || part predictor predictor

decode contexts --contexts "$contexts" --plot "$out/contexts.png"
decode batch_4 --context "$long" --batch 4
decode longest --context "$longest"
[ "$device" = cpu ] || decode card_24 --context "$long" --memory-limit 24
