"""Configuration of preprocessing and training: every value that changes the weights, validated on creation.

Importing this module loads pydantic only, so that a command line can refuse a mistake before torch is loaded.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)


class Config(BaseModel):
    """Base of all configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


Encoding = Literal["raw", "jpeg", "webp"]


class PreprocessConfig(Config):
    """How source images become a dataset version (`data.*`)."""

    image_size: int | None = Field(None, ge=1, le=4096)
    """Height and width in pixels. Unset: the size that all images share, else the median shorter side, at most 128."""

    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB. Unset: 1 if every image is grey, else 3."""

    val_fraction: float = Field(0.1, gt=0, lt=0.5)
    """Share of the training images held out for validation, where the source brings no validation split."""

    test_fraction: float = Field(0.15, gt=0, lt=0.5)
    """Share of all images held out for the test, where the source brings no test split."""

    split_seed: int = Field(0, ge=0, lt=2**32)
    """Chooses another random split; an image's split depends on this and on its own content only."""

    max_unreadable: float = Field(0.01, ge=0, le=1)
    """Share of images that may be unreadable (named and left out) before preprocessing fails."""

    limit: int | None = Field(None, ge=1)
    """For a trial run: keep at most this many images of each split, spread evenly over the source."""

    encoding: Encoding = "raw"
    """How packed images are stored: as pixels, which are read fastest, or compressed with losses. webp: colour only."""

    quality: int = Field(90, ge=1, le=100)
    """Of jpeg and webp; higher is larger and truer."""

    shard_bytes: ByteSize | None = Field(None, ge=1)
    """Size of a full shard, such as 8MiB. Unset: 64MiB; 8MiB if the pixels of all images take more than 64GiB."""

    keep_raw: bool | None = None
    """Copy the source's files into the bucket; no: a folder is read where it lies, twice.
    Unset: yes, but for a folder of more than 50 000 files or 16 GiB."""


class NotesOptions(Config):
    """Options of `notes`, the classic teaching network (`network.*`)."""

    channels: tuple[int, ...] = (32, 64)
    """Output channels (filters) of each convolution; as many convolutions as entries."""

    kernel_sizes: tuple[int, ...] = (3,)
    """Kernel size of each convolution, in pixels; one entry serves all."""

    strides: tuple[int, ...] = (1,)
    """Stride of each convolution, in pixels; one entry serves all."""

    pool_size: int = Field(2, ge=1)
    """Window of the max pooling after each convolution, in pixels; 1 is no pooling."""

    pool_stride: int = Field(2, ge=1)
    """Stride of the max pooling, in pixels."""

    hidden: tuple[int, ...] = (128,)
    """Sizes of the fully connected layers before the last one; may be empty."""

    dropout: float = Field(0.25, ge=0, lt=1)
    """Probability of dropping a value before each fully connected layer."""

    @model_validator(mode="after")
    def _one_entry_a_layer(self) -> "NotesOptions":
        for key in ("channels", "kernel_sizes", "strides", "hidden"):
            if any(value < 1 for value in getattr(self, key)):
                raise ValueError(f"{key} must be positive")
        if not self.channels:
            raise ValueError("channels needs at least one entry")
        for key in ("kernel_sizes", "strides"):
            if len(getattr(self, key)) not in (1, len(self.channels)):
                raise ValueError(f"{key} needs one entry, or one for each of the {len(self.channels)} convolutions")
        return self


class Convoy9Options(Config):
    """Options of `convoy9`, eight convolutions with batch norm and a linear layer (`network.*`)."""

    width: int = Field(32, ge=4, le=512, multiple_of=4)
    """Filters of the first convolution; later stages have two, four and eight times as many."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping a feature before the linear layer."""


class TorchvisionOptions(Config):
    """Options of torchvision's networks (`network.*`)."""

    stem: Literal["auto", "small", "original"] = "auto"
    """`original` shrinks the image at once; `small` starts with a 3×3 convolution of stride 1, and a ResNet then does
    not pool either; `auto` is `small` for images under 64 pixels."""


TORCHVISION_NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "convnext_tiny",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
)
"""Names of networks that torchvision defines, as `torchvision.models.get_model` takes them."""

NETWORK_OPTIONS: Mapping[str, type[Config]] = MappingProxyType(
    {"notes": NotesOptions, "convoy9": Convoy9Options, **dict.fromkeys(TORCHVISION_NETWORKS, TorchvisionOptions)}
)
"""The networks by name, each with the model of its options."""


class AugmentConfig(Config):
    """Random changes to each training batch (`augment.*`), made on whole batches, on the device."""

    flip: bool = True
    """Mirror left-right with probability one half. Off for the catalogue's digits and letters, unless set."""

    shift: int = Field(2, ge=0, le=64)
    """Shift by up to this many pixels in each direction; what comes in is black."""

    cutout: int = Field(0, ge=0, le=256)
    """Blank a square of this side, in pixels, at a random place; 0 is off."""

    mixup: float = Field(0.0, ge=0, le=100)
    """Blend each image and its label with another of its lane; alpha of the Beta distribution of the share. 0 is off.
    With `cutmix` on too, each lane of each batch takes one or the other, with equal chance."""

    cutmix: float = Field(0.0, ge=0, le=100)
    """Paste a box of another image of its lane into each image, and blend the labels by area; alpha of the Beta
    distribution of the share. 0 is off."""


class TrainConfig(Config):
    """How a network is trained. Two equal configurations on one dataset version give equal weights, bit for bit."""

    model: str = "convoy9"
    """The network: `notes` (the classic teaching network), `convoy9` (deeper, with batch norm), or one of
    torchvision's, for example `resnet18`."""

    # Its keys depend on the network, which a form for all of them cannot know.
    network: Annotated[SerializeAsAny[Config], WithJsonSchema({"type": "object"})] = Config()
    """Options of the network, for example `network.dropout=0.2`; `convoy config --model NAME` lists them."""

    pretrained: str | None = None
    """Safetensors file of the same network, local or s3://, to start from instead of fresh weights."""

    pretrained_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of that file; filled in by the flow, so that the run's manifest says what it began from."""

    epochs: int = Field(9, ge=1, le=100_000)
    """Passes over the training split."""

    batch_size: int = Field(256, ge=1)
    """Images in a global batch, over all ranks; a multiple of `lanes`."""

    lanes: int = Field(4, ge=1, le=1024)
    """Equal parts of a batch, a power of two; ranks share them out, and the result depends on lanes, not on ranks."""

    shuffle_window: int | None = Field(None, ge=1)
    """Images that are mixed at a time, over all lanes. Unset, or at least the training split's: all of them; but unset
    with more than 64 GiB of shards, 4 GiB worth. With a window each machine reads its own part of the split only."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds the initial weights, the order of the images, augmentation and dropout."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """`sgd` has Nesterov momentum; `adam` adds L2 to the gradient; `adamw` decouples the weight decay."""

    lr: float = Field(0.2, gt=0, le=100)
    """Peak learning rate."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum; Adam's first beta."""

    weight_decay: float = Field(5e-4, ge=0, le=1)
    """Weight decay of weight matrices and kernels; norms and biases have none."""

    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    """Learning rate over the steps: `one-cycle` warms up and anneals linearly, `cosine` anneals along a cosine."""

    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of all steps over which the learning rate rises to its peak."""

    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target probability spread evenly over all classes."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its share of the training split."""

    clip_norm: float = Field(0.0, ge=0)
    """Largest norm of a step's gradient; a larger one is scaled down to it. 0 is off."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` runs the network under autocast; weights, sums and losses stay float32."""

    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is then validated and kept in their place. 0 is off."""

    select: Literal["last", "best"] = "last"
    """Which weights to keep: of the last epoch, or of the one with the best validation accuracy."""

    early_stopping: int = Field(0, ge=0)
    """Stop after this many epochs in a row without a better validation accuracy. 0 is off."""

    test_flip: bool = False
    """Average the logits of each image and its mirror image, wherever the network predicts."""

    augment: AugmentConfig = AugmentConfig()

    @field_validator("model")
    @classmethod
    def _known_model(cls, model: str) -> str:
        if model not in NETWORK_OPTIONS:
            near = difflib.get_close_matches(model, NETWORK_OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(NETWORK_OPTIONS)}"
            raise ValueError(f"unknown network {model!r}; {hint}")
        return model

    @field_validator("network", mode="wrap")
    @classmethod
    def _options_of_the_model(cls, options: Any, _: Any, info: ValidationInfo) -> Config:
        if "model" not in info.data:  # refused already; there is nothing to check against
            return Config()
        values = options.model_dump(exclude_unset=True) if isinstance(options, Config) else options
        return NETWORK_OPTIONS[info.data["model"]].model_validate(values)

    @model_validator(mode="after")
    def _lanes_divide_batch(self) -> "TrainConfig":
        if self.lanes & (self.lanes - 1):
            lower = 1 << (self.lanes.bit_length() - 1)
            raise ValueError(f"lanes must be a power of two; the nearest are {lower} and {lower * 2}")
        if self.batch_size and (self.batch_size % self.lanes or self.batch_size < 2 * self.lanes):
            raise ValueError(
                f"batch_size must be a multiple of lanes ({self.lanes}) with at least two images a lane; "
                f"the nearest is {max(2, round(self.batch_size / self.lanes)) * self.lanes}"
            )
        return self


Level = Literal["off", "warn", "fail"]


class DataGateConfig(Config):
    """What data must be like to be trained on (`data_gate.*`): for each check a level and a limit.

    `warn` puts a remark into the report, `fail` refuses the data, `off` does neither.
    """

    class_images: Level = "warn"
    min_class_images: int = Field(10, ge=0)
    """Training images that every class has at least."""

    imbalance: Level = "warn"
    max_imbalance: float = Field(10.0, ge=1)
    """Training images of the largest class for each one of the smallest."""

    duplicates: Level = "warn"
    max_duplicates: float = Field(0.02, ge=0, le=1)
    """Share of a split's images that equal an earlier one of the split, pixel for pixel."""

    conflicts: Level = "warn"
    max_conflicts: float = Field(0.001, ge=0, le=1)
    """Share of all images that equal one with another label."""

    leakage: Level = "fail"
    max_leakage: float = Field(0.01, ge=0, le=1)
    """Share of the validation images that are training images too, or of the test images that are either."""

    trained_on: Level = "warn"
    max_trained_on: float = Field(0.01, ge=0, le=1)
    """Share of the test images that are in the champion's training split and not in this version's, since the split,
    the fractions or the seed changed. Above it, `warm_start` is refused, unless the check is off."""

    test_images: Level = "warn"
    min_test_images: int = Field(100, ge=0)
    """Test images: N of them can show no loss below 3 / N. A `gate.margin` of your own may need more."""

    unreadable: Level = "warn"
    max_unreadable: float = Field(0.0, ge=0, le=1)
    """Share of the source's images that could not be decoded (`data.max_unreadable` stops preprocessing)."""

    left_out: Level = "warn"
    max_left_out: float = Field(0.5, ge=0, le=1)
    """Share of a class folder's files that were left out: not named like images, or broken links."""

    constant: Level = "fail"
    max_constant: float = Field(0.01, ge=0, le=1)
    """Share of images of one colour."""

    blank: Level = "warn"
    max_blank: float = Field(0.01, ge=0, le=1)
    """Share of images, the constant ones apart, whose contrast is at most `blank_contrast`."""

    blank_contrast: int = Field(8, ge=1, le=255)
    """Grey levels between the darkest and the brightest pixel of a channel."""

    size_ratio: Level = "warn"
    max_size_ratio: float = Field(4.0, ge=1)
    """Largest width or height in the source for one pixel of the smallest."""

    other_modes: Level = "warn"
    max_other_modes: float = Field(0.1, ge=0, le=1)
    """Share of the source's images that have not the commonest mode (grey, RGB, palette, ...)."""

    missing_classes: Level = "fail"
    max_missing_classes: int = Field(0, ge=0)
    """Classes that the champion knows and the data lack."""

    new_classes: Level = "warn"
    max_new_classes: int = Field(0, ge=0)
    """Classes that the champion does not know."""

    class_drift: Level = "warn"
    max_class_drift: float = Field(0.25, ge=0)
    """PSI between the classes' shares of the champion's training split and of this one."""

    pixel_drift: Level = "warn"
    max_pixel_drift: float = Field(0.25, ge=0)
    """Likewise for pixel values, in 16 bins; the largest PSI of a channel."""

    slow_class_drift: Level = "warn"
    max_slow_class_drift: float = Field(0.25, ge=0)
    """`class_drift` against the data of the oldest champion that a rollback can reach: many small drifts add up."""

    slow_pixel_drift: Level = "warn"
    max_slow_pixel_drift: float = Field(0.25, ge=0)
    """Likewise for pixel values."""
