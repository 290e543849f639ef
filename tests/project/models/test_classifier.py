import json
import os
import socket
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, top_k_accuracy_score
from torch import nn
from waiting import HANG

from boltlab.ground.errors import UserError
from project.models.classifier import Classifier

pytestmark = pytest.mark.floats

SGD = partial(torch.optim.SGD, lr=0.1)


def samples(count=21, classes=7):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (count,), generator=generator)
    y[:classes] = torch.arange(classes)
    return torch.randn(count, classes, generator=generator) + F.one_hot(y, classes), y


def test_epoch_metrics_equal_scikit_learn_with_uneven_batches(data, trainer):
    x, y = samples()
    y[y == 3] = 2  # one class is absent
    trainer = trainer()
    values = trainer.validate(Classifier(nn.Identity(), SGD, 7), datamodule=data(x, y), verbose=False)[0]
    predicted = x.argmax(1)
    present = sorted(set(y.tolist()) | set(predicted.tolist()))
    average = {"average": "macro", "labels": present, "zero_division": 0}
    assert values == pytest.approx(
        {
            "val_loss": F.cross_entropy(x, y).item(),
            "val_acc": accuracy_score(y, predicted),
            "val_top5": top_k_accuracy_score(y, x, k=5, labels=range(7)),
            "val_f1": f1_score(y, predicted, **average),
            "val_precision": precision_score(y, predicted, **average),
            "val_recall": recall_score(y, predicted, **average),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("classes", [5, 7])
def test_logged_metrics_names_exactly_what_a_run_logs(data, trainer, classes):
    x, y = samples(classes=classes)
    model = Classifier(nn.Linear(classes, classes), SGD, classes)
    trainer = trainer(log_every_n_steps=1)
    trainer.fit(model, datamodule=data(x, y))
    logged = set(trainer.callback_metrics)
    trainer.test(model, datamodule=data(x, y), verbose=False)
    logged |= set(trainer.callback_metrics)
    assert logged == set(Classifier.logged_metrics({"num_classes": classes}))
    assert ("val_top5" in logged) == (classes > 5)


def test_train_metrics_are_those_of_the_outputs_seen_in_training(data, trainer):
    x, y = samples()
    model = Classifier(nn.Linear(7, 7), partial(torch.optim.SGD, lr=0.0), 7)
    with torch.no_grad():
        output = model(x)
    trainer = trainer(max_epochs=2)
    trainer.fit(model, datamodule=data(x, y))
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(F.cross_entropy(output, y).item(), abs=1e-6)
    assert trainer.callback_metrics["train_acc"].item() == pytest.approx(accuracy_score(y, output.argmax(1)))


@pytest.mark.slow
def test_two_processes_log_the_metrics_of_all_samples(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, sys, warnings
            from functools import partial
            import lightning as L, torch
            from torch import nn
            from torch.utils.data import DataLoader, TensorDataset
            from project.models.classifier import Classifier

            rank = int(os.environ["RANK"])
            x, y = torch.load(sys.argv[1])
            shard = slice(0, 9) if rank == 0 else slice(9, None)  # batches of 4+4+1 and 4+4+4
            loader = DataLoader(TensorDataset(x[shard], y[shard]), batch_size=4)
            trainer = L.Trainer(accelerator="cpu", strategy="ddp", devices=2, logger=False, enable_progress_bar=False,
                                max_epochs=1, enable_checkpointing=False, enable_model_summary=False,
                                use_distributed_sampler=False)
            weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
            model = Classifier(nn.Linear(7, 7), partial(torch.optim.SGD, lr=0.0), 7, class_weights=weights)
            nn.init.eye_(model.net.weight), nn.init.zeros_(model.net.bias)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.fit(model, loader, loader)
            assert not [w for w in caught if "sync_dist" in str(w.message)], caught
            values = {k: v.item() for k, v in trainer.callback_metrics.items()}
            json.dump(values, open(f"{sys.argv[1]}.{rank}", "w"))
            """
        )
    )
    x, y = samples()
    torch.save((x, y), tmp_path / "samples")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "samples"],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=HANG)
        assert process.returncode == 0, errors
    ranks = [json.loads((tmp_path / f"samples.{rank}").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    weights = torch.arange(1.0, 8)
    for split in ("train", "val"):
        assert ranks[0][f"{split}_acc"] == pytest.approx(accuracy_score(y, x.argmax(1)))
        assert ranks[0][f"{split}_loss"] == pytest.approx(F.cross_entropy(x, y, weight=weights).item(), abs=1e-6)
    assert ranks[0]["val_f1"] == pytest.approx(f1_score(y, x.argmax(1), average="macro"))


def test_balanced_weights_come_from_the_train_split_and_travel_with_the_checkpoint(data, trainer):
    x, y = samples()
    model = Classifier(nn.Linear(7, 7), SGD, 7, class_weights="balanced")
    trainer().fit(model, datamodule=data(x, y))
    expected = len(y) / (7 * torch.bincount(y))
    assert torch.allclose(model.class_weights, expected)
    loaded = Classifier(nn.Linear(7, 7), SGD, 7, class_weights="balanced")
    loaded.load_state_dict(model.state_dict())
    assert torch.allclose(loaded.class_weights, expected)
    output = model(x)
    assert torch.allclose(loaded.criterion(output, y)[0], F.cross_entropy(output, y, weight=expected))


def test_balanced_weights_need_every_class(data, trainer):
    x, y = samples()
    y[y == 3] = 2
    with pytest.raises(UserError, match=r"no sample of the classes \[3\]"):
        trainer().fit(Classifier(nn.Linear(7, 7), SGD, 7, class_weights="balanced"), datamodule=data(x, y))


def test_class_weights_must_fit_the_classes():
    with pytest.raises(ValueError, match="2 numbers for 7 classes"):
        Classifier(nn.Identity(), SGD, 7, class_weights=[1.0, 2.0])
    problem = [("class_weights", "has 2 numbers for 7 classes")]
    assert Classifier.check_arguments({"num_classes": 7, "class_weights": [1, 2]}) == problem
    assert Classifier.check_arguments({"num_classes": 2, "class_weights": [1, 2]}) == []


def test_label_smoothing_reaches_the_loss():
    x, y = samples()
    model = Classifier(nn.Identity(), SGD, 7, label_smoothing=0.2)
    assert torch.equal(model.criterion(x, y)[0], F.cross_entropy(x, y, label_smoothing=0.2))


def test_steps_give_output_and_target_and_prediction_gives_probabilities(data, trainer):
    x, y = samples()
    seen = []

    class Look(Callback):
        def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append(outputs)

    model = Classifier(nn.Identity(), SGD, 7)
    trainer(callbacks=[Look()]).test(model, datamodule=data(x, y), verbose=False)
    assert torch.equal(torch.cat([s["output"] for s in seen]), x)
    assert torch.equal(torch.cat([s["target"] for s in seen]), y)
    probabilities = trainer().predict(model, datamodule=data(x, y))
    assert torch.equal(torch.cat(probabilities), x.softmax(1))
    assert torch.equal(model.predict_step(x), x.softmax(1))
