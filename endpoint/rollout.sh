#!/usr/bin/env bash
# Replaces a deployment by a new one without downtime, and rolls back if a check fails.
#
#   endpoint/rollout.sh [--print] ENDPOINT OLD NEW FILE [NAME=VALUE …]
#   endpoint/rollout.sh mpt blue green endpoint/online/blue.yml model=azureml:mpt-7b:2
#
# ENDPOINT  the endpoint's name; created from endpoint/online/endpoint.yml if it does not exist
# OLD       the deployment that has the traffic now; "" if there is none
# NEW FILE  the new deployment's name and YAML; NAME=VALUE changes the YAML, as az's --set does
# --print   only print the az commands
#
# Steps: create, smoke test, mirror 10 %, compare, then 10, 50 and 100 % of the traffic, watching each. When a check fails,
# or on Ctrl-C, OLD gets all traffic again, NEW is kept for inspection, and the exit status is 1.
#
# WATCH_S   seconds to watch each step, default 300
# SLOWER    how many times as long as OLD NEW may take for the same requests, default 2
# az must know the resource group and the workspace: az configure --defaults group=GROUP workspace=WORKSPACE
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
samples=$(dirname "$here")/samples/online

print=
if [ "${1:-}" = --print ]; then
    print=yes
    shift
fi
if [ $# -lt 4 ]; then
    sed -n '2,/^set -/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
endpoint=$1 old=$2 new=$3 file=$4
shift 4
watch_s=${WATCH_S:-300} slower=${SLOWER:-2}
answers=$(mktemp -d)
step="before the first step"
shifting= # not empty once traffic may have changed

say() { printf '\n== %s\n' "$*" >&2; }

# Runs az, or prints the command.
run() {
    if [ -n "$print" ]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

finish() {
    status=$?
    trap - EXIT INT TERM
    rm -rf "$answers"
    if [ "$status" -eq 0 ]; then
        exit 0
    fi
    say "FAILED: $step"
    if [ -n "$shifting" ] && [ -n "$old" ]; then
        say "rolling back: $old gets all traffic"
        run az ml online-endpoint update --name "$endpoint" --mirror-traffic "$new=0" || true
        if ! run az ml online-endpoint update --name "$endpoint" --traffic "$old=100 $new=0"; then
            say "ROLLBACK FAILED. Run by hand: az ml online-endpoint update --name $endpoint --traffic \"$old=100 $new=0\""
        fi
    fi
    cat >&2 <<END
$new is kept. Its log:  az ml online-deployment get-logs --endpoint-name $endpoint --name $new --lines 500
To remove it:           az ml online-deployment delete --endpoint-name $endpoint --name $new --yes
END
    exit 1
}
trap finish EXIT
trap 'exit 1' INT TERM

# Posts a sample to one deployment, regardless of traffic, and saves the answer; fails unless it is a list of texts.
ask() {
    local deployment=$1 sample=$2 answer=$answers/$1-$2
    if [ -n "$print" ]; then
        run az ml online-endpoint invoke --name "$endpoint" --deployment-name "$deployment" --request-file "$samples/$sample"
        return
    fi
    az ml online-endpoint invoke --name "$endpoint" --deployment-name "$deployment" --request-file "$samples/$sample" >"$answer"
    if ! grep -q '[^[:space:]]' "$answer" || grep -q '\\*"error\\*":' "$answer" || ! grep -q '\[' "$answer"; then
        echo "$deployment answered $sample with something else than texts" >&2
        return 1
    fi
}

# Posts one request of each kind.
smoke_test() {
    step="smoke test of $new"
    say "$step"
    for sample in basic.json several.json greedy.json mlflow.json; do
        ask "$new" "$sample"
    done
}

# Fails if NEW has logged server errors. The log has counts and codes, never text.
check_log() {
    if [ -n "$print" ]; then
        run az ml online-deployment get-logs --endpoint-name "$endpoint" --name "$new" --lines 1000
        return
    fi
    az ml online-deployment get-logs --endpoint-name "$endpoint" --name "$new" --lines 1000 >"$answers/log"
    # az prints the log as one JSON string with escaped quotes
    if grep -E -o '\\?"(message|code)\\?": \\?"(request failed|generation_failed|engine_failed|the engine cannot go on; exiting)' \
        "$answers/log" >&2; then
        echo "$new failed requests; the log has the traces" >&2
        return 1
    fi
}

# Posts the same greedy request to both, and fails if NEW is much slower.
compare() {
    step="comparison of $new with $old"
    say "$step"
    local times=()
    for deployment in "$old" "$new"; do
        local started=$SECONDS
        for _ in 1 2 3; do
            ask "$deployment" greedy.json
        done
        times+=($((SECONDS - started)))
    done
    if [ -n "$print" ]; then
        return
    fi
    if [ "${times[1]}" -gt $((slower * (times[0] + 1))) ]; then
        echo "$new took ${times[1]} s for what $old does in ${times[0]} s" >&2
        return 1
    fi
    if cmp -s "$answers/$old-greedy.json" "$answers/$new-greedy.json"; then
        say "the same text from both"
    else
        say "another text from $new: expected of another model, card or dtype, and only then"
    fi
}

# Waits, then asks NEW and reads its log.
watch() {
    step="watching $new at $1"
    say "$step for $watch_s s"
    if [ -z "$print" ]; then
        sleep "$watch_s"
    fi
    ask "$new" greedy.json
    check_log
}

step="looking for endpoint $endpoint"
if [ -z "$print" ]; then
    found=$(az ml online-endpoint list --query "[?name=='$endpoint'].name" --output tsv)
    if [ -z "$found" ]; then
        step="creating endpoint $endpoint"
        say "$step"
        run az ml online-endpoint create --name "$endpoint" --file "$here/online/endpoint.yml"
    fi
fi

step="creating deployment $new"
say "$step; a quarter of an hour is usual"
create=(az ml online-deployment create --endpoint-name "$endpoint" --name "$new" --file "$file")
if [ $# -gt 0 ]; then
    create+=(--set "$@")
fi
run "${create[@]}"

smoke_test

if [ -z "$old" ]; then
    step="giving $new all traffic"
    run az ml online-endpoint update --name "$endpoint" --traffic "$new=100"
    say "done: $new answers"
    exit 0
fi

shifting=yes
step="mirroring 10 % to $new"
say "$step: it gets copies, and its answers are thrown away"
run az ml online-endpoint update --name "$endpoint" --mirror-traffic "$new=10"
watch "10 % mirrored"
run az ml online-endpoint update --name "$endpoint" --mirror-traffic "$new=0" # a deployment with mirrored traffic cannot have live traffic
compare

for share in 10 50 100; do
    step="giving $new $share % of the traffic"
    say "$step"
    run az ml online-endpoint update --name "$endpoint" --traffic "$old=$((100 - share)) $new=$share"
    watch "$share %"
done

say "done: $new answers. When nobody misses $old: az ml online-deployment delete --endpoint-name $endpoint --name $old --yes"
