"""TensorBoard in a headless browser: what its pages draw, and the data that they fetched for it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

NEEDED = ("chromium", "chromedriver")
TIMEOUT = 60.0
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1400,4800"),
)
# the pages are trees inside trees, which no selector crosses
FIND = """
const [selector, inside] = arguments, found = [];
function look(tree) {
  for (const element of tree.querySelectorAll('*')) {
    if (element.matches(selector)) found.push(element);
    if (element.shadowRoot) look(element.shadowRoot);
  }
}
look(inside ? inside.shadowRoot : document);
return found;
"""


class Board:
    """TensorBoard on a folder of runs, and a browser that looks at it."""

    def __init__(self, runs: Path, profile: Path) -> None:
        with ExitStack() as stack:
            self._url = _serve(runs, stack)
            self._driver = stack.enter_context(browser(profile))
            # else lines end where they leave the range that most of their points are in
            self._driver.get(f"{self._url}data/environment")
            self._driver.execute_script("localStorage.setItem('_ignoreYOutliers', 'false')")
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def find(self, selector: str, inside: "WebElement | None" = None) -> "list[WebElement]":
        return self._driver.execute_script(FIND, selector, inside)

    def open(self, tab: str, card: str, drawn: str, n: int) -> "dict[str, list[WebElement]]":
        """Tag -> what is drawn on its cards, once every group is unfolded and something is on all of n cards."""
        from selenium.webdriver.support.ui import WebDriverWait

        self._driver.get(f"{self._url}#{tab}")

        def unfolded(_: object) -> "list[WebElement] | None":
            for heading in self.find("button.heading:not([open-button])"):
                self._driver.execute_script("arguments[0].click()", heading)
            cards = self.find(card)
            return cards if len(cards) >= n and all(self.find(drawn, one) for one in cards) else None

        cards = WebDriverWait(self._driver, TIMEOUT).until(unfolded, f"{n} cards in {tab}")
        found: dict[str, list[WebElement]] = {}
        for one in cards:
            found.setdefault(one.get_property("tag"), []).extend(self.find(drawn, one))
        return found

    def fetched(self, path: str) -> list[tuple[str, Any]]:
        """What the page has sent to this path, and the answers."""
        events = [json.loads(entry["message"])["message"] for entry in self._driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [
            (request["request"].get("postData", ""), json.loads(self._body(request["requestId"])))
            for request in sent
            if request["request"]["url"] == self._url + path
        ]

    def _body(self, request: str) -> str:
        return self._driver.execute_cdp_cmd("Network.getResponseBody", {"requestId": request})["body"]

    def screenshot(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        assert self._driver.save_screenshot(str(file))


@contextmanager
def browser(profile: Path) -> Iterator["Chrome"]:
    """A headless browser with an empty profile."""
    from selenium import webdriver  # half a second, which every test process would pay

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


def _serve(runs: Path, stack: ExitStack) -> str:
    """The address of a TensorBoard that is ready; it ends with the stack."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1", "--port", "0"]
    server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    stack.callback(server.terminate)
    assert server.stdout is not None
    said = ""
    for line in server.stdout:
        said += line
        if ready := re.search(r"TensorBoard \S+ at (http://\S+)", line):
            return ready[1]
    raise AssertionError(f"no TensorBoard:\n{said}")
