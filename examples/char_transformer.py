"""Which windows of a text made a character transformer predict the way it does?

    python examples/char_transformer.py TEXT_FILE --out runs/characters

Trains a small transformer on windows of the text, recording each window's gradient as it goes;
then asks for held-out windows which training windows helped and which harmed, and writes a page
to open in a browser. It can be killed at any time: started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import whence

BATCH = 32
LEARNING_RATE = 2e-3
PROMPTS = 20
SAVE_SECONDS = 5.0
"""Shorter than the 10 s after which whence confirms rows on its own, so that it never does."""


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        """[batch, length, width] values, each mixed with those before it."""
        parts = self.project(values).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # [batch, heads, length, head width]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a hidden layer, each normalised before and added after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.hidden_norm = nn.LayerNorm(width)
        self.hidden = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, values: Tensor) -> Tensor:
        """[batch, length, width]."""
        values = values + self.attention(self.attention_norm(values))
        return values + self.hidden(self.hidden_norm(values))


class CharacterTransformer(nn.Module):
    """Predicts the next character at every place of a window."""

    def __init__(self, characters: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        # Called with arange(length), not with a batch: whence tells the two apart.
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        # One parameter, used twice: whence records it once, with both uses added up.
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length, characters] scores of what follows each of [batch, length] tokens."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        values = self.embedding(tokens) + self.position(places)
        return self.head(self.norm(self.blocks(values)))


class Text:
    """A text file as windows; the id of a window is the place of its first character.

    Args:
        path: The file.
        length: Characters that a window predicts.
        windows: How many windows to train on.
    """

    def __init__(self, path: Path, length: int, windows: int) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.length = length
        self.characters = sorted(set(self.text))
        number = {character: index for index, character in enumerate(self.characters)}
        self.tokens = torch.tensor([number[character] for character in self.text])
        # Windows do not overlap, and the last tenth of the text is held out.
        starts = np.arange(0, len(self.text) - length, length)
        train, held_out = np.split(starts, [len(starts) * 9 // 10])
        if not 1 <= windows <= len(train) or len(held_out) < PROMPTS:
            sys.exit(
                f"--windows must be 1 to {len(train)} for this text and --length {length}, with "
                f"{PROMPTS} more held out, got {windows} and {len(held_out)}"
            )
        # A seed of its own: the same windows are chosen when the run is started again.
        random = np.random.default_rng(0)
        self.train = random.choice(train, windows, replace=False)
        self.prompts = np.sort(random.choice(held_out, PROMPTS, replace=False))

    def batch(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        """[batch, length] tokens, and those that follow them."""
        places = torch.as_tensor(ids)[:, None] + torch.arange(self.length)
        return self.tokens[places], self.tokens[places + 1]

    def show(self, id_: int) -> str:
        """What a person sees of a window."""
        return self.text[id_ : id_ + self.length + 1]


def mean_loss(model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
    """The mean over all characters of the batch: what whence calls reduction="token_mean"."""
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def save(path: Path, state: object) -> None:
    """Replaces the file in one step, so that a kill leaves the old file or the new one, whole."""
    temporary = path.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(path)


def train(model: nn.Module, text: Text, out: Path, epochs: int) -> dict[str, dict[str, Tensor]]:
    """Trains and records; goes on where an earlier run in the same folder ended.

    Returns:
        The weights at the end of each epoch, by the epoch's name.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    files = {f"epoch {number}": out / f"epoch-{number}.pt" for number in range(epochs)}

    def save_both(recorder: whence.Recorder, path: Path) -> None:
        # Rows first, then the weights that have learned from these very rows. A kill between
        # the two costs the weights the few batches since the last save; no window is ever
        # recorded twice or left out.
        recorder.commit()
        save(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    for path in reversed(files.values()):
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            break

    counts = text.length  # every window has as many characters, and all of them count
    with whence.record(
        model,
        out / "store",
        # The loss is a mean over batch · length characters. "mean" would do here, where all
        # windows are equally long; "token_mean" is right with padding too, and makes a
        # window's own loss the sum over its characters.
        reduction="token_mean",
        # The optimizer steps while rows are recorded. whence finds that out on its own at the
        # second batch; it is said here for a run that is killed right after the first.
        weights="moving",
    ) as recorder:
        for number, (name, path) in enumerate(files.items()):
            # A checkpoint an epoch: each window gets a row in each, and scores are summed over
            # them, weighted by the learning rate (TracInCP).
            recorder.checkpoint(name, learning_rate=LEARNING_RATE)
            order = np.random.default_rng(number).permutation(text.train)
            pending = np.array(recorder.pending(order), np.int64)
            saved = time.monotonic()
            with tqdm(total=len(order), initial=len(order) - len(pending), desc=name) as progress:
                for first in range(0, len(pending), BATCH):
                    ids = pending[first : first + BATCH]
                    tokens, following = text.batch(ids)
                    optimizer.zero_grad()
                    with recorder.batch(ids, tokens=np.full(len(ids), counts)):
                        loss = mean_loss(model, tokens, following)
                        loss.backward()
                    optimizer.step()
                    progress.update(len(ids))
                    progress.set_postfix(loss=f"{loss.item():.3f}")
                    if time.monotonic() - saved > SAVE_SECONDS:
                        save_both(recorder, path)
                        saved = time.monotonic()
            # An epoch that was finished earlier keeps its file: these weights are later ones.
            if len(pending) or not path.exists():
                save_both(recorder, path)
    return {name: torch.load(path, weights_only=True)["model"] for name, path in files.items()}


def print_hits(hits: whence.Hits, text: Text) -> None:
    """Prints each prompt with its best and worst windows, one a line."""
    for query, prompt in enumerate(text.prompts):
        print(f"\nprompt {prompt}: {text.show(prompt)!r}")
        for name, side in (("helpful", hits.helpful), ("harmful", hits.harmful)):
            print(f"  {name}")
            for id_, score in zip(side.ids[query], side.scores[query], strict=True):
                print(f"    {score:+10.4f}  {id_:>8}  {text.show(id_)!r}")
    print(f"\n{hits.sign}\nscores in {hits.unit}\n{hits.method}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text_file", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/characters"))
    parser.add_argument("--windows", type=int, default=6000, help="how many to train on")
    parser.add_argument("--length", type=int, default=64, help="characters of a window")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    text = Text(options.text_file, options.length, options.windows)
    torch.manual_seed(0)
    model = CharacterTransformer(
        len(text.characters), options.length, options.width, options.layers, options.heads
    )
    states = train(model, text, options.out, options.epochs)

    tokens, following = text.batch(text.prompts)
    hits = whence.query(
        model,
        options.out / "store",
        lambda: mean_loss(model, tokens, following),
        k=10,
        states=states,
        tokens=np.full(PROMPTS, options.length),
    )
    print_hits(hits, text)
    page = hits.to_html(
        options.out / "hits.html",
        show=text.show,
        queries=[text.show(prompt) for prompt in text.prompts],
        title="Which windows made the model predict these?",
    )
    print(f"page: {page}")


if __name__ == "__main__":
    main()
