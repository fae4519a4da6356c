"""Takes pictures of pages, whole and as they look on a desktop, on a phone and in the dark, to look at them.

    python tools/page_pictures.py artifacts/demo/report.html compare.html [--out build/pictures]

Needs Debian's chromium.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.chromium import browse, find  # noqa: E402

TALLEST = 12_000
LOOKS = {"desktop": (1280, "light"), "dark": (1280, "dark"), "phone": (390, "light"), "phone-dark": (390, "dark")}
STAGE = """<!doctype html>
<meta charset="utf-8">
<style>
body { margin: 0; }
iframe { display: block; width: WIDTHpx; height: HEIGHTpx; border: 0; color-scheme: SCHEME; }
</style>
<iframe src="PAGE"></iframe>
"""


def main() -> None:
    """Writes the pictures, and their names to stdout."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "pictures")
    options, chromium = parser.parse_args(), find()
    if chromium is None:
        sys.exit("error: no chromium\n  where: PATH\n  fix: apt-get install chromium")
    options.out.mkdir(parents=True, exist_ok=True)
    for page in options.pages:
        if not page.is_file():
            sys.exit(
                f"error: no page\n  where: {page}\n  fix: name an HTML file, such as the report.html of an artifact"
            )
        for look, (width, scheme) in LOOKS.items():
            name = f"{page.resolve().parent.name}-{page.stem}-{look}.png"
            picture(chromium, page, width, scheme).save(options.out / name)
            print(options.out / name)


def picture(chromium: str, page: Path, width: int, scheme: str) -> Image.Image:
    """A whole page at that width; it stands in a frame, as Chromium's own windows are at least 500 wide."""
    filled = {"WIDTH": str(width), "HEIGHT": str(TALLEST), "SCHEME": scheme, "PAGE": page.resolve().as_uri()}
    stage = STAGE
    for word, value in filled.items():
        stage = stage.replace(word, value)
    with tempfile.TemporaryDirectory() as folder:
        path, shot = Path(folder) / "stage.html", Path(folder) / "shot.png"
        path.write_text(stage, encoding="utf-8")
        browse(chromium, path, (max(width, 500), TALLEST), f"--screenshot={shot}")
        with Image.open(shot) as image:
            whole = image.convert("RGB").crop((0, 0, width, TALLEST))
    background = Image.new("RGB", whole.size, whole.getpixel((1, TALLEST - 1)))
    _, _, _, bottom = ImageChops.difference(whole, background).getbbox() or (0, 0, 0, 1)
    return whole.crop((0, 0, width, min(TALLEST, bottom + 30)))


if __name__ == "__main__":
    main()
