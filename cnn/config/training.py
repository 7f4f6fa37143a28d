"""Configuration of training: all values that change the weights, apart from the data."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, WithJsonSchema, field_validator, model_validator

from cnn.config.base import Config
from cnn.config.networks import NETWORKS


class AugmentConfig(Config):
    """Random changes of training batches (`augment.*`), made on whole batches, on the device."""

    flip: bool = True
    """Mirror left-right with probability one half. Off for the catalogue's digits and letters, unless set."""

    shift: int = Field(2, ge=0, le=64)
    """Shift by up to this many pixels in each direction; new pixels at the edge are black."""

    cutout: int = Field(0, ge=0, le=256)
    """Blank a square of this side, in pixels, at a random place; 0 is off."""

    mixup: float = Field(0.0, ge=0, le=100)
    """Blend each image and its label with another of its lane; alpha of the Beta distribution of the share. 0 is off.
    With `cutmix` also on, each lane of a batch picks mixup or cutmix with equal probability."""

    cutmix: float = Field(0.0, ge=0, le=100)
    """Paste a box of another image of its lane into each image, and blend the labels by area; alpha of the Beta
    distribution of the share. 0 is off."""


class TrainConfig(Config):
    """Configuration of training. Equal configurations on one dataset version give equal weights, bit for bit."""

    model: str = "convoy9"
    """The network: `notes` (the classic teaching network), `convoy9` (deeper, with batch norm), or one of
    torchvision's, for example `resnet18`."""

    # The keys depend on the network, so a form for all networks cannot list them.
    network: Annotated[SerializeAsAny[Config], WithJsonSchema({"type": "object"})] = Config()
    """Options of the network, for example `network.dropout=0.2`; `convoy config --model NAME` lists them."""

    pretrained: str | None = None
    """Safetensors file of the same network, local or s3://, to start from instead of new random weights."""

    pretrained_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of that file; the flow sets it, so that the run's manifest records the initial weights."""

    epochs: int = Field(9, ge=1, le=100_000)
    """Passes over the training split."""

    batch_size: int = Field(256, ge=1)
    """Images per global batch, over all ranks; a multiple of `lanes`."""

    lanes: int = Field(4, ge=1, le=1024)
    """Equal parts of a batch, a power of two. Ranks share the lanes; the result depends on lanes, not on ranks."""

    shuffle_window: int | None = Field(None, ge=1)
    """Images that are mixed at a time, over all lanes. Unset: the training split, or 4 GiB of it if its shards take
    more than 64 GiB. With a window smaller than the split each machine reads only its part of the split."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds the initial weights, the order of the images, augmentation and dropout."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """`sgd` uses Nesterov momentum; `adam` adds L2 to the gradient; `adamw` decouples the weight decay."""

    lr: float = Field(0.2, gt=0, le=100)
    """Peak learning rate."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum; Adam's first beta."""

    weight_decay: float = Field(5e-4, ge=0, le=1)
    """Weight decay of matrices and kernels; norms and biases have none."""

    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    """Learning rate over the steps: `one-cycle` warms up and anneals linearly, `cosine` anneals along a cosine."""

    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of all steps over which the learning rate rises to its peak."""

    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target probability spread evenly over all classes."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its share of the training split."""

    clip_norm: float = Field(0.0, ge=0)
    """Largest norm of a step's gradient; a larger gradient is scaled down to it. 0 is off."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` runs the network under autocast; weights, sums and losses stay float32."""

    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is validated and kept in place of the weights. 0 is off."""

    select: Literal["last", "best"] = "last"
    """Which weights to keep: of the last epoch, or of the epoch with the best validation accuracy."""

    early_stopping: int = Field(0, ge=0)
    """Stop after this many epochs in a row without a better validation accuracy. 0 is off."""

    test_flip: bool = False
    """Average the logits of each image and its mirror image in all predictions."""

    augment: AugmentConfig = AugmentConfig()

    @field_validator("model")
    @classmethod
    def _known_model(cls, model: str) -> str:
        if model not in NETWORKS:
            near = difflib.get_close_matches(model, NETWORKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(NETWORKS)}"
            raise ValueError(f"unknown network {model!r}; {hint}")
        return model

    @field_validator("network", mode="wrap")
    @classmethod
    def _options_of_the_model(cls, options: Any, _: Any, info: ValidationInfo) -> Config:
        if "model" not in info.data:  # the model was refused before
            return Config()
        values = options.model_dump(exclude_unset=True) if isinstance(options, Config) else options
        return NETWORKS[info.data["model"]].options.model_validate(values)

    @model_validator(mode="after")
    def _lanes_divide_batch(self) -> "TrainConfig":
        if self.lanes & (self.lanes - 1):
            lower = 1 << (self.lanes.bit_length() - 1)
            raise ValueError(f"lanes must be a power of two; the nearest are {lower} and {lower * 2}")
        if self.batch_size and (self.batch_size % self.lanes or self.batch_size < 2 * self.lanes):
            raise ValueError(
                f"batch_size must be a multiple of lanes ({self.lanes}) with at least two images per lane; "
                f"the nearest is {max(2, round(self.batch_size / self.lanes)) * self.lanes}"
            )
        return self
