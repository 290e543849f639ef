import zlib
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from boltlab.data.augment import Augment
from boltlab.data.base import DataModule
from boltlab.data.loader import TensorData
from boltlab.ground.errors import DataError
from project.data.digits import Digits
from project.data.tables import Diabetes

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


def test_three_splits_are_disjoint_and_no_seed_moves_test():
    one = Numbers(val_fraction=0.25).three_splits(LABELS, 0.2)
    assert sorted(torch.cat(list(one.values())).tolist()) == list(range(100))
    assert {split: len(indices) for split, indices in one.items()} == {"train": 60, "val": 20, "test": 20}
    for options in ({"split_seed": 1}, {"folds": 4, "fold": 3}, {"folds": 5, "fold": 0, "seed": 9}):
        other = Numbers(val_fraction=0.25, **options).three_splits(LABELS, 0.2)
        assert torch.equal(one["test"], other["test"])
        assert not torch.equal(one["val"], other["val"])


def test_the_ordinary_split_is_the_one_it_always_was():
    def checksums(tensors):
        return [zlib.crc32(tensor.contiguous().numpy().tobytes()) for tensor in tensors]

    data = Numbers(val_fraction=0.25, split_seed=3)
    assert checksums(data.three_splits(LABELS, 0.2).values()) == [729646196, 1003015898, 3852856758]
    assert checksums(data.three_splits(LABELS.float(), 0.2).values()) == [3588797401, 1000672619, 1847445522]
    for data, expected in ((Digits(), [2384423283, 2265570724, 1510307679]),
                           (Diabetes(), [504907710, 3279232836, 637313651])):  # fmt: skip
        assert checksums(data.dataset(split).labels for split in ("train", "val", "test")) == expected


def test_folds_and_a_fixed_part_of_the_training_samples():
    data = [Numbers(folds=5, fold=fold, val_fraction=0.9, max_samples=40, seed=fold) for fold in range(5)]
    parts = [each.train_and_val(LABELS) for each in data]
    assert sorted(torch.cat([val for _, val in parts]).tolist()) == list(range(100))
    for train, val in parts:
        assert torch.bincount(LABELS[train]).tolist() == [24, 12, 4]
        assert not set(train.tolist()) & set(val.tolist())
    whole, _ = Numbers(folds=5, fold=1, max_samples=80).train_and_val(LABELS)
    assert sorted([*whole.tolist(), *parts[1][1].tolist()]) == list(range(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 0}, "data.fold=0 is a part of how many"),
        ({"folds": 5, "fold": 5}, "data.fold=5 is none of the parts of data.folds=5, which are 0 to 4"),
        ({"folds": 11, "fold": 0}, "data.folds=11: samples of class 2 beside the test set: 10, and each fold needs"),
        (
            {"folds": 11, "fold": 0, "class_names": ["ant", "bee", "cow"]},
            "samples of class 'cow' beside the test set: 10,",
        ),
        ({"max_samples": 2}, "data.max_samples=2 is less than one sample of each of the 3 classes"),
    ],
)
def test_a_division_that_cannot_be_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        Numbers(**options).train_and_val(LABELS)


def test_data_that_do_not_divide_refuse_folds_and_max_samples():
    with pytest.raises(DataError, match=r"data.folds=5: the val split of Numbers is not divided by train_and_val\(\)"):
        Numbers(folds=5, fold=0).setup("validate")
    with pytest.raises(DataError, match=r"data.max_samples=3: Numbers has no kept\(\) or train_and_val\(\)"):
        Numbers(max_samples=3).setup("fit")
    data = Numbers(folds=5, fold=0, max_samples=3)
    data.setup("test")  # neither of them is of the test split
    assert len(data.dataset("test")) == 20


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


@pytest.mark.slow
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
    found = dict(DataModule.check_arguments({"folds": 1, "fold": None, "max_samples": 0}))
    assert found == {"folds": "is less than 2 parts", "max_samples": "0 is less than 1"}
    assert DataModule.check_arguments({"folds": 5, "fold": 4, "val_fraction": 0.3, "max_samples": 1}) == []
