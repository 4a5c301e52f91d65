#!/usr/bin/env bash
# Evaluates the pocket model under every policy and makes one report: planted questions, needles, RULER, perplexity, recovery by layer
# and head, and LongBench.
# Usage: scripts/reproduce_pocket.sh DATA OUT [DEVICE [MORE…]]
#   DATA     directory with texts/ (.txt files that the pocket model has not seen; files named <kind>__<name>.txt get one perplexity
#            task per kind) and longbench/ (<task>.jsonl files)
#   DEVICE   cpu (the default) or cuda
#   MORE     further options of `attnpred eval`, such as --retry-errors
# One command runs all parts and loads the model once (`attnpred eval several`); it prints the minutes of each part. An interrupted run continues when the script is run again.
# Environment variables change the size of the run: POLICIES, BUDGETS, CONTEXT, QUESTIONS, SAMPLES (per RULER task), DOCUMENTS (per
# kind of text), TASKS and LIMIT (LongBench tasks, and samples of each). PARTS selects from questions, needle, ruler, perplexity, map,
# longbench. PROCESSES sets the number of processes (default: one per core on a CPU, else 1); PYTHON sets the interpreter.
set -euo pipefail
[ $# -ge 2 ] || { echo "reproduce_pocket.sh: expected DATA OUT [DEVICE [MORE…]]" >&2; exit 2; }
data=$1 out=$2 device=${3:-cpu} more=("${@:4}")
every=full,oracle,predictor,quest,quest-ahead,lazy-eviction,cake,tappa,pyramidkv,snapkv,h2o,streaming
policies=${POLICIES:-$every} budgets=${BUDGETS:-256,512}
context=${CONTEXT:-2048} questions=${QUESTIONS:-20} samples=${SAMPLES:-3} documents=${DOCUMENTS:-2} limit=${LIMIT:-1}
known=questions,needle,ruler,perplexity,map,longbench
parts=${PARTS:-$known}
. "$(dirname "$0")/evaluation_plan.sh"
selecting=,$policies, && selecting=${selecting/,full,/,} && selecting=${selecting#,} && selecting=${selecting%,}

add questions synthetic "$policies" --data "$data/texts" --context "$context" --questions "$questions"
add needle needle "$policies" --data "$data/texts" --lengths "$((context / 4)),$context" --depths 0,25,50,75,100 --samples 1 --no-chat
add ruler ruler "$policies" --haystack "$data/texts" --tasks niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt,fwe \
    --lengths "$context" --samples "$samples" --wording pocket --no-chat
add perplexity perplexity "$policies" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
[ -z "$selecting" ] || add map recovery-map "$selecting" "${sources[@]}" --context "$context" --tail 64 --limit "$documents"
add longbench longbench "$policies" --data "$data/longbench" --no-chat --max-length "$((context - 600))" --limit "$limit" \
    --tasks "$tasks" --answer-perplexity

run_plan
