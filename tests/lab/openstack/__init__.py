# SPDX-License-Identifier: Apache-2.0
"""A whole OpenStack on this machine: its services as plain processes, two compute hosts in
namespaces, and servers that live-migrate between them as in any cloud.

    with workspace() as directory, OpenStack(directory) as cloud:
        server = cloud.client.compute.create_server(...)

Runs in a virtual environment of its own, which tools/openstack/venv.sh makes. Needs root.
"""
