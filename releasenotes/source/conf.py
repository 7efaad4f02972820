# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the release notes."""

project = "nova-dmigrate Release Notes"
copyright = "The nova-dmigrate contributors"

extensions = ["openstackdocstheme", "reno.sphinxext"]
root_doc = "index"

html_theme = "openstackdocs"
html_static_path: list[str] = []
openstackdocs_auto_name = False
openstackdocs_repo_name = "nova-dmigrate"
