#!/usr/bin/env bash
# A pretrained model under every policy: LongBench with its chat template, RULER, perplexity of held-out texts and long generation
# against the whole cache's path, then one report with paired bootstrap intervals.
# Usage: scripts/reproduce_real.sh MODEL DATA OUT [DEVICE [MORE…]]
#   MODEL    a directory, a name on the hub, or a GGUF file (scripts/get_model.sh smollm2 fetches a small one)
#   DATA     holds texts/ (.txt files; of files named <kind>__<name>.txt each kind has a task of its own) and longbench/ (.jsonl
#            files, named by task)
#   DEVICE   cuda (the default) or cpu
#   MORE     further options of `attnpred eval`, such as --retry-errors
# Larger or smaller: POLICIES, BUDGETS, LENGTHS (of RULER), SAMPLES (of a RULER task and length), CONTEXT (of perplexity), DOCUMENTS
# (of a kind of text), PROMPT and NEW_TOKENS (of long generation), TASKS and LIMIT (of LongBench, and samples of each; all).
# NO_CHAT=1 leaves out the chat template, for models that are no assistants.
# PARTS names what is run of longbench, ruler, perplexity, continuation; PROCESSES says by how many processes; PYTHON by which
# interpreter. Stopped and run again, it goes on where it was.
set -euo pipefail
[ $# -ge 3 ] || { echo "reproduce_real.sh: expected MODEL DATA OUT [DEVICE [MORE…]]" >&2; exit 2; }
data=$2 out=$3 device=${4:-cuda} more=(--model "$1" "${@:5}")
policies=${POLICIES:-full,predictor,quest,quest-ahead,snapkv,pyramidkv,cake,tappa,h2o,lazy-eviction,streaming}
budgets=${BUDGETS:-256,512,1024} samples=${SAMPLES:-20} documents=${DOCUMENTS:-4}
parts=${PARTS:-longbench,ruler,perplexity,continuation}
chat=() && [ -z "${NO_CHAT:-}" ] || chat=(--no-chat)
limit=() && [ -z "${LIMIT:-}" ] || limit=(--limit "$LIMIT")
. "$(dirname "$0")/evaluation_plan.sh"

add longbench longbench "$policies" --data "$data/longbench" --tasks "$tasks" --answer-perplexity "${limit[@]}" "${chat[@]}"
add ruler ruler "$policies" --haystack "$data/texts" --lengths "${LENGTHS:-4096,8192}" --samples "$samples" "${chat[@]}"
add perplexity perplexity "$policies" "${sources[@]}" --context "${CONTEXT:-8192}" --tail 256 --limit "$documents"
add continuation continuation "$policies" "${sources[@]}" --context "${PROMPT:-4096}" --new-tokens "${NEW_TOKENS:-2048}" \
    --limit "$documents"

run_plan
