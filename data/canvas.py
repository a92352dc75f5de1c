"""Pictures for people: rows that grow, grids with captions, a mask, a terminal. All pictures are uint8 (H, W, 3)."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

def enlarge(picture, scale=4):
    picture = Image.fromarray(picture)
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)

def side_by_side(pictures, scale=4):
    """Pictures in one row."""
    frame = [np.pad(picture, ((0, 1), (0, 1), (0, 0)), constant_values=255) for picture in pictures]
    return enlarge(np.concatenate(frame, axis=1), scale)

def stack(top, bottom):
    """One Pillow image under the other."""
    both = Image.new("RGB", (max(top.width, bottom.width), top.height + bottom.height), "white")
    both.paste(top, (0, 0))
    both.paste(bottom, (0, top.height))
    return both

def beside(left, right, gap=24):
    """Two Pillow images in one, each in the middle of its height."""
    both = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, (both.height - left.height) // 2))
    both.paste(right, (left.width + gap, (both.height - right.height) // 2))
    return both

def captioned_grid(pictures, captions, right, columns=6, scale=4):
    """Pictures above their captions; a caption is red where the picture is not what it says."""
    height, width, text_height = len(pictures[0]) * scale, len(pictures[0][0]) * scale, 40
    rows = math.ceil(len(pictures) / columns)
    grid = Image.new("RGB", (columns * (width + 16), rows * (height + text_height)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, (picture, caption, good) in enumerate(zip(pictures, captions, right)):
        x, y = i % columns * (width + 16) + 8, i // columns * (height + text_height) + 4
        grid.paste(enlarge(picture, scale), (x, y))
        words = caption.split()
        half = (len(words) + 1) // 2
        text = " ".join(words[:half]) + "\n" + " ".join(words[half:])
        pen.text((x, y + height + 3), text, "black" if good else (200, 0, 0), font)
    return grid

def mask_picture(mask, names, inside, cell=24, margin=64):
    """A boolean attention mask (T, T): a row for every query, coloured where it may look; red inside an image."""
    picture = Image.new("RGB", (margin + cell * len(names), margin + cell * len(names)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for i, name in enumerate(names):
        at = margin + cell * i
        pen.text((margin - 6, at + cell / 2), name, "black", font, anchor="rm")
        label = Image.new("RGB", (margin - 6, cell), "white")
        ImageDraw.Draw(label).text((0, cell / 2), name, "black", font, anchor="lm")
        picture.paste(label.rotate(90, expand=True), (at, 0))
        for j in range(len(names)):
            colour = (225, 225, 225) if not mask[i][j] else (225, 90, 60) if inside[i] and inside[j] else (80, 120, 210)
            x = margin + cell * j
            pen.rectangle((x, at, x + cell - 3, at + cell - 3), fill=colour)
    return picture

def half_blocks(picture):
    """A picture as coloured text: every character cell shows an upper and a lower pixel."""
    lines = []
    for upper, lower in zip(picture[::2].tolist(), picture[1::2].tolist()):
        cells = (f"\033[38;2;{a};{b};{c}m\033[48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(upper, lower))
        lines.append("".join(cells) + "\033[0m")
    return "\n".join(lines)
