#!/usr/bin/env bash
# The runs behind the README's results table; mean and deviation are taken over the seeds.
# MNIST is downloaded; CIFAR10 and PHOTOS are folders of the form train/<class>/, test/<class>/.
set -euo pipefail
boltlab train -m experiment=digits_quickstart seed=1,2,3 logger=csv
boltlab train -m experiment=mnist_mlp,mnist_mlp_plain_sgd,mnist_lenet seed=1,2,3 logger=csv
boltlab train -m experiment=cifar10_net data=small_folder data.root="$CIFAR10" seed=1,2,3 logger=csv
boltlab train -m experiment=image_folder_cnn data.root="$PHOTOS" precision=bf16-mixed seed=1,2,3 logger=csv
boltlab train -m experiment=dense_64,linear_regression seed=1,2,3 logger=csv
