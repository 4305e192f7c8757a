"""Writes golden folders of any size: contract §1-3 in float64, layer by layer, without tca_fast."""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Adapted(nn.Module):
    """MLP plus transcoder, keeping the last features."""

    def __init__(self, mlp, adapter):
        super().__init__()
        self.mlp, self.adapter, self.features = mlp, adapter, None

    def forward(self, x):
        a = self.adapter
        self.features = torch.relu(x @ a["enc.weight"].T + a["enc.bias"])
        y = self.mlp(x) + self.features @ a["dec.weight"].T
        return y + a["dec.bias"] if "dec.bias" in a else y


def write_folder(
    directory, *, seed=0, num_features=20, decoder_bias=True, k=1, other_cutoffs=(), padding=3,
    batch=(2, 9), weights=(1.0, 0.01, 1.0, 2.0), **shape,
):  # fmt: skip
    """Make a pair, adapters and a batch, and write everything a golden folder holds."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | shape
    base, target = (
        Qwen2ForCausalLM(Qwen2Config(**shape, max_position_embeddings=64)) for _ in "ab"
    )
    with torch.no_grad():
        for own, other in zip(base.parameters(), target.parameters(), strict=True):
            own.normal_(std=0.3) if own.dim() > 1 else own.add_(0.1 * torch.randn_like(own))
            other.copy_(own + 0.3 * own.std() * torch.randn_like(own))
    base.save_pretrained(directory / "base")
    target.save_pretrained(directory / "target")
    adapters = [random_adapter(num_features, shape["hidden_size"], decoder_bias) for _ in
                range(shape["num_hidden_layers"])]  # fmt: skip
    backbone = write_adapter(directory / "adapter", base, target, adapters, num_features)
    ids = torch.randint(3, shape["vocab_size"], batch)
    mask = torch.ones_like(ids)
    mask[1, batch[1] - padding :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    save_file(inputs, directory / "inputs.safetensors")
    models = base.double(), target.double(), backbone.double()
    oracle = Oracle(*models, [{n: t.double() for n, t in a.items()} for a in adapters], inputs)
    values, gradients, outputs = oracle.results(k, other_cutoffs, weights)
    values["_about"] |= {"batch": list(batch), "padded_right_row1": padding}
    (directory / "values.json").write_text(json.dumps(values))
    save_file(gradients, directory / "grads.safetensors")
    save_file(outputs, directory / "outputs.safetensors")


def random_adapter(num_features, width, decoder_bias):
    adapter = {
        "enc.weight": torch.empty(num_features, width).uniform_(-(width**-0.5), width**-0.5),
        "enc.bias": -0.3 + 0.2 * torch.randn(num_features),
        "dec.weight": 0.05 * torch.randn(width, num_features),
    }
    return adapter | ({"dec.bias": 0.02 * torch.randn(width)} if decoder_bias else {})


def write_adapter(directory, base, target, adapters, num_features):
    """The assembled whole model in the paper's format; returns it without adapters."""
    hybrid = Qwen2ForCausalLM(target.config)
    hybrid.load_state_dict(target.state_dict())
    for ours, theirs in zip(hybrid.model.layers, base.model.layers, strict=True):
        ours.mlp.load_state_dict(theirs.mlp.state_dict())
    hybrid.save_pretrained(directory)
    path = directory / "config.json"
    extra = {
        "architectures": ["Qwen2ForCausalLMWithTranscoder"],
        "transcoder_n_features": num_features,
        "transcoder_dec_bias": "dec.bias" in adapters[0],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    tensors = {name: tensor.contiguous() for name, tensor in hybrid.state_dict().items()}
    if hybrid.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for layer, adapter in enumerate(adapters):
        for name, tensor in adapter.items():
            tensors[f"model.layers.{layer}.mlp.transcoder_{name}"] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return hybrid


class Oracle:
    """Losses and gradients of two streams, written out from the contract's formulas."""

    def __init__(self, base, target, hybrid, adapters, inputs):
        self.reference, self.adapters = target.requires_grad_(False), adapters
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"].bool()
        self.labels = inputs["labels"]
        for adapter in adapters:
            for tensor in adapter.values():
                tensor.requires_grad_(True)
        self.streams = {
            name: self.attach(model.requires_grad_(False))
            for name, model in (("target_backbone", hybrid), ("base_backbone", base))
        }

    def attach(self, model):
        for layer, adapter in zip(model.model.layers, self.adapters, strict=True):
            layer.mlp = Adapted(layer.mlp, adapter)
        return model

    def run(self, front, back, k):
        """Logits and residual states of mixed(front, back, k), contract §3.4."""
        length = self.ids.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & self.mask[:, None, None, :]
        allowed = allowed | torch.eye(length, dtype=torch.bool)
        bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
        h = front.model.embed_tokens(self.ids)
        states = [h]
        for i in range(len(front.model.layers)):
            owner = front if i < k else back
            tables = owner.model.rotary_emb(h, torch.arange(length)[None])
            h = owner.model.layers[i](h, attention_mask=bias, position_embeddings=tables)
            states.append(h)
        return back.lm_head(back.model.norm(h)), states

    def distances(self, logits, labels=None):
        labels = self.labels if labels is None else labels
        counted = labels[:, 1:] != -100
        reference, _ = self.run(self.reference, self.reference, 0)
        p, q = reference[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[counted].mean()
        return kl, F.nll_loss(q[counted], labels[:, 1:][counted])

    def terms(self, stream, cutoffs):
        """Every differentiable quantity of one step, by its golden name."""
        layers = stream.model.layers
        logits, states = self.run(stream, stream, 0)
        features = [layer.mlp.features for layer in layers]
        values = {}
        values["kl"], values["lm"] = self.distances(logits)
        reference_logits, references = self.run(self.reference, self.reference, 0)
        values["ref_lm"] = self.distances(reference_logits)[1]
        m = self.mask
        norms = [adapter["dec.weight"].norm(dim=0) for adapter in self.adapters]
        values["l1_per_layer"] = [
            (f[m] * n).sum(1).mean() for f, n in zip(features, norms, strict=True)
        ]
        values["l1_sum"] = sum(values["l1_per_layer"])
        values["l0_per_layer"] = [(f[m] > 0).double().sum(1).mean() for f in features]
        values["l0_avg"] = sum(values["l0_per_layer"]) / len(layers)
        values["nmse_per_hidden_state"] = [
            (a[m] - r[m]).square().mean() / (r[m].square().mean() + 1e-8)
            for a, r in zip(states, references, strict=True)
        ]
        values["nmse"] = sum(values["nmse_per_hidden_state"]) / len(states)
        for k in cutoffs:
            for name, front, back, exists in (
                ("a2r", stream, self.reference, k >= 1),
                ("r2a", self.reference, stream, k < len(layers)),
            ):
                if exists:
                    kl, lm = self.distances(self.run(front, back, k)[0])
                    values[f"{name}_kl_{k}"], values[f"{name}_lm_{k}"] = kl, lm
        return values, logits, reference_logits, features, states, references

    def gradients(self, loss):
        flat = [tensor for adapter in self.adapters for tensor in adapter.values()]
        grads = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
        names = [
            f"model.layers.{i}.mlp.transcoder_{name}"
            for i, adapter in enumerate(self.adapters)
            for name in adapter
        ]
        return {
            name: torch.zeros_like(tensor) if grad is None else grad
            for name, tensor, grad in zip(names, flat, grads, strict=True)
        }

    def results(self, k, other_cutoffs, weights):
        adapt, l1, nmse, bridge = weights
        depth = range(len(self.adapters) + 1)
        stream = self.streams["target_backbone"]
        values = {
            "_about": dict(
                zip(
                    ("lambda_adapt", "l1_weight", "lambda_nmse", "lambda_bridge"),
                    weights,
                    strict=True,
                ),
                k=k,
            )  # fmt: skip
        }
        for name, model in self.streams.items():
            values[name] = numbers(self.terms(model, depth)[0])
        terms, logits, reference_logits, features, states, references = self.terms(stream, depth)

        def objective(cutoffs):
            crossed = sum(
                terms[f"{name}_kl_{c}"]
                for c in cutoffs
                for name in ("a2r", "r2a")
                if f"{name}_kl_{c}" in terms
            ) / len(cutoffs)
            plain = adapt * terms["kl"] + nmse * terms["nmse"]
            total = plain + l1 * terms["l1_sum"] + bridge * crossed
            logged = plain + bridge * crossed / 2
            norm = math.sqrt(sum(g.square().sum() for g in self.gradients(total).values()))
            return total, {
                "bridging/bridge": crossed.item() / 2,
                "train/total_loss": logged.item(),
                "grad_norm_total": norm,
            }

        total, logged = objective([k])
        values |= {
            "optimised_total": total.item(),
            "logged_total": logged["train/total_loss"],
            "grad_norm_total_preclip": logged["grad_norm_total"],
        }
        for cutoffs in other_cutoffs:
            values["cutoffs_" + "_".join(map(str, cutoffs))] = objective(cutoffs)[1]
        masked = self.labels.clone()
        masked[:, :2] = -100
        kl, lm = self.distances(logits, masked)
        values["prompt_masked_2"] = {"kl": kl.item(), "lm": lm.item()}
        losses = {"total": total, "kl": terms["kl"], "l1": terms["l1_sum"], "nmse": terms["nmse"]}
        losses |= {name: terms[f"{name}_kl_{k}"] for name in ("a2r", "r2a")
                   if f"{name}_kl_{k}" in terms}  # fmt: skip
        gradients = {
            f"{part}/{name}": grad.float().contiguous()
            for part, loss in losses.items()
            for name, grad in self.gradients(loss).items()
        }
        outputs = {
            "logits_adapter": logits,
            "logits_ref": reference_logits,
            "features": torch.stack(features),
            "resid_adapter": torch.stack(states),
            "resid_ref": torch.stack(references),
        }
        for name, front, back in (
            ("a2r", stream, self.reference),
            ("r2a", self.reference, stream),
        ):
            if f"{name}_kl_{k}" in terms:
                outputs[f"logits_{name}_k{k}"] = self.run(front, back, k)[0]
        return values, gradients, {n: t.detach().float() for n, t in outputs.items()}


def numbers(tree):
    if isinstance(tree, dict):
        return {key: numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [numbers(value) for value in tree]
    return tree.item()
