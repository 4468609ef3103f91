"""Take the pictures of docs/tutorial.md in a headless Chromium, in the folder in which its commands were run:

megagpt report runs/mine
python PATH/TO/docs/make_screenshots.py

It needs chromium and chromedriver (Debian: chromium, chromium-driver) and the extra dev. Write the day into the
tutorial.
"""

import io
import shutil
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

HERE = Path(__file__).parent
WIDTH = 760  # pixels
COLORS = 64  # of a picture: plots have few, and the files stay small
PICTURES = {  # file -> page, pixels from its top to begin at, height
    "tutorial_data.png": ("data/mine/report.html", 0, 715),
    "tutorial_run.png": ("runs/mine/report.html", 0, 775),
}


def take(browser: webdriver.Chrome, page: Path, top: int, height: int) -> Image.Image:
    """Return a picture of a part of a page."""
    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.resolve().as_uri())
    browser.execute_script(f"window.scrollTo(0, {top})")
    return Image.open(io.BytesIO(browser.get_screenshot_as_png()))


def main() -> None:
    """Take all pictures."""
    options = Options()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    options.binary_location = shutil.which("chromium") or "chromium"
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or "chromedriver"))
    try:
        for name, (page, top, height) in PICTURES.items():
            picture = take(browser, Path(page), top, height).convert("RGB").quantize(COLORS)
            picture.save(HERE / name, optimize=True)
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
