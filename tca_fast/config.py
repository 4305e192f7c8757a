"""Configuration of every component, and how a YAML file becomes one.

Unknown keys are errors that name the nearest known key; values are checked when the file is
read, before any model is loaded. Names follow Hugging Face's and DeepSpeed's where they have
one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tca_fast.errors import UserError


class _Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_truth_values(cls, values: Any) -> Any:
        """YAML reads `yes`, `on` and `true` as truth values, which would pass for the number 1."""
        if isinstance(values, dict):
            for name, value in values.items():
                field = cls.model_fields.get(name)
                if isinstance(value, bool) and field and field.annotation is not bool:
                    raise ValueError(f"{name}={value} is a truth value; quote it if text is meant")
        return values


class AdapterConfig(_Config):
    """Shape and activation of the adapters, the same for every layer (paper §3, contract §1.1).

    Attributes:
        num_features: F, features per layer.
        activation: "relu" keeps every positive pre-activation, "topk" the k largest positive ones.
        k: features kept per token; required by "topk", absent for "relu".
        decoder_bias: whether the decoder adds a bias `b_dec [D]`.
    """

    num_features: int = Field(default=8192, ge=1)
    activation: Literal["relu", "topk"] = "relu"
    k: int | None = Field(default=None, ge=1)
    decoder_bias: bool = True

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise UserError(_one_line(error, type(self))) from None

    @model_validator(mode="after")
    def _check_k(self) -> AdapterConfig:
        if self.activation == "topk" and self.k is None:
            raise ValueError("activation 'topk' needs k, the number of features kept per token")
        if self.activation == "relu" and self.k is not None:
            raise ValueError(f"k={self.k} has no meaning for activation 'relu'; leave k out")
        if self.k is not None and self.k > self.num_features:
            raise ValueError(f"k={self.k} exceeds num_features={self.num_features}; lower k")
        return self


class PairConfig(_Config):
    """The two models (contract §2).

    Attributes:
        base, target: local directory or hub id of the MLP donor and of the fine-tuned model.
        base_revision, target_revision: hub revisions; None is the hub's default branch.
        backbone: which model gives everything but the MLPs to the adapter stream.
        dtype: of the frozen weights and of the computation; "auto" is bfloat16 on CUDA, float32
            on CPU. Adapter parameters are always trained in float32.
        attn_implementation: a Hugging Face attention implementation.
        accept_differences: settings in which the two models may differ, the target's being used
            throughout; only with backbone "target".
    """

    base: str
    target: str
    base_revision: str | None = None
    target_revision: str | None = None
    backbone: Literal["target", "base"] = "target"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "sdpa"
    accept_differences: list[Literal["rope_parameters", "tie_word_embeddings"]] = []


class ObjectiveConfig(_Config):
    """Weights of the objective as optimised (contract §3.5).

    Attributes:
        lambda_adapt: weight of the main KL.
        l1_weight: weight of the decoder-norm-weighted L1, summed over layers.
        lambda_nmse: weight of the residual-stream NMSE.
        lambda_bridge: weight of each bridging direction, divided by the number of cutoffs.
        num_cutoffs: cutoffs drawn per step when `cutoffs` is "uniform"; 0 turns bridging off.
        cutoffs: "uniform" over {0..L}, or the fixed cutoffs of every step.
        loss: "kl" trains on KL to the target and logs the LM loss; "lm" swaps the roles.
        step: how the passes are run: "shared" computes nothing twice, "plain" runs every model
            whole and is what the shared step is checked against.
        l1_warmup_steps: optimizer steps over which the L1 weight rises linearly from 0, after which
            it is `l1_weight`; 0 has no warm-up, as the paper.
        auxk_weight: weight of the auxiliary loss that gives dead features of "topk" adapters a
            gradient, see `bridging.auxiliary`; 0, as the paper, is none, 1/32 is usual. It costs a
            second encoder product in every adapter.
        auxk_k: dead features that explain the error of a token; None is half the model width.
        gradient_checkpointing: keep only the input of every decoder layer for the backward and
            run the layers again there: less memory for about a third more time.
    """

    lambda_adapt: float = Field(default=1.0, ge=0)
    l1_weight: float = Field(default=0.001, ge=0)
    lambda_nmse: float = Field(default=1.0, ge=0)
    lambda_bridge: float = Field(default=2.0, ge=0)
    num_cutoffs: int = Field(default=1, ge=0)
    cutoffs: Literal["uniform"] | list[int] = "uniform"
    loss: Literal["kl", "lm"] = "kl"
    step: Literal["shared", "plain"] = "shared"
    l1_warmup_steps: int = Field(default=0, ge=0)
    auxk_weight: float = Field(default=0.0, ge=0)
    auxk_k: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _check_step(self) -> ObjectiveConfig:
        if self.gradient_checkpointing and self.step == "plain":
            raise ValueError("gradient_checkpointing needs step 'shared'; set step=shared")
        return self

    @model_validator(mode="after")
    def _check_terms(self) -> ObjectiveConfig:
        if self.cutoffs != "uniform" and len(set(self.cutoffs)) < len(self.cutoffs):
            raise ValueError(f"cutoffs={self.cutoffs} names a layer twice; name each once")
        bridges = self.lambda_bridge if self.cutoffs and self.num_cutoffs else 0
        if not (self.lambda_adapt or self.l1_weight or self.lambda_nmse or bridges):
            raise ValueError(
                "lambda_adapt, l1_weight, lambda_nmse and bridging are all 0 and train nothing; "
                "leave one of them on"
            )
        return self


class DataConfig(_Config):
    """Training text (contract §4).

    Attributes:
        train, validation: a JSONL file in the OpenThoughts schema, or `hf://org/repo/path`.
        format: prompt format, contract §4.2; "chat" uses the tokenizer's chat template.
        max_length: tokens kept per sequence.
        truncate: cut longer sequences; otherwise they are an error.
        loss_on_prompt: whether prompt tokens count in KL and LM.
        append_eos: end every response with the tokenizer's end-of-sequence token, so that
            stopping is trained (the reference does not: contract §3.12 #9).
        bad_lines: "error" stops at a malformed line, "skip" counts and skips it.
        num_workers: tokenizing worker processes; 0 tokenizes in the training process.
        cache_dir: where packed training keeps token ids (4 bytes each), so that a file is
            tokenized once; None is tca_fast/tokens in the user's cache directory.
    """

    train: str
    validation: str | None = None
    format: Literal["deepseek", "qwen", "chat"] = "deepseek"
    max_length: int = Field(default=10000, ge=2)
    truncate: bool = True
    loss_on_prompt: bool = True
    append_eos: bool = False
    bad_lines: Literal["error", "skip"] = "error"
    num_workers: int = Field(default=0, ge=0)
    cache_dir: str | None = None


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(_Config):
    """AdamW with linear warm-up and cosine decay to zero (contract §3.7)."""

    learning_rate: float = Field(default=8e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)


class RunConfig(_Config):
    """One training run: how long, how large, where to, how often.

    Attributes:
        output_dir: directory of logs, checkpoints and the final adapter.
        seed: of adapter initialisation, data order and cutoffs.
        num_epochs: passes over the training file.
        max_steps: optimizer steps after which to stop, if sooner; the schedule ends there too.
        train_batch_size: sequences per optimizer step over all ranks.
        per_device_train_batch_size: sequences per forward on one rank.
        train_batch_tokens: tokens per optimizer step over all ranks, instead of a number of
            sequences: they are packed side by side into rows without padding.
        per_device_train_batch_tokens: tokens per forward on one rank, the length of such a row; at
            least the longest sequence, and twice `data.max_length` is always filled well.
        device: "auto" is CUDA where there is one, otherwise CPU.
        logging_steps, eval_steps, save_steps: optimizer steps between log lines, validations and
            checkpoints; 0 turns validation or checkpoints off.
        eval_samples: validation sequences used by each validation.
        save_total_limit: checkpoints kept.
        dead_after_tokens: tokens without firing after which a feature counts as dead.
        hang_seconds: with several ranks, seconds without any movement after which the rank that the
            others wait for is named on stderr; 0 never looks.
        report_to: loggers beside the JSONL log.
        run_name: shown by those loggers.
        resume_from_checkpoint: a checkpoint directory, or "latest" in `output_dir`.
    """

    output_dir: str
    seed: int = 42
    num_epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    train_batch_size: int = Field(default=1, ge=1)
    per_device_train_batch_size: int = Field(default=1, ge=1)
    train_batch_tokens: int | None = Field(default=None, ge=2)
    per_device_train_batch_tokens: int | None = Field(default=None, ge=2)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    logging_steps: int = Field(default=1, ge=1)
    eval_steps: int = Field(default=1000, ge=0)
    eval_samples: int = Field(default=100, ge=1)
    save_steps: int = Field(default=1000, ge=0)
    save_total_limit: int = Field(default=2, ge=1)
    dead_after_tokens: int = Field(default=1_000_000, ge=1)
    hang_seconds: float = Field(default=600.0, ge=0)
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    run_name: str | None = None
    resume_from_checkpoint: str | None = None

    @property
    def is_packed(self) -> bool:
        """Whether sequences are packed to a token budget rather than padded."""
        return self.train_batch_tokens is not None

    @property
    def rows_per_step(self) -> int:
        """Rows of a full optimizer step over all ranks, padded sequences or packed."""
        if self.train_batch_tokens is None or self.per_device_train_batch_tokens is None:
            return self.train_batch_size
        return self.train_batch_tokens // self.per_device_train_batch_tokens

    @property
    def rows_per_forward(self) -> int:
        """Rows of one forward on one rank; a packed row has one to itself."""
        return 1 if self.is_packed else self.per_device_train_batch_size

    @model_validator(mode="after")
    def _check_budget(self) -> RunConfig:
        if (self.train_batch_tokens is None) != (self.per_device_train_batch_tokens is None):
            raise ValueError(
                "train_batch_tokens and per_device_train_batch_tokens need each other; set both, "
                "or neither to count sequences"
            )
        if self.is_packed and (self.train_batch_size, self.per_device_train_batch_size) != (1, 1):
            raise ValueError(
                f"train_batch_size={self.train_batch_size} and per_device_train_batch_size="
                f"{self.per_device_train_batch_size} count sequences, train_batch_tokens="
                f"{self.train_batch_tokens} counts tokens; leave one kind out"
            )
        row, budget = self.per_device_train_batch_tokens, self.train_batch_tokens
        if row is not None and budget is not None and budget % row:
            raise ValueError(
                f"train_batch_tokens={budget} is not a whole number of rows of "
                f"per_device_train_batch_tokens={row}; make it a multiple"
            )
        return self


class TrainConfig(_Config):
    """Everything `tca-fast train` needs, one block per component."""

    pair: PairConfig
    adapter: AdapterConfig = AdapterConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _check_auxiliary(self) -> TrainConfig:
        if self.objective.auxk_weight and self.adapter.activation != "topk":
            raise ValueError(
                f"objective.auxk_weight={self.objective.auxk_weight} revives features of adapters "
                f"with activation 'topk', this one has {self.adapter.activation!r}; set it to 0"
            )
        most, k = self.adapter.num_features, self.objective.auxk_k
        if k is not None and k > most:
            raise ValueError(f"objective.auxk_k={k} exceeds adapter.num_features={most}; lower it")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML training configuration.

    Args:
        path: YAML file with the blocks of `TrainConfig`.
        overrides: `block.key=value` strings, the value read as YAML; they win over the file.

    Raises:
        UserError: missing or unreadable file, unknown key, wrong type or value.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"config: {path} does not exist; give the path of a YAML file such as "
            "configs/miniature.yaml"
        ) from None
    except IsADirectoryError:
        raise UserError(f"config: {path} is a directory; give a YAML file") from None
    except (UnicodeDecodeError, PermissionError) as error:
        raise UserError(
            f"config: {path} cannot be read ({error}); give a UTF-8 YAML file"
        ) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"config: {path} is not valid YAML ({reason}); mend that line") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"config: {path} holds {type(tree).__name__}, not blocks; it needs at least "
            "pair, data and run"
        )
    return parse_config(tree, overrides, f"config {path}")


def parse_config(tree: dict[str, Any], overrides: Sequence[str], source: str) -> TrainConfig:
    """Check the blocks of a training configuration.

    Args:
        tree: the blocks as plain data; changed in place.
        overrides: as in `load_config`.
        source: what they came from, for messages.

    Raises:
        UserError: unknown key, wrong type or value.
    """
    for override in overrides:
        _apply_override(tree, override)
    try:
        return TrainConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(f"{source}: {_one_line(error, TrainConfig)}") from None


def dump_config(config: TrainConfig, path: str | Path) -> None:
    """Write a configuration as YAML that `load_config` reads back unchanged."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    blocks = key.split(".")
    if not separator or not all(blocks):
        raise UserError(f"override: {override!r} is not of the form block.key=value")
    node = tree
    for block in blocks[:-1]:
        child = node.setdefault(block, {})
        if not isinstance(child, dict):
            raise UserError(f"override: {override!r} goes into {block!r}, which is a single value")
        node = child
    try:
        node[blocks[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override: {override!r} has a value that is not YAML; quote it") from None


def _one_line(error: pydantic.ValidationError, root: type[BaseModel]) -> str:
    """The first problem of a validation error: field, value, remedy."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    field = ".".join(location) or root.__name__
    if problem["type"] == "extra_forbidden":
        known = _known_keys(root, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {field!r} (value {problem['input']!r}); {remedy}"
    if problem["type"] == "missing":
        return f"{field}: missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{field}: {message}"
    return f"{field}: {problem['input']!r} does not fit; {message[0].lower()}{message[1:]}"


def _known_keys(root: type[BaseModel], location: Sequence[str]) -> list[str]:
    model: Any = root
    for part in location:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            return []
        model = field.annotation
    return list(model.model_fields)
