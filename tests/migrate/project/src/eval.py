import hydra


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval.yaml")
def main(cfg):
    data, model = hydra.utils.instantiate(cfg.data), hydra.utils.instantiate(cfg.model)
    hydra.utils.instantiate(cfg.trainer).test(model, datamodule=data, ckpt_path=cfg.ckpt_path)


if __name__ == "__main__":
    main()
