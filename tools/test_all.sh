#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What "make test" does once everything is installed: every stage runs, whatever the others did,
# and the last line is the count of all tests.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

suites=(unit functional integration guests)
# Where the counts are: a file of results for each suite, and one for Nova's own tests
results=("${suites[@]}" openstack nova)
results=("${results[@]/#/$STATE/}")
results=("${results[@]/%/.subunit}")
failed=()
times=()

stage() {
    local name=$1 began=$SECONDS
    shift
    say "$name"
    "$@" || failed+=("$name")
    times+=("$name $((SECONDS - began)) s")
}

# What Nova's tests have said, once they have ended
# shellcheck disable=SC2329 # the stage calls it
await_nova() {
    local status=0
    wait "$nova" || status=$?
    cat "$STATE/nova.log"
    return "$status"
}

# A count of an earlier run must never stand for this one
rm -f "${results[@]}"

stage style tools/check_style.sh
stage docs tools/build_docs.sh
for suite in "${suites[@]}"; do
    stage "$suite" tools/run_suite.sh "$suite"
done
# Nova's tests beside the OpenStack lab, which waits as long as it works. One that hangs ends long
# before the limit of all, and its results count
env CONCURRENCY="${CONCURRENCY:-4}" timeout --kill-after=30 1500 \
    "$VENV/bin/python" -m tools.nova_tests --short 34 >"$STATE/nova.log" 2>&1 &
nova=$!
trap 'kill "$nova" 2>/dev/null || true' EXIT
stage openstack tools/run_suite.sh openstack
stage nova await_nova
say "Summary: $(printf '%s; ' "${times[@]}")total $SECONDS s"
if [ "${#failed[@]}" -gt 0 ]; then echo "Failed stages: ${failed[*]}"; fi
status=0
"$VENV/bin/python" tools/count_results.py "${results[@]}" || status=1
[ "${#failed[@]}" -eq 0 ] || status=1
exit $status
