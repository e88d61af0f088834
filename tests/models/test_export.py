"""What leaves the store: plain folders with a card, never over a user's own files; the hub by the same way."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from temper.models.export import MARK, export, lineage, upload
from temper.parts import Problem
from temper.passport import Artefact, Figure, Passport
from temper.store import Store, digest


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def made(store: Store, name: str, parent: Artefact | None = None, licence: str = "apache-2.0") -> Artefact:
    key = digest(name)
    out = store.work(key) / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "model.safetensors").write_text(name)
    passport = Passport("model", {"model": parent.id} if parent else {}, numbers="float32", licences=(licence,))
    record = {"name": name, "engine": "tune", "method": "full", "passport": passport.dump(), "figures": {"loss": Figure(1.5).dump()}}
    return store.seal(key, out, record)


def test_a_card_names_lineage_licences_and_figures(store, tmp_path):
    base = made(store, "base", licence="mit")
    tuned = made(store, "tuned", base)
    folder = export(tuned, tmp_path / "out", store)
    card = (folder / "README.md").read_text()
    assert "| 1 | base | tune full | float32 |\n| 2 | tuned | tune full | float32 |" in card
    assert "Licences of its parents: apache-2.0, mit." in card
    assert "| loss | 1.5 |" in card
    assert "license:" not in card.split("---")[1]  # two licences: none is claimed for the whole
    assert [one["name"] for one in lineage(tuned, store)] == ["base", "tuned"]
    assert (folder / "model.safetensors").read_text() == "tuned"
    assert "license: mit" in (export(base, tmp_path / "base", store) / "README.md").read_text()


def test_an_export_is_replaced_by_another_and_a_users_folder_by_none(store, tmp_path):
    one, two = made(store, "one"), made(store, "two")
    folder = export(one, tmp_path / "out", store)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    export(one, tmp_path / "out", store)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    export(two, tmp_path / "out", store)
    assert (folder / "model.safetensors").read_text() == "two"
    assert json.loads((folder / MARK).read_text())["export"]["artefact"] == two.id
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(Problem, match="holds files that no export wrote; choose another folder, or empty it"):
        export(one, tmp_path / "mine", store)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_many_at_once_export_to_one_folder(store, tmp_path, monkeypatch):
    """In processes, as two runs of one recipe do; renaming takes long enough for all of them to be at it."""
    ones = [made(store, name) for name in ("one", "two")]
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (time.sleep(0.1), rename(path, target)))
    others = []
    for index in range(4):
        process = os.fork()
        if not process:
            code = 1
            try:
                export(ones[index % 2], tmp_path / "out", store)
                code = 0
            finally:
                os._exit(code)
        others.append(process)
    assert [os.waitpid(process, 0)[1] for process in others] == [0] * 4
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    assert json.loads((tmp_path / "out" / MARK).read_text())["export"]["artefact"] in [one.id for one in ones]


def test_the_hub_gets_the_folder_without_the_mark(store, monkeypatch):
    import huggingface_hub

    sent: dict[str, object] = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **given: sent.update(name=name, **given))
    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda folder_path, repo_id: sent.update(files={p.name for p in folder_path.iterdir()})
    )
    assert upload(made(store, "one"), "me/one", store) == "https://huggingface.co/me/one"
    assert sent == {"name": "me/one", "private": True, "exist_ok": True, "files": {"model.safetensors", "README.md"}}


def test_a_hub_that_cannot_be_reached_is_told(store, monkeypatch):
    import huggingface_hub

    def refuse(*given: object, **more: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(Problem, match=r"the hub cannot be reached .OSError.; export to a folder instead"):
        upload(made(store, "one"), "me/one", store)


@pytest.mark.parametrize(
    ("kind", "told"), [("LORA", "(base, folder)`. "), ("TRI_FACTOR", "after `import temper.peft`: peft alone has no type TRI_FACTOR.")]
)
def test_a_card_says_what_an_adapter_of_our_own_type_needs(store, tmp_path, kind, told):
    key = digest(kind)
    out = store.work(key) / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    record = {"name": kind, "engine": "tune", "method": "", "passport": Passport("adapter", numbers="float32").dump(), "figures": {}}
    folder = export(store.seal(key, out, record), tmp_path / kind, store)
    assert told in (folder / "README.md").read_text()
