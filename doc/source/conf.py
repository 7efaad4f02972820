# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the documentation."""

project = "nova-dmigrate"
copyright = "The nova-dmigrate contributors"

extensions = ["openstackdocstheme", "oslo_config.sphinxext", "oslo_config.sphinxconfiggen"]
root_doc = "index"
exclude_patterns: list[str] = []
nitpicky = True

html_theme = "openstackdocs"
html_static_path: list[str] = []
openstackdocs_auto_name = False
openstackdocs_repo_name = "nova-dmigrate"

config_generator_config_file = "../../etc/nova-dmigrate/nova-dmigrate-config-generator.conf"
sample_config_basename = "_static/nova-dmigrate"
