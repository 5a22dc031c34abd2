"""Hypothesis profiles: quick; ci, derandomized, where CI is set; thorough by --hypothesis-profile. --rest."""

import os

from hypothesis import HealthCheck, Phase, settings

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=50, **common)
settings.register_profile("ci", max_examples=200, derandomize=True, print_blob=True, **common)
settings.register_profile("thorough", max_examples=5000, **common)
# test_mutants.py asks only whether a test fails, not for the smallest input that makes it
settings.register_profile(
    "mutants", max_examples=100, derandomize=True, phases=[Phase.explicit, Phase.generate], **common
)
settings.load_profile("ci" if os.environ.get("CI") else "quick")

PASSED = "arcquant/passed"  # in pytest's cache: what passed in the last run, and since then with --rest
passed: set[str] = set()


def pytest_addoption(parser):
    parser.addoption("--rest", action="store_true", help="only what did not pass in the last run")


def pytest_collection_modifyitems(config, items):
    if config.getoption("rest"):
        passed.update(config.cache.get(PASSED, []))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        passed.add(report.nodeid)


def pytest_sessionfinish(session):
    if hasattr(session.config, "cache"):
        session.config.cache.set(PASSED, sorted(passed))
