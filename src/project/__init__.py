"""This project's nets, data sets and LightningModules; what is trained with them is in configs/."""
