#!/usr/bin/env bash
# Runs LongBench as in the paper's main table: Llama-3.1-8B-Instruct, budgets 512 to 4,096, with the paper's baselines.
# Usage: scripts/reproduce_longbench.sh OUT [DATA [MORE…]]
#   DATA     a directory of LongBench's .jsonl files, hub (the default: the authors' archive), or hub:owner/name
#   MORE     further options of `attnpred eval longbench`, such as --limit 20 or --tasks qasper,trec
# Environment variables: PAPER adds a row for this checkpoint of the published network; MODEL sets another model; DEVICE sets another
# device than cuda; PROCESSES sets the number of processes (one per GPU); PYTHON sets the interpreter.
# An interrupted run continues when the script is run again.
set -euo pipefail
[ $# -ge 1 ] || { echo "reproduce_longbench.sh: expected OUT [DATA [MORE…]]" >&2; exit 2; }
out=$1 data=${2:-hub} more=("${@:3}")
model=${MODEL:-meta-llama/Llama-3.1-8B-Instruct} python=${PYTHON:-python3} processes=${PROCESSES:-1}

launch=("$python" -m)
[ "$processes" = 1 ] || launch+=(torch.distributed.run --standalone --nproc_per_node "$processes" -m)
rules=(--rule predictor --rule "predictor-ahead: predictor,late_fetch=0")
# The published network, trained or loaded by AttentionPredictor.from_upstream, with the paper's exact calibration.
[ -z "${PAPER:-}" ] || rules+=(--rule "paper: predictor,predictor=$PAPER,late_fetch=0,reserve=0,calibration=exact")
"${launch[@]}" attention_predictor.cli eval longbench --model "$model" --device "${DEVICE:-cuda}" --data "$data" --out "$out" \
    --policies full,streaming,h2o,snapkv,quest "${rules[@]}" --budgets 512,1024,2048,4096 "${more[@]}"
"$python" -m attention_predictor.cli report "$out" --out "$out/report"
