# SPDX-License-Identifier: Apache-2.0
"""The agent in the guest: finds out from outside what of a database server is on its volumes.

``processes`` finds the server, ``memory`` and ``pages`` its buffer pool, ``tablespaces``,
``filesystem`` and ``storage`` where its pages lie; ``mapper`` puts these together to the buffer
map. None of them speaks SQL, stops the server or changes anything in it.
"""
