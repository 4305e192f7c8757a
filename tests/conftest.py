"""Threads for parallel test workers, how many random cases are tried, and the backends."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tca_fast import ops

# Read when the first kernel is called: without a device, kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# `make test-long` names the second profile. There, a test that asks for `share` runs as often as
# its backend has shares, with other random cases each time, so that workers can divide them.
settings.register_profile("short", max_examples=200, deadline=None)
settings.register_profile("long", max_examples=500, deadline=None, derandomize=False)
settings.load_profile("short")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def is_long(config: pytest.Config) -> bool:
    return config.getoption("--hypothesis-profile") == "long"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes or many GB; only in `make test-long`")
    if not is_long(config) and not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    from operator_cases import BACKENDS, LONG_SHARES

    if "share" not in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)
        return
    shares = LONG_SHARES if is_long(metafunc.config) else {}
    pairs = [(name, share) for name in BACKENDS for share in range(shares.get(name, 1))]
    metafunc.parametrize(("backend", "share"), pairs, indirect=True)


@pytest.fixture
def share(request: pytest.FixtureRequest) -> int:
    """Which share of a test's random cases this is."""
    return request.param


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """The name of the backend that every operator of the test runs on."""
    with ops.backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread():
    """A module's tests on one thread, so that equal computations give equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pair, its data and its run config; one for each module."""
    from tiny_pair import make_pair

    root = tmp_path_factory.mktemp("pair")
    make_pair(root)
    return root
