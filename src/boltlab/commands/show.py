"""`boltlab show`: what the model gets to see, as a picture, and the class counts of every split."""

from pathlib import Path

from boltlab.config import build, compose
from boltlab.errors import UserError


def main(overrides: list[str]) -> int:
    """Writes a labelled grid of images (PNG) and prints how many samples of each class every split has."""
    config = compose("show", overrides).config
    from rich.console import Console
    from rich.table import Table

    from boltlab.data.grid import count_classes, draw_grid

    data = build(config, "data")
    if len(data.input_shape) != 3:
        raise UserError(f"boltlab show draws images; samples of this data have the shape {list(data.input_shape)}")
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(data, split=config.split, count=config.count, path=output)
    counts = count_classes(data)
    table = Table("class", *counts)
    for index, name in enumerate(data.class_names):
        table.add_row(str(name), *(str(int(split[index])) for split in counts.values()))
    table.add_section()
    table.add_row("all", *(str(int(split.sum())) for split in counts.values()))
    Console().print(table)
    print(f"picture  {output}")
    return 0
