"""Pickled modules are read without running anything; a file that would run something is refused before it could."""

import collections
import functools
import io
import os
import pickle
import sys
import types
import zipfile

import pytest
import torch
from torch import nn

from byom.checkpoint.pickled import read_pickled
from byom.errors import CheckpointError


@pytest.fixture
def src():
    """Modules named as those of the task vectors' code, gone before anything is read."""
    code = types.ModuleType("src.modeling")

    class ImageEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Module()
            self.model.visual = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(2), nn.MultiheadAttention(4, 2))
            self.model.visual.register_buffer("kept", torch.arange(3))
            self.model.visual.register_buffer("passing", torch.ones(2), persistent=False)
            self.model.visual.register_parameter("absent", None)
            self.train_preprocess = Preprocess()

    class Preprocess:
        def __init__(self):
            self.size = 224

    for kind in (ImageEncoder, Preprocess):
        kind.__module__, kind.__qualname__ = "src.modeling", kind.__name__
        setattr(code, kind.__name__, kind)
    sys.modules["src"], sys.modules["src.modeling"] = types.ModuleType("src"), code
    yield code
    for name in ("src", "src.modeling"):
        sys.modules.pop(name, None)


def forget(src):
    for name in ("src", "src.modeling"):
        del sys.modules[name]
    del src.ImageEncoder


WRITERS = {
    "torch.save": torch.save,
    "torch.save, old": lambda module, path: torch.save(module, path, _use_new_zipfile_serialization=False),
    "pickle.dump": lambda module, path: path.write_bytes(pickle.dumps(module)),
    "pickle.dump, protocol 2": lambda module, path: path.write_bytes(pickle.dumps(module, protocol=2)),
}


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_module_is_its_state_dict_to_the_bit_and_no_class_of_it_is_imported(tmp_path, src, write):
    module = src.ImageEncoder()
    expected = {name: t.clone() for name, t in module.state_dict().items()}
    write(module, tmp_path / "m.pt")
    forget(src)
    before = set(sys.modules)
    found = read_pickled(tmp_path / "m.pt")
    assert set(sys.modules) == before
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_strides_offsets_and_shared_storage_are_honoured(tmp_path, write):
    whole = torch.arange(24.0).reshape(4, 6)
    state = collections.OrderedDict(
        t=whole.T, row=whole[2], every=whole[:, ::2], tied=whole.T, half=whole.half(), n=torch.tensor(3)
    )
    write(state, tmp_path / "s.pt")
    found = read_pickled(tmp_path / "s.pt")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found["t"].stride() == whole.T.stride()
    if write is torch.save:  # pickle.dump writes a storage once a tensor
        assert found["t"].data_ptr() == found["tied"].data_ptr()


class Hostile:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    inner = pickle.dumps(Hostile(exec, touch))
    return {
        "posix.system": Hostile(os.system, f"touch {marker}"),
        "builtins.exec": Hostile(exec, touch),
        "builtins.eval": Hostile(eval, touch),
        "builtins.getattr": Hostile(getattr, "text", "upper"),
        "functools.partial": Hostile(functools.partial, exec, touch),
        "importlib.import_module": Hostile(__import__("importlib").import_module, "this"),
        "nested": {"weight": torch.ones(2), "hooks": [Hostile(exec, touch)]},
        "inside bytes": Hostile(torch.storage._load_from_bytes, inner),
        "torch.load": Hostile(torch.load, str(marker)),
    }


@pytest.mark.parametrize("name", attacks("x"))
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_a_hostile_pickle_is_refused_and_nothing_ran(tmp_path, name, form):
    marker, path = tmp_path / "ran", tmp_path / "x.pt"
    hostile = attacks(marker)[name]
    if form == "plain":
        path.write_bytes(pickle.dumps(hostile))
    else:
        torch.save({"a": torch.ones(1), "b": hostile}, path, _use_new_zipfile_serialization=form == "zip")
    before = set(sys.modules)
    with pytest.raises(
        CheckpointError, match=r"which no checkpoint needs; it was not run|a storage holds something else"
    ):
        read_pickled(path)
    assert not marker.exists() and set(sys.modules) == before


def test_the_attacks_do_run_where_nothing_stops_them(tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(attacks(marker)["builtins.exec"]))
    assert marker.exists()


def test_hostile_state_of_a_module_is_refused_too(tmp_path, src):
    module, marker = src.ImageEncoder(), tmp_path / "ran"
    module.secret = Hostile(exec, f"open({str(marker)!r}, 'w').close()")
    torch.save(module, tmp_path / "m.pt")
    forget(src)
    with pytest.raises(CheckpointError, match=r"__builtin__\.exec"):
        read_pickled(tmp_path / "m.pt")
    assert not marker.exists()


def opcodes(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def test_dotted_names_and_changed_helpers_are_refused(tmp_path):
    dotted = opcodes(text("torch.serialization"), text("os.system"), b"\x93")
    helper = text("torch._utils") + text("_rebuild_tensor_v2") + b"\x93"
    changed = opcodes(helper, b"N}", text("_call"), b"Ns\x86b")
    for content in (dotted, changed):
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"os.system, which no checkpoint needs|sets _call of a function"):
            read_pickled(tmp_path / "x.pkl")


def test_damaged_files_are_refused(tmp_path):
    torch.save(nn.Linear(40, 40), tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut.pt"):
        read_pickled(tmp_path / "cut.pt")
    content = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 8 if "/data/" in name else None])
    (tmp_path / "short.pt").write_bytes(content.getvalue())
    with pytest.raises(CheckpointError, match="holds 2; the file is cut short"):
        read_pickled(tmp_path / "short.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="not a pickled module"):
        read_pickled(tmp_path / "junk.pt")
