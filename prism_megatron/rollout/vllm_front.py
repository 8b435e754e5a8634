"""What vLLM's API server loads of this project, by --middleware; the trainer never does.

vLLM asks for its key at some paths, and not at those that load weights or call workers' methods.
Its answers do not tell the version of the weights, which only the workers know, and each question
to them stops the engine; so they are asked once after whatever may have changed it.
"""

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

VERSION = "x-weight-version"
"""The header of an answer with the version of the weights that sampled it, or the two versions
between which they changed meanwhile."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Front:
    """In front of every request: the key of VLLM_API_KEY, and an answer's weight version."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._authorization = f"Bearer {os.environ['VLLM_API_KEY']}".encode()
        self._version: int | None = None
        self._changes = 0
        self._asking = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI's specification."""
        # nobody here speaks by websockets, which the server would take without a key
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http" or not self._knows_key(scope):
            await _refuse(scope, send)
        elif scope["path"] == "/collective_rpc":
            self._change()
            try:
                await self.app(scope, receive, send)
            finally:
                self._change()
        elif scope["path"] == "/inference/v1/generate":
            await self._generate(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _knows_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._authorization)

    def _change(self) -> None:
        self._version, self._changes = None, self._changes + 1

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        before, started = await self._weight_version(scope), False

        async def send_with_version(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                after = await self._weight_version(scope)
                versions = str(after) if after == before else f"{before} to {after}"
                header = (VERSION.encode(), versions.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_version)
        except ValueError as error:
            if started:
                raise
            # a prompt that is refused; answered further out, it would cost the connection, with
            # which the next prompt may be on its way
            await _answer(send_with_version, 400, {"error": {"message": str(error)}})

    async def _weight_version(self, scope: Scope) -> int:
        # one question for all who want to know
        async with self._asking:
            if self._version is not None:
                return self._version
            changes = self._changes
            answers = await scope["app"].state.engine_client.collective_rpc("loaded_version")
            versions = sorted({version for [version] in answers})
            if len(versions) != 1:
                raise RuntimeError(f"the workers have weights of versions {versions}")
            # nothing may have changed it while they were asked
            if changes == self._changes:
                self._version = versions[0]
            return int(versions[0])


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await _answer(send, 401, {"error": "Unauthorized"})


async def _answer(send: Send, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
