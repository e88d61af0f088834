"""A model by what the user calls it: a folder on this machine, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from temper.parts import Problem, nearest, shown

FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*")
"""What is taken from the hub: never pickles, never code."""


def resolve(ref: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: `ref` itself if it is one, else a hub name such as `owner/model`, downloaded once.

    revision: a branch, tag or commit of the hub; `revision_of` tells the commit that was taken. Downloads safetensors,
    JSON and tokenizer files of the top folder alone. `HF_HUB_OFFLINE=1` is obeyed: then only what is cached is found.
    """
    path = Path(ref).expanduser()
    if path.exists():
        if not path.is_dir():
            raise Problem(f"{ref} is a file; give the folder that it lies in")
        if revision is not None:
            raise Problem(f"{ref} is a folder on this machine, and folders have no revision {shown(revision)}; leave it out")
        return path
    name = str(ref)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        beside = path.parent if path.parent.is_dir() else None
        hint = nearest(path.name, [one.name for one in beside.iterdir() if one.is_dir()]) if beside else ""
        raise Problem(f"no folder {name}{hint}; give a folder, or a hub name such as `owner/model`")
    return _download(name, revision)


def revision_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache (`.../snapshots/<commit>`), else None."""
    folder = Path(folder).absolute()
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    told = f"{name}@{revision}" if revision else name
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES), ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise Problem(
            f"{told} is gated: accept its terms on https://huggingface.co/{name}, then log in with `hf auth login` (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise Problem(f"{name} has no revision {shown(revision)}; give a branch, tag or commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise Problem(f"{told} is neither a folder here nor a repository that you can see; a private one needs `hf auth login`") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise Problem(
            f"{told} is neither a folder here nor in the hub's cache, and the hub is out of reach (HF_HUB_OFFLINE set, or no connection)"
        ) from error
    except errors.HfHubHTTPError as error:
        raise Problem(f"the hub refused {told}: {error}") from error
