"""Counts of what the tests of this folder tried, told at the end: few tries in CI, many with --long."""

import collections

import pytest

COUNTS = pytest.StashKey[collections.Counter]()


def pytest_configure(config):
    config.stash[COUNTS] = collections.Counter()


@pytest.fixture(scope="session")
def tries(request):
    """How many tries to make: tries(short, long)."""
    return lambda short, long: long if request.config.getoption("--long") else short


@pytest.fixture(scope="session")
def count(request):
    """Count a try for the table at the end: count("kill -9 while training")."""

    def add(what, n=1):
        request.config.stash[COUNTS][what] += n

    return add


def pytest_terminal_summary(terminalreporter, config):
    for what, n in sorted(config.stash[COUNTS].items()):
        terminalreporter.write_line(f"{n:>9,}  {what}")
