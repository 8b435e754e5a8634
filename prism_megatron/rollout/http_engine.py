"""What clients of engine servers share: requests with a key, errors, what may be sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
import torch
from numpy.typing import NDArray
from torch import Tensor

from prism_megatron.rollout.vocabulary import Vocabulary
from prism_megatron.types import Prompt

NEVER = -1e9
"""Added to the logit of a token that must not be sampled."""
CONTROL_SECONDS = 300
"""Longest wait for anything else, so that a server that hangs is noticed."""


class HttpEngine:
    """Requests to one server: blocking ones to control it, asynchronous ones to sample."""

    def __init__(
        self,
        url: str,
        api_key: str,
        vocabulary: Vocabulary,
        *,
        routes: bool = False,
    ) -> None:
        """routes: ask for the experts that tokens took, which the server was started for."""
        self.url, self.vocabulary, self.routes = url, vocabulary, routes
        self._settings: dict[str, Any] = {
            "base_url": url,
            "headers": {"Authorization": f"Bearer {api_key}"},
            "timeout": CONTROL_SECONDS,
            # as many requests at once as there are prompts; the server queues them
            "limits": httpx.Limits(max_connections=None),
        }
        self._blocking = httpx.Client(**self._settings)
        self._asynchronous: httpx.AsyncClient | None = None

    def get(self, path: str) -> Any:
        """The answer as JSON or text; RuntimeError with what the server says if it failed."""
        return checked(self._blocking.get(path, timeout=CONTROL_SECONDS))

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, seconds: float = CONTROL_SECONDS
    ) -> Any:
        """See get; seconds: longest wait, httpx.TimeoutException after that."""
        return checked(self._blocking.post(path, json=dict(body or {}), timeout=seconds))

    async def ask(
        self, path: str, body: Mapping[str, Any], prompt: Prompt
    ) -> tuple[Any, httpx.Headers]:
        """Have a prompt answered, any number at once in one event loop; see get.

        It takes as long as it takes: whoever asks knows how long responses may become.
        ValueError if the server refuses the prompt itself.
        """
        if self._asynchronous is None:
            self._asynchronous = httpx.AsyncClient(**self._settings)
        patience = httpx.Timeout(CONTROL_SECONDS, read=None)
        response = await self._asynchronous.post(path, json=dict(body), timeout=patience)
        if response.status_code == httpx.codes.BAD_REQUEST:
            raise ValueError(f"row {prompt.row_id}: {response.url} says: {response.text[:2000]}")
        return checked(response), response.headers

    async def health(self) -> None:
        """Raise if the server does not answer."""
        await asyncio.to_thread(self.get, "/health")

    async def close(self) -> None:
        """Let go of the connections of this event loop; another one may sample afterwards."""
        if self._asynchronous is not None:
            await self._asynchronous.aclose()
            self._asynchronous = None


def small_routes(chosen: NDArray[Any], tokens: int) -> Tensor:
    """An engine's choice of experts as Rollout holds it, [tokens, layers * k]."""
    kind = torch.uint8 if chosen.max(initial=0) < 256 else torch.int16
    return torch.from_numpy(chosen.reshape(tokens, -1)).to(kind)


def checked(response: httpx.Response) -> Any:
    """The answer; RuntimeError with what the server says if it failed."""
    if response.is_error:
        raise RuntimeError(f"{response.url}: status {response.status_code}, {response.text[:2000]}")
    if "json" not in response.headers.get("content-type", ""):
        return response.text
    answer = response.json()
    if isinstance(answer, dict) and answer.get("success") is False:
        raise RuntimeError(f"{response.url}: {answer.get('message')}")
    return answer
