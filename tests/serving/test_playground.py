"""The page in a real browser: type, stream, stop, errors, reload, keyboard, a phone's width, a key."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openai_process import OpenAIServer
from serving import PATIENCE_S

selenium = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402 - only where there is a selenium
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs the packages chromium and chromium-driver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves sockets to the collector
]


class Page:
    """The playground in a browser window of its own."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get(url)
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.get(url)
        self.until(lambda: self.text("#model") == "mpt-8m")

    def until(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, PATIENCE_S, 0.05).until(lambda _: condition())

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [e.text for e in self.browser.find_elements(By.CSS_SELECTOR, selector)]

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def set(self, id: str, value: str) -> None:
        script = """
            const field = document.getElementById(arguments[0]);
            field.value = arguments[1];
            field.dispatchEvent(new Event("input"));"""
        self.browser.execute_script(script, id, value)

    def say(self, text: str) -> None:
        self.one("#input").send_keys(text, Keys.ENTER)

    def answered(self) -> None:
        self.until(lambda: self.one("#send").is_enabled() and not self.texts(".running"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,800",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield running
    running.quit()


@pytest.fixture
def page(browser: Any, openai_server: OpenAIServer) -> Iterator[Page]:
    browser.get_log("browser"), browser.get_log("performance")
    yield Page(browser, openai_server.url)
    serious = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry["message"] for entry in serious if "status of 40" not in entry["message"]] == []


def requested(browser: Any) -> list[dict[str, Any]]:
    """Return the requests of the page since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_a_conversation_streams_and_is_still_there_after_a_reload(page: Page) -> None:
    page.set("seed", "1")
    page.say("Hi, I'd like a latte.")
    page.answered()
    page.say("Thanks!")
    page.answered()
    turns = page.texts(".turn .text")
    assert (len(turns), turns[0], turns[2]) == (4, "Hi, I'd like a latte.", "Thanks!")
    numbers = page.texts(".turn.assistant .numbers")
    assert all("first after" in n and "token" in n for n in numbers), numbers
    sent = [json.loads(r["postData"]) for r in requested(page.browser) if r.get("postData")]
    assert [len(body["messages"]) for body in sent] == [1, 3]
    assert sent[1]["messages"][1] == {"role": "assistant", "content": turns[1]}

    page.browser.refresh()
    page.until(lambda: page.texts(".turn .text") == turns)
    assert page.one("#seed").get_attribute("value") == "1"
    page.one("#clear").click()
    assert page.texts(".turn") == []


def test_text_comes_while_it_is_generated_and_stop_stops_it(page: Page) -> None:
    page.one("#tab-continue").click()
    page.set("max_tokens", "1024")
    page.set("repetition_guard", "0")
    page.say("Once upon a time")
    seen = set()

    def growing() -> bool:
        seen.add(page.text(".turn.assistant .text"))
        return len(seen) > 3

    page.until(growing)
    assert all(text.startswith("Once upon a time") for text in seen)
    page.one("#stop").click()
    page.answered()
    assert "stopped by you" in page.text(".numbers")
    kept = page.text(".turn.assistant .text")
    assert len(kept) >= max(map(len, seen))
    page.say("The king")
    page.until(lambda: page.one("#stop").is_enabled())
    page.one("#input").send_keys(Keys.ESCAPE)
    page.answered()
    assert ["stopped by you" in n for n in page.texts(".numbers")] == [True, True]


def test_an_instruction_goes_with_its_text_and_stands_alone(page: Page) -> None:
    page.one("#tab-instruct").click()
    page.set("max_tokens", "8")
    requested(page.browser)
    for instruction in ("Shorten this.", "Say hello."):
        page.one("#extra").clear()
        if instruction == "Shorten this.":
            page.one("#extra").send_keys("A long text.")
        page.say(instruction)
        page.answered()
    sent = [json.loads(r["postData"]) for r in requested(page.browser) if r.get("postData")]
    assert [(b["chat_template"], b["messages"]) for b in sent] == [
        ("dolly", [{"role": "user", "content": "Shorten this.\nA long text."}]),
        ("dolly", [{"role": "user", "content": "Say hello."}]),
    ]


def test_an_error_is_shown_and_the_page_goes_on(page: Page) -> None:
    page.set("seed", "minus one")
    page.say("Hi")
    page.answered()
    assert page.texts(".error") == ["`seed` must be a whole number, got a string of 9 characters"]
    assert page.one("#input").get_attribute("value") == "Hi"
    page.set("seed", "1")
    page.say("")
    page.answered()
    assert len(page.texts(".turn.assistant")) == 1


def test_what_models_and_people_write_is_never_markup(page: Page) -> None:
    page.set("max_tokens", "8")
    page.say("<img src=x onerror=alert(1)><b>bold</b>")
    page.answered()
    assert page.texts(".turn.user .text") == ["<img src=x onerror=alert(1)><b>bold</b>"]
    assert page.texts("#log img, #log b") == []


def test_the_keyboard_is_enough(page: Page) -> None:
    assert page.browser.switch_to.active_element == page.one("#input")
    page.one("#tab-chat").send_keys(Keys.ARROW_RIGHT)
    assert page.browser.switch_to.active_element == page.one("#tab-instruct")
    assert page.one("#tab-instruct").get_attribute("aria-selected") == "true"
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert page.browser.switch_to.active_element == page.one("#tab-continue")
    page.one("#input").send_keys("one", Keys.SHIFT, Keys.ENTER)
    page.one("#input").send_keys(Keys.NULL)
    assert page.texts(".turn") == []
    page.one("#temperature").send_keys(Keys.ARROW_RIGHT)
    assert page.text("label[for=temperature] output") == "0.75"


def test_it_is_usable_on_a_phone_and_in_the_dark(page: Page) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    try:
        page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        page.browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        )
        page.browser.refresh()
        page.until(lambda: page.text("#model") == "mpt-8m")
        assert page.browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert page.browser.execute_script("return document.documentElement.dataset.theme") == "dark"
        assert not page.one("#temperature").is_displayed()
        page.one("#parameters summary").click()
        assert page.one("#temperature").is_displayed()
        assert page.one("#send").rect["y"] + page.one("#send").rect["height"] <= 844
        page.one("#theme").click()
        assert page.browser.execute_script("return document.documentElement.dataset.theme") == "light"
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_asks_nobody_but_its_own_server(page: Page, openai_server: OpenAIServer) -> None:
    requested(page.browser)
    page.browser.refresh()
    page.until(lambda: page.text("#model") == "mpt-8m")
    urls = [r["url"] for r in requested(page.browser)]
    assert [url for url in urls if not url.startswith((openai_server.url, "data:"))] == []


def test_it_asks_for_a_key_where_the_server_does(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("open-sesame\n", encoding="utf-8")
    with OpenAIServer({"MPT_API_KEYS_FILE": str(tmp_path / "keys")}) as locked:
        browser.get(locked.url)
        WebDriverWait(browser, PATIENCE_S).until(lambda _: browser.find_element(By.ID, "key").is_displayed())
        browser.find_element(By.ID, "key").send_keys("open-sesame", Keys.TAB)
        WebDriverWait(browser, PATIENCE_S).until(lambda _: browser.find_element(By.ID, "model").text == "mpt-8m")
        browser.find_element(By.ID, "input").send_keys("Hi", Keys.ENTER)
        WebDriverWait(browser, PATIENCE_S).until(
            lambda _: (
                browser.find_elements(By.CSS_SELECTOR, ".assistant .numbers")
                and browser.find_element(By.ID, "send").is_enabled()
            )
        )
        assert browser.find_elements(By.CSS_SELECTOR, ".error") == []
