#!/usr/bin/env bash
# Evaluates a pretrained model under every policy: LongBench with its chat template, RULER, perplexity of held-out texts, and long
# generation compared with the stock model. Makes one report with paired bootstrap intervals.
# Usage: scripts/reproduce_real.sh MODEL DATA OUT [DEVICE [MORE…]]
#   MODEL    a directory, a name on the hub, or a GGUF file (scripts/get_model.sh smollm2 fetches a small one)
#   DATA     directory with texts/ (.txt files; files named <kind>__<name>.txt get one task per kind) and longbench/ (<task>.jsonl files)
#   DEVICE   cuda (the default) or cpu
#   MORE     further options of `attnpred eval`, such as --retry-errors
# Environment variables change the size of the run: POLICIES, BUDGETS, LENGTHS (of RULER), SAMPLES (per RULER task and length), CONTEXT
# (of perplexity), DOCUMENTS (per kind of text), PROMPT and NEW_TOKENS (of long generation), TASKS and LIMIT (LongBench tasks, and
# samples of each; default: all). NO_CHAT=1 disables the chat template, for models that are not assistants. PARTS selects from
# longbench, ruler, perplexity, continuation. PROCESSES sets the number of processes; PYTHON sets the interpreter.
# An interrupted run continues when the script is run again.
set -euo pipefail
[ $# -ge 3 ] || { echo "reproduce_real.sh: expected MODEL DATA OUT [DEVICE [MORE…]]" >&2; exit 2; }
data=$2 out=$3 device=${4:-cuda} more=(--model "$1" "${@:5}")
policies=${POLICIES:-full,predictor,quest,quest-ahead,snapkv,pyramidkv,cake,tappa,h2o,lazy-eviction,streaming}
budgets=${BUDGETS:-256,512,1024} samples=${SAMPLES:-20} documents=${DOCUMENTS:-4}
known=longbench,ruler,perplexity,continuation
parts=${PARTS:-$known}
chat=() && [ -z "${NO_CHAT:-}" ] || chat=(--no-chat)
limit=() && [ -z "${LIMIT:-}" ] || limit=(--limit "$LIMIT")
. "$(dirname "$0")/evaluation_plan.sh"

add longbench longbench "$policies" --data "$data/longbench" --tasks "$tasks" --answer-perplexity "${limit[@]}" "${chat[@]}"
add ruler ruler "$policies" --haystack "$data/texts" --lengths "${LENGTHS:-4096,8192}" --samples "$samples" "${chat[@]}"
add perplexity perplexity "$policies" "${sources[@]}" --context "${CONTEXT:-8192}" --tail 256 --limit "$documents"
add continuation continuation "$policies" "${sources[@]}" --context "${PROMPT:-4096}" --new-tokens "${NEW_TOKENS:-2048}" \
    --limit "$documents"

run_plan
