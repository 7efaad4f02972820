# SPDX-License-Identifier: Apache-2.0
"""The service of a host: starts the relays of migrations, keeps them within limits, ends them.

``relays`` is one relay as a process, which outlives the service; ``store`` keeps on disk what was
started; ``qemu_files`` has what QEMU needs of it, and ``qemu_account`` finds out who that is;
``session`` is one of them with its states.
``capacity`` says how many there is room for, and what share each has: ``turns`` starts the next one
accordingly, ``bandwidth`` gives the shares. ``sessions`` has them all, for requests and for the
thread that looks after them; ``presence`` knows whether anybody can ask for them; ``permissions``
and ``agents`` say what a requester may reach on this host, ``vouching`` which volumes the
destination of a guest may read; ``service`` has the methods of the protocol.

Nothing here asks Nova or libvirt: the disks of guests come from whoever runs the service.
"""
