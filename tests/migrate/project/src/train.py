import hydra
from lightning import seed_everything

from src.utils import instantiate_all


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    if cfg.get("seed"):
        seed_everything(cfg.seed, workers=True)
    data, model = hydra.utils.instantiate(cfg.data), hydra.utils.instantiate(cfg.model)
    callbacks, logger = instantiate_all(cfg.get("callbacks")), instantiate_all(cfg.get("logger"))
    trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=logger)
    if cfg.get("train"):
        trainer.fit(model, datamodule=data, ckpt_path=cfg.get("ckpt_path"))
    if cfg.get("test"):
        trainer.test(model, datamodule=data, ckpt_path=trainer.checkpoint_callback.best_model_path or None)
    return trainer.callback_metrics.get(cfg.get("optimized_metric"))


if __name__ == "__main__":
    main()
