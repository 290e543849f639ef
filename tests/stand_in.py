"""Data that is at hand in place of a download, of the shape that each shipped recipe's net is made for."""

import numpy as np
from PIL import Image

STAND_IN = {
    "mnist_mlp": ["data=digits"],
    "mnist_mlp_plain_sgd": ["data=digits"],
    "mnist_lenet": ["data=digits"],
    "cifar10_net": ["data=small_folder", "data.root=images"],
    "cifar10_fast": ["data=small_folder", "data.root=images", "data.batch_size=2", "compile=false"],
    "image_folder_cnn": ["data.root=images", "data.batch_size=2"],
}
SHORT = ["logger=csv", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "trainer.limit_train_batches=3"]


def make_images(folder):
    """folder/images/<split>/<class>/<number>.jpg"""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = draw.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{i}.jpg")
