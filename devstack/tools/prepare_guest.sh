#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Give the agent in a guest its credentials at the broker, and return when it can be asked: what
# DMIGRATE_PREPARE of tests/scenario wants. Runs on the node with RabbitMQ, as the user of devstack.
#
# Of the environment: SERVER_ID and SERVER_ADDRESS; GUEST_USER (debian), GUEST_KEY (a private key),
# BROKER (HOST:PORT by which guests reach RabbitMQ), HOSTS_USER (of the host services there,
# nova-dmigrate) and PATIENCE (seconds, 600).
set -euo pipefail

: "${SERVER_ID:?}" "${SERVER_ADDRESS:?}" "${GUEST_KEY:?}" "${BROKER:?}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
configuration=/etc/nova-dmigrate/nova-dmigrate-agent.conf.d/instance.conf
end=$((SECONDS + ${PATIENCE:-600}))

# A guest of this address may have been another one before
function in_guest {
    ssh -i "$GUEST_KEY" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
        -o BatchMode=yes -o ConnectTimeout=10 -o LogLevel=ERROR \
        "${GUEST_USER:-debian}@$SERVER_ADDRESS" "$@"
}

function until_it_works {
    until "$@"; do
        if [[ $SECONDS -ge $end ]]; then
            echo "not in time: $*" >&2
            exit 1
        fi
        sleep 5
    done
}

until_it_works in_guest true </dev/null
"${PYTHON:-python3}" "$here/broker_credentials.py" add "$SERVER_ID" --broker "$BROKER" \
    --host-user "${HOSTS_USER:-nova-dmigrate}" |
    in_guest "sudo install -m 0600 /dev/stdin $configuration"
in_guest sudo systemctl restart nova-dmigrate-agent </dev/null
# It finds a server that runs; what it lacks, as the SQL user, is no matter here
until_it_works in_guest "sudo nova-dmigrate-agent map --summary" </dev/null
