"""Writes houses.csv: 200 made-up houses without a header row: rooms, area in m², year built, price in thousands."""

import random
from pathlib import Path


def houses(number: int = 200, seed: int = 0) -> str:
    draw = random.Random(seed)
    lines = []
    for _ in range(number):
        rooms = draw.choice([2, 3, 3, 4, 4, 5, 6])
        area = round(max(25.0, 24 * rooms + draw.gauss(0, 12)), 1)
        year = draw.randint(1920, 2024)
        price = 20 + 9 * rooms + 2.4 * area + 0.9 * (year - 1920) + draw.gauss(0, 18)
        lines.append(f"{rooms},{area},{year},{price:.1f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("houses.csv").write_text(houses(), encoding="utf-8", newline="\n")
