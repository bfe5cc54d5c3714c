"""Files and folders that come in place of weights: what each is, in a sentence, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

HEAD = 512
"""Bytes of a file that tell what it is."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ADAPTER = "adapter_config.json"
BUNDLE = "bundle.json"
STANDARD = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Names of indexes of shards, in safetensors and in PyTorch's own format."""
PYTORCH = ("pytorch_model.bin", STANDARD[1])
INDEX_NAME = re.compile(r"\.index\.([\w-]+\.)?json$")
READ = "byom.read_checkpoint(path, base), or turn it into safetensors with `byom convert SOURCE FOLDER`"
TRANSFORMERS = "Load it with transformers and save it with save_pretrained"

_STARTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file that it points to. Run `git lfs pull` "
    "where it was cloned, or download the file from the hub",
    b"GGUF": f"is a GGUF file, whose tensors are packed for llama.cpp. {TRANSFORMERS} "
    "(from_pretrained(..., gguf_file=...)), or give the model that it was made from",
    b"\x89HDF\r\n\x1a\n": f"is an HDF5 file, of Keras or TensorFlow. {TRANSFORMERS} (version 4, from_tf=True)",
    b"\x93NUMPY": "is one array of NumPy without a name. Save named tensors with safetensors.torch.save_file",
}
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")
_ANSWERS = (
    b"entry not found",
    b"repository not found",
    b"not found",
    b"invalid username",
    b"access to model",
    b'{"error',
)
_SUFFIXES = {
    ".gguf": _STARTS[b"GGUF"],
    ".msgpack": f"holds weights of Flax. {TRANSFORMERS} (version 4, from_flax=True)",
    ".h5": _STARTS[b"\x89HDF\r\n\x1a\n"],
    ".keras": "is a model of Keras. Save its weights with safetensors",
    ".onnx": "is an ONNX graph, whose tensors do not have the names of a model's parameters. Give the model "
    "that it was exported from",
    ".tflite": "is a graph of TensorFlow Lite. Give the model that it was converted from",
    ".npz": "holds arrays of NumPy. Save them as named tensors with safetensors.torch.save_file",
    ".npy": _STARTS[b"\x93NUMPY"],
}
_PACKAGES = {
    ADAPTER: "it is a PEFT adapter, a difference to a model. Read it on its base with "
    "byom.Adapter.open(folder).on(base), or byom.read_checkpoint(folder, base)",
    BUNDLE: "it is a bundle of byom's. Open it with byom.Bundle.open(folder), and take weights(task) of it",
}
"""Files that tell what a folder is that holds no model of its own."""
_OUTPUTS = re.compile(r"checkpoint-\d+|epoch[-_=]?\d+|step[-_=]?\d+|global_step\d+", re.IGNORECASE)
_PARTITIONED = re.compile(
    r".*\.distcp|zero_to_fp32\.py|pytorch_model_fsdp_\d+|zero_pp_rank_.*|bf16_zero_pp_rank_.*|mp_rank_\d+_model_states\.pt"
)
_SHARD = re.compile(r".+-\d{5}-of-(?P<total>\d{5})\.(?:safetensors|bin)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def cause(file: Path) -> str | None:
    """Say what a file is that holds no tensors in a form that is read here, and what to do.

    Args:
        file: A file that exists.

    Returns:
        The end of a sentence that begins with the file; None if its start and its name tell nothing.
    """
    head = start(file)
    if not head:
        return "is damaged: it is empty, not written or fetched to the end. Delete it and make or fetch it again"
    text = head.lstrip().lower()
    if text.startswith(_PAGES):
        return (
            "is a web page that was saved in place of a checkpoint. Download the file itself (on the hub its address "
            "has "
            "/resolve/, not /blob/)"
        )
    if len(head) < HEAD and text.startswith(_ANSWERS):
        return f"is a server's answer ({head[:40]!r}) in place of a checkpoint. Check the address and download it again"
    if head.startswith(_PACKED) or head[257:262] == b"ustar":
        return "is an archive. Unpack it, and give what it holds"
    known = next((what for sign, what in _STARTS.items() if head.startswith(sign)), None)
    return known or _SUFFIXES.get(file.suffix.lower())


def misplaced(file: Path) -> str | None:
    """Say what a file is that was given as one of weights; see `cause`."""
    if INDEX_NAME.search(file.name):
        return "is the index of a model in shards. Give the folder that it lies in"
    if file.suffix == ".json":
        return "holds settings, not weights. Give the folder or the file with the weights"
    return cause(file)


def start(file: Path) -> bytes:
    """Return a file's first bytes, none if it cannot be read."""
    try:
        with file.open("rb") as handle:
            return handle.read(HEAD)
    except OSError:
        return b""


def is_pickle(file: Path) -> bool:
    """Say whether a file begins as those of `torch.save` and `pickle.dump` do."""
    return start(file).startswith((b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6))))


def is_safetensors(file: Path) -> bool:
    """Say whether a file begins as safetensors do: with the length of a table that lies in the file."""
    head = start(file)
    return head[8:9] == b"{" and 8 + int.from_bytes(head[:8], "little") <= file.stat().st_size


def is_shard(name: str) -> bool:
    """Say whether a file's name is that of one of several shards."""
    match = _SHARD.fullmatch(name)
    return match is not None and int(match["total"]) > 1


def missing(path: Path) -> str:
    """Say that there is no such file, and what else the name may be."""
    if path.is_symlink():
        return f"{path} is a link to a file that is not there. Download it again"
    if _HUB_ID.fullmatch(str(path)) and not path.parent.exists():
        return (
            f"there is no checkpoint at {path}. If that is the id of a repository on the hub, download it "
            f"(hf download {path} --local-dir FOLDER) and give the folder"
        )
    return f"there is no checkpoint at {path}; check the path"


def unclear(folder: Path, suffixes: Iterable[str]) -> str:
    """Say why a folder is no checkpoint of the kinds that are sought.

    Args:
        folder: The folder.
        suffixes: Ends of the names of files that could be read.

    Returns:
        A sentence with what lies there instead, and what to do.
    """
    names = sorted(file.name for file in folder.iterdir())
    begin = f"{folder} is not a checkpoint: "
    files = [name for name in names if (folder / name).is_file()]
    found = [name for name in files if name.endswith(tuple(suffixes))]
    if packed := next((what for file, what in _PACKAGES.items() if file in files), None):
        return begin + packed
    if dangling := [name for name in names if not (folder / name).exists()]:
        return f"{begin}it has links to files that are not there ({_few(dangling)}). Download them again"
    if shards := [name for name in files if is_shard(name) and not _is_indexed(name, files)]:
        return begin + _unnamed(files, shards)
    if found:
        found += [name for name in PYTORCH if name in files and name not in found]
        return (
            f"{begin}it holds {len(found)} files of weights ({_few(found)}), and nothing says which is meant. Name one"
        )
    return begin + (_other(folder, names, files) or f"it holds no file of weights ({_few(names) or 'it is empty'})")


def _is_indexed(shard: str, files: list[str]) -> bool:
    return STANDARD[shard.endswith(".bin")] in files


def _unnamed(files: list[str], shards: list[str]) -> str:
    """Say why shards are not read."""
    indexes = [name for name in files if INDEX_NAME.search(name) and name not in STANDARD]
    if not indexes:
        return f"it holds shards ({_few(shards)}) and no index that names them. Fetch the *.index.json as well"
    standard = STANDARD[".bin." in indexes[0]]
    return (
        f"its shards are named by {_few(indexes)}, and only {standard} is looked for. Copy the index of the model that "
        "is meant to that name"
    )


def _other(folder: Path, names: list[str], files: list[str]) -> str | None:
    folders = [name for name in names if name not in files]
    if any(_PARTITIONED.fullmatch(name) for name in names):
        return (
            "it holds the state of a partitioned training run (DeepSpeed, FSDP). Gather it first, with "
            "zero_to_fp32.py or accelerate merge-weights"
        )
    if pickles := [name for name in files if name.endswith(PICKLES)]:
        return f"it holds PyTorch's own files ({_few(pickles)}) and no safetensors. Read it with {READ}"
    if runs := [name for name in folders if _OUTPUTS.fullmatch(name)]:
        return f"it is the folder of a training run. Give one of the checkpoints in it: {_few(runs)}"
    if inner := [name for name in folders if _has_weights(folder / name)]:
        return f"its weights lie in the folders in it. Give one of {_few(inner)}"
    foreign = next((name for name in files if Path(name).suffix.lower() in _SUFFIXES), None)
    return foreign and f"{foreign} {_SUFFIXES[Path(foreign).suffix.lower()]}"


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in (".safetensors", *PICKLES) for file in folder.iterdir())


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
