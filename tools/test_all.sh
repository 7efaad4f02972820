#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What "make test" does once everything is installed: every stage runs, whatever the others did,
# and the last line is the count of all tests.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Where the counts are: a file of results for each suite, and one for Nova's own tests
results=(unit functional integration guests openstack nova)
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

# Run something beside the next stages: beside NAME SECONDS COMMAND..., which then is ended. It is in a
# session of its own, for Linux shares out the processors among sessions first: it has its share
beside() {
    local name=$1 seconds=$2
    shift 2
    setsid timeout --kill-after=30 "$seconds" "$@" >"$STATE/$name.log" 2>&1 &
    beside[$name]=$!
}

# The same, of what of the processors the stages leave: a tenth of what they have where they leave
# nothing
behind() {
    # shellcheck disable=SC2016 # the inner shell expands them
    beside "$1" "$2" nice -n 10 bash -c \
        'echo 10 2>/dev/null >/proc/self/autogroup; exec "$@"' behind "${@:3}"
}

# End all of such sessions: signals for a process or its group do not reach what a timeout within them
# has started
# shellcheck disable=SC2329 # the trap calls it
finish() {
    local session
    for session in "$@"; do pkill -TERM -s "$session" || true; done
}

# What that has said, once it has ended
# shellcheck disable=SC2329 # the stage calls it
await() {
    local status=0
    wait "${beside[$1]}" || status=$?
    # Of what was ended by its limit something may be left; the number of what ended by itself may be
    # somebody else's by now
    if [ "$status" -ge 124 ]; then finish "${beside[$1]}"; fi
    unset "beside[$1]"
    cat "$STATE/$1.log"
    return "$status"
}

declare -A beside=()
trap 'finish "${beside[@]}"' EXIT

# A count of an earlier run must never stand for this one
rm -f "${results[@]}"

# What later stages are run in: the first ones leave some of the processors idle
behind environments 900 bash -c 'tools/nova_tests/venv.sh 34 && tools/openstack/venv.sh'
stage style tools/check_style.sh
stage docs tools/build_docs.sh
stage unit tools/run_suite.sh unit
stage environments await environments
# A cloud waits half of the time: for its services, for a guest that boots, for its migrations. So do
# Nova's processes, all at once. One that hangs ends long before the limit of all, and its results count
beside openstack 2400 tools/run_suite.sh openstack
stage functional tools/run_suite.sh functional
beside nova 2400 env CONCURRENCY="${CONCURRENCY:-4}" "$VENV/bin/python" -m tools.nova_tests --short 34
stage integration tools/run_suite.sh integration
stage openstack await openstack
stage nova await nova
stage guests tools/run_suite.sh guests
say "Summary: $(printf '%s; ' "${times[@]}")total $SECONDS s"
if [ "${#failed[@]}" -gt 0 ]; then echo "Failed stages: ${failed[*]}"; fi
status=0
"$VENV/bin/python" tools/count_results.py "${results[@]}" || status=1
[ "${#failed[@]}" -eq 0 ] || status=1
exit $status
