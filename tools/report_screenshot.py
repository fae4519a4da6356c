"""Takes docs/images/report.png: the report of an artifact on a desktop, and its figures on a phone in the dark.

    make demo && python tools/report_screenshot.py [ARTIFACT]

The artifact is artifacts/demo unless another is named. Needs Debian's chromium.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.chromium import browse, find  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "report.png"
SIZE = (1240, 1500)
STAGE = """<!doctype html>
<meta charset="utf-8">
<style>
body { margin: 0; background: #cfd6de; }
iframe { position: absolute; top: 20px; border: 0; border-radius: 8px; transform-origin: top left; }
.desktop { left: 20px; width: 1100px; height: 2027px; transform: scale(.72); color-scheme: light; }
.phone { left: 832px; width: 390px; height: 1460px; color-scheme: dark; }
</style>
<iframe class="desktop" src="PAGE"></iframe><iframe class="phone" src="PAGE#figures"></iframe>
"""


def main() -> None:
    """Writes the picture."""
    artifact = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "artifacts" / "demo"
    page, chromium = artifact / "report.html", find()
    if not page.is_file():
        sys.exit(f"error: no report\n  where: {page}\n  fix: run `make demo`")
    if chromium is None:
        sys.exit("error: no chromium\n  where: PATH\n  fix: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        stage, shot = Path(folder) / "stage.html", Path(folder) / "shot.png"
        stage.write_text(STAGE.replace("PAGE", page.resolve().as_uri()), encoding="utf-8")
        browse(chromium, stage, SIZE, f"--screenshot={shot}")
        with Image.open(shot) as picture:
            picture.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE).save(PICTURE, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
