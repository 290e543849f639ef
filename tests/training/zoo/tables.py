"""The data of the kinds in `modules`, in plain DataLoaders."""

import lightning as L
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Plain(L.LightningDataModule):
    """`data(count, seed)` is a dataset; a train loader that shuffles and one that does not."""

    collate = None

    def __init__(self, batch_size: int = 8, num_workers: int = 0, samples: int = 52):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage):
        self.splits = {"train": self.data(self.hparams.samples, 0), "val": self.data(20, 1)}

    def _loader(self, split):
        h = self.hparams
        how = {"shuffle": split == "train", "num_workers": h.num_workers, "collate_fn": self.collate}
        return DataLoader(self.splits[split], h.batch_size, **how)

    def train_dataloader(self):
        return self._loader("train")

    def val_dataloader(self):
        return self._loader("val")

    test_dataloader = val_dataloader


class Table(Plain):
    def data(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 6, generator=g)
        weights = torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
        return TensorDataset(x, (x @ weights > 0.3).float())


class Drawn(Dataset):
    """Of each sample a new view at each time."""

    def __init__(self, count, seed):
        self.x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)


class Views(Plain):
    class data(Drawn):
        def __getitem__(self, index):
            return [self.x[index] + 0.1 * torch.randn(6) for _ in range(2)]


class Shapes(Plain):
    class data(Drawn):
        """A square on noise, mirrored by chance; batches are dicts."""

        def __getitem__(self, index):
            g = torch.Generator().manual_seed(index)
            image, mask = 0.3 * torch.rand(3, 8, 8, generator=g), torch.zeros(8, 8, dtype=torch.long)
            y, x = (int(v) for v in torch.randint(0, 5, (2,), generator=g))
            image[0, y : y + 3, x : x + 3] += 0.6
            mask[y : y + 3, x : x + 3] = 1 + index % 2
            if torch.rand(()) < 0.5:
                image, mask = image.flip(-1), mask.flip(-1)
            return {"image": image, "mask": mask}


class Text(Plain):
    class data(Drawn):
        def __getitem__(self, index):
            return (torch.arange(7) * (1 + index % 3) + index) % 11


class Sequences(Plain):
    class data(Drawn):
        def __getitem__(self, index):
            g = torch.Generator().manual_seed(index)
            tokens = torch.randint(1, 20, (int(torch.randint(3, 9, (), generator=g)),), generator=g)
            return tokens, int(tokens.argmax()) * 3 // len(tokens)

    @staticmethod
    def collate(items):
        tokens, labels = zip(*items, strict=True)
        return pad_sequence(tokens, batch_first=True), torch.tensor([len(t) for t in tokens]), torch.tensor(labels)


class Boxes(Plain):
    class data(Drawn):
        def __getitem__(self, index):
            g = torch.Generator().manual_seed(index)
            image = torch.rand(1, 8, 8, generator=g) + 0.1 * torch.rand(1, 8, 8)
            return image, {"boxes": torch.rand((index % 3) * (index > 9), 4, generator=g)}

    @staticmethod
    def collate(items):
        images, targets = zip(*items, strict=True)
        return list(images), list(targets)


class Series(Plain):
    class data(Drawn):
        def __getitem__(self, index):
            wave = torch.sin(torch.arange(index, index + 9) / 5.0)[:, None]
            return {"past": wave[:8] + 0.05 * torch.randn(8, 1), "next": wave[8]}


class Classes(Plain):
    """For a module of the engine."""

    class data(Drawn):
        def __getitem__(self, index):
            return self.x[index] + 0.1 * torch.randn(6), int(self.x[index].argmax())

    def __init__(self, input_shape: list, num_classes: int, **arguments):
        super().__init__(**arguments)
        self.input_shape, self.num_classes = input_shape, num_classes
        self.class_names = [str(i) for i in range(num_classes)]
