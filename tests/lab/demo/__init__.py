# SPDX-License-Identifier: Apache-2.0
"""The main job, shown and measured: a live database VM moves between two hosts of the lab.

`python -m tests.lab.demo` compares three ways on one running guest; `python -m
tests.lab.demo.scenarios` goes through many shapes. Both write a report. `tests.lab.demo.soak`
migrates there and back for long, `tests.lab.demo.evacuation` kills the VM and starts it on the
other host.
"""
