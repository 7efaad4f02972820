# SPDX-License-Identifier: Apache-2.0
"""Requests of the host to the agent in a guest, and their answers.

``messages`` has the methods with the records that they take and return, ``fields`` checks what
arrives, ``dispatcher`` is the answering side whatever the transport, ``client`` the asking one.
There are two transports: ``broker`` (oslo.messaging) and ``channel`` (lines of JSON over a
virtio-serial port). ``requester`` is what asks over the broker, replaced when answers stay away.
``isolation`` says what a guest may do at the broker; ``calm`` keeps the log short while that is
away.

Neither side trusts the other: every value is checked before it is used, and has a limit.
"""
