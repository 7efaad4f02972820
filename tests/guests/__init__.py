# SPDX-License-Identifier: Apache-2.0
"""The guests suite: whole database guests, with the agent in them."""
