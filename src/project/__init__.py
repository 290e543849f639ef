"""The project: its nets, data sets and LightningModules. Its configs are in configs/."""
