"""Threads for parallel test workers, and how many cases Hypothesis tries."""

import os

import torch
from hypothesis import settings

# `make test-long` names the second profile.
settings.register_profile("short", max_examples=200, deadline=None)
settings.register_profile("long", max_examples=10_000, deadline=None)
settings.load_profile("short")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
