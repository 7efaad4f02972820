# SPDX-License-Identifier: Apache-2.0
"""Run tests of the Nova that is installed beside this Python, with a driver; write subunit v2.

Nova's files stay as they are, and of its tests nothing is changed but a lock (`cells`). Before any
test module is imported, DMigrate's class takes the place of LibvirtDriver in the two modules that
publish that name, so tests that make, patch or configure the stock driver do so with ours.
"""

import argparse
import faulthandler
import importlib
import re
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import subunit
import testtools

from tools.nova_tests.cells import readers_first

FUNCTIONAL = "nova.tests.functional"
STOCK = "stock"
OURS = "dmigrate"
# Seconds for a test, as in Nova's own runs; one that this does not end ends the process after GRACE
TEST_TIMEOUT = 160
GRACE = 20
# An exit status that Python has no use for
NEVER_MADE = 3


def main(argv: list[str]) -> int:
    """Return 0 if the tests ran to their end, whatever their results.

    Returns NEVER_MADE if they all did without the driver: then they prove nothing of it.

    :raises ImportError: a module of tests, or the driver, cannot be imported.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--driver", choices=(STOCK, OURS), required=True)
    parser.add_argument("--shim", required=True, help="directory that has dmigrate/__init__.py")
    parser.add_argument("--select", default="", help="regular expression that names must match")
    parser.add_argument("--only", type=Path, help="file of names, one a line; no other test runs")
    parser.add_argument("--output", type=Path, required=True, help="of subunit v2")
    parser.add_argument("--names", type=Path, required=True, help="takes the names of all tests")
    parser.add_argument(
        "--verdict", type=Path, required=True, help="takes the exit status when all is done"
    )
    parser.add_argument("modules", nargs="+", help="of tests, all of them of one package of Nova's")
    arguments = parser.parse_args(argv)

    # The packages of tests decide between threads and eventlet, so they come before all of Nova.
    # nova.test replaces parts of mock and of locking, and has to come before what uses those.
    package = ".".join(arguments.modules[0].split(".")[:3])
    importlib.import_module(package)
    importlib.import_module("nova.test")
    if package == FUNCTIONAL:
        readers_first()
    driver = stock() if arguments.driver == STOCK else swap(arguments.shim)
    made = watch(driver)

    tests = list(load(arguments.modules, re.compile(arguments.select)))
    if arguments.only:
        only = set(arguments.only.read_text().split())
        tests = [test for test in tests if test.id() in only]
    arguments.names.write_text("".join(f"{test.id()}\n" for test in tests))
    suite = unittest.TestSuite(tests)
    tests.clear()  # the suite lets go of each test that has ended
    # Unbuffered: what has ended is told, even if a later test ends this process
    with arguments.output.open("wb", buffering=0) as stream:
        result = BoundedResult(subunit.StreamResultToBytes(stream))
        result.startTestRun()
        suite(result)
        result.stopTestRun()
    faulthandler.cancel_dump_traceback_later()
    print(f"{driver} was made {len(made)} times")
    # A few tests that run again may be such as do without
    verdict = 0 if made or arguments.only else NEVER_MADE
    # Python waits for threads that Nova has left behind, maybe for long: whoever waits for this
    # process is told that nothing else is to come
    arguments.verdict.write_text(str(verdict))
    return verdict


def stock() -> type:
    """Return Nova's libvirt driver."""
    driver: type = importlib.import_module("nova.virt.libvirt.driver").LibvirtDriver
    return driver


def swap(shim: str) -> type:
    """Put DMigrate's driver in the place of Nova's, and return it.

    :param shim: the directory that has ``dmigrate``, as ``nova.virt`` has it where installed.
    """
    importlib.import_module("nova.virt").__path__.append(shim)
    # The name that Nova's loader makes of compute_driver = dmigrate.DMigrateDriver
    driver: type = importlib.import_module("nova.virt.dmigrate").DMigrateDriver
    base = stock()
    if not issubclass(driver, base) or driver is base:
        raise ImportError(f"{driver} does not extend {base}")
    # Where tests patch a static method, the library finds out that it is one in the class itself
    for name, value in vars(base).items():
        if isinstance(value, staticmethod) and name not in vars(driver):
            setattr(driver, name, value)
    _keep_super(base)
    for publisher in ("nova.virt.libvirt.driver", "nova.virt.libvirt"):
        module: Any = importlib.import_module(publisher)
        module.LibvirtDriver = driver
    return driver


def _keep_super(base: type) -> None:
    """Have super(LibvirtDriver, self), as older releases write it, mean the stock class still."""
    module = sys.modules[base.__module__]
    kept = f"stock_{base.__name__}"
    setattr(module, kept, base)
    for value in vars(base).values():
        code = getattr(value, "__code__", None)
        if code and {"super", base.__name__} <= set(code.co_names):
            names = tuple(kept if name == base.__name__ else name for name in code.co_names)
            value.__code__ = code.replace(co_names=names)


def load(modules: list[str], select: re.Pattern[str]) -> Iterator[unittest.TestCase]:
    """Yield the tests of modules whose names match."""
    loader = unittest.TestLoader()
    for module in modules:
        importlib.import_module(module)  # its own error says more than the loader's
        for test in testtools.iterate_tests(loader.loadTestsFromName(module)):
            if select.search(test.id()):
                yield test


class BoundedResult(testtools.ExtendedToStreamDecorator):
    """Ends the process, with all stacks on stderr, where a test outlives its own timeout."""

    def startTest(self, test: unittest.TestCase) -> None:
        faulthandler.dump_traceback_later(TEST_TIMEOUT + GRACE, exit=True)
        super().startTest(test)


def watch(driver: Any) -> list[type]:
    """Return a list that takes the class of each driver that is made from now on."""
    made: list[type] = []

    def make(cls: type, *_: object, **__: object) -> object:
        made.append(cls)
        return object.__new__(cls)

    driver.__new__ = staticmethod(make)
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
