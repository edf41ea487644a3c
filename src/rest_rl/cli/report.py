"""The command `report`: summarize run folders."""

from __future__ import annotations

from typing import Annotated

import typer

from rest_rl.cli.options import OutFolder


def report(
    folders: Annotated[list[str], typer.Argument(metavar="DIR", help="run folders")],
    out: OutFolder = None,
    html: Annotated[bool, typer.Option("--html", help="write one HTML file; --out can name it")] = False,
    responses: Annotated[
        int,
        typer.Option(metavar="N", help="with --html: about how many responses to include, from evenly spaced steps"),
    ] = 5000,
) -> None:
    """Summarize run folders in report.md with plots.

    Runs that differ only in their seed share one curve, with the spread over seeds. With --html, the report is a single
    file, report.html, with the curves and the recorded responses, whose tokens are colored by region. It needs no
    network. Without --out, the report of one run goes to its folder, and any other to ./report.
    """
    if html:
        from rest_rl.report.html import write_html_report

        print(write_html_report(folders, out, responses))
    else:
        from rest_rl.report.page import write_report

        print(write_report(folders, out))
