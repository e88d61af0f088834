"""Artefacts on disk: content-addressed, immutable, checksummed, written beside and renamed.

<store>/artefacts/ab/abcdef.../   artefact.json, model/, record/
<store>/work/abcdef.../           scratch and checkpoints of a step under way; survives a crash
<store>/locks/abcdef....lock      held while a step is made or a folder exported: two runs never do one thing at once
<store>/runs/<time>-<name>.json   which recipe gave which artefacts
<store>/verified.json             files already read whole, by identity (inode, size, time)
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from temper.context import sync, write
from temper.parts import Problem, nearest
from temper.passport import Artefact, Figure, Passport

RECORD = "record"
"""The folder in an artefact that says how it was made; it is checksummed but no part of the content hash."""


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def home() -> Path:
    """The store's folder: `TEMPER_STORE`, else in the user's cache folder."""
    if given := os.environ.get("TEMPER_STORE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "temper"


class Damaged(RuntimeError):
    """A file of the store is not what was written."""


class Store:
    """A folder of artefacts. Safe to share between processes of one machine."""

    def __init__(self, root: Path | None = None):
        self.root = (root or home()).resolve()
        for name in ("artefacts", "work", "locks", "runs"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._verified: dict[str, list[Any]] | None = None

    # ------------------------------------------------------------------------------------------- artefacts

    def folder(self, key: str) -> Path:
        return self.root / "artefacts" / key[:2] / key

    def work(self, key: str) -> Path:
        return self.root / "work" / key

    def has(self, key: str) -> bool:
        return (self.folder(key) / "artefact.json").is_file()

    def record(self, key: str) -> dict[str, Any]:
        """All that was written of an artefact when it was sealed."""
        return json.loads((self.folder(key) / "artefact.json").read_text(encoding="utf8"))

    def get(self, key: str) -> Artefact:
        """An artefact, its files verified on their first reading. Raises `Damaged`."""
        if not self.has(key):
            raise Problem(f"the store has no artefact {key[:12]}{nearest(key, [one[:12] for one in self.keys()])}")
        record = self.record(key)
        self._check(key, record, reread=False)
        base = self.get(record["base"]) if record.get("base") else None
        figures = {name: Figure(**raw) for name, raw in record["figures"].items()}
        passport = Passport.load(record["passport"])
        if record.get("outside_base") and base is None:
            base = self._outside(record["outside_base"])
        return Artefact(key, self.folder(key), passport, base, figures, record["content"], record.get("name", ""))

    def _outside(self, raw: Mapping[str, Any]) -> Artefact:
        return Artefact(raw["id"], Path(raw["path"]), Passport.load(raw["passport"]), None, {}, raw["id"], raw["name"])

    def keys(self) -> list[str]:
        return sorted(path.parent.name for path in (self.root / "artefacts").glob("*/*/artefact.json"))

    def seal(self, key: str, out: Path, record: Mapping[str, Any], base: Artefact | None = None) -> Artefact:
        """Makes `out` an artefact: checksums, one rename. `out` must lie in this store."""
        files = {}
        for path in sorted(one for one in out.rglob("*") if one.is_file()):
            name = path.relative_to(out).as_posix()
            sync(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": digest_file(path)}
        content = digest({name: one["sha256"] for name, one in files.items() if not name.startswith(RECORD + "/")})
        held: dict[str, Any] = {}
        if base is not None and self.has(base.id):
            held["base"] = base.id
        elif base is not None:
            held["outside_base"] = {"id": base.id, "path": str(base.path), "passport": base.passport.dump(), "name": base.name}
        whole = {**record, **held, "key": key, "content": content, "files": files}
        write(out / "artefact.json", json.dumps(whole, indent=1))
        for name, one in files.items():  # what stands on disk is what was hashed
            if (out / name).stat().st_size != one["bytes"]:
                raise Damaged(f"{name} changed while it was sealed; is another process writing into {out}?")
        target = self.folder(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        out.rename(target)
        sync(target.parent)
        self._check(key, whole, reread=False)
        return self.get(key)

    # --------------------------------------------------------------------------------------------- checksums

    def _cache(self) -> dict[str, list[Any]]:
        if self._verified is None:
            file = self.root / "verified.json"
            try:
                self._verified = json.loads(file.read_text(encoding="utf8"))
            except (FileNotFoundError, json.JSONDecodeError):
                self._verified = {}
        assert self._verified is not None
        return self._verified

    def _check(self, key: str, record: Mapping[str, Any], reread: bool) -> int:
        """Compares files with their checksums, each identity once unless `reread`. Returns bytes read."""
        seen, fresh, read = self._cache(), {}, 0
        for name, said in record["files"].items():
            path = self.folder(key) / name
            where = path.relative_to(self.root).as_posix()
            try:
                stat = path.stat()
            except FileNotFoundError:
                raise Damaged(f"artefact {key[:12]}: {name} is missing") from None
            identity = [stat.st_ino, stat.st_size, stat.st_mtime_ns, said["sha256"]]
            if not reread and seen.get(where) == identity:
                continue
            if stat.st_size != said["bytes"] or digest_file(path) != said["sha256"]:
                raise Damaged(f"artefact {key[:12]}: {name} does not match its checksum")
            read += stat.st_size
            fresh[where] = identity
        if fresh:
            self._remember(fresh)
        return read

    def remembered(self, path: Path) -> str:
        """SHA-256 of any file, read once per identity: large models outside the store are not hashed at every run."""
        path = path.resolve()
        stat = path.stat()
        identity = [stat.st_ino, stat.st_size, stat.st_mtime_ns]
        known = self._cache().get(str(path))
        if known is not None and known[:3] == identity:
            return known[3]
        found = digest_file(path)
        self._remember({str(path): [*identity, found]})
        return found

    def _remember(self, fresh: Mapping[str, list[Any]]) -> None:
        self._verified = None  # another process may have added to it
        self._verified = {**self._cache(), **fresh}
        write(self.root / "verified.json", json.dumps(self._verified))

    def verify(self, tell: Callable[[str, str], None] = lambda key, state: None) -> dict[str, str]:
        """Rereads every file of every artefact. Returns key -> `whole` or what is wrong."""
        found = {}
        for key in self.keys():
            try:
                self._check(key, self.record(key), reread=True)
                found[key] = "whole"
            except (Damaged, json.JSONDecodeError, KeyError) as error:
                found[key] = str(error)
            tell(key, found[key])
        return found

    def set_aside(self, key: str) -> Path:
        """Moves a damaged artefact out of the way, so that it is made again; nothing is deleted."""
        target = self.root / "damaged" / f"{key}-{int(time.time())}"
        target.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            self.folder(key).rename(target)
        return target

    # ------------------------------------------------------------------------------------------------- locks

    @contextlib.contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Held while an artefact is made. The kernel lets go of it when the process dies."""
        with (self.root / "locks" / f"{key}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def busy(self, key: str) -> bool:
        """Whether some process holds the lock of a key."""
        path = self.root / "locks" / f"{key}.lock"
        if not path.exists():
            return False
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            fcntl.flock(file, fcntl.LOCK_UN)
            return False

    # -------------------------------------------------------------------------------------------------- runs

    def run_id(self, name: str) -> str:
        """A fresh name for a run: time, recipe, process."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
        return f"{now}-{name}"

    def save_run(self, run: str, record: Mapping[str, Any]) -> None:
        write(self.root / "runs" / f"{run}.json", json.dumps(record, indent=1))

    def runs(self) -> list[dict[str, Any]]:
        """All runs, oldest first."""
        found = []
        for path in sorted((self.root / "runs").glob("*.json")):
            with contextlib.suppress(json.JSONDecodeError):
                found.append({"run": path.stem, **json.loads(path.read_text(encoding="utf8"))})
        return found

    def find(self, word: str) -> str:
        """The key of an artefact from what a user calls it: a key's beginning, `step`, or `recipe/step` of the latest run."""
        keys = self.keys()
        if len(word) >= 6 and (near := [key for key in keys if key.startswith(word)]):
            if len(near) > 1:
                raise Problem(f"`{word}` begins {len(near)} artefacts; write more of it")
            return near[0]
        recipe, _, step = word.rpartition("/")
        names: set[str] = set()
        for run in reversed(self.runs()):
            if recipe and run["name"] != recipe:
                continue
            for made in run["steps"]:
                names.add(made["name"])
                if made["name"] == step and made.get("key") and self.has(made["key"]):
                    return made["key"]
        raise Problem(
            f"no artefact `{word}`: neither the beginning of a key (6 or more characters) nor a step of a run{nearest(step, names)}"
        )

    # ---------------------------------------------------------------------------------------------------- gc

    def free(self, keep_runs: int = 1, dry: bool = False) -> tuple[list[str], int]:
        """Removes artefacts and scratch that none of the latest `keep_runs` runs of each recipe uses.

        Returns the keys and the bytes. What a run under way holds is kept, and so are the parents of what is kept.
        """
        kept: set[str] = set()
        seen: dict[str, int] = {}
        for run in reversed(self.runs()):
            seen[run["name"]] = seen.get(run["name"], 0) + 1
            held = [step["key"] for step in run["steps"]]
            under_way = run["state"] == "running" and any(map(self.busy, held))
            if under_way or seen[run["name"]] <= keep_runs:
                kept.update(held)
        waiting = list(kept)
        while waiting:
            key = waiting.pop()
            if self.has(key) and (base := self.record(key).get("base")) and base not in kept:
                kept.add(base)
                waiting.append(base)
        going, freed = [], 0
        candidates = [(key, self.folder(key)) for key in self.keys()]
        candidates += [(path.name, path) for path in (self.root / "work").iterdir() if path.is_dir()]
        for key, folder in candidates:
            if key in kept or self.busy(key):
                continue
            if key not in going:
                going.append(key)
            freed += sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
            if not dry:
                beside = folder.with_name(f".{folder.name}.going")
                folder.rename(beside)
                shutil.rmtree(beside)
        return going, freed
