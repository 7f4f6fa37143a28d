"""The default network."""

from torch import Tensor, nn

from cnn.config.networks import Convoy9Options


class Convoy9(nn.Module):
    """Eight convolutions with batch norm, two residual stages, global max pooling and a linear layer.

    The design is the nine-layer residual network of Page, "How to train your ResNet" (2018), with earlier pooling: on a
    CPU, full-resolution layers take the most time for the least accuracy. Works for images of any size: a single pixel
    is not pooled further.
    """

    def __init__(self, options: Convoy9Options, *, channels: int, image_size: int, classes: int) -> None:
        super().__init__()
        width, stem = options.width, options.stem_width or options.width
        pool = [image_size >> stage >= 2 for stage in range(3)]
        self.stem = _conv(channels, stem, kernel=options.stem_kernel, pool=pool[0])
        self.stage1 = nn.Sequential(_conv(stem, 2 * width, pool=pool[1]), _Residual(2 * width))
        self.stage2 = nn.Sequential(_conv(2 * width, 4 * width, pool=pool[2]), _Residual(4 * width))
        self.head = _conv(4 * width, 4 * width)
        self.dropout = nn.Dropout(options.dropout)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised float images N×C×H×W to logits N×classes."""
        maps: Tensor = self.head(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.linear(self.dropout(maps.amax(dim=(2, 3))))
        return logits


def _conv(inputs: int, outputs: int, *, kernel: int = 3, pool: bool = False) -> nn.Sequential:
    """Builds a convolution, 2×2 max pooling if `pool`, batch norm and ReLU."""
    pooling = [nn.MaxPool2d(2)] if pool else []
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=1, bias=False)
    return nn.Sequential(convolution, *pooling, nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Module):
    """Two convolutions, whose output is added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.body(maps)  # type: ignore[no-any-return]
