# SPDX-License-Identifier: Apache-2.0
"""The main job, shown and measured: a live database VM moves between two hosts of the lab.

`python -m tests.lab.demo` compares three ways on one running guest; `python -m
tests.lab.demo.scenarios` goes through many shapes. Both write a report.
"""
