"""Lecture 12: attention, and the networks that consist of little else.

A query asks all keys at once, and takes of their values as much as it likes each key: softmax(q k^T / sqrt(d)) v. From
that layer come the Transformer, which reads with one half and writes with the other, a language model that is its
second half alone, captions, and a classifier to which an image is a sequence of patches.

The standard forms differ from the lecture's sketch in this:

- Without positions attention is equivariant to permutations, not invariant: who reorders the tokens reorders the
  outputs. A mean over the outputs is invariant.
- Division by sqrt(d) keeps the variance of the logits at 1 whatever the dimension d of the keys. Undivided they grow,
  softmax chooses one key, and no gradient reaches the others.
- Sinusoidal positions: feature 2i of position p is sin(p / 10000^(2i / d)), feature 2i + 1 the cosine; the product of
  two positions depends on their distance alone.
- A block of the decoder has three layer norms, one for each of self-attention, cross-attention and the two linear
  layers. The paper's twelve layers are six of the encoder and six of the decoder.
- The paper normalises after each sum (post-norm); nearly all networks since then before each block (pre-norm), which
  leaves the sum untouched from the first layer to the last.

Run it: ``python examples/lecture_12_attention.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lesson import (
    COPY,
    REVERSE,
    SYMBOLS,
    accuracy,
    arguments,
    copy_or_reverse,
    drawn,
    exact,
    fit,
    learnt,
    longest_pair,
    save_figure,
    show_table,
    show_weights,
    symbols,
    trained,
)
from torch import Tensor

from dlkernels import data, models, nn, train
from dlkernels import functional as F
from dlkernels.data.text import python_text
from dlkernels.models import decoding
from dlkernels.models.transformer import TransformerDecoderLayer


def largest(difference: Tensor) -> str:
    """The largest absolute value, to two digits."""
    return f"{difference.abs().max().item():.1e}"


# ---- The layer -------------------------------------------------------------------------------------------------------


def attention_by_formula(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
    """``[..., L, d]``, ``[..., S, d]``, ``[..., S, d_v]`` to ``[..., L, d_v]``; ``hidden`` hides keys from queries."""
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if hidden is not None:
        logits = logits.masked_fill(hidden, -math.inf)
    return logits.softmax(-1) @ value


def heads_by_formula(layer: nn.MultiheadAttention, tokens: Tensor, others: Tensor) -> Tensor:
    """Each head with its own projections to queries, keys and values; then one projection of all heads together."""
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    projected = [
        (x @ weight.T + bias).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)  # [N, heads, L, d]
        for x, weight, bias in zip((tokens, others, others), weights, biases, strict=True)
    ]
    return layer.out_proj(attention_by_formula(*projected).transpose(1, 2).flatten(2))


def formulas() -> None:
    """The largest differences between the layers and what defines them."""
    query, key, value = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 8)
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    heads, tokens, others = nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    layer, torchs = (
        kind(32, 4, 64, 0.0, **options)
        for kind, options in ((TransformerDecoderLayer, {}), (torch.nn.TransformerDecoderLayer, {"batch_first": True}))
    )
    layer.load_state_dict(torchs.state_dict())
    attention = F.scaled_dot_product_attention
    found = {
        "softmax(q k^T / sqrt(d)) v": attention(query, key, value) - attention_by_formula(query, key, value),
        "the same, causal": attention(query, key, value, is_causal=True)
        - attention_by_formula(query, key, value, later),
        "self-attention of 4 heads": heads(tokens, tokens, tokens)[0] - heads_by_formula(heads, tokens, tokens),
        "cross-attention of 4 heads": heads(tokens, others, others)[0] - heads_by_formula(heads, tokens, others),
        "decoder layer, of torch's weights": layer(tokens, others) - torchs(tokens, others),
    }
    rows = [(name, largest(difference)) for name, difference in found.items()]
    show_table("Layers against their formulas", ("formula", "largest difference"), rows)


def order() -> None:
    """What reordering the tokens does to the outputs."""
    layer, positions = nn.MultiheadAttention(32, 4, batch_first=True), nn.SinusoidalPositions()
    tokens, permutation = torch.randn(1, 9, 32), torch.randperm(9)

    def attend(x: Tensor) -> Tensor:
        return layer(x, x, x)[0]

    functions = {
        "attention": attend,
        "attention, then the mean": lambda x: attend(x).mean(1, keepdim=True).expand_as(x),
        "positions, then attention": lambda x: attend(positions(x)),
    }
    rows = []
    for name, function in functions.items():
        before, after = function(tokens), function(tokens[:, permutation])
        rows.append((name, largest(after - before[:, permutation]), largest(after - before)))
    columns = ("f", "f(Px) from P f(x)", "f(Px) from f(x)")
    show_table("Tokens in another order P: how far f(Px) is", columns, rows)


def scale() -> None:
    """Logits and weights of ever larger queries and keys, undivided and divided."""
    rows = []
    for size in (4, 64, 1024):
        query, key = torch.randn(1000, 1, size), torch.randn(1000, 16, size)
        for divisor, name in ((1.0, "1"), (math.sqrt(size), "sqrt(d)")):
            logits = ((query @ key.transpose(1, 2)).squeeze(1) / divisor).requires_grad_()
            weights = logits.softmax(-1)
            (gradient,) = torch.autograd.grad(weights[:, 0].sum(), logits)
            rows.append(
                (
                    size,
                    name,
                    logits.var().item(),
                    weights.max(-1).values.mean().item(),
                    gradient.norm(dim=1).median().item(),
                )
            )
    columns = ("d", "divided by", "variance", "largest of 16 weights", "median gradient")
    show_table("Why logits are divided by sqrt(d)", columns, rows)


def draw_positions(output: Path) -> None:
    """Writes a PNG of the sinusoidal positions and of their products."""
    encodings = nn.SinusoidalPositions()(torch.zeros(100, 64))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1))
    shown = left.imshow(encodings.T, aspect="auto", cmap="RdBu", origin="lower")
    left.set(xlabel="position", ylabel="feature", title="Sinusoidal positions")
    figure.colorbar(shown, ax=left)
    for position in (20, 50, 80):
        right.plot(encodings @ encodings[position], label=f"with position {position}")
    right.set(xlabel="position", ylabel="product", ylim=(10, 40), title="Products: of the distance alone")
    right.legend(fontsize=8)
    save_figure(figure, output / "positions.png")


def causality(output: Path) -> None:
    """How strongly what a language model says at each token depends on each token: not at all on later ones."""
    model = models.GPT(20, 12, 32, 4, 2, dropout=0.0)
    embedded: list[Tensor] = []

    def as_leaf(module: torch.nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
        embedded.append(outputs.detach().requires_grad_())
        return embedded[0]

    model.embedding.register_forward_hook(as_leaf)
    logits = model(torch.randint(20, (1, 12)))
    gradients = [torch.autograd.grad(row.square().sum(), embedded[0], retain_graph=True)[0] for row in logits[0]]
    sizes = torch.cat(gradients).norm(dim=-1)  # [12 outputs, 12 tokens]
    later = torch.ones(12, 12, dtype=torch.bool).triu(1)
    rows = [
        ("itself and earlier ones, smallest", f"{sizes[~later].min().item():.1e}"),
        ("later ones, largest", f"{sizes[later].max().item()}"),
    ]
    show_table("Gradients of a token's logits with respect to", ("tokens", "size"), rows)
    figure, axis = plt.subplots(figsize=(4.5, 4))
    shown = axis.imshow(sizes.masked_fill(sizes == 0, math.nan), cmap="viridis", norm="log")
    axis.set(xlabel="token", ylabel="logits of token", title="Gradients (white: exactly 0)")
    figure.colorbar(shown, ax=axis)
    save_figure(figure, output / "causal.png")


# ---- Where heads look ------------------------------------------------------------------------------------------------


@contextmanager
def looks(attention: torch.nn.MultiheadAttention) -> Iterator[list[Tensor]]:
    """The weights ``[N, heads, L, S]`` of each call within it, which otherwise asks for none."""
    found: list[Tensor] = []

    def ask(module: torch.nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {**options, "need_weights": True, "average_attn_weights": False}

    handles = [
        attention.register_forward_pre_hook(ask, with_kwargs=True),
        attention.register_forward_hook(lambda module, inputs, output: found.append(output[1])),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# ---- The Transformer -------------------------------------------------------------------------------------------------


def transformer(steps: int, output: Path) -> None:
    """Encoder and decoder, with norms after the sums and before the blocks, copy and reverse letters."""
    rows = []
    for name, norm_first in (("post-norm", False), ("pre-norm", True)):
        torch.manual_seed(0)
        model = models.Transformer(SYMBOLS, SYMBOLS, 48, 4, 2, 2, 96, dropout=0.0, norm_first=norm_first)
        losses = fit(name, steps, lambda: copy_or_reverse(64), [(model.loss, learnt(model))], 3e-3, clip_norm=1.0)
        tenth = max(1, steps // 10)
        shares = (exact(model, *copy_or_reverse(500, order)) for order in (COPY, REVERSE))
        rows.append((name, sum(losses[-tenth:]) / tenth, *shares))
    columns = ("layer norm", "last loss", "copied exactly", "reversed exactly")
    show_table(f"Transformer, {steps} steps", columns, rows)

    source, target = longest_pair(*copy_or_reverse(64, REVERSE))
    with looks(model.decoder.layers[-1].multihead_attn) as found, torch.no_grad():
        model(source, target[:, :-1])
    read, written = symbols(source[0]), symbols(target[0])[1:]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.8))
    for head, (axis, weights) in enumerate(zip(axes, found[0][0], strict=True)):
        show_weights(axis, weights[: len(written), : len(read)], written, read, f"head {head + 1}")
        axis.set_xlabel("read")
    axes[0].set_ylabel("written")
    figure.suptitle("Cross-attention of the last layer while reversing", fontsize=10)
    save_figure(figure, output / "heads.png")


def captions(steps: int) -> None:
    """A decoder that attends to the grid of an image's features learns 50 captions by heart."""
    scenes = data.load("synthetic", "captions", image_size=16)
    images, expected = scenes.batch(scenes.train, torch.arange(50))
    torch.manual_seed(0)
    model = models.CaptioningTransformer(len(scenes.vocabulary), None, 32, 32, 4, 1, 64, dropout=0.0)
    fit("captions", steps, lambda: (images, expected), [(model.loss, learnt(model))], clip_norm=1.0)
    show_table(f"Captions, {steps} steps", ("images", "exact"), [(len(images), exact(model, images, expected))])


# ---- A language model ------------------------------------------------------------------------------------------------


def without_cache(model: models.GPT, tokens: Tensor, length: int) -> Tensor:
    """Greedy writing that computes all tokens again for each new one."""
    with torch.no_grad():
        while tokens.shape[1] < length:
            logits = model.eval()(tokens)[:, -1]
            logits[:, data.PADDING] = -math.inf  # which decoding never writes
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


def language_model(epochs: int, output: Path) -> None:
    """A small GPT of a licence: what it writes, and what keeping keys and values saves."""
    path = output / "licence.txt"
    path.write_text(python_text()[:14_000], encoding="utf-8")  # where Python's licence is installed, that
    sizes = {"d_model": 64, "nhead": 4, "num_layers": 2, "dropout": 0.1}
    settings = {"epochs": epochs, "batch_size": 8, "learning_rate": 5e-3}
    trainer = trained("GPT", train.recipe("gpt", str(path), settings=settings, arguments=sizes, length=128))
    model, vocabulary = trainer.model, trainer.data.vocabulary
    rows = [
        ("before training", math.log2(len(vocabulary))),
        ("text seen", trainer.evaluate(trainer.data.train)["loss"] / math.log(2)),
        ("text not seen", trainer.finish()["loss"] / math.log(2)),
    ]
    show_table(f"GPT of a licence, {trainer.steps} steps", ("", "bits a character"), rows)

    prompt = vocabulary.encode("Python ").unsqueeze(0)
    rows = []
    for temperature in (0.2, 0.5, 1.0):
        written = decoding.sample(model, prompt=prompt, max_length=80, temperature=temperature)
        rows.append((str(temperature), " ".join(vocabulary.decode(written[0]).split())[:58]))
    show_table("What it writes", ("temperature", "text"), rows)

    prompts = vocabulary.encode(python_text()[:160]).view(16, 10)
    written, rows = [], []
    for name, write in (
        ("kept", lambda: decoding.greedy(model, prompt=prompts, max_length=128)),
        ("computed again", lambda: without_cache(model, prompts, 128)),
    ):
        start = time.perf_counter()
        written.append(write())
        rows.append((name, time.perf_counter() - start, "yes" if torch.equal(written[0], written[-1]) else "no"))
    show_table("16 texts of 128 characters", ("keys and values are", "seconds", "same texts"), rows)


# ---- Images as sequences ---------------------------------------------------------------------------------------------


def vision(steps: int, output: Path) -> None:
    """A Vision Transformer of 16 patches recognises digits; where its class token looks in the end."""
    split = data.load_digits(0)
    images, test_images = (x.expand(-1, 3, -1, -1) for x in (split.train_images, split.test_images))
    torch.manual_seed(0)
    model, loss = models.VisionTransformer(8, 2, 3, 4, 48, 96, num_classes=10), nn.CrossEntropyLoss()
    batch = drawn(images, split.train_labels, count=32)
    fit("ViT", steps, batch, [(lambda x, y: loss(model(x), y), learnt(model))], 3e-3)
    size = sum(parameter.numel() for parameter in model.parameters())
    rows = [(f"{size:,}", accuracy(model, test_images, split.test_labels))]
    show_table(f"Vision Transformer of digits, {steps} steps", ("parameters", "test accuracy"), rows)

    shown = torch.stack([(split.test_labels == digit).nonzero()[0, 0] for digit in range(8)])
    with looks(model.encoder.layers[-1].self_attention) as found, torch.no_grad():
        model(test_images[shown])
    weights = found[0][:, :, 0, 1:].unflatten(-1, (4, 4))  # of the class token to the patches, [8, heads, 4, 4]
    figure, axes = plt.subplots(5, 8, figsize=(8, 5.4))
    for column, (image, maps) in enumerate(zip(split.test_images[shown], weights, strict=True)):
        axes[0, column].imshow(image[0], cmap="gray")
        for axis, values in zip(axes[1:, column], maps, strict=True):
            axis.imshow(values, cmap="viridis", vmin=0)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("digit", *(f"head {head}" for head in range(1, 5))), strict=True):
        axis.set_ylabel(name, fontsize=8)
    figure.suptitle("Patches that the class token looks at, in the last layer", fontsize=10)
    save_figure(figure, output / "patches.png")


def main() -> None:
    """The whole lesson."""
    options = arguments("lecture_12_attention", __doc__)
    torch.manual_seed(0)
    formulas()
    order()
    scale()
    draw_positions(options.output)
    causality(options.output)
    transformer(3 if options.fast else 500, options.output)
    captions(3 if options.fast else 200)
    language_model(1 if options.fast else 50, options.output)
    vision(5 if options.fast else 800, options.output)


if __name__ == "__main__":
    main()
