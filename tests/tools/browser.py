"""Restart and run notebooks in a real JupyterLab, in a headless Chromium, and take pictures: `make browser`.

Uses the Chromium of the system, or the one that `python -m playwright install chromium` brings. Works on copies of the
notebooks, in fast mode.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]


def run_all(page: Page, url: str, minutes: float) -> dict[str, int]:
    """Open a notebook, restart its kernel, run all cells; the counts of cells, of those that ran, of errors."""
    page.goto(url)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Restart Kernel and Run All Cells…").click()
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    busy = page.locator(".jp-InputArea-prompt", has_text="[*]:")
    busy.first.wait_for(timeout=60_000)  # the old numbers stay until then
    deadline = time.monotonic() + 60 * minutes
    while busy.count():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url.split('?')[0]}: still running after {minutes} minutes")
        page.wait_for_timeout(500)
    shown = [
        text.strip("[]: ")
        for text in page.locator(".jp-CodeCell .jp-InputArea-prompt").all_inner_texts()
    ]
    return {
        "code cells": page.locator(".jp-CodeCell").count(),
        "executed": max(
            (int(text) for text in shown if text.isdigit()), default=0
        ),  # collapsed ones show no number
        # JupyterLab shows an exception as it shows stderr.
        "errors": page.locator(
            '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'
        ).count(),
        "pictures": page.locator(".jp-RenderedImage img").count(),
    }


def serve(folder: Path, log: Path) -> tuple[subprocess.Popen, str, str]:
    """A JupyterLab on a free port, without news; its process, address and token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, settings = secrets.token_hex(8), folder / ".settings"
    settings.mkdir()
    quiet = {
        "@jupyterlab/apputils-extension:notification": {
            "fetchNews": "false",
            "checkForUpdates": False,
        }
    }
    # All cells in the page at once, not only those in view: they are counted.
    whole = {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}
    (settings / "overrides.json").write_text(json.dumps(quiet | whole))
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--allow-root",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
    ]
    options = [
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={folder}",
        f"--LabApp.app_settings_dir={settings}",
    ]
    told = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "DYSIGMA_FAST": "1",
        "DYSIGMA_FIGURES": str(folder / "figures"),
    }
    server = subprocess.Popen(
        command + options, env=told, cwd=folder, stdout=log.open("w"), stderr=subprocess.STDOUT
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api?token={token}", timeout=5)
            return server, address, token
        except OSError:
            time.sleep(0.5)
    server.terminate()
    raise RuntimeError(f"JupyterLab did not start; see {log}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=["00", "01"], help="numbers of notebooks (default: 00 01)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/browser"), help="folder for pictures"
    )
    parser.add_argument("--minutes", type=float, default=10, help="limit for one notebook")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder = Path(scratch).resolve()
        shutil.copytree(ROOT / "data" / "runs", folder / "data" / "runs")
        shutil.copytree(ROOT / "notebooks", folder / "notebooks")
        server, address, token = serve(folder, args.out / "jupyterlab.log")
        chromium = (
            shutil.which("chromium")
            or shutil.which("chromium-browser")
            or shutil.which("google-chrome")
        )
        try:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            for name in args.names:
                (path,) = (folder / "notebooks").glob(f"{name}_*.ipynb")
                page = browser.new_page(viewport={"width": 1200, "height": 1600})
                url = f"{address}/doc/tree/notebooks/{path.name}?token={token}&reset"
                counts = run_all(page, url, args.minutes)
                good = (
                    counts["executed"] == counts["code cells"] > 0
                    and not counts["errors"]
                    and counts["pictures"]
                )
                failed |= not good
                print(path.stem, "passed" if good else "FAILED", counts, flush=True)
                panel = page.locator(".jp-WindowedPanel-outer").first
                height = panel.evaluate("e => e.scrollHeight")
                for i, top in enumerate(range(0, max(1, height - 800), 1400)):
                    panel.evaluate("(e, top) => { e.scrollTop = top }", top)
                    page.wait_for_timeout(300)
                    page.screenshot(path=args.out / f"{path.stem}-{i:02d}.png")
                page.close()
            browser.close()
        finally:
            server.terminate()
            server.wait()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
