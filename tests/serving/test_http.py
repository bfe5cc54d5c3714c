"""A server over HTTP: answers, refusals, limits, metrics, and the end of its thread."""

import asyncio
import base64
import concurrent.futures
import io
import json
import random
import threading
import time
from types import MappingProxyType

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from byom.errors import CheckpointError
from byom.serving.app import create_app, of_model
from byom.serving.limits import BodyLimit
from byom.serving.model import Model, Served
from byom.serving.options import Options
from tests.serving import bundles
from tests.serving.bundles import LABELS, WORDS

OPTIONS = Options(device="cpu", batch=8, items=16, body=0.05, characters=2000, threads=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A bundle of text classifiers on disk, its models and its tokenizer."""
    folder = tmp_path_factory.mktemp("texts") / "bundle"
    return folder, *bundles.bert_classifiers(folder)


@pytest.fixture(scope="module")
def client(texts):
    with TestClient(create_app(texts[0], OPTIONS), raise_server_exceptions=False) as client:
        yield client


@torch.no_grad()
def expected(models, tokenizer, task, items):
    rows = tokenizer(items, padding=True, truncation=True, max_length=12, return_tensors="pt")
    return models[task](**rows).logits.softmax(-1)


def close(answer, row, task):
    """Say whether an answer has the probabilities of a task's own model."""
    found = [answer["probabilities"][label] for label in LABELS[task]]
    return torch.allclose(torch.tensor(found), row, atol=2e-5) and answer["label"] == LABELS[task][int(row.argmax())]


def test_under_load_with_interleaved_tasks_every_answer_is_that_of_the_tasks_own_model(texts, client):
    _, models, tokenizer = texts
    draw = random.Random(0)
    sent = []
    for _ in range(80):
        lines = [" ".join(draw.choices(WORDS[:8], k=draw.randint(1, 6))) for _ in range(draw.randint(1, 3))]
        sent.append((draw.choice("abc"), lines))

    def ask(request):
        task, lines = request
        return client.post("/predict", json={"task": task, "texts": lines})

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, sent))
    for (task, lines), response in zip(sent, answers, strict=True):
        assert response.status_code == 200
        rows = expected(models, tokenizer, task, lines)
        got = response.json()["answers"]
        assert len(got) == len(lines) and all(one["task"] == task for one in got)
        assert all(close(one, row, task) for one, row in zip(got, rows, strict=True))
    told = client.get("/metrics").text
    switches = float(next(line for line in told.splitlines() if line.startswith("byom_switches_total")).split()[1])
    assert 2 <= switches < len(sent)  # batched by task: fewer switches than requests


def test_tasks_health_and_metrics_say_what_is_served(client):
    told = client.get("/tasks").json()
    assert [(t["name"], t["kind"], t["input"], t["labels"]) for t in told["tasks"]] == [
        (task, "classification", "text", labels) for task, labels in LABELS.items()
    ]
    assert told["routes"] is False and client.get("/health").json()["status"] == "ok"
    client.post("/predict", json={"task": "a", "text": "good"}), client.post("/predict", json={"task": "z", "text": ""})
    metrics = client.get("/metrics").text
    for line in ('byom_requests_total{status="200",task="a"}', 'byom_requests_total{status="404",task="unknown"}'):
        assert line in metrics
    assert "byom_request_seconds_bucket" in metrics and "byom_queue_items 0.0" in metrics


def test_one_text_answers_with_the_likeliest_classes_and_says_what_was_cut(client):
    one = client.post("/predict", json={"task": "c", "text": "good", "top": 2}).json()["answers"][0]
    assert len(one["probabilities"]) == 2 and one["score"] == max(one["probabilities"].values())
    whole, long = client.post("/predict", json={"task": "c", "texts": ["my " * 10, "my " * 11]}).json()["answers"]
    assert "truncated" not in whole and long["truncated"] is True  # 12 tokens, of which two are special


DEEP = b"[" * 20_000
REFUSED = {
    "unknown task": ({"task": "aa", "text": "x"}, 404, "did you mean 'a'"),
    "no task": ({"text": "x"}, 422, "no router"),
    "task is a number": ({"task": 3, "text": "x"}, 422, "a number where a name"),
    "nothing": ({"task": "a"}, 422, "one of the fields text and texts"),
    "two fields": ({"task": "a", "text": "x", "texts": ["y"]}, 422, "one of the fields"),
    "misspelt": ({"task": "a", "txt": "x"}, 422, "did you mean 'text'"),
    "empty batch": ({"task": "a", "texts": []}, 422, "the list is empty"),
    "many": ({"task": "a", "texts": ["x"] * 17}, 413, "17 items in one request, and 16"),
    "numbers": ({"task": "a", "texts": ["x", 3]}, 422, "a number where a text"),
    "null": ({"task": "a", "text": None}, 422, "null where a text"),
    "nested": ({"task": "a", "texts": [["x"]]}, 422, "a list where a text"),
    "long": ({"task": "a", "text": "x" * 2001}, 413, "2,001 characters"),
    "top": ({"task": "a", "text": "x", "top": True}, 422, "top is not a whole number"),
    "a list": ([1], 422, "a list where an object"),
    "no JSON": (b"{text", 400, "not JSON"),
    "not UTF-8": (b'{"task": "a", "text": "\xff"}', 400, "not JSON"),
    "deep": (DEEP, 400, "nested too deeply"),
    "half a pair": (b'{"task": "a", "text": "\\ud800"}', 422, "surrogate"),
    "large": (b" " * 50_001, 413, "larger than 0.05 MB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_requests_are_refused_in_a_sentence(client, case):
    sent, status, said = REFUSED[case]
    response = client.post("/predict", content=sent if isinstance(sent, bytes) else json.dumps(sent))
    assert response.status_code == status and said in response.json()["error"]


def test_odd_pages_methods_and_uploads_are_refused_in_a_sentence(client):
    assert client.get("/nothing").status_code == 404 and "GET /" in client.get("/nothing").json()["error"]
    assert client.get("/predict").status_code == 405 and "POST /predict" in client.get("/predict").json()["error"]
    upload = client.post("/predict", files={"image": b"x"}, data={"task": "a"})
    assert upload.status_code == 415 and "sent as JSON" in upload.json()["error"]
    broken = client.post("/predict", content=b"xx", headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert broken.status_code == 400 and "upload" in broken.json()["error"]


def test_a_chunked_body_is_refused_before_all_of_it_is_read():
    read = 0

    def chunks():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield b" " * 10_000

    sent, source = [], chunks()

    async def receive():
        return {"type": "http.request", "body": next(source), "more_body": True}

    async def send(message):
        sent.append((read, message))

    async def app(scope, receive, send):
        raise AssertionError("the body is too large for the application to see")

    limited = BodyLimit(app, OPTIONS, linger=0)
    asyncio.run(limited({"type": "http", "headers": []}, receive, send))
    assert sent[0][1]["status"] == 413 and sent[0][0] == 6  # 60,000 of 10 million bytes


class Slow(Model):
    """A model that answers when it is let, and fails where it is told to."""

    tasks = MappingProxyType({task: Served(task, "features", "text") for task in "ab"})

    def __init__(self):
        self.gate, self.busy, self.seen = threading.Event(), threading.Event(), []

    def switch(self, task):
        if task == "b":
            raise CheckpointError("b is lost")
        self.held = task

    def predict(self, items):
        self.busy.set()
        assert self.gate.wait(10)
        self.seen += items
        if "fail" in items:
            raise RuntimeError("out of memory")
        return [{"features": []} for _ in items]


def in_flight(client, *texts):
    """Send requests that nobody has answered yet; return their futures and the pool."""
    pool = concurrent.futures.ThreadPoolExecutor(8)
    sent = []
    for text in texts:
        sent.append(pool.submit(client.post, "/predict", json={"task": "a", "text": text}))
        time.sleep(0.02)
    return sent, pool


def test_a_request_that_waited_too_long_is_given_up_and_not_computed():
    model = Slow()
    with TestClient(of_model(model, Options(timeout=0.1, batch=1))) as client:
        sent, pool = in_flight(client, "first", "second")
        assert [f.result().status_code for f in sent] == [504, 504] and "0.1 s" in sent[1].result().json()["error"]
        model.gate.set()
        assert client.post("/predict", json={"task": "a", "text": "third"}).status_code == 200
        pool.shutdown()
    assert model.seen == ["first", "third"]


def test_a_full_queue_refuses_and_says_when_to_come_back():
    model = Slow()
    with TestClient(of_model(model, Options(queue=2, items=2, batch=1))) as client:
        sent, pool = in_flight(client, "1")
        assert model.busy.wait(5)
        more, another = in_flight(client, "2", "3")
        full = client.post("/predict", json={"task": "a", "text": "4"})
        assert full.status_code == 503 and full.headers["Retry-After"] and "queue holds 2" in full.json()["error"]
        model.gate.set()
        assert [f.result().status_code for f in sent + more] == [200, 200, 200]
        pool.shutdown(), another.shutdown()


def test_at_the_end_what_runs_is_answered_and_what_waits_is_refused():
    model = Slow()
    app = of_model(model, Options(batch=1))
    with TestClient(app) as client:
        (runs, waits), pool = in_flight(client, "runs", "waits")
        app.state.worker.close()
        assert waits.result().status_code == 503 and "shutting down" in waits.result().json()["error"]
        assert client.get("/health").status_code == 503
        assert client.post("/predict", json={"task": "a", "text": "late"}).status_code == 503
        model.gate.set()
        assert runs.result().status_code == 200
        pool.shutdown()
    assert model.seen == ["runs"]


def test_a_batch_that_fails_is_told_so_and_the_next_is_answered(caplog):
    model = Slow()
    model.gate.set()
    with TestClient(of_model(model, Options())) as client:
        failed = client.post("/predict", json={"task": "a", "text": "fail"})
        assert failed.status_code == 500 and "out of memory" in failed.json()["error"]
        assert client.post("/predict", json={"task": "a", "text": "x"}).status_code == 200


def test_a_model_that_cannot_switch_any_more_is_reported_and_answers_nothing(caplog):
    model = Slow()
    model.gate.set()
    with TestClient(of_model(model, Options())) as client:
        for task in "ba":
            gone = client.post("/predict", json={"task": task, "text": "x"})
            assert gone.status_code == 500 and "b is lost" in gone.json()["error"]
            assert "Traceback" not in gone.text
        assert client.get("/health").status_code == 503


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "bundle"
    models, processor = bundles.vit_classifiers(folder)
    options = Options(device="cpu", megapixels=0.5, body=1)
    with TestClient(create_app(folder, options)) as client:
        yield client, models, processor


def png(image):
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def test_uploads_and_base64_have_the_answers_of_the_tasks_own_models(images):
    client, models, processor = images
    image = Image.radial_gradient("L").convert("RGB")
    encoded = base64.b64encode(png(image)).decode()
    for task in "ab":
        with torch.no_grad():
            row = models[task](**processor(images=image, return_tensors="pt")).logits.softmax(-1)[0]
        uploaded = client.post("/predict", files=[("image", png(image))] * 2, data={"task": task})
        sent = client.post("/predict", json={"task": task, "image": f"data:image/png;base64,{encoded}"})
        answers = uploaded.json()["answers"] + sent.json()["answers"]
        assert len(answers) == 3 and all(close(one, row, task) for one in answers)


def test_what_is_no_image_or_too_large_a_one_is_refused(images):
    client, *_ = images
    bomb = png(Image.new("1", (3000, 3000)))  # 1 KB that would be 27 MB
    whole = png(Image.radial_gradient("L"))
    cases = ((b"no image", 422, "cannot be read"), (bomb, 413, "0.5 million pixels"), (whole[:-900], 422, "cannot be"))
    for content, status, said in cases:
        refused = client.post("/predict", files={"image": content}, data={"task": "a"})
        assert refused.status_code == status and said in refused.json()["error"]
    for sent, said in (({"image": "%%%"}, "not base64"), ({"image": 3}, "a number where"), ({"text": "x"}, "image")):
        refused = client.post("/predict", json={"task": "a"} | sent)
        assert refused.status_code == 422 and said in refused.json()["error"]
    assert client.post("/predict", data={"task": "a", "image": "x"}, files={"images": whole}).status_code == 422


def test_the_page_needs_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert page.status_code == 200 and "http://" not in page.text and "https://" not in page.text
