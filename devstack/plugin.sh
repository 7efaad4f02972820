#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What devstack calls: plugin.sh stack PHASE, unstack, clean.

_XTRACE_NOVA_DMIGRATE=$(set +o | grep xtrace)
set +o xtrace

for _nova_dmigrate_part in node package broker storage host driver image tempest; do
    # shellcheck source=/dev/null
    source "$NOVA_DMIGRATE_DIR/devstack/lib/$_nova_dmigrate_part"
done
unset _nova_dmigrate_part

if [[ "$1" == "stack" && "$2" == "pre-install" ]]; then
    check_nova_dmigrate
    install_nova_dmigrate_storage
elif [[ "$1" == "stack" && "$2" == "install" ]]; then
    install_nova_dmigrate
elif [[ "$1" == "stack" && "$2" == "post-config" ]]; then
    configure_nova_dmigrate_broker
    configure_nova_dmigrate_storage
    configure_nova_dmigrate_host
    configure_nova_dmigrate_driver
elif [[ "$1" == "stack" && "$2" == "extra" ]]; then
    start_nova_dmigrate_host
    create_nova_dmigrate_flavor
    build_nova_dmigrate_image
elif [[ "$1" == "stack" && "$2" == "test-config" ]]; then
    configure_nova_dmigrate_tempest
elif [[ "$1" == "unstack" ]]; then
    stop_nova_dmigrate_host
    # While RabbitMQ still runs
    cleanup_nova_dmigrate_broker
    cleanup_nova_dmigrate_storage
elif [[ "$1" == "clean" ]]; then
    cleanup_nova_dmigrate_host
    cleanup_nova_dmigrate
fi

$_XTRACE_NOVA_DMIGRATE
