"""Visual question answering: as on torch's layers, and questions about colours and shapes are answered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlkernels import models, nn

from .cases.networks import compare_with_torch
from .cases.sequences import COLOURS, PLACES, SHAPES, WORDS, encoded, fit, padded, picture

ANSWERS = [*COLOURS, *SHAPES]
QUESTIONS = ("what colour is it", "what shape is the shape")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


def examples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images, questions about them, and answers."""
    images, questions, answers = [], [], []
    for _ in range(count):
        colour, shape, place = (
            list(kinds)[int(torch.randint(len(kinds), (), generator=generator))] for kinds in (COLOURS, SHAPES, PLACES)
        )
        asked = int(torch.randint(2, (), generator=generator))
        images.append(picture(colour, shape, place, generator))
        questions.append(encoded(QUESTIONS[asked]))
        answers.append(ANSWERS.index((colour, shape)[asked]))
    return torch.stack(images), padded(questions), torch.tensor(answers)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_as_on_torchs_layers(attention: bool, dtype: torch.dtype) -> None:
    images, questions, answers = examples(3, torch.Generator().manual_seed(0))
    compare_with_torch(
        lambda layers: models.VQA(len(WORDS), 7, None, 8, 6, 10, 2, attention, layers=layers),
        lambda model: (model(images.to(dtype), questions), model.loss(images.to(dtype), questions, answers)),
        dtype,
    )


@pytest.mark.parametrize("attention", [False, True])
def test_questions_about_unseen_images_are_answered(attention: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    data = examples(3000, generator)

    def batch() -> tuple[Tensor, ...]:
        chosen = torch.randint(3000, (64,), generator=generator)
        return tuple(x[chosen] for x in data)

    torch.manual_seed(0)
    model = models.VQA(len(WORDS), len(ANSWERS), None, 32, 16, 32, attention=attention)
    fit(model, batch, steps=300)
    images, questions, answers = examples(400, generator)
    assert (model(images, questions).argmax(1) == answers).float().mean() >= 0.95


@pytest.mark.parametrize("attention", [False, True])
def test_a_batch_of_questions_as_each_alone(attention: bool) -> None:
    model = models.VQA(len(WORDS), 7, None, 8, 6, 10, attention=attention).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    questions = [encoded(question) for question in QUESTIONS]
    together = model(images, padded(questions))
    for row, question in enumerate(questions):
        alone = model(images[row : row + 1], torch.tensor([question]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", [False, True])
def test_fusion_is_the_product_of_both_projections(attention: bool) -> None:
    model = models.VQA(9, 4, torch.nn.Identity(), 5, 6, 7, attention=attention).double()
    images, questions = torch.randn(2, 5, 2, 3, dtype=torch.float64), torch.tensor([[3, 4], [5, 0]])
    _, (hidden, _) = model.question_encoder(questions)
    if attention:  # of the question to the places, [2, 6, 5]
        places = images.flatten(2).transpose(1, 2)
        image = model.attend(hidden[-1], model.attend.key(places), places, None)[0]
    else:
        image = images.mean((2, 3))
    image, question = model.image_projection(image), model.question_projection(hidden[-1])
    torch.testing.assert_close(model(images, questions), model.classifier(image.tanh() * question.tanh()))


def test_its_layers_are_those_asked_for() -> None:
    assert isinstance(models.VQA(9, 4).cross_entropy, nn.CrossEntropyLoss)
    assert not any(type(m).__module__.startswith("dlkernels.nn") for m in models.VQA(9, 4, layers=torch.nn).modules())
