"""A real browser and a real MLflow server for tests, both on this machine alone.

Without Chromium the tests that need it are skipped; with ``OUROBOROS_REQUIRE_BROWSER`` set, as in CI, they fail.
"""

import base64
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from PIL import Image

from tests.processes import wait_until

T = TypeVar("T")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing beyond this machine can be asked
)


class Browser:
    """Chromium over its driver; what a test asks of a page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of this size; what it logs and requests is counted from here on."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for log in ("performance", "browser"):
            self.driver.get_log(log)
        self.driver.get("about:blank")  # a change of the part behind # alone would not load anything
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], T], what: str, seconds: float = 40) -> T:
        """The first true value of ``condition``, within a bound."""
        found: list[T] = []

        def holds() -> bool:
            found[:] = [condition()]
            return bool(found[0])

        wait_until(holds, seconds, f"{what} at {self.driver.current_url}")
        return found[0]

    def wait_for_text(self, *texts: str) -> None:
        """Until the page shows each of these."""
        for text in texts:
            self.wait(lambda text=text: text in self.run("return document.body.innerText"), repr(text))

    def click(self, xpath: str) -> None:
        """Click what an XPath finds, once it is there."""
        element = self.wait(lambda: self.driver.find_elements("xpath", xpath), xpath)[0]
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        self.wait(lambda: _clicked(element), f"a click on {xpath}")

    def requests(self) -> list[str]:
        """Addresses asked for since :meth:`open`."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if url != "about:blank"]

    def complaints(self) -> list[str]:
        """What the console says is wrong since :meth:`open`."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """A PNG of 256 colours: of the window, or of the page down to ``height``."""
        options: dict[str, Any] = {}
        if height:
            width = self.run("return window.innerWidth")
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
            options = {"captureBeyondViewport": True, "clip": clip}
        content = base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"])
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh browser, or a skipped test where there is none."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        reason = "no browser, so nobody looked at the pages: apt-get install chromium chromium-driver"
        warnings.warn(reason, stacklevel=2)  # unlike a skipped test, it is seen in the summary
        (pytest.fail if os.environ.get("OUROBOROS_REQUIRE_BROWSER") else pytest.skip)(reason)
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driven = Chrome(options=options, service=Service(driver))
        try:
            yield Browser(driven)
        finally:
            driven.quit()


def _clicked(element: Any) -> bool:
    from selenium.common.exceptions import WebDriverException

    try:
        element.click()
    except WebDriverException:  # something still moves over it
        return False
    return True
