"""The module that is served."""

import torch
from torch import nn

from cnn.config.training import TrainConfig
from cnn.networks.build import build_network
from cnn.networks.wrappers import Normalise
from cnn.serving.classifier import ServedClassifier

MEAN, STD = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)


def network(model: str) -> nn.Module:
    torch.manual_seed(0)
    built = build_network(TrainConfig(model=model), channels=3, image_size=16, classes=5)
    return built.train()  # as a training leaves it: dropout and batch statistics on


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_raw_images_give_the_probabilities_of_the_normalised_network() -> None:
    trained = network("convoy9")
    served = ServedClassifier(trained, MEAN, STD)
    with torch.inference_mode():
        expected = trained(Normalise(MEAN, STD)(images(7))).softmax(1)
        probabilities = served(images(7))
    assert probabilities.dtype == torch.float32
    assert torch.equal(probabilities, expected)
    assert torch.allclose(probabilities.sum(1), torch.ones(7))


def test_normalisation_is_that_of_the_training_split() -> None:
    served = ServedClassifier(nn.Flatten(), MEAN, STD)
    pixel = torch.tensor([51, 102, 153], dtype=torch.uint8).view(1, 3, 1, 1)  # 0.2, 0.4, 0.6: the mean itself
    brighter = torch.tensor([255, 102, 153], dtype=torch.uint8).view(1, 3, 1, 1)  # eight deviations above in red
    with torch.inference_mode():
        assert torch.allclose(served(pixel), torch.full((1, 3), 1 / 3), atol=1e-6)
        assert torch.allclose(served(brighter), torch.tensor([[8.0, 0.0, 0.0]]).softmax(1), atol=1e-6)


def test_dropout_is_off() -> None:
    served = ServedClassifier(network("notes"), MEAN, STD)
    assert torch.equal(served(images(3)), served(images(3)))


def test_export_takes_any_number_of_images() -> None:
    served = ServedClassifier(network("convoy9"), MEAN, STD)
    shapes = [{0: torch.export.Dim.AUTO}]
    exported = torch.export.export(served, (images(2),), dynamic_shapes=shapes).module()
    with torch.inference_mode():
        whole = served(images(64))
        for count in (1, 3, 64):
            assert torch.allclose(exported(images(64)[:count]), whole[:count], atol=1e-6)
