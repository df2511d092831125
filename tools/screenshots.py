"""Takes the documentation's screenshot of the playground, with a real browser, a real server and the embedded model.

python tools/screenshots.py      writes docs/images/playground.png; needs the packages chromium and chromium-driver
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "playground.png"
SIZE = (1080, 640)
PROMPTS = ("Hi, I'd like a latte.", "Oat milk, please. How much is it?")


def main() -> None:
    """Write the picture."""
    sys.path[:0] = [str(ROOT / "score"), str(ROOT / "tests" / "support")]
    from openai_process import OpenAIServer

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={SIZE[0]},{SIZE[1]}")
    options.binary_location = shutil.which("chromium") or ""
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        with OpenAIServer() as openai_server:
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False},
            )
            converse(browser, openai_server.url)
            browser.save_screenshot(str(PICTURE))
    finally:
        browser.quit()
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1000:.0f} kB")


def converse(browser: Any, url: str) -> None:
    """Send PROMPTS on the page and wait for the answers."""
    browser.get(url)
    wait = WebDriverWait(browser, 60)
    wait.until(lambda _: browser.find_element(By.ID, "model").text)
    set_field = """
        const field = document.getElementById(arguments[0]);
        field.value = arguments[1];
        field.dispatchEvent(new Event("input"));"""
    browser.execute_script(set_field, "seed", "3")
    browser.execute_script(set_field, "temperature", "0.5")
    for prompt in PROMPTS:
        browser.find_element(By.ID, "input").send_keys(prompt, Keys.ENTER)
        wait.until(
            lambda _: (
                browser.find_element(By.ID, "send").is_enabled()
                and not browser.find_elements(By.CSS_SELECTOR, ".running")
            )
        )
    browser.execute_script("document.activeElement.blur()")


if __name__ == "__main__":
    main()
