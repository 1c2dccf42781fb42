"""A training loop of one's own over a decoder of one's own: in memory by plain torch, and paged from a file.

    python own_loop.py

Both train the same decoder on the same tokens. The paged one has a few blocks in RAM at a time, and its losses and
weights are those of the one in memory, to the bit.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import megatrain_io as mt

VOCABULARY, WIDTH, HEADS, BLOCKS = 101, 48, 4, 6
STEPS, ACCUMULATION, WARMUP = 6, 3, 3
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1


# ------------------------------------------------------------------------------------------ the model


class Block(nn.Module):
    """Attention to earlier tokens, then an MLP, each added to the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """The next hidden state, [B, T, WIDTH]."""
        batch, length, _ = hidden.shape
        q, k, v = (
            part.view(batch, length, HEADS, -1).transpose(1, 2)
            for part in self.qkv(self.attention_norm(hidden)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        added: Tensor = self.down(F.gelu(self.up(self.mlp_norm(hidden))))
        return hidden + added


class Decoder(nn.Module):
    """Embeddings, blocks in a named module list, norm and head: all that PagedModel asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores of the next token, [B, T, VOCABULARY]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.tokens(input_ids) + self.positions(positions)
        for layer in self.layers:
            hidden = layer(hidden)
        scores: Tensor = self.head(self.norm(hidden))
        return scores


# ------------------------------------------------------------------------------- data and learning rate


def steps() -> Iterator[list[dict[str, Tensor]]]:
    """The micro-batches of each step: rows of different lengths, a quarter of the tokens not trained."""
    random = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        lengths = torch.randint(8, 32, (ACCUMULATION,), generator=random).tolist()
        rows = [torch.randint(VOCABULARY, (2, length), generator=random) for length in lengths]
        yield [
            {
                "input_ids": row,
                "labels": row.masked_fill(torch.rand(row.shape, generator=random) < 0.25, -100),
            }
            for row in rows
        ]


def learning_rate(step: int) -> float:
    """Warms up to 1e-3, and stays there."""
    return 1e-3 * min(1.0, step / WARMUP)


# ------------------------------------------------------------------------------------------- in memory


def train_in_memory(model: Decoder) -> list[float]:
    """Train by plain torch; returns the loss of each step."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
    losses = []
    for number, micro_batches in enumerate(steps(), start=1):
        trained = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
        total = torch.zeros(())
        for batch in micro_batches:
            scores = model(batch["input_ids"])
            targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]  # each token predicts the next one
            token_losses = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")
            loss = token_losses / trained  # of all micro-batches: the mean over the step's tokens
            loss.backward()
            total = total + loss.detach()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


# ----------------------------------------------------------------------------------------------- paged


def train_paged(model: mt.PagedModel) -> list[float]:
    """Train from the last committed step on; returns the losses of all steps."""
    losses = [float.fromhex(text) for text in model.state.decode().split()]
    for number, micro_batches in enumerate(steps(), start=1):
        if number <= model.step_number:
            continue  # trained before the program was stopped
        with model.step(learning_rate=learning_rate(number)) as step:
            losses.append(step.forward(micro_batches))
            step.backward()
            step.state = " ".join(loss.hex() for loss in losses).encode()  # committed with the step
    return losses


def main() -> None:
    """Train in memory and paged, and compare."""
    torch.manual_seed(0)
    decoder = Decoder()
    with TemporaryDirectory() as folder:
        paged = mt.PagedModel.create(
            decoder,
            Path(folder) / "decoder.mtio",
            blocks="layers",
            precision="fp32",
            ram="256MiB",
            device="cpu",
            weight_decay=WEIGHT_DECAY,
            betas=BETAS,
            eps=EPS,
        )
        with paged:
            losses = train_paged(paged)
            weights = dict(paged.weights())
    expected = train_in_memory(decoder)
    print("loss, paged:    ", *(f"{loss:.6f}" for loss in losses))
    print("loss, in memory:", *(f"{loss:.6f}" for loss in expected))
    equal = all(torch.equal(weights[name], parameter) for name, parameter in decoder.named_parameters())
    print("losses equal to the bit:", losses == expected, "- weights equal to the bit:", equal)


if __name__ == "__main__":
    main()
