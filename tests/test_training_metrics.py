"""What a step waits for, and when its metrics arrive."""

import traceback
from pathlib import Path

import pytest
import torch
from tiny_pair import records
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tca_fast.config import OptimizerConfig, load_config
from tca_fast.errors import UserError
from tca_fast.training import run as running
from tca_fast.training.batches import collate, to_device
from tca_fast.training.data import Encoded
from tca_fast.training.engine import LocalEngine
from tca_fast.training.logs import RunLog
from tca_fast.training.metrics import to_host
from tca_fast.training.phases import Moment
from tca_fast.training.run import train
from tca_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unbroken(pair) -> Path:
    start(pair, pair / "out")
    return pair / "out"


def start(pair, output, *overrides):
    settings = [
        f"run.output_dir={output}",
        "run.max_steps=12",
        "run.save_steps=7",
        *overrides,
    ]
    return train(load_config(pair / "run.yaml", settings), show_progress=False)


# Reads


aten = torch.ops.aten
# A GPU's queue is waited for by what returns a number and by what has a shape that depends on one.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default}
EXEMPT = {
    "density.py",  # the adapters' own counts: at once on the CPU only
    "head.py",  # which positions count: found on the CPU only
    "masking_utils.py",  # Hugging Face's look for padding
}


class HostReads(TorchDispatchMode):
    """Names of the files whose code waits for a tensor, in the order in which it does."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._methods = _ReadingMethods(self.places)

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in WAITING or (operator in INDEXING and any(map(is_mask, args[1]))):
            self.places.append(reader())
        return operator(*args, **(kwargs or {}))


class _ReadingMethods(TorchFunctionMode):
    """What reads without an operator on the CPU and would wait for any other device."""

    names = {"tolist", "numpy", "cpu"}

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.names:
            self.places.append(reader())
        return function(*args, **(kwargs or {}))


def is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def reader() -> str:
    """The file of the innermost frame outside torch and this module."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if "torch" not in path.parts and path != Path(__file__):
            return path.name
    raise AssertionError("nobody reads")


def test_every_kind_of_read_is_seen():
    value = torch.ones(())
    with HostReads() as reads:
        value.double().add_(1).isfinite()
        assert reads.places == []
        readers = [
            value.item,
            value.tolist,
            value.numpy,
            value.cpu,
            lambda: float(value),
            lambda: int(value),
            lambda: bool(value),
            value.nonzero,
            lambda: torch.equal(value, value),
            lambda: torch.ones(2)[torch.tensor([True, False])],
        ]
        for number, read in enumerate(readers, start=1):
            before = len(reads.places)
            read()
            assert len(reads.places) > before, number


@pytest.mark.parametrize("step", ["shared", "plain"])
def test_nothing_is_read_between_the_batch_and_the_optimizer(pair, tmp_path, monkeypatch, step):
    before_update, after_update = [], []

    class Watched(Trainer):
        def _step(self, batch, totals):
            with HostReads() as reads:
                self.reads = reads.places
                super()._step(batch, totals)
                after_update.append(list(reads.places))

    class WatchedEngine(LocalEngine):
        def apply(self, learning_rate, loss):
            norm = super().apply(learning_rate, loss)
            before_update.append(list(trainers[0].reads))
            trainers[0].reads.clear()
            return norm

    trainers = []

    def make(*arguments):
        trainers.append(Watched(*arguments))
        return trainers[0]

    monkeypatch.setattr(running, "Trainer", make)
    monkeypatch.setattr(running, "LocalEngine", WatchedEngine)
    settings = ["run.max_steps=4", "run.eval_steps=0", f"objective.step={step}"]
    start(pair, tmp_path / "run", *settings)
    assert len(before_update) == len(after_update) == 4
    for places in before_update:
        assert set(places) <= EXEMPT
    # Nothing of the first step; then the metrics of the step before.
    assert after_update[0] == []
    for places in after_update[1:]:
        assert places and set(places) == {"metrics.py"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_a_gpu():
    """A step of a linear objective, with copies in and out, while waiting is an error."""
    device = torch.device("cuda")
    engine = LocalEngine(torch.nn.Linear(96, 8), OptimizerConfig(), device)
    ids = Encoded(torch.arange(96, dtype=torch.int32), 0, 96, 1)
    batch = collate([ids, ids], 0, True)
    for sync_debug_mode in ("default", "error"):  # the first step allocates
        torch.cuda.set_sync_debug_mode(sync_debug_mode)
        try:
            began = Moment(device)
            on_device = batch.to(device)
            loss = engine.forward(on_device.input_ids.float()).square().mean()
            engine.backward(loss, True)
            norm = to_host(engine.apply(1e-3, loss.detach().double()))
            total = to_host(to_device(torch.tensor([3, 4]), device).sum())
            ended = Moment(device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ended.wait()
    assert ended.seconds_since(began) > 0
    assert int(total) == 7 and norm.is_pinned() and norm > 0


# Lateness


def test_metrics_arrive_one_step_late_under_their_own_number(pair, unbroken, tmp_path, monkeypatch):
    arrivals, shown, trainers = [], [], []

    class Watched(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            trainers.append(self)

    def log(self, split, step, figures, write=RunLog.log):
        arrivals.append((split, step, trainers[0].progress.step))
        write(self, split, step, figures)

    def progress(self, figures, tokens_per_second):
        shown.append((figures["loss"], tokens_per_second))

    monkeypatch.setattr(running, "Trainer", Watched)
    monkeypatch.setattr(RunLog, "log", log)
    monkeypatch.setattr(RunLog, "progress", progress)
    settings = ["run.eval_steps=4", "run.save_steps=7", "run.logging_steps=3"]
    start(pair, tmp_path / "run", *settings)
    # Late but where a validation or the end waits for the device anyway.
    assert arrivals == [
        ("train", 3, 4),
        ("validation", 4, 4),
        ("train", 6, 7),
        ("validation", 8, 8),
        ("train", 9, 10),
        ("train", 12, 12),
        ("validation", 12, 12),
    ]
    assert records(tmp_path / "run") == records(unbroken)[2::3]
    assert [loss for loss, _ in shown] == [record["loss"] for record in records(unbroken)]
    assert all(0 < rate < 1e6 for _, rate in shown)


def test_what_was_trained_is_logged_when_the_data_fail(pair, tmp_path, monkeypatch):
    data = tmp_path / "train.jsonl"
    data.write_bytes((pair / "train.jsonl").read_bytes())

    class Careless(Trainer):
        def _between_steps(self):
            super()._between_steps()
            if self.progress.step == 1:
                data.write_text("other")

    monkeypatch.setattr(running, "Trainer", Careless)
    with pytest.raises(UserError, match="changed during training"):
        start(pair, tmp_path / "run", f"data.train={data}")
    # Up to three batches were made ahead of the change; the sixth is the last of the epoch.
    steps = [record["step"] for record in records(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)) and 1 <= len(steps) <= 4


def test_what_was_trained_is_logged_after_an_impatient_ctrl_c(pair, tmp_path, monkeypatch):
    """The second signal cuts a step short; the step before it is still unread."""

    class Interrupted(LocalEngine):
        num_forwards = 0

        def forward(self, *inputs, **options):
            self.num_forwards += 1
            if self.num_forwards == 8:
                raise KeyboardInterrupt
            return super().forward(*inputs, **options)

    monkeypatch.setattr(running, "LocalEngine", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(pair, tmp_path / "run", "run.eval_steps=0")
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3]
