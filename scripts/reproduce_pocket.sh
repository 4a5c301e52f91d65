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
[ $# -ge 2 ] || { echo "reproduce_pocket.sh: expected DATA OUT [DEVICE [MORE…]]" >&2; exit 2; }
data=$1 out=$2 device=${3:-cpu} more=("${@:4}")
every=full,oracle,predictor,quest,quest-ahead,lazy-eviction,cake,tappa,pyramidkv,snapkv,h2o,streaming
policies=${POLICIES:-$every} budgets=${BUDGETS:-256,512}
context=${CONTEXT:-2048} questions=${QUESTIONS:-20} samples=${SAMPLES:-3} documents=${DOCUMENTS:-2} limit=${LIMIT:-1}
parts=${PARTS:-questions,needle,ruler,perplexity,map,longbench}
. "$(dirname "$0")/evaluation_plan.sh"
selecting=,$policies, && selecting=${selecting/,full,/,} && selecting=${selecting#,} && selecting=${selecting%,}

add questions synthetic "$policies" --data "$data/texts" --context "$context" --questions "$questions"
add needle needle "$policies" --data "$data/texts" --lengths "$((context / 4)),$context" --depths 0,25,50,75,100 --samples 1 --no-chat
add ruler ruler "$policies" --haystack "$data/texts" --tasks niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt,fwe \
    --lengths "$context" --samples "$samples" --wording pocket --no-chat
add perplexity perplexity "$policies" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
add map recovery-map "$selecting" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
add longbench longbench "$policies" --data "$data/longbench" --no-chat --max-length "$((context - 600))" --limit "$limit" \
    --tasks "$tasks" --answer-perplexity

run_plan
