"""The plan's memory against the operating system's: all cases in `make test-long`, two here.

docs/planning.md has the table of a whole run.
"""

import pytest
from planned_memory import CASES, measure, planned

SHORT = ("shallow", "long, checkpointed")
#: Relative; what the issue of a plan is: to know whether a run fits.
ALLOWED = 0.15


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SHORT else pytest.mark.slow) for name in CASES],
)
def test_the_planned_peak_is_the_measured_one(name):
    if CASES[name].stage is not None:
        pytest.importorskip("deepspeed")
    port = 29640 + list(CASES).index(name)
    measured = measure(CASES[name], port)
    assert planned(CASES[name]).peak == pytest.approx(measured, rel=ALLOWED)
