#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run one suite of tests: run_suite.sh SUITE [stestr's arguments, as a regex of names].
# The raw results go to .make/SUITE.subunit as they arrive, so that they are there even when the
# run is killed; tools/count_results.py adds them up.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

suite=$1
shift
workers=()
run=() # what prints the results, if not stestr
case $suite in
unit)
    config=.stestr.conf
    concurrency=$(nproc)
    test_timeout=120
    suite_timeout=900
    ;;
functional)
    # Nova's services in process: with the release of Nova that NOVA names, on what its nova-compute
    # runs on by default (Nova's tests do not know)
    release=${NOVA:-34}
    tools/nova_tests/venv.sh "$release"
    VENV=$ROOT/.make/nova-$release
    if [ "$release" -ge 34 ]; then
        export OS_NOVA_DISABLE_EVENTLET_PATCHING=${OS_NOVA_DISABLE_EVENTLET_PATCHING:-true}
    fi
    config=tests/functional/stestr.conf
    concurrency=$((2 * $(nproc))) # they wait more than they work
    test_timeout=160
    suite_timeout=1500
    ;;
integration)
    config=tests/integration/stestr.conf
    concurrency=4 # each of them waits now and then
    workers=(--worker-file tests/integration/workers.yaml)
    test_timeout=300
    suite_timeout=3900
    ;;
guests)
    config=tests/guests/stestr.conf
    concurrency=3
    workers=(--worker-file tests/guests/workers.yaml)
    test_timeout=600
    suite_timeout=2400
    ;;
openstack)
    # The scenario tests, in a cloud that a program of the lab's brings up and removes
    tools/openstack/venv.sh
    VENV=$ROOT/.make/openstack-34
    run=(python -W ignore -m tests.lab.openstack.scenario)
    test_timeout=600
    suite_timeout=1500
    ;;
*)
    echo "No such suite: $suite" >&2
    exit 2
    ;;
esac
export OS_TEST_TIMEOUT=${OS_TEST_TIMEOUT:-$test_timeout} # seconds; see tests/base.py
export PYTHONFAULTHANDLER=1
export PATH=$VENV/bin:$PATH # stestr starts its workers as "python"

if [ "${#run[@]}" -eq 0 ]; then
    mkdir -p "$STATE/stestr-$suite"
    run=(stestr --config "$config" --repo-url "$STATE/stestr-$suite" run --subunit
        --concurrency "${CONCURRENCY:-$concurrency}" "${workers[@]}" "$@")
fi

# The last resort against a hang that even a test's own timeout does not end
timeout --kill-after=30 "${SUITE_TIMEOUT:-$suite_timeout}" "${run[@]}" |
    tee "$STATE/$suite.subunit" |
    python -c 'import subunit.test_results, stestr.subunit_trace as t; t.main()' \
        --no-failure-debug --fails
