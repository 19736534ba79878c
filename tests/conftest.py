"""Hypothesis profiles of the whole suite."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# A compile takes longer than any deadline; examples are drawn anew in each run, and a failure prints how to repeat it.
settings.register_profile("default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
