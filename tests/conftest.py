"""Hypothesis profiles: quick; ci, derandomized, where CI is set; thorough by --hypothesis-profile."""

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
