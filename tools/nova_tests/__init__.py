# SPDX-License-Identifier: Apache-2.0
"""Nova's own tests, with the stock libvirt driver and with DMigrate's in its place, compared.

``python -m tools.nova_tests`` runs in the repository's virtual environment and starts
``tools.nova_tests.worker`` in those of the releases of Nova, which ``venv.sh`` makes.
"""
