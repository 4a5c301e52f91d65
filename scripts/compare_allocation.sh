#!/usr/bin/env bash
# Compares equal budgets with unequal ones of the same total, by TAPPA (qsim) and by CAKE, for several policies: answers found, attention
# mass recovered (after planted questions and in plain text), and perplexity.
# Usage: scripts/compare_allocation.sh DATA OUT [DEVICE]
#   DATA     .txt files that the model has not seen, or a directory of them
# Environment variables: MODEL, BUDGETS, CONTEXT, POLICIES (such as predictor, snapkv, cake), QUESTIONS and DOCUMENTS; PYTHON sets the interpreter. The
# tables are printed, and saved in OUT/*.txt.
# An interrupted run continues when the script is run again.
set -euo pipefail
[ $# -ge 2 ] || { echo "compare_allocation.sh: expected DATA OUT [DEVICE]" >&2; exit 2; }
data=$1 out=$2 device=${3:-cpu}
budgets=${BUDGETS:-256,512,1024} context=${CONTEXT:-8192} questions=${QUESTIONS:-60} documents=${DOCUMENTS:-16}
[ -e "$data" ] || { echo "compare_allocation.sh: $data: no such file or directory" >&2; exit 2; }
rules=()
for policy in ${POLICIES:-predictor snapkv cake}; do
    for allocation in uniform qsim cake; do
        rules+=(--rule "$policy-$allocation: $policy,budget_allocation=$allocation")
    done
done
common=(--data "$data" --device "$device" --budgets "$budgets" --context "$context" ${MODEL:+--model "$MODEL"} "${rules[@]}")
mkdir -p "$out"
attnpred() { "${PYTHON:-python3}" -m attention_predictor.cli "$@"; }
run() { # NAME BENCHMARK OPTIONS…
    echo "== $1"
    attnpred eval "$2" "${common[@]}" "${@:3}" | tee "$out/$1.txt"
}
run questions recovery --tasks kv,facts --questions "$questions" --per-document 10 --recovery 4 --out "$out/questions"
run text recovery --tail 64 --documents "$documents" --out "$out/text"
run perplexity perplexity --tail 128 --limit "$documents" --out "$out/perplexity"
