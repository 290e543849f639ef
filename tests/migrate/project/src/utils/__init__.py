import hydra


def instantiate_all(group):
    return [hydra.utils.instantiate(node) for node in (group or {}).values() if "_target_" in node]
