# SPDX-License-Identifier: Apache-2.0
# "make test" on a bare Debian 12 machine installs what it needs and runs everything.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup test unit functional test-nova integration guests style format docs sample compat bench scale corpus demo scenarios evacuation soak openstack clean

# What of "make bench": BENCH_SHAPES=50:50,50:100 (network:volume in MB/s), BENCH_ONLY=relay
export BENCH_SHAPES BENCH_ONLY
# Of "make scale": SCALE_ONLY=map|messages|evacuation SCALE_POOL_GIB=64,256 (pools)
# SCALE_LAYOUT=huge|scattered (their memory) SCALE_HOSTS=200 (that are evacuated)
export SCALE_ONLY SCALE_POOL_GIB SCALE_LAYOUT SCALE_HOSTS
# What of "make demo": NETWORK=50 VOLUME=100 (MB/s) POOL=0.5 (share of RAM) LOAD=oltp_read_write
# RATE=10 (transactions a second, 0 for all there can be) DB=mysql|mariadb RAM=2048 (MiB)
# COMPRESSION=yes|no;
# "make scenarios" takes ONLY='scenario; ...' MODES=dmigrate,... POOLS=0.25,0.5,0.75 DEADLINE=90 (s)
# KEEP=yes (what the report has of other scenarios stays) and all but LOAD and POOL
export NETWORK VOLUME POOL LOAD RATE DB RAM COMPRESSION ONLY MODES POOLS DEADLINE KEEP
# "make evacuation": READS=300 (reads a second of the volume) VOLUME=50 (MB/s) and DB RAM POOL LOAD RATE
# "make soak": COUNT=50 DRILLS=all|none|part of a name,... and what "make demo" takes
# "make openstack": ONLY=part of a row's name,... NETWORK RAM POOL=512 (MiB) LOAD RATE
export COUNT DRILLS READS
# Which tests of a suite: make unit TESTS=stream
TESTS ?=
# Releases of Nova
export NOVA
# Releases of Debian whose QEMU and libvirt "make compat" takes
SUITES ?= trixie,sid

help:           ## Say what can be made
	@sed -n 's/^\([a-z-]*\): *[a-z]* *## /\1\t/p' $(MAKEFILE_LIST)

setup:          ## Install the system packages and the virtual environment that all else needs
	@tools/install_system_packages.sh
	@tools/make_venv.sh

test: setup     ## Run all checks and suites; the last line counts the tests
	@tools/test_all.sh

unit: setup     ## Run the unit suite
	@tools/run_suite.sh unit $(TESTS)

functional: setup ## Run the functional suite: Nova's services in process; NOVA=34
	@tools/run_suite.sh functional $(TESTS)

test-nova: setup ## Run Nova's own tests with DMigrate's driver in the stock one's place: NOVA="34 33"
	@.venv/bin/python -m tools.nova_tests $(NOVA)

integration: setup ## Run the integration suite: real QEMU
	@tools/run_suite.sh integration $(TESTS)

guests: setup   ## Run the guests suite: whole database guests
	@tools/run_suite.sh guests $(TESTS)

style: setup    ## Check style, format, types, release notes
	@tools/check_style.sh

format: setup   ## Repair what of the style repairs itself
	@.venv/bin/ruff check --fix . ; .venv/bin/ruff format .

docs: setup     ## Build the documentation into doc/build
	@tools/build_docs.sh

sample: setup   ## Write the sample configurations anew from the options
	@for each in nova-dmigrate nova; do \
	    .venv/bin/oslo-config-generator --config-file etc/nova-dmigrate/$$each-config-generator.conf || exit; \
	done

compat: setup   ## Run what depends on QEMU and libvirt with newer ones: SUITES=trixie,sid
	@.venv/bin/python tools/compat.py $(SUITES)

bench: setup    ## Measure; writes bench.json
	@.venv/bin/python -m tests.bench

scale: setup    ## Maps of pools up to 3 TiB, the evacuation of 200 hosts (simulated); writes scale.json
	@.venv/bin/python -W ignore -m tests.scale

corpus: setup   ## Record the corpus of real migration streams anew
	@.venv/bin/python tools/record_corpus.py

demo: setup     ## Move a live database between two hosts in three ways; writes demo-report/
	@.venv/bin/python -m tests.lab.demo

scenarios: setup ## Compare many loads, sizes and troubles; writes scenarios-report/. Takes hours
	@.venv/bin/python -m tests.lab.demo.scenarios

evacuation: setup ## Kill a database VM and start it on the other host, in three ways; writes evacuation-report/
	@.venv/bin/python -m tests.lab.demo.evacuation

soak: setup     ## COUNT=50 migrations back and forth under load, then drills; fails on a lost commit or a leak
	@.venv/bin/python -m tests.lab.demo.soak

openstack: setup ## A whole OpenStack whose Nova migrates a database server; writes openstack-report/
	@tools/openstack/venv.sh
	@.make/openstack-34/bin/python -W ignore -m tests.lab.openstack

clean:          ## Remove what was made, the virtual environment too
	rm -rf .venv .make .stestr .mypy_cache .ruff_cache .hypothesis doc/build *.egg-info build dist
