"""What a newcomer gets wrong when attaching or loading, and the sentence that answers it."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from hub_server import Hub
from tiny import SHAPE, randomise, tiny_qwen2
from torch import nn

import tca_fast
from tca_fast.adapter_config import Provenance
from tca_fast.errors import UserError

PROVENANCE = Provenance("org/base", "v1", "org/target", "v2", "target")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Adapters of `tiny_qwen2(0)`, with a folder of each kind beside them."""
    folder = tmp_path_factory.mktemp("saved")
    adapted = tca_fast.attach(tiny_qwen2(), tca_fast.AdapterConfig(num_features=20))
    randomise(adapted)
    adapted.save_pretrained(folder / "adapter", PROVENANCE)
    tca_fast.detach(adapted.model).save_pretrained(folder / "model")
    return folder


def with_mlp(change):
    model = tiny_qwen2()
    for layer in model.model.layers:
        change(layer)
    return model


def with_packed_weights():
    """As bitsandbytes and GPTQ keep them: integers in the place of the matrix."""

    def pack(layer):
        projection = layer.mlp.up_proj
        integers = (projection.weight * 20).to(torch.int8)
        projection.weight = nn.Parameter(integers, requires_grad=False)

    return with_mlp(pack)


def dynamically_quantised():
    """By PyTorch itself, which keeps no tensors in the module."""
    return torch.ao.quantization.quantize_dynamic(tiny_qwen2(), {nn.Linear}, torch.qint8)


def tuned_further():
    model = tiny_qwen2()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1.5)
    return model


def without_a_layer():
    model = tiny_qwen2()
    del model.model.layers[2]
    model.config.num_hidden_layers = 2
    return model


def opt():
    settings = {**SHAPE, "ffn_dim": 40, "word_embed_proj_dim": 24}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**settings))


LOADING = {
    "the wrong base model": (
        lambda: tiny_qwen2(7),
        "adapter",
        "MLP weights .* so it is not the model the adapters in .* were trained beside; load the "
        "hybrid, which is org/target at revision v2 with the MLPs of org/base at revision v1",
    ),
    "an adapter of another revision": (
        tuned_further,
        "adapter",
        "fingerprint has MLP weights .*; load .* org/base at revision v1, or pass check_model",
    ),
    "the wrong width": (
        lambda: tiny_qwen2(hidden_size=48),
        "adapter",
        "hidden_size: the adapters .* trained with 24, this model has 48; load the hybrid",
    ),
    "a layer missing": (
        without_a_layer,
        "adapter",
        "num_layers: the adapters .* trained with 3, this model has 2; load the hybrid",
    ),
    "quantised MLP weights": (
        with_packed_weights,
        "adapter",
        "MLP weights are quantised .up_proj.weight is torch.int8.* check_model=False if it is",
    ),
    "MLPs quantised by PyTorch": (
        dynamically_quantised,
        "adapter",
        "MLP weights are quantised .no matrices are left.*; load it without quantisation",
    ),
    "a model in the adapter's place": (
        tiny_qwen2,
        "model",
        "no adapter in .*model: expected adapter_config.json .* give the directory that "
        "save_pretrained wrote",
    ),
    "a run in the adapter's place": (
        tiny_qwen2,
        ".",
        "is that of a run; give its adapter, .*adapter$",
    ),
    "a path that is not there": (tiny_qwen2, "adaptr", "adaptr does not exist; give a directory"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mistake", LOADING)
def test_loading(saved, mistake):
    make, name, message = LOADING[mistake]
    model = make()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError, match=message) as caught:
        tca_fast.load(model, saved / name)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("width", "config", "message"),
    [
        (16, 8, "config: 8 is no configuration; pass tca_fast.AdapterConfig"),
        (0, tca_fast.AdapterConfig(num_features=8), "width: 0 is no model width"),
        ("16", tca_fast.AdapterConfig(num_features=8), "width: '16' is no model width"),
    ],
)
def test_the_plain_layer(width, config, message):
    with pytest.raises(UserError, match=message):
        tca_fast.TranscoderAdapter(width, config)


@pytest.mark.parametrize("make", [with_packed_weights, tuned_further])
def test_other_weights_load_when_they_are_meant(saved, make):
    adapted = tca_fast.load(make(), saved / "adapter", check_model=False)
    assert adapted.layers[0].W_dec.any()


ATTACHING = {
    "no language model": (lambda: nn.Linear(3, 3), "no config.num_hidden_layers; pass a Hugging"),
    "no head": (
        lambda: transformers.Qwen2Model(transformers.Qwen2Config(**SHAPE)),
        "no language-model head; pass a causal language model",
    ),
    "a name in the model's place": (lambda: "Qwen/Qwen2.5-7B", "str is no module"),
    "a layer without MLP": (
        lambda: with_mlp(lambda layer: delattr(layer, "mlp") if layer.self_attn.layer_idx else 0),
        "no child named 'mlp' in model.layers.1, only self_attn",
    ),
    "no MLP module": (opt, "no child named 'mlp' in model.decoder.layers.0, only .* fc1, fc2"),
    "adapters already there": (
        lambda: tca_fast.attach(tiny_qwen2(), tca_fast.AdapterConfig(num_features=2)).model,
        "already attached; call tca_fast.detach",
    ),
}


@pytest.mark.parametrize("mistake", ATTACHING)
def test_attaching(mistake):
    make, message = ATTACHING[mistake]
    with pytest.raises(UserError, match=message) as caught:
        tca_fast.attach(make(), tca_fast.AdapterConfig(num_features=2))
    assert "\n" not in str(caught.value)


def test_a_number_in_the_configurations_place():
    message = "config: 8192 is no configuration; pass tca_fast.AdapterConfig"
    with pytest.raises(UserError, match=message):
        tca_fast.attach(model := tiny_qwen2(), 8192)
    adapted = tca_fast.attach(model, tca_fast.AdapterConfig(num_features=2))
    with pytest.raises(UserError, match=message):
        adapted.add("other", 8192)
    assert adapted.names == ["default"]


def test_offloaded_mlps():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny_qwen2(), execution_device="cpu")
    with pytest.raises(UserError, match="MLP of layer 0 is offloaded .* choose a device_map"):
        tca_fast.attach(model, tca_fast.AdapterConfig(num_features=2))


# What `AutoModel` and the like answer, as JSON. A process of its own, because in this one another
# test may have told PEFT of the method. None in a module's place makes it count as not installed.
OPENING = """
import json, sys
if "without" in sys.argv[1]:
    sys.modules["peft"] = None
import transformers
ways = {
    "AutoModelForCausalLM": transformers.AutoModelForCausalLM.from_pretrained,
    "AutoModel": transformers.AutoModel.from_pretrained,
    "pipeline": lambda name: transformers.pipeline("text-generation", name),
}
answers = {}
for name in sys.argv[2:]:
    for way, call in ways.items():
        try:
            answers[f"{way} of {name}"] = "opened", str(call(name))
        except Exception as error:
            answers[f"{way} of {name}"] = type(error).__name__, str(error)
print("\\n" + json.dumps(answers))
"""


def contents(directory, model=None):
    """Files of a directory; of an adapter, with another name of the model it belongs to."""
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    if model:
        config = json.loads(files["adapter_config.json"])
        config |= {"base_model_name_or_path": model, "revision": None}
        files["adapter_config.json"] = json.dumps(config).encode()
    return files


class TestAutoModel:
    """An adapter opened as if it were a model: transformers answers, not we."""

    def answers(self, peft, saved, tmp_path):
        """Of a directory, and of a repository of a hub that has the model too."""
        directory = tmp_path / "adapter"
        directory.mkdir()
        for name, data in contents(saved / "adapter", str(saved / "model")).items():
            (directory / name).write_bytes(data)
        with Hub() as hub:
            hub.repos["org/adapter"] = contents(saved / "adapter", "org/target")
            hub.repos["org/target"] = contents(saved / "model")
            run = subprocess.run(
                [sys.executable, "-c", OPENING, f"{peft} peft", str(directory), "org/adapter"],
                env={
                    **os.environ,
                    "HF_ENDPOINT": hub.address,
                    "HF_HUB_CACHE": str(tmp_path / "cache"),
                    "HF_HUB_OFFLINE": "0",
                },
                capture_output=True,
                text=True,
            )
        assert run.returncode == 0, run.stderr
        answers = json.loads(run.stdout.splitlines()[-1])
        assert len(answers) == 6
        return answers

    def test_with_peft_the_answer_names_what_to_install_and_call(self, saved, tmp_path):
        pytest.importorskip("peft")
        for way, (kind, text) in self.answers("with", saved, tmp_path).items():
            assert kind == "KeyError", (way, kind, text)
            assert "install tca_fast" in text and "or load with tca_fast.load" in text, (way, text)

    def test_without_peft_there_is_no_model(self, saved, tmp_path):
        # The words are transformers' own: it looks for config.json and knows no other file.
        for way, (kind, text) in self.answers("without", saved, tmp_path).items():
            assert kind in ("ValueError", "OSError"), (way, kind, text)
            assert way.split(" of ")[1] in text and "config.json" in text, (way, text)
