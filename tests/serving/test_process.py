"""``byom serve`` as a process: its address, its end, its page in a browser."""

import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from byom.__main__ import main
from tests.serving import bundles

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
def test_a_process_answers_shows_its_page_and_ends_well_on_sigterm(tmp_path):
    bundles.bert_classifiers(tmp_path / "bundle")
    command = [sys.executable, "-m", "byom", "serve", str(tmp_path / "bundle"), "port=0", "device=cpu", "body=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[0]
            assert url.startswith("http://127.0.0.1:")
            said = httpx.post(f"{url}/predict", json={"task": "b", "text": "good film"}).json()["answers"][0]
            assert said["label"] in bundles.LABELS["b"]
            large = httpx.post(f"{url}/predict", content=(b" " * 100_000 for _ in range(40)))
            assert large.status_code == 413 and "larger than 1 MB" in large.json()["error"]
            if CHROMIUM:
                _require_page(f"{url}/?" + urllib.parse.urlencode({"task": "b", "text": "good film"}), said)
            with ThreadPoolExecutor(4) as pool:
                many = {"task": "a", "texts": ["good bad film card lost"] * 64}
                sent = [pool.submit(httpx.post, f"{url}/predict", json=many, timeout=20) for _ in range(4)]
                time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                ended = [answer.result() for answer in sent if not isinstance(answer.exception(), httpx.ConnectError)]
            assert all(answer.status_code in (200, 503) for answer in ended)
            assert process.wait(10) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def _require_page(url, said):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    page = subprocess.run([CHROMIUM, *options, url], capture_output=True, text=True, timeout=60, check=True).stdout
    assert f'<p id="label">{said["label"]}</p>' in page
    assert f"<span>{100 * said['score']:.1f} %</span>" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["batch=0"], "batch=0 must be a whole number, 1 or more"),
        (["batch=x"], "batch=x is not a whole number"),
        (["port=70000"], "the largest is 65535"),
        (["timeout=nan"], "timeout=nan is not a positive number"),
        (["queue=3"], "no room for one request"),
        (["prot=1"], "did you mean 'port'"),
        (["port=1", "port=2"], "given twice"),
        (["host=300.1.1.1"], "cannot be listened on"),
        (["port=0"], "it has no serve.json"),
    ],
)
def test_options_and_bundles_that_cannot_be_served_end_in_a_sentence(options, said, old, capsys):
    assert main(["serve", str(old), *options]) == 1
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A bundle of the time before bundles held what predicts."""
    folder = tmp_path_factory.mktemp("old") / "bundle"
    bundles.bert_classifiers(folder)
    notes = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    (folder / "bundle.json").write_text(json.dumps({k: v for k, v in notes.items() if k != "kind"}), encoding="utf-8")
    return folder


def test_a_port_that_is_taken_ends_in_a_sentence(old, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(old), f"port={taken.getsockname()[1]}"]) == 1
    assert "cannot be listened on (Address already in use)" in capsys.readouterr().err


def test_without_its_libraries_the_command_names_what_to_install(old, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("byom.cli.server.find_spec", lambda name: None if name == "fastapi" else find(name))
    assert main(["serve", str(old)]) == 1
    assert "byom serve needs fastapi: pip install 'byom[serve]'" in capsys.readouterr().err
