"""The demo's picture: python -m benchmarks.tiny_vlm.sample [NUMBER]"""

from __future__ import annotations

import json
import sys

from PIL import Image

from benchmarks.tiny_vlm.scenes import TYPES, scene
from vispruner_kernels.demo.tiny_vlm import FOLDER


def main(number: int = 6) -> None:
    """Writes that test picture, what is in it and its questions, small details first.

    The default is one of those near the mean of each method: 8, 8, 7 and 6 right answers with all
    tokens, VisPruner, FasterVLM and random ones.
    """
    s = scene("test", number)
    Image.fromarray(s.pixels).save(FOLDER / "sample.png", optimize=True)
    questions = sorted(s.questions, key=lambda question: TYPES.index(question.type))
    sides = ("kind", "left", "top", "right", "bottom")
    rows = {
        "questions": [{"question": x.text, "answer": x.answer} for x in questions],
        "things": [{side: getattr(thing, side) for side in sides} for thing in s.things],
    }
    parts = [
        f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in table) + "\n  ]"
        for name, table in {"scene": ["test", number], **rows}.items()
    ]
    (FOLDER / "sample.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
