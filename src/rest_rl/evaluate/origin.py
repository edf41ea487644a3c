"""Where an evaluated model comes from: the run that its folder belongs to, its name, what tells its weights apart."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from huggingface_hub import repo_exists, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rest_rl.config import EMBEDDED, ModelTable, RunConfig, read_run_file
from rest_rl.data.hub import has_hub
from rest_rl.errors import UserError
from rest_rl.jsonl import describe_os_error
from rest_rl.runlog import CHECKPOINTS, CONFIG, MODEL

MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of which a folder has one if it is a model, an adapter or a tokenizer."""
BLOCK_BYTES, STRIDE_BYTES = 64 << 10, 16 << 20
"""Of a file of weights, a block at every stride and one at its end are read: any training changes all of them."""


class Origin(NamedTuple):
    """Where the weights lie, and the run that they come from, if they come from one."""

    path: str
    run: RunConfig | None = None
    folder: Path | None = None
    """The run's."""


def resolve_origin(path: str, option: str = "--model") -> Origin:
    """The origin of a model: a run folder stands for its model, a model may lie in one.

    UserError, which names the option, for a path that is no model's. A name on the hub is not looked up, unless it
    begins with a folder that is here.
    """
    path = os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111
    folder = Path(path)
    try:
        (folder / CONFIG).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(
            f"{option} {path} ({describe_os_error(error)})", "a folder that can be read", "check the path"
        ) from error
    if (folder / CONFIG).is_file() and (folder / MODEL).is_dir():
        return Origin(str(folder / MODEL), read_run_file(folder / CONFIG), display_path(folder))
    if (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir():
        raise UserError(
            f"{path}, a run folder without {MODEL}/",
            "a finished run",
            f"finish it with rest-rl train --resume --out {path}, or pass one of its {CHECKPOINTS}/",
        )
    for home, _ in find_enclosing_runs(path):
        if run := read_run_or_none(home):
            return Origin(path, run, display_path(home))
    if path != EMBEDDED:
        check_model_path(path, option)
    return Origin(path)


def check_model_path(path: str, option: str) -> None:
    """UserError for what is no folder of a model, and no name that the hub or its cache could have."""
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / part).exists() for part in MODEL_FILES):
            inside = [each.parent for part in MODEL_FILES for each in folder.glob(f"*/{part}")]
            near = f"did you mean {inside[0]}?" if inside else "check the path"
            raise UserError(f"{option} {path}, a folder without a model", "one with config.json", near)
        return
    first, *others = folder.parts or (path,)
    got = f"{option} {path}, but there is no such folder"
    if not path.startswith(("/", ".")) and not folder.is_file() and is_hub_name(path):
        if any(isinstance(try_to_load_from_cache(path, part), str) for part in MODEL_FILES):
            return
        if not has_hub():
            got = f"{option} {path}, which is no folder here, and the hub cannot be reached"
        elif not (others and Path(first).is_dir()) or exists_on_hub(path):  # `runs/mine`, or another model of an owner
            return
    here = folder.parent if folder.parent.is_dir() else Path()
    folders = sorted(each.name for each in here.iterdir() if each.is_dir() and not each.name.startswith("."))
    near = difflib.get_close_matches(folder.name if here == folder.parent else first, folders, n=1)
    remedy = (
        f"did you mean {here / near[0]}?" if near else f"{here.absolute()} holds {', '.join(folders[:5]) or 'none'}"
    )
    raise UserError(got, "a folder or a name on the hub", remedy)


def is_hub_name(path: str) -> bool:
    """Whether a model on the hub could be called so: NAME or OWNER/NAME, of certain letters."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def exists_on_hub(name: str) -> bool:
    """Whether the hub, which can be reached, has a model of this name, as far as it tells."""
    try:
        return repo_exists(name)
    except Exception:  # whatever the client's transport raises: loading the model tells more
        return True


def find_enclosing_runs(path: str) -> Iterator[tuple[Path, Path]]:
    """(run folder, model in it) as far as the names of folders tell: of the path as given, then of what it links to.

    In that order, because a run's model may be a link itself.
    """
    if not Path(path).is_dir():
        return
    for place in (Path(os.path.abspath(path)), Path(path).resolve()):  # noqa: PTH100 - Path.absolute keeps `..`
        if place.name == MODEL and (place.parent / CONFIG).is_file():
            yield place.parent, place
        if place.parent.name == CHECKPOINTS and (place.parent.parent / CONFIG).is_file():
            yield place.parent.parent, place


def read_run_or_none(folder: Path) -> RunConfig | None:
    try:
        return read_run_file(folder / CONFIG)
    except UserError:  # somebody else's config.toml
        return None


def display_path(folder: Path) -> Path:
    """A folder as one would type it here; its whole path where that is `.` or lies elsewhere."""
    place, here = Path(os.path.abspath(folder)), Path.cwd()  # noqa: PTH100
    return place.relative_to(here) if place != here and place.is_relative_to(here) else place


def model_label(path: str) -> str:
    """What a model is called where nobody names it: by its run and checkpoint, its folder, or its name on the hub."""
    if not Path(path).is_dir():
        return path.rstrip("/").rpartition("/")[2]
    for home, model in find_enclosing_runs(path):
        return home.name if model.name == MODEL else f"{home.name}-{model.name}"
    return Path(os.path.abspath(path)).name  # noqa: PTH100


def weights_digest(table: ModelTable) -> str | None:
    """What tells a model's weights from others': of its folder and of its base model's, where it is an adapter.

    The commit stands for a name on the hub. None where nothing is known.
    """
    from rest_rl.train.policy import find_hub_commit, resolve_adapter

    base, adapter = resolve_adapter(table)
    parts = [
        folder_digest(Path(path)) if Path(path).is_dir() else find_hub_commit(str(path), is_adapter=path == adapter)
        for path in (adapter, base)
        if path is not None
    ]
    return "+".join(part or "unknown" for part in parts) if any(parts) else None


def folder_digest(folder: Path) -> str | None:
    """Of names, sizes and blocks of all files of weights in a folder; None without any."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    text = "".join(f"{path.name}\0{compute_digest(path, read_sample_blocks)}\0" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if files else None


def read_sample_blocks(file: BinaryIO) -> Iterator[bytes]:
    """The size of a file and blocks all over it, for gigabytes would take minutes."""
    size = file.seek(0, os.SEEK_END)
    yield str(size).encode()
    for start in (*range(0, size, STRIDE_BYTES), max(0, size - BLOCK_BYTES)):
        file.seek(start)
        yield file.read(BLOCK_BYTES)


def compute_digest(path: Path, pieces: Callable[[BinaryIO], Iterable[bytes]] | None = None) -> str:
    """Of pieces of a file, all of it unless told."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for piece in pieces(file) if pieces else iter(partial(file.read, 1 << 20), b""):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{path} ({error.strerror})", "a readable file", "check the path") from error
    return digest.hexdigest()[:12]
