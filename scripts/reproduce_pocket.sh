#!/usr/bin/env bash
# The whole evaluation, small, with the pocket model: planted questions, needles, RULER's families, perplexity, recovery by layer
# and head and LongBench, for our policy and the baselines, then one report. Usage: scripts/reproduce_pocket.sh DATA OUT [DEVICE [MORE…]]
#   DATA     holds texts/ (.txt files that the pocket model has not seen; of files named <kind>__<name>.txt each kind has a
#            perplexity of its own) and longbench/ (.jsonl files, named by task)
#   DEVICE   cpu (the default) or cuda; processes share the GPUs there are
#   MORE     further options of `attnpred eval`, such as --retry-errors
# About 30 minutes on two cores. Larger or smaller: POLICIES, BUDGETS, CONTEXT, QUESTIONS, SAMPLES (of a RULER task), DOCUMENTS (of a
# kind of text), TASKS and LIMIT (of LongBench, and samples of each). PARTS names what is run of questions, needle, ruler,
# perplexity, map, longbench. On a CPU they run one after another, each by PROCESSES (one a core); on GPUs side by side, each by
# PROCESSES (three a GPU), since every one of them has long waits; TOGETHER=yes or no says otherwise. PYTHON names the interpreter.
# Stopped and run again, it goes on where it was.
set -euo pipefail
refuse() { echo "reproduce_pocket.sh: $1" >&2; exit 2; }
[ $# -ge 2 ] || refuse "expected DATA OUT [DEVICE [MORE…]]"
data=$1 out=$2 device=${3:-cpu} more=("${@:4}")
policies=${POLICIES:-full,predictor,streaming,snapkv,quest} budgets=${BUDGETS:-256,512}
context=${CONTEXT:-2048} questions=${QUESTIONS:-20} samples=${SAMPLES:-3} documents=${DOCUMENTS:-2} limit=${LIMIT:-1}
parts=${PARTS:-questions,needle,ruler,perplexity,map,longbench}
python=${PYTHON:-python3} together=${TOGETHER:-$([ "$device" = cpu ] && echo no || echo yes)}
gpus() { "$python" -c "import torch; print(max(torch.cuda.device_count(), 1))"; }
processes=${PROCESSES:-$([ "$together" = yes ] && echo $((3 * $(gpus))) || nproc)}
for part in texts longbench; do
    [ -d "$data/$part" ] || refuse "$data/$part: no such directory"
done
tasks=${TASKS:-$(cd "$data/longbench" && ls | sed -n 's/\.jsonl$//p' | paste -sd,)}
[ -n "$tasks" ] || refuse "$data/longbench: no .jsonl file in it"
kinds=$(cd "$data/texts" && ls | sed -n 's/__.*\.txt$//p' | sort -u)
sources=() && for kind in $kinds; do sources+=(--data "$kind=$data/texts/${kind}__*.txt"); done
[ -n "$kinds" ] || sources=(--data "texts=$data/texts")
selecting=,$policies, && selecting=${selecting/,full,/,} && selecting=${selecting#,} && selecting=${selecting%,}

launch=("$python" -m)
if [ "$processes" != 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    launch+=(torch.distributed.run --standalone --nproc_per_node "$processes" -m)
fi
running=() names=()
trap '[ ${#running[@]} = 0 ] || kill "${running[@]}" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
run() { # NAME BENCHMARK POLICIES OPTIONS…
    [[ ,$parts, == *,$1,* ]] || return 0
    local command=("${launch[@]}" attention_predictor.cli eval "$2" --device "$device" --out "$out/$1" --budgets "$budgets"
        --policies "$3" --rule "predictor-ahead: predictor,late_fetch=0" "${more[@]}" "${@:4}")
    if [ "$together" = yes ]; then
        mkdir -p "$out/logs"
        "${command[@]}" >"$out/logs/$1.table" 2>"$out/logs/$1" &
        running+=($!) names+=("$1")
    else
        echo "$1"
        "${command[@]}"
    fi
}
finish() { # what runs side by side: to the end, whatever becomes of the others; how far it has come, every ten seconds
    local failed=0 place
    while [ -n "$(jobs -rp)" ]; do
        sleep 1
        [ $((SECONDS % 10)) != 0 ] || for name in "${names[@]}"; do
            echo "$name: $(tr '\r' '\n' <"$out/logs/$name" | sed '/./!d' | tail -n 1)" >&2
        done
    done
    for place in "${!running[@]}"; do
        wait "${running[place]}" || { failed=$? && cat "$out/logs/${names[place]}" >&2; }
        cat "$out/logs/${names[place]}.table"
    done
    running=()
    [ $failed = 0 ] || exit $failed
}
run questions synthetic "$policies" --data "$data/texts" --context "$context" --questions "$questions"
run needle needle "$policies" --data "$data/texts" --lengths "$((context / 4)),$context" --depths 0,25,50,75,100 --samples 1 --no-chat
run ruler ruler "$policies" --haystack "$data/texts" --tasks niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt,fwe \
    --lengths "$context" --samples "$samples" --wording pocket --no-chat
run perplexity perplexity "$policies" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
run map recovery-map "$selecting" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
run longbench longbench "$policies" --data "$data/longbench" --no-chat --max-length "$((context - 600))" --limit "$limit" \
    --tasks "$tasks" --answer-perplexity
finish
runs=("$out"/*/run.json)
"$python" -m attention_predictor.cli report "${runs[@]%/run.json}" --out "$out/report"
