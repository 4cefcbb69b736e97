"""The current step of a ComfyUI server, from its websocket; results do not depend on it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import threading
from collections.abc import Callable

logger = logging.getLogger("stylemaster")

# Called with a server's address, the step and the number of steps.
OnStep = Callable[[str, int, int], None]
_RECONNECT_S = 3.0


class StepListener:
    """Listen to one server in a thread of its own, from construction to `close`.

    A lost connection is made again after a while; meanwhile there are only no steps.

    Args:
        url: the server's address.
        client_id: the id that prompts are queued with; a server tells steps to nobody else.
        on_step: called in the thread.
    """

    def __init__(self, url: str, client_id: str, on_step: OnStep) -> None:
        self._url = url
        self._client_id = client_id
        self._on_step = on_step
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._listen())
        self._thread = threading.Thread(target=self._run, name=f"steps {url}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Disconnect and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    async def _listen(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.ws_connect(
                        f"{self._url}/ws",
                        params={"clientId": self._client_id},
                        heartbeat=20,
                        max_msg_size=0,
                    ) as socket:
                        async for message in socket:
                            if message.type == aiohttp.WSMsgType.TEXT:
                                self._handle(json.loads(message.data))
                except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
                    logger.debug("No steps from %s: %s", self._url, error)
                await asyncio.sleep(_RECONNECT_S)

    def _handle(self, message: dict[str, dict[str, object]]) -> None:
        # Previews come as binary messages and are skipped.
        if message.get("type") == "progress":
            data = message["data"]
            self._on_step(self._url, int(str(data["value"])), int(str(data["max"])))


def can_listen() -> bool:
    """Return whether aiohttp, which speaks to the websocket, is installed."""
    return importlib.util.find_spec("aiohttp") is not None
