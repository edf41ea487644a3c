"""The verb `report`: a page from run folders."""

from __future__ import annotations

from typing import Annotated

import typer

from rest_rl.cli.options import OutFolder


def report(
    folders: Annotated[list[str], typer.Argument(metavar="DIR", help="run folders")],
    out: OutFolder = None,
    html: Annotated[bool, typer.Option("--html", help="one HTML file; --out may name it")] = False,
    responses: Annotated[
        int, typer.Option(metavar="N", help="with --html: about how many responses, of evenly spaced steps")
    ] = 5000,
) -> None:
    """Write report.md and plots from run folders; runs that differ only in their seed are one curve with its spread.

    With --html it is one file report.html instead: curves, and every recorded response with its tokens in colours; it
    opens from disk and needs no network. Without --out the page of one run goes to its folder, any other to ./report.
    """
    if html:
        from rest_rl.report.html import write_html_report

        print(write_html_report(folders, out, responses))
    else:
        from rest_rl.report.page import write_report

        print(write_report(folders, out))
