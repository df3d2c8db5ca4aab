"""Files that a foreign folder names are looked for in it and nowhere else.

The cache of the Hugging Face hub keeps its files as links into `blobs` beside `snapshots`; these
links are followed too.
"""

import re
from collections.abc import Callable
from pathlib import Path

from checkpoint.files import read_bytes
from checkpoint.objects import ObjectPath
from sharding.errors import MismatchError, UnsafeInputError, shown

NAME = 255  # bytes of a name


def inside(folder: Path, name: str) -> Path:
    """Returns the file `name` of a folder.

    Raises:
      UnsafeInputError: the name, or the link it is, leads out of the folder.
      MismatchError: there is no such file.
    """
    if not _is_name(name):
        raise UnsafeInputError(f"{folder} names a file outside of itself: {shown(name)}")
    if isinstance(folder, ObjectPath):
        if not (folder / name).is_file():
            raise MismatchError(f"{folder} has no {name}")
        return folder / name
    path, root = folder / name, resolved(folder)
    if not path.exists() and not path.is_symlink():
        raise MismatchError(f"{folder} has no {name}")
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    target = resolved(path)
    if not any(target.is_relative_to(place) for place in allowed):
        raise UnsafeInputError(f"{path} is a link out of its folder, to {target}")
    if not target.is_file():
        raise UnsafeInputError(f"{path} is not a file")
    return target


def resolved(path: Path) -> Path:
    """Returns a path without links; raises UnsafeInputError for a link to itself."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # the latter before Python 3.13
        raise UnsafeInputError(f"{path} is a link to itself, or cannot be followed") from error


def find_tag(
    folder: Path, pointer: str, wanted: re.Pattern, spell: Callable[[str], str] = str
) -> Path:
    """Returns the folder of one step: `folder` itself, or the one that the file `pointer` names.

    spell: makes the folder's name of what the file says.

    Raises:
      MismatchError: there is none.
    """
    if any(wanted.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    if not (folder / pointer).exists():
        raise MismatchError(f"{folder} has no file `{pointer}`, and holds no step itself")
    name = spell(read_bytes(inside(folder, pointer), NAME).decode(errors="replace").strip())
    if not _is_name(name):
        raise UnsafeInputError(
            f"{folder / pointer} names a folder outside of its own: {shown(name)}"
        )
    tag = folder / name
    if name not in {path.name for path in folder.iterdir()} or not tag.is_dir():
        raise MismatchError(f"{folder / pointer} names {name}, which is not there")
    if not resolved(tag).is_relative_to(resolved(folder)):
        raise UnsafeInputError(f"{tag} is a link out of its folder")
    return tag


def _is_name(text: str) -> bool:
    """Whether this names something in a folder, not the folder, one above it or one below."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return size <= NAME and text not in ("", ".", "..") and not set(text) & set("/\\\0")
