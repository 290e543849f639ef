"""Two processes share the batches of a plain DataLoader, and resume to the bit."""

import csv
from collections import Counter
from itertools import chain, cycle
from math import ceil

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler
from training.kills import at
from training.rows import TWO, net, plain
from warm import differences, outcome

pytestmark = [pytest.mark.floats, pytest.mark.slow]

RECORD = (*plain("nets.Recorder", "forms.Numbers"), "trainer.max_epochs=2", "callbacks=[last]")
RECORD = tuple(text for text in RECORD if "every_n_train_steps" not in text)


def seen(folder, stage, rank, epoch=0):
    """Batches of a process in an epoch, and what their steps drew."""
    lines = [line.split(";") for line in (folder / f"{stage}-{rank}").read_text().splitlines()]
    lines = [line for line in lines if line[0] == str(epoch)]
    return [eval(line[1]) for line in lines], [line[2:] for line in lines]


@pytest.mark.parametrize(("train", "form"), [(67, "shuffle"), (64, "shuffle"), (9, "shuffle"), (67, "drop_last")])
def test_training_is_padded_as_torch_pads_it(run, tmp_path, train, form):
    run("two", *RECORD, *TWO, "trainer.max_epochs=2", f"+data.train={train}", f"+data.form={form}", two=True)
    epochs = []
    for epoch in range(2):
        (first, drawn), (second, others) = (seen(tmp_path / "two", "train", rank, epoch) for rank in range(2))
        own = ceil(train / 2)
        sizes = [min(8, own - i) for i in range(0, own, 8)]
        sizes = [size for size in sizes if size == 8 or form != "drop_last"]
        assert [len(batch) for batch in first] == [len(batch) for batch in second] == sizes
        counts = Counter(chain(*first, *second))
        if form != "drop_last":
            assert sorted(counts) == list(range(train))
            assert sorted(counts.values(), reverse=True)[: 1 + train % 2] == [2] * (train % 2) + [1]
        assert not set(map(tuple, drawn)) & set(map(tuple, others))
        epochs.append(first)
    assert epochs[0] != epochs[1]


def test_a_sampler_that_shares_by_itself_is_left_alone(run, tmp_path):
    run("two", *RECORD, *TWO, "trainer.max_epochs=2", "+data.form='shares itself'", two=True)
    for rank in range(2):
        for epoch in range(2):
            sampler = DistributedSampler(range(67), 2, rank, seed=5)
            sampler.set_epoch(epoch)
            assert [*chain(*seen(tmp_path / "two", "train", rank, epoch)[0])] == list(sampler)


@pytest.mark.parametrize(("val", "size"), [(31, 8), (32, 8), (5, 1), (33, 16)])
def test_an_evaluation_counts_each_sample_once(run, tmp_path, val, size):
    overrides = (*RECORD, *TWO, "trainer.max_epochs=1", f"+data.val={val}", f"+data.batch_size={size}")
    child, folder = run("two", *overrides, two=True)
    assert child.stdout.count(f"batch_size {size} on each of 2 processes, {2 * size} together\n") == 1
    batches = [seen(tmp_path / "two", "val", rank)[0] for rank in range(2)]
    assert sorted(chain(*batches[0], *batches[1])) == list(range(val))
    assert len(batches[0]) == len(batches[1]) == ceil(val // 2 / size)
    assert max(len(batch) for batch in batches[0]) <= size + 1
    with (folder / "metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["val_loss"])
    x = np.arange(val, dtype=np.float64)
    # Lightning's sums are float32.
    assert float(row["val_loss"]) == pytest.approx(np.square(x).mean(), rel=1e-6)
    assert float(row["val_sum"]) == pytest.approx(x.sum() / 1, rel=1e-6)
    assert float(row["val_acc"]) == pytest.approx(((x % 3 == 0) == (x % 2 == 0)).mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["+data.form='own batches'"], "Buckets makes its batches: give it a sampler of single indices"),
        (["+data.form=endless", "trainer.limit_train_batches=3"], "its sampler has no length"),
        (["+data.val=1"], "the evaluation DataLoader of TensorDataset has 1 samples, too few for 2 processes"),
        (["+data.train=1"], "the train DataLoader of TensorDataset has 1 samples, too few for 2 processes"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(run, arguments, said):
    child, _ = run("two", *RECORD, *TWO, *arguments, two=True, code=1)
    assert said in child.stdout + child.stderr


ROWS = {
    "VAE": plain("modules.VAE"),
    "multi-label": plain("modules.MultiLabel"),
    # In its validation the norms of both processes count, which DDP then does not make equal.
    "norms apart": (*plain("modules.MNISTLit"), *TWO, "+trainer.strategy.broadcast_buffers=false"),
    "draws and state in all hooks": net(),
    "2 workers": net(workers=2),
    "several loaders": net("list"),
    "GAN": (*plain("modules.GAN"), "trainer.limit_val_batches=0"),
    "VAE, sharded": (*plain("modules.VAE"), "trainer=fsdp"),
}
UNUSED = "trainer.strategy.find_unused_parameters=true"  # of a GAN, each optimizer steps a part
KILLS = {"0.1": "1.2", "1.{last}@on_validation_start": "2.0", "0.{last}@on_train_epoch_end": "2.1"}
FIRST = dict(zip(ROWS, cycle(KILLS), strict=False))


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("row", ROWS)
def test_two_processes_resume_to_the_same_bits(run, row):
    first = FIRST[row]
    overrides = ("train", *TWO, *ROWS[row][1:], *([UNUSED] if row == "GAN" else []))
    _, whole = run("whole", *overrides, two=True)
    assert ("strategies.fsdp" in (whole / "config.yaml").read_text()) == ("sharded" in row)
    content = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    last = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] - 1
    run("killed", *overrides, before=at(first.format(last=last)), two=True, code=1)
    run("killed", "train", "resume=latest", before=at(KILLS[first]), two=True, code=1)
    _, found = run("killed", "train", "resume=latest", two=True)
    assert differences(outcome(whole), outcome(found)) == []
