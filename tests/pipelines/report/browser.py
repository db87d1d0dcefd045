"""A headless Chromium that opens a page and tells what it did: DevTools protocol over a WebSocket,
no driver needed.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
TROUBLE = (
    "Log.entryAdded",
    "Runtime.consoleAPICalled",
    "Runtime.exceptionThrown",
    "Page.javascriptDialogOpening",
)


class Tab:
    """One tab. `events` holds what the browser said since the last page was opened."""

    def __init__(self, channel: aiohttp.ClientWebSocketResponse) -> None:
        self._channel = channel
        self._number = 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._channel.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._channel.receive()).data)
            if message.get("id") == self._number:
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    async def open(self, path: Path, *, width: int, scheme: str) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.events.clear()
        await self.call("Page.navigate", url=path.resolve().as_uri())
        while await self.value("document.readyState") != "complete":
            await asyncio.sleep(0.05)
        await self.value(
            "document.querySelectorAll('img').forEach((each) => { each.loading = 'eager'; })"
        )
        await asyncio.sleep(0.3)

    async def value(self, expression: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=expression, returnByValue=True))[
            "result"
        ].get("value")

    def troubles(self) -> list[str]:
        return [json.dumps(each)[:500] for each in self.events if each.get("method") in TROUBLE]

    def requests(self) -> list[str]:
        sent = [each for each in self.events if each.get("method") == "Network.requestWillBeSent"]
        return [each["params"]["request"]["url"] for each in sent]


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Tab]:
    """Raises AssertionError where there is none: who asked for these tests wants to know."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    assert program, (
        f"tests with a browser were asked for, and none of {', '.join(NAMES)} is installed"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    )
    process = subprocess.Popen(
        [
            program,
            *options,
            f"--remote-debugging-port={port}",
            f"--user-data-dir={profile}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with aiohttp.ClientSession() as session:
            address = await _new_tab(session, port)
            async with session.ws_connect(address, max_msg_size=0) as channel:
                tab = Tab(channel)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await tab.call(f"{domain}.enable")
                yield tab
    finally:
        process.terminate()
        process.wait()


async def _new_tab(session: aiohttp.ClientSession, port: int) -> str:
    for _ in range(300):
        try:
            async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
                return str((await answer.json())["webSocketDebuggerUrl"])
        except aiohttp.ClientError:
            await asyncio.sleep(0.1)
    raise AssertionError("the browser did not start within 30 s")
