"""A picture of a real run in a terminal: runs a command in a pseudo-terminal and writes its last screen as SVG.

    uv run --with pyte scripts/terminal_picture.py docs/terminal.svg boltlab train

pyte, a terminal emulator, is not in the lock: it plays back what progress bars overwrite. Linux and macOS only.
"""

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text


def main() -> int:
    """Records one command; its exit code is ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--first-line", type=int, default=0, help="leave out what stands above this line")
    parser.add_argument("--lines", type=int, default=60, help="at most so many lines")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()

    screen = pyte.Screen(arguments.columns, 500)
    stream = pyte.ByteStream(screen)
    code = record(arguments.command, arguments.columns, stream)

    rows = [styled_row(screen, row) for row in range(screen.lines)]
    while rows and not rows[-1].plain.strip():
        rows.pop()
    rows = rows[arguments.first_line :][: arguments.lines]
    prompt = Text.assemble(("$ ", "bold green"), " ".join(arguments.command))
    console = Console(record=True, width=arguments.columns, file=io.StringIO(), force_terminal=True)
    for row in [prompt, *rows]:
        console.print(row, no_wrap=True, overflow="crop", highlight=False)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title="boltlab")
    # No font from the network: a README shows pictures without one, and textLength keeps the columns straight.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    arguments.picture.write_text(svg, encoding="utf-8")
    print(
        f"{arguments.picture}: {len(rows) + 1} lines, {arguments.picture.stat().st_size / 1000:.0f} kB", file=sys.stderr
    )
    return code


def record(command: list[str], columns: int, stream: pyte.ByteStream) -> int:
    """Runs the command in a pseudo-terminal, passing its output on as it comes; returns its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(columns), "COLORTERM": "truecolor"}
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux says "input/output error" when the command has ended
            break
        if not piece:
            break
        stream.feed(piece)
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def styled_row(screen: pyte.Screen, row: int) -> Text:
    """One line of the emulated screen with its colours."""
    text = Text()
    cells = [screen.buffer[row][column] for column in range(screen.columns)]
    for style, run in groupby(cells, style_of):
        text.append("".join(cell.data for cell in run), style or None)
    text.rstrip()
    return text


def style_of(cell: pyte.screens.Char) -> str:
    """What rich calls a cell's colours and weight."""
    names = {"bold": cell.bold, "italic": cell.italics, "underline": cell.underscore, "reverse": cell.reverse}
    style = [name for name, is_on in names.items() if is_on]
    style += [colour(cell.fg)] * (cell.fg != "default") + [f"on {colour(cell.bg)}"] * (cell.bg != "default")
    return " ".join(style)


def colour(name: str) -> str:
    """pyte's colour as rich writes it: hexadecimal digits, or a name such as `brightred` or `brown`."""
    if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name.lower()):
        return f"#{name}"
    return name.replace("brown", "yellow").replace("bright", "bright_")


if __name__ == "__main__":
    sys.exit(main())
