"""Networks of cells: as on torch's layers, genotypes as text, and a search that finds something."""

from __future__ import annotations

import random
import statistics
from types import ModuleType

import pytest
import torch

from dlkernels import data, models, nn
from dlkernels.models import nas

from .cases.learning import accuracy, fit
from .cases.networks import compare_with_torch

# Every operation, in both cells and with both strides.
ALL = nas.Genotype.parse(
    "normal: sep_conv_3x3@0 + sep_conv_5x5@1, dil_conv_3x3@2 + max_pool_3x3@0, avg_pool_3x3@3 + skip_connect@1; "
    "reduction: sep_conv_3x3@0 + sep_conv_5x5@1, dil_conv_3x3@1 + max_pool_3x3@0, avg_pool_3x3@1 + skip_connect@0"
)


def build(layers: ModuleType = nn, genotype: nas.Genotype | str = ALL) -> models.CellNetwork:
    """Four cells of two channels: normal, reduction, reduction, normal."""
    return models.CellNetwork(genotype, channels=2, num_cells=4, in_channels=1, num_classes=5, layers=layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_computes_what_it_computes_on_torchs_layers(dtype: torch.dtype) -> None:
    x = torch.randn(4, 1, 8, 8, dtype=dtype)
    compare_with_torch(build, lambda model: model(x), dtype)


def test_parameter_count_is_that_of_darts() -> None:
    with torch.device("meta"):
        model = models.get_model("cellnetwork")
        assert sum(parameter.numel() for parameter in model.parameters()) == 3_349_342
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_reduction_cells_halve_the_image_and_double_the_channels() -> None:
    model = build()
    shapes: list[tuple[int, ...]] = []
    for cell in model.cells:
        cell.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    model(torch.randn(4, 1, 8, 8))
    assert shapes == [(4, 6, 8, 8), (4, 12, 4, 4), (4, 24, 2, 2), (4, 24, 2, 2)]


@pytest.mark.parametrize("operation", nas.OPERATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_operations_keep_channels_and_divide_the_size_by_their_stride(operation: str, stride: int) -> None:
    module = nas.OPERATIONS[operation](4, stride, nn)
    assert module(torch.randn(2, 4, 8, 7)).shape == ((2, 4, 8, 7) if stride == 1 else (2, 4, 4, 4))


@pytest.mark.parametrize("layers", [nn, torch.nn])
def test_a_reduction_by_two_grids_sees_pixels_of_both(layers: ModuleType) -> None:
    module = nas.FactorizedReduce(1, 2, layers).eval()
    pixels = torch.rand(1, 1, 4, 4) + 0.5
    pixels.requires_grad_()
    module(pixels).sum().backward()
    assert pixels.grad is not None
    assert torch.equal(pixels.grad[0, 0] != 0, torch.eye(2, dtype=torch.bool).repeat(2, 2))


@pytest.mark.parametrize("seed", range(5))
def test_a_genotype_survives_the_round_trip(seed: int) -> None:
    genotype = nas.random_genotype(4, random.Random(seed))
    assert nas.Genotype.parse(str(genotype)) == genotype
    assert hash(nas.Genotype.parse(str(genotype))) == hash(genotype)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("normal: ; reduction: ", "a genotype reads 'normal: ...; reduction: ...', got 'normal: ; reduction: '"),
        ("normal: skip_connect@0; reduction: skip_connect@0", "a node reads 'operation@source [+] operation@source'"),
        (
            "normal: conv@0 + conv@1; reduction: conv@0 + conv@1",
            "operation must be one of sep_conv_3x3, .*, got 'conv'",
        ),
        (
            "normal: skip_connect@0 + skip_connect@2; reduction: skip_connect@0 + skip_connect@1",
            "node 2 of the normal cell must take one from 0 to 1, got skip_connect@2",
        ),
    ],
)
def test_a_text_that_is_no_genotype_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nas.Genotype.parse(text)


def test_a_network_reads_its_genotype() -> None:
    names = [list(build(nn, genotype).state_dict()) for genotype in (ALL, str(ALL))]
    assert names[0] == names[1]


def test_a_cell_without_nodes_is_refused() -> None:
    with pytest.raises(ValueError, match="the reduction cell has no node"):
        nas.Genotype(ALL.normal, ())


def test_too_few_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="num_cells must be at least 3, got 2"):
        models.CellNetwork(num_cells=2)


def edges(genotype: nas.Genotype) -> list[nas.Edge]:
    return [edge for cell in (genotype.normal, genotype.reduction) for node in cell for edge in node]


def test_a_mutation_changes_one_operation_or_one_source() -> None:
    generator = random.Random(0)
    changed = {"operation": 0, "source": 0}
    for _ in range(200):
        child = nas.mutate(ALL, generator)
        ((before, after),) = [pair for pair in zip(edges(ALL), edges(child), strict=True) if pair[0] != pair[1]]
        assert (before.operation == after.operation) != (before.source == after.source)
        changed["operation" if before.operation != after.operation else "source"] += 1
    assert min(changed.values()) > 60


def separable_convolutions(genotype: nas.Genotype) -> float:
    """A score whose best genotypes are known: all 16 edges."""
    return float(sum(edge.operation == "sep_conv_3x3" for edge in edges(genotype)))


@pytest.mark.parametrize("seed", range(3))
def test_evolution_finds_more_than_as_many_random_candidates(seed: int) -> None:
    evolved = nas.search(separable_convolutions, candidates=300, population=20, tournament=5, seed=seed)
    drawn = nas.search(separable_convolutions, candidates=300, population=300, tournament=1, seed=seed)
    assert len(evolved.history) == len(drawn.history) == 300
    assert evolved.history[:20] == drawn.history[:20]  # the first population is random
    assert evolved.best.score > drawn.best.score


def test_the_oldest_candidate_dies_however_good() -> None:
    """With one alive, each candidate is a mutation of the one before, the best included."""
    history = nas.search(separable_convolutions, candidates=30, population=1, tournament=1).history
    for parent, child in zip(history, history[1:]):  # noqa: B905
        differing = [a != b for a, b in zip(edges(parent.genotype), edges(child.genotype), strict=True)]
        assert sum(differing) == 1


@pytest.mark.parametrize(
    "sizes",
    [
        {"candidates": 4, "population": 5, "tournament": 2},
        {"candidates": 4, "population": 3, "tournament": 4},
        {"candidates": 4, "population": 3, "tournament": 0},
    ],
)
def test_a_search_of_impossible_sizes_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="search needs 1 <= tournament <= population <= candidates, got tournament"):
        nas.search(separable_convolutions, **sizes)


def test_a_score_that_is_not_a_number_stops_the_search() -> None:
    with pytest.raises(ValueError, match="evaluate returned nan for normal: "):
        nas.search(lambda genotype: float("nan"), candidates=3, population=2, tournament=1)


def test_a_search_on_digits_finds_cells_that_beat_the_median_and_learn() -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits(0)
    train = digits.train_images[:1000], digits.train_labels[:1000]
    validation = digits.train_images[1000:], digits.train_labels[1000:]
    loss = nn.CrossEntropyLoss()

    def trained(genotype: nas.Genotype, epochs: int) -> models.CellNetwork:
        torch.manual_seed(0)
        model = models.CellNetwork(genotype, channels=4, num_cells=3, in_channels=1)
        fit(
            model.parameters(),
            lambda images, labels: loss(model(images), labels),
            *train,
            epochs=epochs,
            learning_rate=1e-2,
        )
        return model

    def evaluate(genotype: nas.Genotype) -> float:
        return accuracy(trained(genotype, epochs=1), *validation)

    found = nas.search(evaluate, candidates=8, population=4, tournament=2, nodes=2)
    assert len(found.history) == 8
    assert found.best.score > statistics.median(candidate.score for candidate in found.history)
    assert found.best.score == evaluate(nas.Genotype.parse(str(found.best.genotype)))
    assert accuracy(trained(found.best.genotype, epochs=6), digits.test_images, digits.test_labels) >= 0.95
