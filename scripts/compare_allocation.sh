#!/usr/bin/env bash
# Does it pay to give layers unequal budgets? Each policy with equal ones, with those of TAPPA (qsim) and of CAKE, at equal totals:
# answers found and attention mass recovered, both behind planted questions and in plain text, and perplexity.
# Usage: scripts/compare_allocation.sh DATA OUT [DEVICE]
#   DATA     .txt files that the model has not seen, or a directory of them
# MODEL, BUDGETS, CONTEXT, POLICIES (of predictor, snapkv, cake, …), QUESTIONS and DOCUMENTS make it another or a larger one; stopped
# and run again, it goes on where it was. The tables are printed, and kept in OUT/*.txt.
set -euo pipefail
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
run() { # NAME BENCHMARK OPTIONS…
    echo "== $1"
    attnpred eval "$2" "${common[@]}" "${@:3}" | tee "$out/$1.txt"
}
run questions recovery --tasks kv,facts --questions "$questions" --per-document 10 --recovery 4 --out "$out/questions"
run text recovery --tail 64 --documents "$documents" --out "$out/text"
run perplexity perplexity --tail 128 --limit "$documents" --out "$out/perplexity"
