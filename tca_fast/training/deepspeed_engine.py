"""Training with DeepSpeed: ZeRO 0 to 3, over CPU ranks (gloo) or GPUs (NCCL).

The two streams are two module trees over the same parameters, which ZeRO-3 handles: it partitions
parameters once and fetches them by module. Cutoffs change the order of modules from step to step
but equally on all ranks, so its prefetch trace is dropped now and then and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tca_fast.config import TrainConfig
from tca_fast.errors import UserError, one_line
from tca_fast.training.deepspeed_settings import fill_settings, read_settings
from tca_fast.training.engine import Engine, make_optimizer, read_optimizer, read_weights, trainable
from tca_fast.training.optimizer_state import Fragment, write_part
from tca_fast.training.zero_partitions import fragments, inner_optimizer, write_working_copy


class DeepSpeedGroup:
    """This process's place among the ranks, and the DeepSpeed configuration of the run.

    Attributes:
        rank, num_ranks, device: of this process.
        settings: the JSON file with every "auto" filled in.
        stage: of ZeRO.
    """

    def __init__(self, path: Path, config: TrainConfig, device: torch.device) -> None:
        """Join the process group that the launcher described, or a group of one.

        Raises:
            UserError: DeepSpeed is missing, or its file is missing, malformed or at odds with
                the run configuration.
        """
        settings = read_settings(path)
        if device.type == "cpu":
            # DeepSpeed picks the first accelerator it finds; the run configuration decides here.
            os.environ["DS_ACCELERATOR"] = "cpu"
        try:
            import deepspeed
        except ImportError:
            raise UserError(
                "deepspeed: the package is not installed; pip install 'tca_fast[deepspeed]'"
            ) from None
        _skip_shared_memory_op()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls collectives by names that newer torch releases replace.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        alone = "WORLD_SIZE" not in os.environ
        if alone:
            _describe_group_of_one()
        backend = "gloo" if device.type == "cpu" else "nccl"
        try:
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        except (torch.distributed.DistError, ValueError) as error:
            where = ":".join(os.environ.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
            raise UserError(
                f"ranks: they cannot meet at {where} ({one_line(error)}); give the launcher a free "
                "--master_port, and an address that every node reaches"
            ) from None
        self.rank = torch.distributed.get_rank()
        self.num_ranks = torch.distributed.get_world_size()
        self.device = device
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        elif self.num_ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Each rank would start a thread per core; together they only get in each other's way.
            local_ranks = int(os.environ.get("LOCAL_SIZE", self.num_ranks))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
        self.settings = fill_settings(settings, config, self.num_ranks, self.device, path)
        self.stage = int(self.settings.get("zero_optimization", {}).get("stage", 0))
        self._check_agreement(config)
        _check_settings(self.settings, path)

    def from_rank_0(self, text: str) -> str:
        """The text of rank 0, on every rank."""
        texts = [text]
        torch.distributed.broadcast_object_list(texts, src=0)
        return texts[0]

    def _check_agreement(self, config: TrainConfig) -> None:
        """Refuse ranks that were started differently, which would train on without noticing.

        Raises:
            UserError: on every rank; names the first that differs from rank 0, and in what.
        """
        own = {
            "host": socket.gethostname(),
            "torch": torch.__version__,
            **{name: metadata.version(name) for name in ("deepspeed", "transformers", "tca_fast")},
            "the configuration": config.model_dump(mode="json"),
            "the DeepSpeed settings": self.settings,
        }
        ranks: list[Any] = [None] * self.num_ranks
        torch.distributed.all_gather_object(ranks, own)
        for rank, theirs in enumerate(ranks):
            for name in list(own)[1:]:
                if theirs[name] != ranks[0][name]:
                    raise UserError(
                        f"ranks: rank {rank} on {theirs['host']} and rank 0 on {ranks[0]['host']} "
                        f"differ in {name}{_versions(ranks[0][name], theirs[name])}; install and "
                        "start the same on every node"
                    )


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    """Have DeepSpeed read the settings before any model is loaded.

    Raises:
        UserError: it refuses them.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(json.loads(json.dumps(settings)))
    except Exception as error:  # of many kinds, assertions among them
        raise UserError(
            f"deepspeed: {path}: DeepSpeed refuses it ({one_line(error, 300)}); start from "
            "configs/zero2.json"
        ) from None


def _versions(ours: object, theirs: object) -> str:
    return f" ({theirs} and {ours})" if isinstance(ours, str) else ""


def _skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce on CPU.

    The op only serves tensor-parallel inference; compiling it takes most of a minute and fails
    where no ninja or C++ compiler is found.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False


def _describe_group_of_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


class DeepSpeedEngine(Engine):
    """One rank of a DeepSpeed run, with the client's AdamW over the adapters only.

    DeepSpeed reads the gradient norm on the host in every step, so the device is waited for here
    in any case, and whether loss and gradients are finite is read right before its step.
    """

    def __init__(self, objective: nn.Module, config: TrainConfig, group: DeepSpeedGroup) -> None:
        """Hand the objective to DeepSpeed.

        Raises:
            UserError: DeepSpeed does not support the settings together.
        """
        import deepspeed

        self.rank, self.num_ranks, self.device = group.rank, group.num_ranks, group.device
        self.parameters = trainable(objective)
        self.max_grad_norm = config.optimizer.max_grad_norm
        optimizer = make_optimizer(list(self.parameters.values()), config.optimizer)
        try:
            self.engine, *_ = deepspeed.initialize(
                model=objective, optimizer=optimizer, config=group.settings
            )
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise UserError(
                f"deepspeed: DeepSpeed refuses its settings ({one_line(error, 300)}); start from "
                "configs/zero2.json"
            ) from None
        self._is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        for parameter in self.parameters.values():
            parameter.register_hook(self._watch)
        self.stage = int(self.engine.zero_optimization_stage())
        self.name = f"deepspeed stage={self.stage} ranks={self.num_ranks}"

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the objective through DeepSpeed's hooks."""
        return self.engine(*inputs, **options)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of one micro-batch; gradients are reduced over ranks after the last.

        DeepSpeed averages over ranks (and would over accumulation steps), where this trainer's
        gradients are sums of shares: hence the factor.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * self.num_ranks, scale_wrt_gas=False)

    def apply(self, learning_rate: float, loss: Tensor) -> Tensor:
        """Clip, step and clear; see `Engine.apply`.

        Under ZeRO the norm is known afterwards. Finite gradients whose sum or norm is not stop the
        run then; whether they were applied is up to DeepSpeed's own check for overflow.
        """
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {float(loss)}")
        if self.any_over_ranks(~self._is_finite):
            raise FloatingPointError("a gradient is not finite")
        norm = None
        if self.stage == 0 and not self.engine.bfloat16_enabled():
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            _check_norm(norm)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        if norm is None:
            norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
            _check_norm(norm)
        return norm

    def _watch(self, gradient: Tensor) -> None:
        """Note one gradient of one micro-batch, before ZeRO reduces and scatters it."""
        self._is_finite.logical_and_(gradient.isfinite().all())

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """All-reduce on the device, which DeepSpeed's last step has just been waited for."""
        own = torch.tensor(counts, dtype=torch.int64, device=self.device)
        return self.sum_over_ranks(own).tolist()

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        torch.distributed.all_reduce(tensor)
        return tensor

    def any_over_ranks(self, mask: Tensor) -> Tensor:
        """All-reduce of the maximum."""
        counts = mask.to(torch.uint8)
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
        return counts.bool()

    def gather_text(self, text: str) -> list[str]:
        """All-gather of strings."""
        texts: list[Any] = [None] * self.num_ranks
        torch.distributed.all_gather_object(texts, text)
        return texts

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather partitioned adapters (ZeRO-3), or show the masters of bfloat16 ones."""
        if self.engine.bfloat16_enabled():
            with self._masters():
                yield
            return
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.parameters.values())):
            yield

    @contextlib.contextmanager
    def whole(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Gather partitioned parameters (ZeRO-3)."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        parameters = [parameter for module in modules for parameter in module.parameters()]
        with deepspeed.zero.GatheredParameters(parameters):
            yield

    @contextlib.contextmanager
    def _masters(self) -> Iterator[None]:
        """Float32 masters stand in for the bfloat16 adapters on rank 0, in host memory."""
        from deepspeed.utils import safe_get_full_fp32_param

        working = {}
        try:
            for name, parameter in self.parameters.items():
                master = safe_get_full_fp32_param(parameter)
                if self.rank == 0:
                    working[name] = parameter.data
                    parameter.data = master.cpu()
            yield
        finally:
            for name, data in working.items():
                self.parameters[name].data = data

    def save_state(self, directory: Path) -> None:
        """Write the moments that this rank keeps; see `Engine.save_state`."""
        own = self._fragments() if self.stage or self.rank == 0 else []
        if own:
            write_part(directory, self.rank, inner_optimizer(self.engine), own)

    def load_state(self, directory: Path) -> None:
        """Read what this rank keeps; see `Engine.load_state`."""
        shapes = {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.parameters.items()
        }
        own = {fragment.parameter: fragment for fragment in self._fragments()}
        with torch.no_grad():
            for name, weights in read_weights(directory, shapes):
                write_working_copy(self.parameters[name], weights)
                if fragment := own.get(name):
                    end = fragment.offset + fragment.weights.numel()
                    fragment.weights.copy_(weights.view(-1)[fragment.offset : end])
        read_optimizer(directory, shapes, inner_optimizer(self.engine), list(own.values()))

    def _fragments(self) -> list[Fragment]:
        return fragments(self.engine, self.parameters, self.rank)

    def is_lost_contact(self, error: RuntimeError) -> bool:
        """NCCL raises errors of torch.distributed, gloo plain ones that name its source file."""
        return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers; the process group serves further runs."""
        self.engine.destroy()


def _check_norm(norm: Tensor) -> None:
    if not norm.isfinite():
        raise FloatingPointError(f"the gradient norm is {float(norm)}")
