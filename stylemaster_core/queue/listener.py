"""What a ComfyUI server tells by its websocket: steps, and the ends of prompts.

Results do not depend on it: an end that is told makes the queue look at once, and where nothing is
told it looks by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import aiohttp

from . import answers
from .answers import AnswerError
from .client import MAX_ANSWER_BYTES, ComfyClient

logger = logging.getLogger("stylemaster")

# Called with a server's address, the step and the number of steps.
OnStep = Callable[[str, int, int], None]
_HEARTBEAT_S = 20.0
_FIRST_PAUSE_S = 0.5
_MAX_PAUSE_S = 30.0
_MAX_MESSAGES_PER_S = 500


class Listener:
    """Listen to one server; a lost connection is made again after a while.

    Args:
        client: the server. It tells about prompts only to who has queued them.
        on_end: called with the id of a prompt that has ended.
        on_change: called when the connection is made or lost; ends may have been missed.
        on_step: called with each step; None if nobody wants to see them.
    """

    def __init__(
        self,
        client: ComfyClient,
        on_end: Callable[[str], None],
        on_change: Callable[[], None],
        on_step: OnStep | None = None,
    ) -> None:
        self._client = client
        self._on_end = on_end
        self._on_change = on_change
        self._on_step = on_step
        self.is_connected = False

    async def run(self) -> None:
        """Listen until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            since = time.monotonic()
            try:
                await self._listen()
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
                logger.debug("No messages from %s: %s", self._client.url, answers.plain(error))
            finally:
                self._set_connected(False)
            lasted_s = time.monotonic() - since
            pause_s = _FIRST_PAUSE_S if lasted_s > pause_s else min(2 * pause_s, _MAX_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _listen(self) -> None:
        connect = self._client.session.ws_connect(
            f"{self._client.url}/ws",
            params={"clientId": self._client.client_id},
            heartbeat=_HEARTBEAT_S,
            autoping=False,  # answered here, or a flood of pings would never let go
            max_msg_size=MAX_ANSWER_BYTES,
        )
        async with await asyncio.wait_for(connect, _HEARTBEAT_S) as socket:
            self._set_connected(True)
            window, count = time.monotonic(), 0
            async for message in socket:
                # Previews come as binary messages and are skipped.
                if message.type == aiohttp.WSMsgType.TEXT:
                    self._take(message.data)
                elif message.type == aiohttp.WSMsgType.PING:
                    await socket.pong(message.data)
                count += 1
                if count >= _MAX_MESSAGES_PER_S:
                    # A flood is read no faster than this, and the server has to wait.
                    await asyncio.sleep(max(0.0, window + 1 - time.monotonic()))
                    window, count = time.monotonic(), 0

    def _set_connected(self, is_connected: bool) -> None:
        if is_connected != self.is_connected:
            self.is_connected = is_connected
            self._on_change()

    def _take(self, text: str) -> None:
        try:
            message = answers.decode(text.encode(), answers.Message)
            if message.type == "executing":
                executing = answers.decode(message.data, answers.Executing)
                if executing.node is None and executing.prompt_id is not None:
                    self._on_end(executing.prompt_id)
            elif message.type == "progress" and self._on_step is not None:
                progress = answers.decode(message.data, answers.Progress)
                self._on_step(self._client.url, int(progress.value), int(progress.max))
        except (AnswerError, ValueError, OverflowError) as error:
            # Node packs send messages of their own; one of no use to us is no fault.
            logger.debug("A message of %s was skipped: %s", self._client.url, error)
