# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# What of devstack the plugin uses. Each function notes that it was called, with its arguments, in
# the file $CALLS: one call a line, words parted by the character US. What only reads is not noted.
# iniset and sudo do what they say; all else changes nothing.

function _note {
    local IFS=$'\x1f'
    echo "$*" >>"$CALLS"
}

function is_service_enabled {
    local service
    for service in "$@"; do
        if [[ ,$ENABLED_SERVICES, == *,$service,* ]]; then
            return 0
        fi
    done
    return 1
}

function enable_service {
    _note enable_service "$@"
    if [[ ,$DISABLED_SERVICES, != *,$1,* ]]; then
        ENABLED_SERVICES+=,$1
    fi
}

function is_plugin_enabled {
    [[ ,$DEVSTACK_PLUGINS, == *,$1,* ]]
}

function trueorfalse {
    case ${!2:-} in
        1 | [yY]es | YES | [tT]rue | TRUE) echo True ;;
        0 | [nN]o | NO | [fF]alse | FALSE) echo False ;;
        *) echo "$1" ;;
    esac
}

function is_ubuntu {
    [[ "$DISTRO" != rhel* ]]
}

function get_python_exec_prefix {
    echo "$PYTHON_PREFIX"
}

function die {
    shift
    echo "died: $*" >&2
    exit 1
}

function iniset {
    _note iniset "$@"
    local file=$1
    touch "$file"
    SECTION=[$2] OPTION=$3 VALUE=$4 awk '
        function put() { if (!done++) print ENVIRON["OPTION"] " = " ENVIRON["VALUE"] }
        /^\[/ { if (inside) put(); inside = $0 == ENVIRON["SECTION"] }
        inside && $1 == ENVIRON["OPTION"] && $2 == "=" { put(); next }
        { print }
        END { if (!done) { if (!inside) print ENVIRON["SECTION"]; put() } }
    ' "$file" >"$file.new"
    cat "$file.new" >"$file"
    rm "$file.new"
}

function sudo {
    _note sudo "$@"
    "$@"
}

function exportfs {
    _note exportfs "$@"
}

function make_cert {
    local names=$4
    if [[ -n "$SERVICE_HOST" && "$3" != "$SERVICE_HOST" ]]; then
        names+=,IP:$SERVICE_HOST
    fi
    _note make_cert "${@:1:3}" "$names"
    mkdir -p "$1/private"
    touch "$1/ca-chain.pem" "$1/$2.crt" "$1/private/$2.key"
}

# Flavors and images that are there are files
function openstack {
    _note openstack "$@"
    shift 2
    case "$1 $2" in
        *" show") [[ -e "$CLOUD/$1.$3" ]] ;;
        *" create") touch "$CLOUD/$1.${*: -1}" ;;
    esac
}

function define_plugin {
    _note define_plugin "$@"
}

function setup_develop {
    _note setup_develop "$@"
}

function install_package {
    _note install_package "$@"
}

function pip_install {
    _note pip_install "$@"
}

function run_process {
    _note run_process "$@"
}

function stop_process {
    _note stop_process "$@"
}

function async_wait {
    _note async_wait "$@"
}
