from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from boltlab.data.augment import Augment
from boltlab.data.base import DataModule, split_off, three_splits
from boltlab.data.digits import Digits
from boltlab.data.loader import TensorData
from boltlab.errors import DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning asks torch's pytree so
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),  # Python 3.12 and later
]
LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


@dataclass(kw_only=True, eq=False, repr=False)
class Numbers(DataModule):
    """x is the sample's index."""

    size: int = 20
    max_bad_files: int = 0

    def load(self, split):
        return TensorData(torch.arange(self.size).float().unsqueeze(1), torch.arange(self.size) % 2)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, _ = batch
        self.seen.append((self.current_epoch, x.clone()))
        return self.weight * x.float().mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(("val", batch[0].clone()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, **options):
    model = Recorder()
    defaults = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                "enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False,
                "num_sanity_val_steps": 0}  # fmt: skip
    Trainer(**{**defaults, **options}).fit(model, datamodule=data)
    return model.seen


def augmented_digits(**options):
    return Digits(augment=Augment(input_shape=(1, 28, 28), crop="padded", policy="trivialaugment"), **options)


def test_split_off_is_stratified_exact_and_repeatable():
    rest, chosen = split_off(LABELS, 0.15, seed=0)
    assert torch.bincount(LABELS[chosen]).tolist() in ([9, 5, 1], [9, 4, 2])
    assert sorted([*rest.tolist(), *chosen.tolist()]) == list(range(100))
    assert torch.equal(chosen, split_off(LABELS, 15, seed=0)[1])
    assert not torch.equal(chosen, split_off(LABELS, 15, seed=1)[1])


def test_split_off_keeps_a_sample_of_every_class():
    rest, chosen = split_off(torch.tensor([0] * 20 + [1, 2]), 0.9, seed=0)
    assert rest.tolist()[-2:] == [20, 21]
    assert len(chosen) == 18


def test_split_off_of_a_regression_is_random():
    _, chosen = split_off(torch.arange(100).float(), 0.3, seed=0)
    assert len(chosen) == 30
    assert chosen.tolist() != list(range(30))


@pytest.mark.parametrize("size", [0, 100, 200, 0.001, 0.999])
def test_split_off_refuses_an_empty_part(size):
    with pytest.raises(DataError, match="both parts need at least one"):
        split_off(LABELS, size, seed=0)


def test_three_splits_are_disjoint_and_no_seed_moves_test():
    one, other = three_splits(LABELS, 0.2, 0.25, split_seed=0), three_splits(LABELS, 0.2, 0.25, split_seed=1)
    assert sorted(torch.cat(list(one.values())).tolist()) == list(range(100))
    assert {split: len(indices) for split, indices in one.items()} == {"train": 60, "val": 20, "test": 20}
    assert torch.equal(one["test"], other["test"])
    assert not torch.equal(one["val"], other["val"])


def test_lightning_sets_the_epoch_and_the_tail_is_kept():
    seen = fit(Numbers(batch_size=8))
    epochs = [torch.cat([x for epoch, x in seen if epoch == number]).flatten().tolist() for number in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert torch.cat([x for epoch, x in seen if epoch == "val"])[:20].flatten().tolist() == list(range(20))


def test_overfit_batches_repeats_the_same_batch():
    seen = [x for epoch, x in fit(Numbers(batch_size=8), overfit_batches=1, max_epochs=3) if epoch != "val"]
    assert len(seen) == 3
    assert all(x.flatten().tolist() == list(range(8)) for x in seen)


@pytest.mark.filterwarnings("ignore:.*Consider setting `persistent_workers:UserWarning")
def test_workers_change_nothing_and_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    runs = [fit(augmented_digits(num_workers=n, batch_size=256), limit_val_batches=1) for n in (0, 0, 2)]
    assert torch.equal(before, torch.get_rng_state())
    for other in runs[1:]:
        assert [epoch for epoch, _ in runs[0]] == [epoch for epoch, _ in other]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(runs[0], other, strict=True))


def test_augmentation_follows_seed_epoch_and_sample_alone():
    data, other = augmented_digits(), augmented_digits(seed=1)
    one, _ = data.samples("train", [5, 7], augment=True)
    torch.rand(10)
    again, _ = data.samples("train", [9, 7, 5], augment=True)
    assert torch.equal(one[0], again[2])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one, data.samples("train", [5, 7], augment=True, epoch=1)[0])
    assert not torch.equal(one, other.samples("train", [5, 7], augment=True)[0])
    assert torch.equal(data.samples("train", [5])[0][0], data.dataset("train").x[5])


def test_two_processes_split_batch_and_samples(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    loaded = {"train": [], "val": []}
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        data = Numbers(batch_size=8, size=21)
        for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
            batches = [x.flatten().tolist() for x, _ in loader]
            assert max(map(len, batches)) == 4
            loaded[split] += [index for batch in batches for index in batch]
    assert sorted(loaded["train"]) == list(range(21))
    assert sorted(loaded["val"]) == list(range(21))
    with pytest.raises(DataError, match="batch_size=7 cannot be divided over 2 processes"):
        Numbers(batch_size=7).train_dataloader()


def test_automatic_workers(monkeypatch):
    monkeypatch.setattr("boltlab.data.base.MIN_SAMPLES_FOR_WORKERS", 100)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert augmented_digits().train_dataloader().num_workers == 16
    assert augmented_digits().val_dataloader().num_workers == 0
    assert augmented_digits(num_workers=3).train_dataloader().num_workers == 3
    assert augmented_digits(num_workers=3).val_dataloader().num_workers == 0  # whole batches need none
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert augmented_digits().train_dataloader().num_workers == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert augmented_digits().train_dataloader().num_workers == 0  # two cores: workers would only take the trainer's


def test_an_augmentation_without_a_batch_form_is_named_once(capsys):
    data = augmented_digits(num_workers=2)
    data.train_dataloader()
    data.train_dataloader()
    data.val_dataloader()
    said = "TrivialAugmentWide has no batch form: images are augmented one by one, in 2 processes\n"
    assert capsys.readouterr().out == said
    Digits(augment=Augment(input_shape=(1, 28, 28), crop="padded")).train_dataloader()
    assert capsys.readouterr().out == ""


def test_the_test_split_can_be_another():
    data = Digits()
    data.test_split = "val"
    assert len(data.test_dataloader().dataset) == len(data.dataset("val"))


def test_check_arguments():
    found = DataModule.check_arguments({"val_fraction": 1.5, "test_fraction": 0, "batch_size": 0, "num_workers": -1})
    assert [name for name, _ in found] == ["val_fraction", "test_fraction", "batch_size", "num_workers"]
    assert DataModule.check_arguments({"val_fraction": 0.1, "test_fraction": 5, "num_workers": "auto"}) == []
