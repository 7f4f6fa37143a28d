"""The network as it is served: raw images in, probabilities out."""

import torch
from torch import Tensor, nn

from cnn.networks.wrappers import Normalise


class ServedClassifier(nn.Module):
    """A trained network that includes normalisation and softmax, so training and serving cannot differ.

    It contains `network` itself, not a copy, and sets it to evaluation mode, on the CPU, without gradients.

    Args:
        network: maps normalised float32 N×C×H×W to logits N×classes.
        mean, std: per channel, on the scale 0 … 1; see `normalisation` there.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.network = network
        self.cpu().eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps raw images uint8 N×C×H×W to probabilities float32 N×classes; each row has the sum 1."""
        return torch.softmax(self.network(self.normalise(images)).float(), dim=1)
