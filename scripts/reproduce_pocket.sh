#!/usr/bin/env bash
# The whole evaluation, small, with the pocket model: planted questions, needles, RULER's families, perplexity, recovery by layer
# and head and LongBench, for our policy and the baselines, then one report. Usage: scripts/reproduce_pocket.sh DATA OUT [DEVICE [MORE…]]
#   DATA     holds texts/ (.txt files that the pocket model has not seen; of files named <kind>__<name>.txt each kind has a
#            perplexity of its own) and longbench/ (.jsonl files, named by task)
#   DEVICE   cpu (the default) or cuda; processes share the GPUs there are
#   MORE     further options of `attnpred eval`, such as --retry-errors
# About 30 minutes on two cores. Larger or smaller: POLICIES, BUDGETS, CONTEXT, QUESTIONS, SAMPLES (of a RULER task), DOCUMENTS (of a
# kind of text), TASKS and LIMIT (of LongBench, and samples of each). PARTS names what is run of questions, needle, ruler,
# perplexity, map, longbench, one after another; on a GPU LongBench beside the others (TOGETHER=yes or no says otherwise). PROCESSES
# says by how many processes (one a core), of which LongBench then has two thirds; PYTHON by which interpreter. Stopped and run
# again, it goes on where it was.
set -euo pipefail
refuse() { echo "reproduce_pocket.sh: $1" >&2; exit 2; }
[ $# -ge 2 ] || refuse "expected DATA OUT [DEVICE [MORE…]]"
data=$1 out=$2 device=${3:-cpu} more=("${@:4}")
policies=${POLICIES:-full,predictor,streaming,snapkv,quest} budgets=${BUDGETS:-256,512}
context=${CONTEXT:-2048} questions=${QUESTIONS:-20} samples=${SAMPLES:-3} documents=${DOCUMENTS:-2} limit=${LIMIT:-1}
parts=${PARTS:-questions,needle,ruler,perplexity,map,longbench}
processes=${PROCESSES:-$(nproc)} python=${PYTHON:-python3} together=${TOGETHER:-$([ "$device" = cpu ] && echo no || echo yes)}
[[ ,$parts, == *,longbench,* && $parts != longbench ]] || together=no
for part in texts longbench; do
    [ -d "$data/$part" ] || refuse "$data/$part: no such directory"
done
tasks=${TASKS:-$(cd "$data/longbench" && ls | sed -n 's/\.jsonl$//p' | paste -sd,)}
[ -n "$tasks" ] || refuse "$data/longbench: no .jsonl file in it"
kinds=$(cd "$data/texts" && ls | sed -n 's/__.*\.txt$//p' | sort -u)
sources=() && for kind in $kinds; do sources+=(--data "$kind=$data/texts/${kind}__*.txt"); done
[ -n "$kinds" ] || sources=(--data "texts=$data/texts")
selecting=,$policies, && selecting=${selecting/,full,/,} && selecting=${selecting#,} && selecting=${selecting%,}

[ "$processes" = 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
launch_by() { # NUMBER of processes
    launch=("$python" -m)
    [ "$1" -le 1 ] || launch+=(torch.distributed.run --standalone --nproc_per_node "$1" -m)
}
run() { # NAME BENCHMARK POLICIES OPTIONS…
    [[ ,$parts, == *,$1,* ]] || return 0
    echo "$1"
    "${launch[@]}" attention_predictor.cli eval "$2" --device "$device" --out "$out/$1" --budgets "$budgets" \
        --policies "$3" --rule "predictor-ahead: predictor,late_fetch=0" "${more[@]}" "${@:4}"
}
longbench() {
    run longbench longbench "$policies" --data "$data/longbench" --no-chat --max-length "$((context - 600))" --limit "$limit" \
        --tasks "$tasks" --answer-perplexity
}
launch_by "$processes"
if [ "$together" = yes ]; then
    mkdir -p "$out"
    launch_by $((processes - processes / 3))
    set -m # a process group of its own, to be stopped with all its processes
    longbench >"$out/longbench.log" 2>&1 &
    set +m
    aside=$!
    trap 'kill -- "-$aside" 2>/dev/null || true' EXIT
    trap 'exit 130' INT TERM
    launch_by $((processes / 3))
fi
run questions synthetic "$policies" --data "$data/texts" --context "$context" --questions "$questions"
run needle needle "$policies" --data "$data/texts" --lengths "$((context / 4)),$context" --depths 0,25,50,75,100 --samples 1 --no-chat
run ruler ruler "$policies" --haystack "$data/texts" --tasks niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt,fwe \
    --lengths "$context" --samples "$samples" --wording pocket --no-chat
run perplexity perplexity "$policies" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
run map recovery-map "$selecting" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
if [ "$together" = yes ]; then
    while kill -0 "$aside" 2>/dev/null; do
        [ $((SECONDS % 10)) != 0 ] || echo "longbench: $(cat "$out"/longbench/*/*.jsonl* 2>/dev/null | wc -l) samples so far" >&2
        sleep 1
    done
    wait "$aside" || { cat "$out/longbench.log" >&2 && exit 1; }
    cat "$out/longbench.log"
else
    longbench
fi
runs=("$out"/*/run.json)
"$python" -m attention_predictor.cli report "${runs[@]%/run.json}" --out "$out/report"
