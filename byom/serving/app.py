"""The application: routes, and what becomes of each request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from byom.serving import inputs
from byom.serving.errors import Refusal
from byom.serving.limits import BodyLimit
from byom.serving.metrics import Metrics
from byom.serving.model import Model, Served
from byom.serving.open import open_bundle
from byom.serving.options import Options
from byom.serving.queue import Ticket
from byom.serving.worker import Worker

LOG = logging.getLogger("byom.serving")
PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src blob:"


def create_app(bundle: str | Path, options: Options | None = None) -> FastAPI:
    """Return the application that serves a bundle; its model's thread runs from startup to shutdown.

    Args:
        bundle: The bundle's folder.
        options: Limits and sizes; None takes the defaults.

    Raises:
        CheckpointError: If the folder is not a bundle, is damaged, or lacks what predicts.
    """
    options = options or Options()
    return of_model(open_bundle(Path(bundle), options), options)


def of_model(model: Model, options: Options) -> FastAPI:
    """Return the application that serves a model; see `create_app`."""
    served = _Server(model, options)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        yield
        served.worker.close()
        await asyncio.to_thread(served.worker.join, options.timeout)

    app = FastAPI(title="byom", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker = served.worker
    app.add_middleware(BodyLimit, options=options)
    for path, answer in (("/tasks", served.tasks), ("/health", served.health), ("/metrics", served.told), ("/", _page)):
        app.add_api_route(path, answer, methods=["GET"], response_model=None)
    app.add_api_route("/predict", served.predict, methods=["POST"], response_model=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)
    return app


class _Server:
    def __init__(self, model: Model, options: Options) -> None:
        self.model, self.options = model, options
        self.worker = Worker(model, options)
        self.metrics = Metrics(self.worker.waiting)
        self.worker.switched, self.worker.batched = self._switched, self.metrics.batches.observe

    def _switched(self, seconds: float) -> None:
        self.metrics.switches.inc()
        self.metrics.switching.observe(seconds)

    async def tasks(self) -> Response:
        told = [task.to_json() for task in self.model.tasks.values()]
        limits = {"items": self.options.items, "megabytes": self.options.body, "characters": self.options.characters}
        return JSONResponse({"tasks": told, "routes": self.model.routes, "limits": limits})

    async def health(self) -> Response:
        if self.worker.healthy:
            return JSONResponse({"status": "ok", "tasks": len(self.model.tasks), "waiting": self.worker.waiting()})
        reason = "the model's thread has ended; restart the server" if self.worker.failure else "shutting down"
        return JSONResponse({"status": "down", "error": reason}, 503)

    async def told(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def predict(self, request: Request) -> Response:
        start, label = time.monotonic(), ["unknown"]
        try:
            answers = await self._answers(request, label, start)
            response = JSONResponse(answers)
        except Refusal as refusal:
            response = JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)
        self.metrics.requests.labels(label[0], response.status_code).inc()
        self.metrics.seconds.labels(label[0]).observe(time.monotonic() - start)
        return response

    async def _answers(self, request: Request, label: list[str], start: float) -> dict[str, Any]:
        asked = await self._asked(request)
        label[0] = asked.task or "routed"
        any_task = next(iter(self.model.tasks.values()))
        if any_task.input == "image":
            items = [await asyncio.to_thread(self._image, content) for content in asked.items]
        else:
            items = [self.model.prepare(item) for item in asked.items]
        answers = await self._waited(request, asked.task, items, start)
        cut = [_cut(one, self.model.tasks[one["task"]], asked.top) for one in answers]
        return {"answers": cut, "routed": asked.task is None}

    def _image(self, content: bytes) -> Any:
        return self.model.prepare(inputs.image(content, self.options))

    async def _asked(self, request: Request) -> inputs.Asked:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        given = (self.model.tasks, self.options)
        if kind == "multipart/form-data":
            try:
                form = await request.form(max_files=self.options.items + 1, max_fields=16)
            except HTTPException as error:
                raise Refusal(
                    400, f"the upload cannot be read ({error.detail}); send it with -F image=@FILE"
                ) from error
            async with _closing(form):
                return await inputs.from_form(form, *given, routes=self.model.routes)
        return inputs.from_json(await request.body(), *given, routes=self.model.routes)

    async def _waited(self, request: Request, task: str | None, items: list[Any], start: float) -> list[dict[str, Any]]:
        """Wait for the model; a request that is given up, by time or by the client, is not computed."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Refusal | None] = loop.create_future()
        ticket = Ticket(items, start, _deliverer(loop, done))
        self.worker.submit(task, ticket)
        left = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait(
                {done, left}, timeout=start + self.options.timeout - time.monotonic(), return_when="FIRST_COMPLETED"
            )
        finally:
            left.cancel()
            ticket.given_up = not done.done()
        if done.done():
            if refusal := done.result():
                raise refusal
            return ticket.answers
        if left.done() and not left.cancelled():
            raise Refusal(499, "the client closed the connection")
        raise Refusal(504, f"no answer within {self.options.timeout:g} s; ask again later, or serve with timeout=S")


def _deliverer(
    loop: asyncio.AbstractEventLoop, done: asyncio.Future[Refusal | None]
) -> Callable[[Refusal | None], None]:
    def settle(refusal: Refusal | None) -> None:
        if not done.done():
            done.set_result(refusal)

    def deliver(refusal: Refusal | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it the connection
            loop.call_soon_threadsafe(settle, refusal)

    return deliver


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def _closing(form: Any) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await form.close()


def _cut(answer: dict[str, Any], task: Served, top: int) -> dict[str, Any]:
    """Return an answer with the likeliest classes alone."""
    if "probabilities" not in answer or len(task.labels) <= top:
        return answer
    likeliest = sorted(answer["probabilities"].items(), key=lambda pair: -pair[1])[:top]
    return answer | {"probabilities": dict(likeliest)}


async def _page() -> Response:
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentences = {
        404: "there is no such page; GET / /tasks /health /metrics, POST /predict",
        405: "that method is not for this page; GET / /tasks /health /metrics, POST /predict",
    }
    return JSONResponse(
        {"error": sentences.get(error.status_code, str(error.detail))}, error.status_code, error.headers
    )


async def _unforeseen(_: Request, error: Exception) -> Response:
    LOG.error("a request failed", exc_info=error)
    return JSONResponse({"error": "the server failed on this request; its log says why"}, 500)
