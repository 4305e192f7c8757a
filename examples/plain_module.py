"""An adapter in a model written by hand, without our trainer, Hugging Face or a configuration file.

    python examples/plain_module.py

A small network is frozen; another one, the "tuned" one, differs in its MLP. An adapter beside the
frozen MLP learns the difference with a plain PyTorch loop, first as a module and then by the
functional operators, which give the same numbers.
"""

import torch
from torch import Tensor, nn

import tca_fast
from tca_fast import ops

WIDTH, FEATURES, TOKENS = 32, 256, 512


class Block(nn.Module):
    """A residual block; the adapter is an ordinary submodule of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.adapter: tca_fast.TranscoderAdapter | None = None

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The next residual state, and the adapter's L1 summed over tokens."""
        x = self.norm(h)
        mlp_out = self.mlp(x)
        if self.adapter is None:
            return h + mlp_out, h.new_zeros(())
        output = self.adapter(x, mlp_out)
        return h + output.y, output.l1


def main() -> float:
    """Train the adapter and return the share of the difference that is left."""
    torch.manual_seed(0)
    block, tuned = Block().requires_grad_(False), Block().requires_grad_(False)
    tuned.load_state_dict(block.state_dict())
    tuned.mlp[2].weight += 0.1 * torch.randn_like(tuned.mlp[2].weight)

    block.adapter = tca_fast.TranscoderAdapter(
        WIDTH, tca_fast.AdapterConfig(num_features=FEATURES), generator=torch.Generator()
    )
    h = torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        wanted, _ = tuned(h)
        difference = (wanted - block(h)[0]).square().sum()
    optimizer = torch.optim.Adam(block.adapter.parameters(), lr=3e-3)
    for _ in range(300):
        got, l1 = block(h)
        loss = (got - wanted).square().sum() / difference + 1e-5 * l1 / TOKENS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        got, _ = block(h)
        left = ((got - wanted).square().sum() / difference).item()

        # The same by functions: which features are active, and what they add.
        a = block.adapter
        active = ops.encode(block.norm(h), a.W_enc, a.b_enc)
        added = ops.decode(active, a.W_dec, a.b_dec)
        torch.testing.assert_close(h + block.mlp(block.norm(h)) + added, got)
        per_token = active.counts().double().mean().item()
    print(f"{left:.1%} of the difference is left; {per_token:.0f} of {FEATURES} features per token")
    return left


if __name__ == "__main__":
    main()
