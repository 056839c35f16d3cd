"""Settings of the whole suite."""

from __future__ import annotations

import os

from hypothesis import settings

# In CI the same examples every time: a red run must be about the change. Elsewhere new ones.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
