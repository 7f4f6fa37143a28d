"""Configuration of training: all values that change the weights, apart from the data."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, WithJsonSchema, field_validator, model_validator

from cnn.config.base import Config
from cnn.config.networks import find_network

IMAGENET = "imagenet"
"""The value of `pretrained` that stands for published weights."""

RESOLVE_OPTIONS = "resolve_options"
"""Key of pydantic's context for a function that checks and completes the options of a network of one's own. Without it
they are taken as they are: a record of a training must be readable where the network's module is not."""


class AugmentConfig(Config):
    """Random changes of training batches (`augment.*`), made on whole batches, on the device."""

    flip: bool = True
    """Mirror left-right with probability one half. Off for the catalogue's digits and letters, unless set."""

    shift: int = Field(2, ge=0, le=64)
    """Shift by up to this many pixels in each direction; new pixels at the edge are black."""

    cutout: int = Field(0, ge=0, le=256)
    """Blank a square of this side, in pixels, at a random place; 0 is off."""

    crop_area: float = Field(1.0, gt=0, le=1)
    """Smallest share of the image's area in a random crop, which is resized to `crop_size`; 1 is no random crop. The
    share is uniform between this and 1."""

    crop_aspect: float = Field(4 / 3, ge=1, le=10)
    """Largest ratio of a random crop's sides, either way."""

    crop_size: int | None = Field(None, ge=1, le=4096)
    """Height and width of training images, in pixels, for networks that take any size; evaluation and serving use the
    whole image. Choose `crop_area` such that objects have about as many pixels as in whole images. Unset: the image
    size."""

    rotation: float = Field(0.0, ge=0, le=180)
    """Turn by up to this many degrees, either way; what lies outside the image is black. 0 is off."""

    brightness: float = Field(0.0, ge=0, le=1)
    """Multiply the brightness by a factor within 1 ± this; 0 is off."""

    contrast: float = Field(0.0, ge=0, le=1)
    """Multiply the contrast by a factor within 1 ± this; 0 is off."""

    saturation: float = Field(0.0, ge=0, le=1)
    """Multiply the saturation of colours by a factor within 1 ± this; 0 is off. For colour images only."""

    hue: float = Field(0.0, ge=0, le=0.5)
    """Turn the hue by up to this share of the circle of colours, either way; 0 is off. For colour images only."""

    erase: float = Field(0.0, ge=0, le=1)
    """Probability of blanking a random box of 2 to 33 % of the image; 0 is off."""

    policy: Literal["none", "trivial"] = "none"
    """`trivial` is TrivialAugment (wide): per image one of 14 changes of geometry or colour, at random strength."""

    mixup: float = Field(0.0, ge=0, le=100)
    """Blend each image and its label with another of its lane; alpha of the Beta distribution of the share. 0 is off.
    With `cutmix` also on, each lane of a batch picks mixup or cutmix with equal probability."""

    cutmix: float = Field(0.0, ge=0, le=100)
    """Paste a box of another image of its lane into each image, and blend the labels by area; alpha of the Beta
    distribution of the share. 0 is off."""

    @property
    def is_off(self) -> bool:
        """Whether the network gets all training images as they are."""
        return self == AugmentConfig(flip=False, shift=0)


class FinetuneConfig(Config):
    """Training of a network that has learned before (`finetune.*`). A stage is a part of the network, such as `layer3`
    or `blocks.5`; the head is its last layer, linear or a convolution, the body all before the head."""

    freeze: str = Field("none", coerce_numbers_to_str=True)
    """What is not trained: `none`, `body`, or all layers up to and including the stage of this name; a wrong name lists
    those of the network. Frozen batch norms keep their statistics, and frozen layers cost no backward pass. Without
    `pretrained` the frozen layers keep random weights, which only helps to measure what the trained part does. If only
    the head is ever trained (`body`, and `freeze_epochs` unset), on images that do not change (no `augment.*`, no
    `test_flip`), the body's output is computed once per image, unless it takes more than 1 GiB."""

    freeze_epochs: int | None = Field(None, ge=1)
    """Epochs for which `freeze` holds; then everything is trained. Unset: to the end."""

    head_lr: float = Field(1.0, gt=0, le=1000)
    """Learning rate of the head, as a multiple of `lr`. New classes need a new head, which has more to learn."""

    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each stage's learning rate, as a multiple of that of the stage after it; the last stage's is a multiple of `lr`.
    Below 1, early stages, which know edges and textures, change less than late ones."""

    batch_norm: Literal["train", "frozen"] = "train"
    """Statistics by which all batch norms normalise in training: `train`, those of a lane's images, as usual; `frozen`,
    those that came with the weights, and stay. On few images per lane these are better estimates."""


class TrainConfig(Config):
    """Configuration of training. Equal configurations on one dataset version give equal weights, bit for bit."""

    model: str = "convoy9"
    """The network: `notes` (the classic teaching network), `convoy9` (deeper, with batch norm), `efficientnet_lite0`
    (for photographs), one of torchvision's, for example `resnet18`, of timm's, for example `timm/resnet18d`, or your
    own: `package.module:NAME`, a class or function in the working folder."""

    # The keys depend on the network, so a form for all networks cannot list them.
    network: Annotated[SerializeAsAny[Config], WithJsonSchema({"type": "object"})] = Config()
    """Options of the network, for example `network.dropout=0.2`; `convoy config --model NAME` lists them."""

    pretrained: str | None = None
    """Weights to start from instead of new random ones. `imagenet`: those that the publisher of the network has
    trained on ImageNet. Or a file of the same network's weights, local or s3://: safetensors, or PyTorch's .pth, .pt
    or .bin."""

    pretrained_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of those weights as a safetensors file; the flow sets it, so that the run's manifest records the initial
    weights."""

    pretrained_mean: tuple[float, ...] | None = Field(None, min_length=1)
    """Mean of the images that those weights were trained on, per channel, from 0 to 1: images are normalised with it.
    With `pretrained=imagenet` the flow sets it, unless you do. Unset with other weights: the training split's."""

    pretrained_std: tuple[float, ...] | None = Field(None, min_length=1)
    """Standard deviation of those images, per channel, on the same scale."""

    epochs: int = Field(9, ge=1, le=100_000)
    """Passes over the training split."""

    batch_size: int = Field(256, ge=1)
    """Images per global batch, over all ranks; a multiple of `lanes`."""

    lanes: int = Field(4, ge=1, le=1024)
    """Equal parts of a batch, a power of two. Ranks share the lanes; the result depends on lanes, not on ranks."""

    shuffle_window: int | None = Field(None, ge=1)
    """Images that are mixed at a time, over all lanes. Unset: the training split, or 4 GiB of it if its shards take
    more than 64 GiB. With a window smaller than the split each machine reads only its part of the split."""

    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """How images are drawn: `shuffled`, each once per epoch, or `balanced`, each class equally often, and the images of
    a class in turn, so that those of small classes come several times per epoch. Both have the same number of steps per
    epoch."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds the initial weights, the order of the images, augmentation and dropout."""

    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    """`sgd` uses Nesterov momentum; `adam` adds L2 to the gradient; `adamw` decouples the weight decay; `muon`, which
    does so too, makes the step of each matrix and kernel orthogonal, and needs fewer steps: try lr=0.1 and
    weight_decay=0.02."""

    lr: float = Field(0.2, gt=0, le=100)
    """Peak learning rate."""

    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD and Muon; Adam's first beta."""

    weight_decay: float = Field(5e-4, ge=0, le=1)
    """Weight decay of matrices and kernels; norms and biases have none."""

    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    """Learning rate over the steps: `one-cycle` warms up and anneals linearly, `cosine` anneals along a cosine."""

    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of all steps over which the learning rate rises to its peak; `constant` has no such rise."""

    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target probability spread evenly over all classes."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its share of the training split."""

    clip_norm: float = Field(0.0, ge=0)
    """Largest norm of a step's gradient; a larger gradient is scaled down to it. 0 is off."""

    precision: Literal["float32", "bfloat16", "tf32"] = "float32"
    """`bfloat16` runs the network under autocast, and Muon's products; weights, sums and losses stay float32. `tf32`
    lets a GPU round the factors of products to 10 bits of mantissa; on a CPU it is float32. Evaluation is always in
    float32."""

    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, which is validated and kept in place of the weights. 0 is off."""

    validate_every: int = Field(1, ge=1)
    """Epochs from one validation to the next; the last epoch is always validated."""

    select: Literal["last", "best"] = "last"
    """Which weights to keep: of the last epoch, or of the epoch with the best validation accuracy."""

    early_stopping: int = Field(0, ge=0)
    """Stop after this many epochs in a row without a better validation accuracy. 0 is off."""

    test_flip: bool = False
    """Average the logits of each image and its mirror image in all predictions."""

    augment: AugmentConfig = AugmentConfig()

    finetune: FinetuneConfig = FinetuneConfig()

    @field_validator("model")
    @classmethod
    def _known_model(cls, model: str) -> str:
        find_network(model)
        return model

    @field_validator("network", mode="wrap")
    @classmethod
    def _options_of_the_model(cls, options: Any, _: Any, info: ValidationInfo) -> Config:
        if "model" not in info.data:  # the model was refused before
            return Config()
        values = options.model_dump(exclude_unset=True) if isinstance(options, Config) else options
        if resolve := (info.context or {}).get(RESOLVE_OPTIONS):
            values = resolve(values)
        return find_network(info.data["model"]).options.model_validate(values)

    @model_validator(mode="after")
    def _weights_can_be_found(self) -> "TrainConfig":
        if self.pretrained == IMAGENET and not find_network(self.model).arguments:
            raise ValueError(
                f"pretrained={IMAGENET}: nobody has published such weights of {self.model}; choose a network of "
                "torchvision or timm, for example efficientnet_lite0, or give a file of weights"
            )
        if (self.pretrained_mean is None) != (self.pretrained_std is None):
            raise ValueError("pretrained_mean and pretrained_std need each other")
        if not all(0 <= mean <= 1 for mean in self.pretrained_mean or ()):
            raise ValueError("pretrained_mean: give a number from 0 (black) to 1 (white) per channel")
        if not all(0 < std <= 1 for std in self.pretrained_std or ()):
            raise ValueError("pretrained_std: give a positive number up to 1 per channel")
        return self

    @model_validator(mode="after")
    def _balanced_once(self) -> "TrainConfig":
        if self.sampling == self.class_weights == "balanced":
            raise ValueError("sampling=balanced and class_weights=balanced would balance the classes twice; choose one")
        return self

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
