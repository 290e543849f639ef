import pickle
import threading

import pytest
import torch

from boltlab.data.augment import Augment
from boltlab.data.images import ImageBatches
from boltlab.data.loader import Batches, Loader, TensorData
from boltlab.data.samplers import EvalSampler, TrainSampler
from boltlab.ground.errors import DataError
from project.data.digits import Digits

pytestmark = pytest.mark.floats


def images(count, *shape):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Pixels:
    """Images as an image folder gives them; `bad` cannot be read."""

    def __init__(self, x, bad=()):
        self.x, self.labels, self.bad, self.threads = x, torch.arange(len(x)), bad, set()

    def __len__(self):
        return len(self.x)

    def pixels(self, index):
        self.threads.add(threading.current_thread().name)
        if index in self.bad:
            raise DataError(f"{index}.jpg: broken")
        return self.x[index].permute(1, 2, 0).numpy()


class Own:
    """A data set of somebody's own, which draws."""

    labels = torch.arange(50)

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return torch.rand(3) + index, index


def loader(source, num_workers=0, max_bad_files=0, batch_size=7, **augment):
    active = Augment(input_shape=(3, 16, 16), **augment) if augment else None
    batches = ImageBatches(source, 0, (3, 16, 16), augment=active)
    return Loader(batches, TrainSampler(len(source), batch_size, 0), max_bad_files, num_workers)


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True)
    )


AUGMENT = {"crop": "padded", "flip_probability": 0.5, "cutout": 4, "degrees": 10}


def test_memory_and_files_give_the_same_batches():
    x = images(50, 3, 16, 16)
    from_memory = list(loader(TensorData(x, torch.arange(50)), **AUGMENT))
    assert [len(a) for a, _ in from_memory] == [7] * 7  # 50 = 7 x 7 + 1
    for workers in (0, 1, 3):
        source = Pixels(x)
        assert same(list(loader(source, workers, **AUGMENT)), from_memory)
        assert all(name.startswith("boltlab-loader") == (workers > 0) for name in source.threads)


@pytest.mark.parametrize("options", [{"crop": "resized"}, {"policy": "trivialaugment", "crop": "padded"}])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_what_has_no_batch_form_gives_the_same_batches_too(options):
    x = images(30, 3, 20, 24) if options["crop"] == "resized" else images(30, 3, 16, 16)
    one = list(loader(TensorData(x, torch.arange(30)), **options))
    assert one[0][0].shape == (7, 3, 16, 16)
    assert same(one, list(loader(Pixels(x), 2, **options)))
    assert same(one, list(loader(Pixels(x), 0, batch_size=7, **options)))


def test_batches_made_at_once_are_the_batches_made_alone(monkeypatch):
    def batches():
        return list(loader(TensorData(images(50, 3, 16, 16), torch.arange(50)), batch_size=4, **AUGMENT))

    at_once = batches()
    monkeypatch.setattr("boltlab.data.loader.CHUNK_BYTES_CPU", 0)
    assert same(at_once, batches())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_data_set_of_ones_own_draws_by_sample():
    runs = [list(Loader(Batches(Own(), 0), TrainSampler(50, 7, 0), num_workers=n)) for n in (0, 2)]
    assert same(*runs)
    x, y = runs[0][0]
    assert ((x - y.unsqueeze(1)) < 1).all()
    again = Loader(Batches(Own(), 0), TrainSampler(50, 7, 0))
    again.sampler.set_epoch(1)
    assert not same(runs[0], list(again))


class Samples:
    """The same as a data set of (image, label), without `pixels`."""

    def __init__(self, x, bad=()):
        self.source, self.labels = Pixels(x, bad), torch.arange(len(x))

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return torch.from_numpy(self.source.pixels(index)).permute(2, 0, 1), self.labels[index]


@pytest.mark.parametrize("source", [Pixels, Samples])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_unreadable_samples_are_skipped_up_to_the_limit(workers, source):
    x = images(20, 3, 16, 16)
    with pytest.warns(UserWarning, match="skipped .* of at most 2.: .*jpg: broken"):
        seen = [y for _, y in loader(source(x, bad={3, 4}), workers, max_bad_files=2, **AUGMENT)]
    assert sorted(torch.cat(seen).tolist()) == sorted(set(range(20)) - {3, 4})
    whole = TensorData(x, torch.arange(20))
    good = {int(i): a for xs, ys in loader(whole, **AUGMENT) for a, i in zip(xs, ys, strict=True)}
    with pytest.warns(UserWarning, match="skipped"):
        batches = list(loader(source(x, bad={3, 4}), workers, max_bad_files=2, **AUGMENT))
    for xs, ys in batches:
        assert all(torch.equal(a, good[int(i)]) for a, i in zip(xs, ys, strict=True))  # draws stay with samples
    with pytest.raises(DataError, match="max_bad_files=N skips"):
        list(loader(source(x, bad={3}), workers))


def test_loader_threads_work_alone_and_the_caller_keeps_its_threads():
    class Asks(Pixels):
        def pixels(self, index):
            seen.add(torch.get_num_threads())
            return super().pixels(index)

    seen = set()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(loader(Asks(images(20, 3, 16, 16)), 2))
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_comes_out_and_the_threads_end():
    class Broken(Pixels):
        def pixels(self, index):
            raise ZeroDivisionError

    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        list(loader(Broken(images(20, 3, 16, 16)), 2))
    left = iter(loader(Pixels(images(200, 3, 16, 16)), 2))
    next(left)
    left.close()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("boltlab-loader")]


@pytest.mark.parametrize("delivered", [0, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_resumes_in_the_middle_of_an_epoch(delivered, workers):
    def make():
        fresh = loader(Pixels(images(50, 3, 16, 16)), workers, **AUGMENT)
        fresh.sampler.set_epoch(2)
        return fresh

    whole, first = list(make()), make()
    batches = iter(first)
    for _ in range(delivered):
        next(batches)
    second = make()
    second.load_state_dict(first.state_dict())
    assert same(list(second), whole[delivered:])
    state = second.state_dict()
    assert (state["epoch"], state["delivered"], state["taken"], state["samples"]) == (2, 7, 7, 50)
    assert same(list(second), whole)  # once
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(3)
    assert len(list(second)) == 7  # another epoch begins at its beginning


def test_batches_travel_to_a_spawned_worker():
    batches = loader(TensorData(images(9, 3, 16, 16), torch.arange(9)), **AUGMENT, policy="trivialaugment").dataset
    key = (3, torch.tensor([1, 2]))
    for mine, theirs in zip(batches[key], pickle.loads(pickle.dumps(batches))[key], strict=True):
        assert mine == theirs if isinstance(mine, list) else torch.equal(mine, theirs)


def test_the_state_is_kept_until_the_first_batch():
    stands = {"epoch": 0, "delivered": 5, "taken": 7}
    resumed = loader(Pixels(images(50, 3, 16, 16)))
    resumed.load_state_dict(stands)
    assert resumed.state_dict() == stands


def test_other_batches_in_mid_epoch_are_refused():
    resumed = loader(Pixels(images(50, 3, 16, 16)), batch_size=8)
    resumed.load_state_dict({"epoch": 0, "delivered": 3, "taken": 7})
    with pytest.raises(DataError, match="the same data.batch_size"):
        next(iter(resumed))


def test_a_data_set_without_pixels_has_no_resized_crop():
    with pytest.raises(DataError, match=r"augment.crop=resized needs Own.pixels"):
        loader(Own(), crop="resized")


def test_a_foreign_sampler_is_refused():
    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        Batches(TensorData(torch.arange(3), torch.arange(3)), seed=0)[3]


def test_evaluation_batches_of_unequal_length():
    data = TensorData(torch.arange(7).float(), torch.arange(7))
    batches = [y.tolist() for _, y in Loader(Batches(data, 0), EvalSampler(7, 3, rank=0, world_size=2))]
    assert batches == [[0, 2, 4, 6]]  # one more than the batch size, so that both processes make one step


def test_in_memory_data_moves_to_the_device_only_where_it_fits(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * (1797 * 784 + 1797 * 8), 0))
    monkeypatch.setattr(TensorData, "to", lambda self, device: moved.append(device) or self)
    data, device = Digits(device_memory_share=0.2), torch.device("cuda")
    source = data.dataset("train")
    assert data._placed("train", source, device) is source
    assert not moved
    data = Digits(device_memory_share=0.9)
    data._placed("train", data.dataset("train"), device)
    data._placed("train", data.dataset("train"), device)
    assert moved == [device]


def test_a_gpu_gives_the_pixels_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = images(50, 3, 16, 16)
    here = list(loader(TensorData(x, torch.arange(50)), crop="padded", flip_probability=0.5, cutout=4))
    there = list(loader(TensorData(x, torch.arange(50)).to("cuda"), crop="padded", flip_probability=0.5, cutout=4))
    assert all(x.is_cuda and y.is_cuda for x, y in there)
    assert same(here, [(x.cpu(), y.cpu()) for x, y in there])
