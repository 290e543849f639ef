from PIL import Image


def test_show_draws_a_grid_and_counts_the_classes(boltlab):
    code, out, err = boltlab("show", "data=digits", "count=8", "output=pictures/grid.png", "augment=basic")
    assert code == 0, err
    with Image.open("pictures/grid.png") as picture:
        assert min(picture.size) > 100 and len(set(picture.convert("L").tobytes())) > 50
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    counts = {row[0]: [int(cell) for cell in row[1:]] for row in rows if row[1].isdigit()}
    assert sum(counts.pop("all")) == 1797 and len(counts) == 10
    assert sum(sum(row) for row in counts.values()) == 1797


def test_show_refuses_tables(boltlab):
    code, _, err = boltlab("show", "data=diabetes")
    assert code == 1 and "draws images" in err
