"""Draw logo.png: a dart on its way, and what it is called.

python .asset/make_logo.py
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))
from svd_xtend.demo.synthetic_clips import COLORS, outline

WIDTH, HEIGHT, SCALE, FRAMES = 880, 200, 3, 9

canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), (24, 26, 34))
draw = ImageDraw.Draw(canvas, "RGBA")
for f in range(FRAMES):  # later frames are more opaque
    t = f / (FRAMES - 1)
    center = (60 + 250 * t) * SCALE, (140 - 70 * t + 36 * t * (1 - t)) * SCALE
    color = tuple(int(a + (b - a) * t) for a, b in zip(COLORS[4], COLORS[5]))
    points = [tuple(p) for p in outline("dart", center, -0.28 + 0.14 * (0.5 - t), 34 * SCALE)]
    draw.polygon(points, fill=(*color, int(255 * (0.08 + 0.92 * t**3))))
font = ImageFont.load_default(92 * SCALE)
draw.text((390 * SCALE, 44 * SCALE), "SVD", fill=(240, 240, 245), font=font)
draw.text((590 * SCALE, 44 * SCALE), "Xtend", fill=tuple(int(c) for c in COLORS[5]), font=font)
canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(Path(__file__).with_name("logo.png"))
