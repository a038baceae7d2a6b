"""Write the demo's picture: python -m benchmarks.tiny_vlm.sample [NUMBER]"""

from __future__ import annotations

import json
import sys

from PIL import Image

from benchmarks.tiny_vlm.scenes import TYPES, scene
from vispruner_kernels.demo.tiny_vlm import FOLDER


def main(number: int = 6) -> None:
    """Write a test picture, the things in it and its questions, those about small details first.

    The default is a picture near the mean of each method: of 8 answers, 8 are right with all
    tokens, 8 with VisPruner's, 7 with FasterVLM's and 6 with random ones.
    """
    s = scene("test", number)
    Image.fromarray(s.pixels).save(FOLDER / "sample.png", optimize=True)
    questions = sorted(s.questions, key=lambda question: TYPES.index(question.type))
    fields = ("kind", "left", "top", "right", "bottom")
    rows = {
        "questions": [{"question": x.text, "answer": x.answer} for x in questions],
        "things": [{field: getattr(thing, field) for field in fields} for thing in s.things],
    }
    parts = [
        f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(row)}" for row in table) + "\n  ]"
        for name, table in {"scene": ["test", number], **rows}.items()
    ]
    (FOLDER / "sample.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
