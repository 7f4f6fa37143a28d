"""A plain timm loop that fine-tunes a network on a folder of photographs: photos_program.py FOLDER WEIGHTS SETTINGS.

It is what an expert writes by hand: one process with a thread per core, a DataLoader whose workers decode and augment
photographs one by one with torchvision's transforms, AdamW. Epochs, sizes, learning rates and the moving average are
those of the settings (JSON: `config`, a TrainConfig, and `image_size` of the test). Prints one line of JSON: images/s
of the steps, and the class that it predicts for each photograph of the test folder.
"""

import copy
import json
import os
import sys
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from cnn.config.training import TrainConfig
from cnn.training.schedule import average_decay, learning_rate

WORKERS = 2
MEAN_STD = (0.5, 0.5, 0.5)  # of the weights of EfficientNet-Lite0


def main() -> None:
    folder, weights, text = sys.argv[1:]
    settings = json.loads(text)
    config, size = TrainConfig.model_validate(settings["config"]), settings["image_size"]
    torch.manual_seed(config.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    train = ImageFolder(str(Path(folder, "train")), _training_transform(config))
    network = _network(weights, len(train.classes))
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(_groups(network, config))
    loader = DataLoader(train, config.batch_size, shuffle=True, num_workers=WORKERS, drop_last=True)
    total = config.epochs * len(loader)
    step, seconds = 0, 0.0
    for _ in range(config.epochs):
        _train_mode(network, config)
        began = time.perf_counter()
        for images, labels in loader:
            rate = learning_rate(config, step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            logits = network(images.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            _move(average, network, average_decay(config, step))
            step += 1
        seconds += time.perf_counter() - began
    rate = total * config.batch_size / seconds
    print(json.dumps({"images_per_second": rate, "predictions": _predict(average, folder, size, train.classes)}))


def _training_transform(config: TrainConfig) -> v2.Transform:
    augment = config.augment
    ratio = augment.crop_aspect
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(augment.crop_size, (augment.crop_area, 1), (1 / ratio, ratio)),
            v2.RandomHorizontalFlip(0.5 if augment.flip else 0.0),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN_STD, MEAN_STD),
        ]
    )


def _network(weights: str, classes: int) -> nn.Module:
    network: nn.Module = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(load_file(weights))
    network.reset_classifier(classes)  # type: ignore[operator]
    return network.to(memory_format=torch.channels_last)


def _groups(network: nn.Module, config: TrainConfig) -> list[dict[str, object]]:
    return [
        {
            "params": [parameter],
            "weight_decay": config.weight_decay if parameter.ndim > 1 else 0.0,
            "scale": config.finetune.head_lr if name.startswith("classifier") else 1.0,
        }
        for name, parameter in network.named_parameters()
    ]


def _train_mode(network: nn.Module, config: TrainConfig) -> None:
    network.train()
    if config.finetune.batch_norm == "frozen":
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


@torch.no_grad()
def _move(average: nn.Module, network: nn.Module, decay: float) -> None:
    for ours, theirs in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.lerp_(theirs, 1 - decay)


@torch.no_grad()
def _predict(network: nn.Module, folder: str, size: int, classes: list[str]) -> dict[str, str]:
    steps = [v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    test = ImageFolder(str(Path(folder, "test")), v2.Compose([*steps, v2.Normalize(MEAN_STD, MEAN_STD)]))
    network.eval()
    chosen: list[Tensor] = [network(images).argmax(1) for images, _ in DataLoader(test, 50, num_workers=WORKERS)]
    names = [str(Path(path).relative_to(Path(folder, "test"))) for path, _ in test.samples]
    return dict(zip(names, (classes[index] for index in torch.cat(chosen)), strict=True))


if __name__ == "__main__":
    main()
