#!/usr/bin/env bash
# The whole evaluation, small, with the pocket model: planted questions, needles, RULER's families, perplexity and LongBench, for
# our policy and the baselines, then one report. Usage: scripts/reproduce_pocket.sh DATA OUT [DEVICE]
#   DATA     holds texts/ (.txt files that the pocket model has not seen) and longbench/ (.jsonl files, named by task)
# 30 minutes on two cores. LIMIT (samples of a LongBench task), QUESTIONS, BUDGETS and CONTEXT make it larger or smaller; stopped
# and run again, it goes on where it was.
set -euo pipefail
data=$1 out=$2 device=${3:-cpu}
budgets=${BUDGETS:-256,512} context=${CONTEXT:-4096} questions=${QUESTIONS:-20} limit=${LIMIT:-1}
for part in texts longbench; do
    [ -d "$data/$part" ] || { echo "reproduce_pocket.sh: $data/$part: no such directory" >&2; exit 2; }
done
run() { # NAME BENCHMARK OPTIONS…
    attnpred eval "$2" --device "$device" --out "$out/$1" --budgets "$budgets" \
        --policies full,streaming,snapkv,quest,predictor --rule "predictor-ahead: predictor,late_fetch=0" "${@:3}"
}
run questions synthetic --data "$data/texts" --context "$context" --questions "$questions"
run needle needle --data "$data/texts" --lengths 1024,"$context" --depths 0,50,100 --samples 1 --no-chat
run ruler ruler --haystack "$data/texts" --tasks niah_single_2,niah_multikey_1,vt --lengths "$context" --samples 3 \
    --wording pocket --no-chat
run perplexity perplexity --data "texts=$data/texts" --context "$context" --tail 64 --limit 4
run longbench longbench --data "$data/longbench" --no-chat --max-length "$((context - 600))" --limit "$limit" \
    --tasks "$(cd "$data/longbench" && ls ./*.jsonl | sed 's/.*\///; s/\.jsonl$//' | paste -sd,)" --answer-perplexity
attnpred report "$out"/*/ --out "$out/report"
