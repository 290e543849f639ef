import pytest
from torch.utils.data import DataLoader, IterableDataset

from boltlab.training.probe import _one


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(5))


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize(
    ("datasets", "samples"), [((range(40), range(64)), 64), ((range(7),), 7), ((range(40), Endless()), None)]
)
def test_several_loaders_have_the_samples_of_the_longest(datasets, samples, kind):
    """Not as many as they have batches: no batch size is tried that is larger than that."""
    loaders = [DataLoader(dataset, batch_size=4) for dataset in datasets]
    dataset = _one(loaders if kind is list else dict(enumerate(loaders))).dataset
    assert (len(dataset) if samples else dataset) == samples
