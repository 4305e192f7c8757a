"""How many features an int8 screen leaves open, simulated: `python tests/screening_candidates.py`.

Synthetic weights and inputs, biases that make a wanted number of features active on average; the
rounding and the bound of docs/screening.md, in float32 on the CPU.
"""

import torch

D, F, T = 3584, 8192, 64


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    outliers = normal(T, D)
    outliers[:, torch.randperm(D, generator=generator)[:8]] *= 30
    weights = {"uniform": 2 * torch.rand(F, D, generator=generator) - 1, "normal": normal(F, D)}
    inputs = {"normal": normal(T, D), "8 outliers of 30": outliers}
    print("weights  inputs            L0   bound/σ  rows read, 1 token   8 tokens")
    for weights_name, W in weights.items():
        scale = W.abs().amax(1, keepdim=True) / 127
        q = (W / scale).round()
        error, norm = (W - q * scale).norm(dim=1), W.norm(dim=1)
        for inputs_name, x in inputs.items():
            x_scale = x.abs().amax(1, keepdim=True) / 32639
            levels = (x / x_scale).round()
            x_error = (x - levels * x_scale).norm(dim=1, keepdim=True)
            bound = 1.001 * (
                x.norm(dim=1, keepdim=True) * error
                + x_error * (norm + error)
                + (D // 32 + 32) * 2**-24 * x.norm(dim=1, keepdim=True) * norm
            )
            estimate, z = (levels * x_scale) @ (q * scale).T, x @ W.T
            for wanted in (1.4, 10, 64):
                bias = -z.flatten().topk(round(wanted * T)).values[-1]
                is_open = estimate + bound > -bias
                assert bool((is_open | (z + bias <= 0)).all())
                rows = is_open.view(-1, 8, F).any(1).sum(1).double().mean()
                print(
                    f"{weights_name:8} {inputs_name:16} {wanted:4}   {bound.mean() / z.std():.2f}"
                    f"     {is_open.sum(1).double().mean():15.0f} {rows:10.0f}"
                )


if __name__ == "__main__":
    main()
