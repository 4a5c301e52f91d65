#!/usr/bin/env bash
# The whole evaluation, small, with the pocket model: planted questions, needles, RULER's families, perplexity, recovery by layer
# and head and LongBench, under every policy, then one report. Usage: scripts/reproduce_pocket.sh DATA OUT [DEVICE [MORE…]]
#   DATA     holds texts/ (.txt files that the pocket model has not seen; of files named <kind>__<name>.txt each kind has a
#            perplexity of its own) and longbench/ (.jsonl files, named by task)
#   DEVICE   cpu (the default) or cuda
#   MORE     further options of `attnpred eval`, such as --retry-errors
# All of it is one process that loads the model once (`attnpred eval several`); it prints the minutes that each part has taken. On a
# CPU there is a process for each core, each takes whatever sample is next; PROCESSES says otherwise. Larger or smaller: POLICIES,
# BUDGETS, CONTEXT, QUESTIONS, SAMPLES (of a RULER task), DOCUMENTS (of a kind of text), TASKS and LIMIT (of LongBench, and samples
# of each). PARTS names what is run of questions, needle, ruler, perplexity, map, longbench; PYTHON by which interpreter. Stopped and
# run again, it goes on where it was.
set -euo pipefail
refuse() { echo "reproduce_pocket.sh: $1" >&2; exit 2; }
[ $# -ge 2 ] || refuse "expected DATA OUT [DEVICE [MORE…]]"
data=$1 out=$2 device=${3:-cpu} more=("${@:4}")
every=full,oracle,predictor,quest,quest-ahead,lazy-eviction,cake,tappa,pyramidkv,snapkv,h2o,streaming
policies=${POLICIES:-$every} budgets=${BUDGETS:-256,512}
context=${CONTEXT:-2048} questions=${QUESTIONS:-20} samples=${SAMPLES:-3} documents=${DOCUMENTS:-2} limit=${LIMIT:-1}
parts=${PARTS:-questions,needle,ruler,perplexity,map,longbench} python=${PYTHON:-python3}
processes=${PROCESSES:-$([ "$device" = cpu ] && nproc || echo 1)}
for part in texts longbench; do
    [ -d "$data/$part" ] || refuse "$data/$part: no such directory"
done
tasks=${TASKS:-$(cd "$data/longbench" && ls | sed -n 's/\.jsonl$//p' | paste -sd,)}
[ -n "$tasks" ] || refuse "$data/longbench: no .jsonl file in it"
kinds=$(cd "$data/texts" && ls | sed -n 's/__.*\.txt$//p' | sort -u)
sources=() && for kind in $kinds; do sources+=(--data "$kind=$data/texts/${kind}__*.txt"); done
[ -n "$kinds" ] || sources=(--data "texts=$data/texts")
selecting=,$policies, && selecting=${selecting/,full,/,} && selecting=${selecting#,} && selecting=${selecting%,}

plan=() # benchmarks with their options, set apart by "then"
add() { # NAME BENCHMARK POLICIES OPTIONS…
    [[ ,$parts, == *,$1,* ]] || return 0
    [ ${#plan[@]} = 0 ] || plan+=(then)
    plan+=("$2" --device "$device" --out "$out/$1" --budgets "$budgets" --policies "$3")
    plan+=(--rule "predictor-ahead: predictor,late_fetch=0" "${more[@]}" "${@:4}")
}
add questions synthetic "$policies" --data "$data/texts" --context "$context" --questions "$questions"
add needle needle "$policies" --data "$data/texts" --lengths "$((context / 4)),$context" --depths 0,25,50,75,100 --samples 1 --no-chat
add ruler ruler "$policies" --haystack "$data/texts" --tasks niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt,fwe \
    --lengths "$context" --samples "$samples" --wording pocket --no-chat
add perplexity perplexity "$policies" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
add map recovery-map "$selecting" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
add longbench longbench "$policies" --data "$data/longbench" --no-chat --max-length "$((context - 600))" --limit "$limit" \
    --tasks "$tasks" --answer-perplexity

launch=("$python" -m)
if [ "$processes" -gt 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    launch+=(torch.distributed.run --standalone --nproc_per_node "$processes" -m)
fi
"${launch[@]}" attention_predictor.cli eval several "${plan[@]}"
runs=("$out"/*/run.json)
"$python" -m attention_predictor.cli report "${runs[@]%/run.json}" --out "$out/report"
