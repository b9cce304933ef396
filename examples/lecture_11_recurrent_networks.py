"""Lecture 11: recurrent networks, which read and write sequences by applying one cell again and again.

All that a cell knows of a sequence is its state, and a gradient goes back through as many steps as the sequence has: in
a vanilla network it vanishes or explodes, gates let it pass. With cells that remember come a language model that knows
a text by heart, another that writes like a licence, networks that copy and reverse what they read, captions with a look
at the place of each word, and answers to questions about images.

The standard forms differ from the lecture's sketch in this:

- The gates of torch's LSTM come in the order i, f, g, o; other libraries have another order, and weights do not tell.
- torch's GRU applies the reset gate after the matrix product, the paper (Cho et al.) before: another function of the
  same weights. Its update gate z keeps the old state: h' = (1 - z) n + z h.
- A gradient passes an LSTM as far as its forget gate is open. Initial biases around zero leave it half open, and the
  gradient halves with every step; a positive bias of the forget gate (Gers et al., Jozefowicz et al.) is the remedy.
- Clipping shortens the gradient of all parameters together, which keeps its direction, rather than each element.
- Truncated backpropagation ends the gradient where a chunk begins. The state goes on, so that what a chunk says may
  depend on the chunks before it.

Run it: ``python examples/lecture_11_recurrent_networks.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lesson import (
    COPY,
    REVERSE,
    SYMBOLS,
    arguments,
    console,
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
from rich.progress import track
from torch import Tensor

from dlkernels import data, models, nn, train
from dlkernels.data.text import python_text
from dlkernels.models import decoding

State = Tensor | tuple[Tensor, Tensor]


# ---- Gradients through time ------------------------------------------------------------------------------------------


def vanilla_cell(size: int, gain: float) -> torch.nn.RNNCell:
    """A cell whose recurrent weights have a spectral radius of about ``gain``."""
    cell = torch.nn.RNNCell(size, size)
    torch.nn.init.normal_(cell.weight_hh, std=gain / math.sqrt(size))
    return cell


def lstm_cell(size: int, forget_bias: float) -> nn.LSTMCell:
    """A cell whose forget gate is more open the larger the bias is."""
    cell = nn.LSTMCell(size, size)
    with torch.no_grad():
        cell.bias_hh[size : 2 * size] += forget_bias
    return cell


def gradient_by_step(cell: torch.nn.Module, inputs: Tensor) -> list[float]:
    """Size of the last output's gradient with respect to the memory before each step, latest first, over the first."""
    memories, state = [], None
    for x in inputs:
        state = cell(x, state)
        memories.append(state[1] if isinstance(state, tuple) else state)
    output = state[0] if isinstance(state, tuple) else state
    gradients = torch.autograd.grad((output * torch.randn_like(output)).sum(), memories[:-1])
    norms = [gradient.norm().item() for gradient in reversed(gradients)]
    return [norm / norms[0] for norm in norms]


def gradients_through_time(output: Path) -> None:
    """How much of a gradient is left after ever more steps back, in cells with their initial weights."""
    size, steps = 128, 60
    cells = {
        "RNN, recurrent weights of radius 0.8": vanilla_cell(size, 0.8),
        "RNN, of radius 1.3": vanilla_cell(size, 1.3),
        "RNN, of radius 3": vanilla_cell(size, 3.0),
        "LSTM as it is initialised": lstm_cell(size, 0.0),
        "LSTM, forget gate's bias 1": lstm_cell(size, 1.0),
        "LSTM, forget gate's bias 4": lstm_cell(size, 4.0),
    }
    inputs = torch.randn(steps + 2, 32, size) / 2
    curves = {name: gradient_by_step(cell, inputs) for name, cell in cells.items()}
    rows = [(name, *(f"{norms[back]:.1e}" for back in (1, 10, steps))) for name, norms in curves.items()]
    show_table("What is left of a gradient", ("cell", "1 step back", "10 steps", f"{steps} steps"), rows)
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, norms in curves.items():
        axis.plot(norms, label=name, linestyle="--" if name.startswith("LSTM") else "-")
    axis.set(xlabel="steps back in time", ylabel="gradient of the memory, relative", yscale="log", ylim=(1e-15, 1e12))
    axis.set_title("Gradients through time")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save_figure(figure, output / "gradients.png")


# ---- The cells, written out ------------------------------------------------------------------------------------------


def lstm_by_formula(cell: nn.LSTMCell, x: Tensor, h: Tensor, c: Tensor, order: str) -> Tensor:
    """The next hidden state, of gates whose weights stand in this order."""
    products = x @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T + cell.bias_hh
    gate = dict(zip(order, products.chunk(4, 1), strict=True))
    memory = gate["f"].sigmoid() * c + gate["i"].sigmoid() * gate["g"].tanh()
    return gate["o"].sigmoid() * memory.tanh()


def gru_by_formula(cell: torch.nn.GRUCell, x: Tensor, h: Tensor, reset_after: bool) -> Tensor:
    """The next state, of weights in the order reset, update, new."""
    x_r, x_z, x_n = (x @ cell.weight_ih.T + cell.bias_ih).chunk(3, 1)
    h_r, h_z, h_n = (h @ cell.weight_hh.T + cell.bias_hh).chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    if not reset_after:
        weight, bias = cell.weight_hh.chunk(3)[2], cell.bias_hh.chunk(3)[2]
        h_n = (r * h) @ weight.T + bias
    n = (x_n + (r * h_n if reset_after else h_n)).tanh()
    return (1 - z) * n + z * h


def cells_by_formula() -> None:
    """The largest difference between a cell and its formula."""
    x, h, c = torch.randn(5, 8), torch.randn(5, 16), torch.randn(5, 16)
    rnn, lstm, gru = torch.nn.RNNCell(8, 16), nn.LSTMCell(8, 16), torch.nn.GRUCell(8, 16)
    rnn_by_formula = (x @ rnn.weight_ih.T + rnn.bias_ih + h @ rnn.weight_hh.T + rnn.bias_hh).tanh()
    found = {
        "RNN: h' = tanh(W x + U h + b)": rnn_by_formula - rnn(x, h),
        "LSTM: gates i, f, g, o": lstm_by_formula(lstm, x, h, c, "ifgo") - lstm(x, (h, c))[0],
        "LSTM: gates i, f, o, g": lstm_by_formula(lstm, x, h, c, "ifog") - lstm(x, (h, c))[0],
        "GRU: reset after the product": gru_by_formula(gru, x, h, True) - gru(x, h),
        "GRU: reset before it": gru_by_formula(gru, x, h, False) - gru(x, h),
    }
    rows = [(name, f"{difference.abs().max().item():.1e}") for name, difference in found.items()]
    show_table("Cells against their formulas", ("formula", "largest difference"), rows)


# ---- Language models -------------------------------------------------------------------------------------------------


def learn_chunks(
    model: models.CharLM, tokens: Tensor, chunk: int, passes: int, optimizer: torch.optim.Optimizer, clip_norm: float
) -> tuple[float, float]:
    """Trains on a text ``[1, T]`` chunk by chunk; returns the last pass's loss and the longest gradient of all."""
    inputs, targets = tokens[:, :-1].split(chunk, 1), tokens[:, 1:].split(chunk, 1)
    longest, losses = 0.0, [math.inf]
    for _ in track(range(passes), "by heart", console=console, transient=True, disable=not console.is_terminal):
        state, losses = None, []
        for x, y in zip(inputs, targets, strict=True):
            loss, state = model.truncated_loss(x, y, state)  # the state goes on, its gradient does not
            optimizer.zero_grad()
            loss.backward()
            longest = max(longest, torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item())
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses), longest


def by_heart(text: str, passes: int) -> None:
    """200 characters, learnt whole or in chunks, and then written from the first one on."""
    vocabulary = data.Vocabulary.of_text(text)
    tokens = vocabulary.encode(text).unsqueeze(0)
    whole = tokens.shape[1] - 1
    rows = []
    for cell, chunk in (("rnn", whole), ("gru", whole), ("lstm", whole), ("lstm", 50), ("lstm", 10)):
        torch.manual_seed(0)
        model = models.CharLM(len(vocabulary), None, 128, cell=cell)
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        loss, _ = learn_chunks(model, tokens, chunk, passes, optimizer, clip_norm=1.0)
        written = decoding.greedy(model, prompt=tokens[:, :1], max_length=len(text))
        rows.append((cell, chunk, loss, f"{(written == tokens).sum()} of {len(text)}"))
    columns = ("cell", "gradient's steps", "loss", "right when written")
    show_table(f"A text by heart, {passes} passes", columns, rows)


def clipping(text: str, passes: int) -> None:
    """Gradient descent in a vanilla network with large recurrent weights, with clipping and without."""
    vocabulary = data.Vocabulary.of_text(text)
    tokens = vocabulary.encode(text).unsqueeze(0)
    rows = []
    for name, clip_norm in (("none", math.inf), ("to 1", 1.0), ("to 0.25", 0.25)):
        torch.manual_seed(0)
        model = models.CharLM(len(vocabulary), None, 128, cell="rnn")
        torch.nn.init.normal_(model.recurrent.weight_hh_l0, std=1.5 / math.sqrt(128))
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        loss, longest = learn_chunks(model, tokens, 50, passes, optimizer, clip_norm)
        rows.append((name, longest, loss))
    show_table(f"Clipping, {passes} passes", ("clipping", "longest gradient before", "last loss"), rows)


def licence(text: str, epochs: int, output: Path) -> None:
    """A language model of a licence, and what it writes at several temperatures."""
    path = output / "licence.txt"
    path.write_text(text, encoding="utf-8")
    settings = {"epochs": epochs, "batch_size": 16, "learning_rate": 5e-3}
    recipe = train.recipe("charlm", str(path), settings=settings, arguments={"hidden_size": 192}, length=64)
    trainer = trained("licence", recipe)
    seen = trainer.evaluate(trainer.data.train)["loss"] / math.log(2)
    unseen = trainer.finish()["loss"] / math.log(2)
    vocabulary = trainer.data.vocabulary
    rows = [("before training", math.log2(len(vocabulary))), ("text seen", seen), ("text not seen", unseen)]
    show_table(f"Language model of a licence, {trainer.steps} steps", ("", "bits a character"), rows)
    words = set(re.findall(r"\w+", text))
    rows = []
    for temperature in (0.2, 0.5, 1.0, 1.5):
        prompt = vocabulary.encode("Python ").expand(8, -1)
        written = decoding.sample(trainer.model, prompt=prompt, max_length=200, temperature=temperature)
        texts = [vocabulary.decode(row) for row in written]
        found = [word for line in texts for word in re.findall(r"\w+", line)[:-1]]  # the last may be cut off
        known = sum(word in words for word in found) / len(found)
        rows.append((str(temperature), known, " ".join(texts[0].split())[:42]))
    show_table("What it writes", ("temperature", "known words", "the first of eight texts"), rows)


# ---- Attention: where a network looked -------------------------------------------------------------------------------


@contextmanager
def looks(attend: torch.nn.Module) -> Iterator[list[Tensor]]:
    """The weights ``[N, S]`` of each look that the network takes within it."""
    found: list[Tensor] = []
    handle = attend.register_forward_hook(lambda module, inputs, output: found.append(output[1]))
    try:
        yield found
    finally:
        handle.remove()


def sequences(steps: int, output: Path) -> None:
    """Copying and reversing: what passes through one state, and what attention adds to that."""
    rows = []
    for name, attention in (("the last state alone", None), ("dot attention", "dot"), ("additive", "additive")):
        torch.manual_seed(0)
        model = models.Seq2Seq(SYMBOLS, SYMBOLS, 32, 96, 1, attention)
        fit(name, steps, lambda: copy_or_reverse(64), [(model.loss, learnt(model))], 1e-2, clip_norm=1.0)
        shares = (exact(model, *copy_or_reverse(500, order)) for order in (COPY, REVERSE))
        rows.append((name, *shares))
    show_table(f"Sequences written exactly, {steps} steps", ("the decoder sees", "copy", "reverse"), rows)

    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
    for axis, order in zip(axes, (COPY, REVERSE), strict=True):
        source, target = longest_pair(*copy_or_reverse(64, order))
        with looks(model.decoder.attend) as found, torch.no_grad():
            model(source, target[:, :-1])
        read, written = symbols(source[0]), symbols(target[0])[1:]
        weights = torch.stack(found, 1)[0, : len(written), : len(read)]
        show_weights(axis, weights, written, read, f"to {read[0]}: where each letter comes from")
        axis.set(xlabel="read", ylabel="written")
    save_figure(figure, output / "alignment.png")


# ---- Images ----------------------------------------------------------------------------------------------------------


def captions(steps: int, image_size: int, output: Path) -> None:
    """Captions of 50 images by heart, then of images that were never seen, and where the network looked."""
    scenes = data.load("synthetic", "captions", image_size=image_size)
    seen, test = (scenes.batch(part, torch.arange(len(part[0]))) for part in (scenes.train, scenes.test))
    rows = []
    for count, attention in ((50, False), (50, True), (len(seen[0]), True)):
        torch.manual_seed(0)
        model = models.Captioner(len(scenes.vocabulary), None, 64, 32, 96, attention)
        batch = drawn(*(column[:count] for column in seen), count=50)
        fit(f"{count} captions", steps, batch, [(model.loss, learnt(model))], 1e-2, clip_norm=1.0)
        few = (column[: min(count, 400)] for column in seen)
        rows.append((count, "attention" if attention else "the mean", exact(model, *few), exact(model, *test)))
    columns = ("images", "the decoder sees", "exact, seen", "exact, not seen")
    show_table(f"Captions, {steps} steps", columns, rows)
    draw_looks(model, scenes, test[0], output / "captions.png")


def draw_looks(model: models.Captioner, scenes: data.CaptionedImages, images: Tensor, path: Path) -> None:
    """Writes a PNG of images and, for each word of their captions, where the network looked before it wrote it."""
    written = decoding.greedy(model, images, max_length=12)
    chosen = (written != data.PADDING).sum(1).topk(3).indices  # the longest
    with looks(model.decoder.attend) as found, torch.no_grad():
        model(images[chosen], written[chosen, :-1])
    weights = torch.stack(found, 1)  # [3, T, h * w]
    side = math.isqrt(weights.shape[-1])
    figure, axes = plt.subplots(3, 1 + weights.shape[1], figsize=(1.25 * (1 + weights.shape[1]), 4.6))
    for row, index, maps in zip(axes, chosen, weights, strict=True):
        pixels = scenes.test[0][index].permute(1, 2, 0)
        words = ["", *(scenes.vocabulary.symbols[token] for token in written[index, 1:])]
        for axis, word in zip(row, words, strict=True):
            axis.imshow(pixels, extent=(0, side, side, 0))
            axis.set_title(word, fontsize=9)
            axis.axis("off")
        for axis, weight in zip(row[1:], maps, strict=True):
            axis.imshow(weight.view(side, side), extent=(0, side, side, 0), cmap="gray", alpha=0.75, vmin=0)
    figure.suptitle("Where each word came from: the lighter, the more it was looked at", fontsize=10)
    save_figure(figure, path)


def questions(epochs: int, image_size: int) -> None:
    """Questions about images, and about other images than they were asked about."""
    recipe = train.recipe(
        "vqa",
        settings={"epochs": epochs, "learning_rate": 5e-3},
        image_size=image_size,
        arguments={"encoder_channels": 32, "embedding_size": 16, "hidden_size": 64, "attention": True},
    )
    trainer = trained("questions", recipe)
    right = trainer.finish()["accuracy"]
    images, *asked = trainer.data.test
    exchanged = trainer.evaluate((images.roll(1, 0), *asked))["accuracy"]
    images, questions, answers = trainer.data.batch(trainer.data.test, torch.arange(4))
    with torch.no_grad():
        chosen = trainer.model.eval()(images, questions).argmax(1)
    said = trainer.data.answers
    rows = [
        (trainer.data.vocabulary.decode(question[question != data.PADDING]), said[found], said[answer])
        for question, found, answer in zip(questions, chosen, answers, strict=True)
    ]
    show_table("Questions about images", ("asked", "answered", "expected"), rows)
    rows = [("the image that it is about", right), ("another image", exchanged)]
    show_table("Answers that are right", ("with", "test accuracy"), rows)


def main() -> None:
    """The whole lesson."""
    options = arguments("lecture_11_recurrent_networks", __doc__)
    torch.manual_seed(0)
    text = python_text()[:14_000]  # where Python's licence is installed, that
    short = " ".join(re.findall(r"[\w.,']+", text))[:200]  # without underlines, which nobody can count by heart
    gradients_through_time(options.output)
    cells_by_formula()
    by_heart(short, 2 if options.fast else 150)
    clipping(short, 2 if options.fast else 40)
    licence(text, 1 if options.fast else 30, options.output)
    sequences(3 if options.fast else 700, options.output)
    captions(2 if options.fast else 400, 16, options.output)
    questions(1 if options.fast else 20, 16)


if __name__ == "__main__":
    main()
