#!/usr/bin/env python3
"""Runs commands on a pseudo-terminal and draws what they print as an SVG, for the README.

    tools/terminal_svg.py -o docs/demo.svg ./run

Understands line ends, carriage returns, "erase to the end of the line" and the SGR codes for bold and
the eight colours; nothing else is needed for what this project prints."""
import argparse
import html
import os
import pathlib
import pty
import re
import select
import sys

COLOURS = {30: "#6e7681", 31: "#ff7b72", 32: "#7ee787", 33: "#e3b341",
           34: "#79c0ff", 35: "#d2a8ff", 36: "#76e3ea", 37: "#e6edf3"}
FOREGROUND, BACKGROUND, BAR = "#e6edf3", "#0d1117", "#161b22"
CELL_W, CELL_H, FONT, PAD, HEAD = 8.0, 18, 13.3, 16, 34
ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


def record(command: str) -> tuple[str, int]:
    """What `command` writes to a terminal, and its exit status."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="110", LINES="50")
        os.execvp("/bin/bash", ["bash", "-c", command])
    data = b""
    while True:
        select.select([fd], [], [])
        try:
            part = os.read(fd, 65536)
        except OSError:
            break
        if not part:
            break
        data += part
    return data.decode("utf-8", "replace"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def screen(text: str) -> list[list[tuple[str, str]]]:
    """Lines of (character, style); a style is an SVG attribute string."""
    lines: list[list[tuple[str, str]]] = [[]]
    at, colour, bold, column = 0, None, False, 0

    def style() -> str:
        return (f' fill="{colour}"' if colour else "") + (' font-weight="bold"' if bold else "")

    while at < len(text):
        match = ESCAPE.match(text, at)
        if match:
            at = match.end()
            if match.group(2) == "K":
                del lines[-1][column:]
            elif match.group(2) == "m":
                for code in (int(c or 0) for c in match.group(1).split(";")):
                    if code == 0:
                        colour, bold = None, False
                    elif code == 1:
                        bold = True
                    elif code in COLOURS:
                        colour = COLOURS[code]
            continue
        char = text[at]
        at += 1
        if char == "\n":
            lines.append([])
            column = 0
        elif char == "\r":
            column = 0
        elif char >= " ":
            line = lines[-1]
            line.extend([(" ", "")] * (column - len(line)))
            line[column:column + 1] = [(char, style())]
            column += 1
    return lines if lines[-1] else lines[:-1]


def draw(lines: list[list[tuple[str, str]]], title: str) -> str:
    columns = max(len(line) for line in lines)
    width = round(2 * PAD + columns * CELL_W)
    height = HEAD + 2 * PAD + len(lines) * CELL_H
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
           f'viewBox="0 0 {width} {height}" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" '
           f'font-size="{FONT}">',
           f"<title>{html.escape(title)}</title>",
           f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}"/>',
           f'<path d="M0 {HEAD}V8a8 8 0 0 1 8-8H{width - 8}a8 8 0 0 1 8 8V{HEAD}z" fill="{BAR}"/>']
    out += [f'<circle cx="{18 + 20 * i}" cy="{HEAD // 2}" r="6" fill="{c}"/>'
            for i, c in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))]
    for row, line in enumerate(lines):
        y = HEAD + PAD + row * CELL_H + 13
        start = 0
        while start < len(line):
            end = start
            while end < len(line) and line[end][1] == line[start][1]:
                end += 1
            run = "".join(char for char, _ in line[start:end])
            style = line[start][1] + ("" if " fill=" in line[start][1] else f' fill="{FOREGROUND}"')
            # One element per stretch without a wide gap, each stretched to its cells: the columns stay
            # straight in whatever font the reader has.
            for part in re.finditer(r"\S+(?: \S+)*", run):
                out.append(f'<text x="{PAD + (start + part.start()) * CELL_W:g}" y="{y}"'
                           f' textLength="{len(part.group()) * CELL_W:g}"{style}>'
                           f"{html.escape(part.group())}</text>")
            start = end
    return "\n".join(out + ["</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True)
    parser.add_argument("command", nargs="+", help="a command line; each is shown after a prompt")
    args = parser.parse_args()
    lines: list[list[tuple[str, str]]] = []
    for command in args.command:
        text, status = record(command)
        if status != 0:
            sys.stderr.write(text)
            print(f"error: '{command}' ended with {status}", file=sys.stderr)
            return 1
        lines += ([[]] if lines else []) + screen(f"\x1b[32m$\x1b[0m \x1b[1m{command}\x1b[0m\n") + screen(text)
    svg = draw(lines, "; ".join(args.command))
    args.output.write_text(svg, encoding="utf-8")
    print(f"{args.output}: {len(lines)} lines, {len(svg.encode())} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
