# Sourced by reproduce_pocket.sh and reproduce_real.sh: finds the data, plans benchmarks, runs them in one process that loads the
# model once (`attnpred eval several`), and makes one report. Reads $data, $out, $device, $policies, $budgets, $parts, $known (parts that there
# are) and the array $more; TASKS, PROCESSES and PYTHON from the environment.
refuse() { echo "$(basename "$0"): $1" >&2; exit 2; }
for part in texts longbench; do
    [ -d "$data/$part" ] || refuse "$data/$part: no such directory"
done
tasks=${TASKS:-$(cd "$data/longbench" && ls | sed -n 's/\.jsonl$//p' | paste -sd,)}
[ -n "$tasks" ] || refuse "$data/longbench: no .jsonl file in it"
kinds=$(cd "$data/texts" && ls | sed -n 's/__.*\.txt$//p' | sort -u)
sources=() && for kind in $kinds; do sources+=(--data "$kind=$data/texts/${kind}__*.txt"); done
[ -n "$kinds" ] || sources=(--data "texts=$data/texts")
without=$(cd "$data/texts" && ls | grep '\.txt$' | grep -vc '__' || true)
[ -z "$kinds" ] || [ "$without" = 0 ] || refuse "$data/texts: $without files have no kind, others have one: expected <kind>__<name>.txt of all, or of none"

processes=${PROCESSES:-$([ "$device" = cpu ] && nproc || echo 1)}
for number in processes samples documents context questions; do
    [[ ${!number-1} =~ ^[1-9][0-9]*$ ]] || refuse "${number^^}: '${!number}' is not allowed: expected a number from 1 on"
done
for part in ${parts//,/ }; do
    [[ ,$known, == *,$part,* ]] || refuse "PARTS: '$part' is not allowed: expected some of $known"
done
plan=() # benchmarks with their options, set apart by "then"
add() { # NAME BENCHMARK POLICIES OPTIONS…
    [[ ,$parts, == *,$1,* ]] || return 0
    [ ${#plan[@]} = 0 ] || plan+=(then)
    plan+=("$2" --device "$device" --out "$out/$1" --budgets "$budgets" --policies "$3")
    plan+=(--rule "predictor-ahead: predictor,late_fetch=0" "${more[@]}" "${@:4}")
}

run_plan() {
    local python=${PYTHON:-python3}
    local launch=("$python" -m) runs
    if [ "$processes" -gt 1 ]; then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        launch+=(torch.distributed.run --standalone --nproc_per_node "$processes" -m)
    fi
    [ ${#plan[@]} -gt 0 ] || refuse "PARTS=$parts, POLICIES=$policies: nothing is left to run"
    "${launch[@]}" attention_predictor.cli eval several "${plan[@]}"
    runs=("$out"/*/run.json)
    "$python" -m attention_predictor.cli report "${runs[@]%/run.json}" --out "$out/report"
}
