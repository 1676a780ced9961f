"""Draw report.png for the README: the head of a run's page.

python .asset/make_report.py outputs/lora_tiny
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

output_dir = Path(sys.argv[1])
chromium = shutil.which("chromium")
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 1000, "height": 750}, reduced_motion="reduce")
    page.goto((output_dir / "report.html").resolve().as_uri())
    page.evaluate("frame.value = 6; frame.oninput()")
    page.wait_for_timeout(500)  # milliseconds, to decode the images
    page.screenshot(path=Path(__file__).with_name("report.png"))
