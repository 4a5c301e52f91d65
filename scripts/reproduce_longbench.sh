#!/usr/bin/env bash
# LongBench as in the paper's main table: Llama-3.1-8B-Instruct, budgets 512 to 4,096, the paper's baselines beside it.
# Usage: scripts/reproduce_longbench.sh OUT [DATA] [MORE…]
#   DATA     a directory of LongBench's .jsonl files, or hub (the default: the authors' archive)
#   MORE     further options of `attnpred eval longbench`, such as --limit 20 or --tasks qasper,trec
# PAPER names a checkpoint of the published network, for its row. One GPU; several: LAUNCH="accelerate launch --num_processes 4 -m attention_predictor.cli". MODEL names another model.
# Stopped and run again, it goes on where it was.
set -euo pipefail
out=$1 data=${2:-hub} more=("${@:3}")
model=${MODEL:-meta-llama/Llama-3.1-8B-Instruct} launch=${LAUNCH:-attnpred}

rules=(--rule predictor --rule "predictor-ahead: predictor,late_fetch=0")
# The published network, trained or loaded by AttentionPredictor.from_upstream, with the paper's exact calibration.
[ -z "${PAPER:-}" ] || rules+=(--rule "paper: predictor,predictor=$PAPER,late_fetch=0,reserve=0,calibration=exact")
$launch eval longbench --model "$model" --device "${DEVICE:-cuda}" --data "$data" --out "$out" \
    --policies full,streaming,h2o,snapkv,quest "${rules[@]}" --budgets 512,1024,2048,4096 "${more[@]}"
attnpred report "$out" --out "$out/report"
