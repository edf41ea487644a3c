"""LaTeX source of a table: booktabs rules, headers stacked by word, numbers with their interval below.

Needs `\\usepackage{booktabs}` and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LINE_BREAK = r"\\"
MACRO = r"\providecommand{\withinterval}[2]{\begin{tabular}[t]{@{}c@{}}#1\\[-3pt]{\tiny #2}\end{tabular}}"
ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    # A row that starts with one of these would be read as an option of the line break before it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "\n": " ",
    "\r": " ",
} | {character: "\\" + character for character in "&%$#_"}


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(ESCAPES.get(character, character) for character in text)


def with_interval(number: str, interval: str) -> str:
    """A cell of a number over its interval."""
    return rf"\withinterval{{{number}}}{{{interval}}}"


def latex_table(
    caption: str, span: str, header: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str]
) -> str:
    """A floating table; caption, span, header, first column and notes are plain text, other cells are LaTeX."""
    columns = len(header) - 1
    over = [rf"& \multicolumn{{{columns}}}{{c}}{{{escaped(span)}}} \\", rf"\cmidrule(l){{2-{columns + 1}}}"]
    lines = [
        MACRO,
        r"\begin{table}[t]",
        r"\centering\footnotesize\setlength{\tabcolsep}{3.5pt}",
        rf"\caption{{{escaped(caption)}}}",
        rf"\begin{{tabular}}{{@{{}}l{'c' * columns}@{{}}}}",
        r"\toprule",
        *(over if span else ()),
        " & ".join([escaped(header[0]), *(stacked(label) for label in header[1:])]) + r" \\",
        r"\midrule",
        *(" & ".join([escaped(row[0]), *row[1:]]) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        *([rf"\par\smallskip{{\scriptsize {escaped(' '.join(notes))}\par}}"] if notes else ()),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def stacked(label: str) -> str:
    """A header with one word per line."""
    words = [escaped(word) for word in label.split()]
    return rf"\shortstack{{{LINE_BREAK.join(words)}}}" if len(words) > 1 else escaped(label)
