#!/usr/bin/env bash
# A predictor for models it never saw, judged leave-one-out: records the attention of several models, trains a predictor on all but
# one of them, for each, and one on all, and judges them on the model left out, on held-out text, beside rules that learn nothing.
# Ends with one table of relative recovery and MB fetched a token. Usage: scripts/train_any_model.sh DATA OUT [DEVICE]
#   DATA     holds texts/ to learn from and heldout/ to be judged on (.txt files; of files named <kind>__<name>.txt each kind gives
#            equally many)
#   OUT      where recordings, predictors (OUT/without-NAME, OUT/all), results and the table go
#   DEVICE   cuda (the default) or cpu
# MODELS="name=MODEL,…" are at least two; MODEL is what --model takes (models/pocket-lm; scripts/get_model.sh smollm2 fetches a
# second one). PLANTED="name,…" are those that planted questions are recorded from as well (pocket; may be empty).
# Larger or smaller: TEXTS (recorded, of a kind of text), QUESTIONED (documents of 8 questions), CONTEXT (tokens), ROWS (recorded of a
# tail; 64 are the prompt's), STEPS (of training), JUDGED (documents, of a kind), TAIL (tokens decoded of each), BUDGETS.
# JOBS says how many recordings, trainings or judgements run side by side (default: 1), each in OUT/log/STAGE if several do.
# A trial: TEXTS=2 QUESTIONED=2 CONTEXT=1500 ROWS=96 STEPS=20 JUDGED=1 TAIL=8. PYTHON says by which interpreter.
# Stopped and run again, it goes on where it was; a finished stage is not redone. Other settings need another OUT.
set -euo pipefail
refuse() { echo "train_any_model.sh: $1" >&2; exit 2; }
[ $# -ge 2 ] && [ $# -le 3 ] || refuse "expected DATA OUT [DEVICE]"
data=$1 out=$2 device=${3:-cuda} python=${PYTHON:-python3} here=$(cd "$(dirname "$0")" && pwd)
models=${MODELS:-pocket=$here/../models/pocket-lm,smollm2=$here/../models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}
planted=${PLANTED-pocket} texts=${TEXTS:-6} questioned=${QUESTIONED:-12} context=${CONTEXT:-8192} rows=${ROWS:-160}
jobs=${JOBS:-1} steps=${STEPS:-600} judged=${JUDGED:-2} tail=${TAIL:-48} budgets=${BUDGETS:-256,512}
for part in texts heldout; do [ -d "$data/$part" ] || refuse "$data/$part: no such directory"; done
declare -A model=()
names=() running=()
IFS=, read -ra pairs <<<"$models"
for pair in "${pairs[@]}"; do
    name=${pair%%=*}
    [[ $pair == *=* && $name =~ ^[A-Za-z0-9._-]+$ ]] || refuse "MODELS: '$pair' is not allowed: expected name=MODEL"
    [ "$name" != all ] && [ -z "${model[$name]:-}" ] || refuse "MODELS: name '$name' is taken: expected different ones, none of them all"
    names+=("$name")
    model[$name]=${pair#*=}
done
[[ $jobs =~ ^[1-9][0-9]*$ ]] || refuse "JOBS: '$jobs' is not allowed: expected a number from 1 on"
[ ${#names[@]} -ge 2 ] || refuse "MODELS has ${#names[@]} model: expected at least 2, one to leave out"
IFS=, read -ra asked <<<"$planted"
for name in "${asked[@]}"; do [ -n "${model[$name]:-}" ] || refuse "PLANTED: '$name' is none of MODELS"; done
settings="$models $planted $texts $questioned $context $rows $steps $judged $tail $budgets"
mkdir -p "$out/done" "$out/log"
[ ! -f "$out/settings" ] || [ "$(cat "$out/settings")" = "$settings" ] || refuse "$out holds results of other settings: $(cat "$out/settings")"
echo "$settings" >"$out/settings"

attnpred() { "$python" -m attention_predictor.cli "$@"; }
stage() { # NAME COMMAND…: run it unless it is done, beside others if JOBS allows
    [ ! -f "$out/done/$1" ] || { echo "$1: done before"; return 0; }
    echo "$1: after $((SECONDS / 60)):$(printf %02d $((SECONDS % 60)))"
    if [ "$jobs" = 1 ]; then finish "$@"; else
        [ ${#running[@]} -lt "$jobs" ] || join
        finish "$@" >"$out/log/$1" 2>&1 &
        running+=($!:"$1")
    fi
}
finish() { # NAME COMMAND…
    "${@:2}"
    touch "$out/done/$1"
}
join() { # wait for the stages that run beside each other; the first that failed ends the script
    local one
    for one in "${running[@]}"; do
        wait "${one%%:*}" || { tail -n 5 "$out/log/${one#*:}" >&2; stop; exit 1; }
    done
    running=()
}
stop() {
    local one
    for one in "${running[@]}"; do kill -INT -- "-${one%%:*}" 2>/dev/null || true; done
    wait
}
[ "$jobs" = 1 ] || { set -m; trap 'stop; exit 130' INT TERM; } # jobs in process groups of their own, which can be interrupted
pick() { # FROM COUNT TO: link so many files of each kind, spread evenly
    local kind files n i
    [ -n "$(ls "$1"/*.txt 2>/dev/null)" ] || refuse "$1: no .txt file in it"
    mkdir -p "$3"
    ls "$1" | sed -n 's/\.txt$//p' | sed 's/__.*//;t;s/.*//' | sort -u | while read -r kind; do
        if [ -n "$kind" ]; then files=("$1/$kind"__*.txt); else
            files=()
            for i in "$1"/*.txt; do [[ $i == */*__* ]] || files+=("$i"); done
        fi
        n=$(($2 < ${#files[@]} ? $2 : ${#files[@]}))
        for ((i = 0; i < n; i++)); do ln -sf "$(realpath "${files[$((i * ${#files[@]} / n))]}")" "$3/"; done
    done
}
plant_and_record() { # NAME
    "$python" "$here/plant_tasks.py" --model "${model[$1]}" --data "$out/texts" --out "$out/$1-tasks.jsonl" \
        --documents "$questioned" --questions 8 --context "$context" --seed 11
    record "$1" "$out/$1-tasks.jsonl"
}
record() { # NAME DATA
    attnpred record --model "${model[$1]}" --device "$device" --dtype float32 --data "$2" --out "$out/histories-$1" \
        --per-file 1 --max-tokens "$context" --steps "$rows"
}
train() { # OUT NAMES…: one predictor on these models' recordings
    local to=$1 sources=() name
    for name in "${@:2}"; do sources+=(--data "$out/histories-$name"); done
    attnpred train "${sources[@]}" --out "$to" --steps "$steps" --batch 16 --resume \
        --device "$([ "$device" = cpu ] && echo cpu || echo auto)"
}
judge() { # NAME
    attnpred eval recovery --model "${model[$1]}" --device "$device" --dtype float32 --data "$out/heldout" --context "$context" \
        --tail "$tail" --recovery 4 --per-file 1 --documents 10000 --budgets "$budgets" --out "$out/judged-$1" \
        --rule "last row: predictor,predictor=last,late_fetch=0" \
        --rule "exponential average: predictor,predictor=ema,late_fetch=0" \
        --rule "mean of the window: predictor,predictor=mean,late_fetch=0" \
        --rule "quest, previous query: quest-ahead" \
        --rule "shipped: predictor,late_fetch=0" \
        --rule "trained on the others: predictor,predictor=$out/without-$1,late_fetch=0" \
        --rule "trained on all: predictor,predictor=$out/all,late_fetch=0"
}

stage texts pick "$data/texts" "$texts" "$out/texts"
stage heldout pick "$data/heldout" "$judged" "$out/heldout"
for name in "${names[@]}"; do
    [[ ,$planted, != *,$name,* ]] || stage "record-$name-questions" plant_and_record "$name"
done
join
for name in "${names[@]}"; do stage "record-$name" record "$name" "$out/texts"; done
join
for left in "${names[@]}"; do
    others=()
    for name in "${names[@]}"; do [ "$name" = "$left" ] || others+=("$name"); done
    stage "train-without-$left" train "$out/without-$left" "${others[@]}"
done
stage train-all train "$out/all" "${names[@]}"
join
for name in "${names[@]}"; do stage "judge-$name" judge "$name"; done
join
"$python" "$here/any_model_table.py" "${names[@]/#/$out/judged-}" | tee "$out/table.txt"
