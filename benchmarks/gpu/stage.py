"""One stage in this process; `python -m benchmarks.gpu` starts it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path


def main() -> None:
    """Run a stage; exit status as in `benchmarks.gpu`, and 3 where the device is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["check", "bench", "step", "tune"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

    import torch

    from benchmarks import timing
    from benchmarks.gpu.facts import facts
    from benchmarks.gpu.record import Clock, DeviceLost, Record, status_of
    from tca_fast.errors import UserError

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"{options.stage}: torch sees no CUDA device; --device cpu rehearses without one")
        sys.exit(1)
    if options.device == "cpu":
        timing.EVICTED_BYTES = timing.COPIED_BYTES = 2**20
    clock = Clock(options.seconds)
    stage = importlib.import_module(f"benchmarks.gpu.{options.stage}")
    device = torch.device(options.device)
    try:
        record = Record(options.out / f"{options.stage}.json", facts(options.stage, device))
    except UserError as error:
        print(f"error: {error}")
        sys.exit(1)
    for name, value in record.facts.items():
        print(f"{name}: {value}")
    try:
        stage.run(record, clock, device, options.out)
    except DeviceLost as lost:
        print(f"the device is lost to this process after {lost}")
        sys.exit(3)
    sys.exit(status_of([record]))


if __name__ == "__main__":
    main()
