"""Files made to run something, or to read beyond themselves, by other ways than a function that is named outright."""

import io
import pickle
import random
import sys
import tracemalloc
import types
import zipfile

import pytest
import torch
from torch import nn

from byom.checkpoint import read
from byom.checkpoint.pickled import read_pickled
from byom.errors import CheckpointError
from byom.weights import Weights


@pytest.fixture
def armed(tmp_path, monkeypatch):
    """A class of an allowed name that stays importable, and marks every use of it."""
    code, marker = types.ModuleType("src.modeling"), tmp_path / "ran"

    class Armed(nn.Linear):
        def __new__(cls, *_, **__):
            marker.touch()
            return super().__new__(cls)

        def __setstate__(self, state):
            marker.touch()

        def __getattr__(self, name):
            marker.touch()
            return super().__getattr__(name)

    Armed.__module__, Armed.__qualname__, code.Armed = "src.modeling", "Armed", Armed
    monkeypatch.setitem(sys.modules, "src", types.ModuleType("src"))
    monkeypatch.setitem(sys.modules, "src.modeling", code)
    return Armed, marker


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("new", [True, False])
def test_code_of_an_allowed_class_does_not_run_either(tmp_path, armed, new):
    kind, marker = armed
    module = kind(2, 3)
    torch.save(module, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    weight = module.weight.detach()
    marker.unlink()
    found = read_pickled(tmp_path / "m.pt")
    assert torch.equal(found["weight"], weight) and not marker.exists()
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert marker.exists()  # where nothing stops it, it does run


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize("way", ["global", "stack global", "inst", "obj", "newobj", "attribute of an allowed module"])
def test_no_opcode_reaches_a_function(tmp_path, way):
    marker = tmp_path / "ran"
    argument = f"touch {marker}"
    content = {
        "global": b"cos\nsystem\n" + text(argument) + b"\x85R.",
        "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(argument) + b"\x85R.",
        "inst": b"(" + text(argument) + b"ios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text(argument) + b"o.",
        "newobj": b"cos\nsystem\n" + text(argument) + b"\x85\x81.",
        "attribute of an allowed module": b"\x80\x04" + text("torch.nn") + text("modules.os.system") + b"\x93"
        + text(argument) + b"\x85R.",
    }[way]  # fmt: skip
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.system, which no checkpoint needs|no module and no state dict"):
        read(tmp_path / "x.pkl", Weights.of({"weight": torch.ones(2)}))
    assert not marker.exists()


def test_what_is_known_cannot_be_changed(tmp_path):
    names = [("collections", "OrderedDict"), ("torch", "Size"), ("builtins", "set"), ("torch.nn", "Linear")]
    for module, name in names:
        build = text(module) + text(name) + b"\x93N}" + text("update") + text("changed") + b"s\x86b."
        (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + build)
        with pytest.raises(CheckpointError):
            read_pickled(tmp_path / "x.pkl")
    assert callable(dict.update) and not hasattr(read_pickled, "update")


def rewritten(path, change):
    """Return a file of `torch.save` with its pickle changed."""
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()


@pytest.mark.parametrize(
    ("shape", "stride", "offset"), [((4, 5), (5, 1), 0), ((4, 4), (5, 1), 0), ((4, 4), (4, 1), 1), ((2,), (-1,), 3)]
)
def test_a_view_beyond_its_storage_is_refused(tmp_path, shape, stride, offset):
    class Beyond:
        def __reduce__(self):
            whole = torch.zeros(16)
            storage = whole.untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=whole.dtype, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, offset, shape, stride, False, {})

    torch.save({"weight": Beyond()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="reaches beyond its storage|strides"):
        read_pickled(tmp_path / "x.pt")


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="it is compressed"):
        read_pickled(tmp_path / "y.pt")


@pytest.mark.parametrize("form", ["zip", "old"])
def test_damage_anywhere_gives_tensors_or_a_sentence(tmp_path, form):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=form == "zip")
    draw, before, refused = random.Random(0), set(sys.modules), 0

    def hit(content):
        places = {draw.randrange(len(content)): draw.randrange(256) for _ in range(2)}
        return bytes(places.get(i, byte) for i, byte in enumerate(content))

    for _ in range(300):
        changed = rewritten(tmp_path / "m.pt", hit) if form == "zip" else hit((tmp_path / "m.pt").read_bytes())
        (tmp_path / "x.pt").write_bytes(changed)
        try:
            assert all(isinstance(t, torch.Tensor) for t in read_pickled(tmp_path / "x.pt").values())
        except CheckpointError as error:
            refused += 1
            assert str(tmp_path / "x.pt") in str(error)
    assert 20 < refused < 300
    assert not [name for name in set(sys.modules) - before if not name.startswith("encodings.")]


def test_an_index_beyond_the_file_allocates_nothing(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"}r\xff\xff\xff\x7f.")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="no module and no state dict"):
        read_pickled(tmp_path / "x.pkl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_pickle_that_unpickles_itself_ends(tmp_path):
    content = pickle.dumps(torch.zeros(1).untyped_storage())
    for _ in range(200):
        content = (
            b"ctorch.storage\n_load_from_bytes\n" + b"B" + len(content).to_bytes(4, "little") + content + b"\x85R."
        )
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_pickled(tmp_path / "x.pkl")
