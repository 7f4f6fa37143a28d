"""A stranger's use of a registered model, whose address is all it knows; tasks/verify.py runs it.

    python -P consume.py MODEL_URI IMAGES PREDICTIONS SIZE...

IMAGES and PREDICTIONS are safetensors files. For each SIZE, that many of the first `images` go in as one
batch, and its predictions are stored under that number. It knows nothing of Convoy, like any model server.
"""

import sys

import mlflow.pyfunc
from safetensors.numpy import load_file, save_file


def main() -> None:
    uri, images_file, predictions_file, *sizes = sys.argv[1:]
    images = load_file(images_file)["images"]
    model = mlflow.pyfunc.load_model(uri)
    save_file({size: model.predict(images[: int(size)]) for size in sizes}, predictions_file)


if __name__ == "__main__":
    main()
