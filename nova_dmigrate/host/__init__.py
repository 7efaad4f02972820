# SPDX-License-Identifier: Apache-2.0
"""The service of a host: starts the relays of migrations, keeps them within limits, ends them.

``relays`` is one relay as a process, which outlives the service; ``capacity`` says how many there
is room for, and what share each has; ``store`` keeps on disk what was started; ``sessions`` puts
these together; ``permissions`` and ``agents`` say what a requester may reach on this host;
``service`` has the methods of the protocol.

Nothing here knows Nova or libvirt.
"""
