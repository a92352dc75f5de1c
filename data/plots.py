"""All pictures for human readers: rows, grids, the mask, charts and GIFs.

A picture is uint8 (H, W, 3). Functions return a Pillow image.
"""

import textwrap
from contextlib import suppress

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RED, BLUE, GREY, BLACK = (225, 90, 60), (80, 120, 210), (225, 225, 225), (0, 0, 0)

def enlarge(picture, height=128):
    """Enlarge a picture by the largest whole number (at least 1) that fits the height."""
    picture = Image.fromarray(picture)
    scale = max(1, height // picture.height)
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)

def arrange(images, columns, gap=4):
    """Pillow images in a grid, row by row. Each row and column is as large as it has to be."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.height for image in row) + gap for row in rows]
    widths = [max(image.width for image in images[i::columns]) + gap for i in range(len(rows[0]))]
    grid = Image.new("RGB", (sum(widths), sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            grid.paste(image, (sum(widths[:j]), sum(heights[:i])))
    return grid

# Of the common systems. Pillow's own font has only the letters of English.
FONTS = "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf", "msyh.ttc"

def find_font(text, size):
    """Pillow's own font, or one of this machine if it has characters that Pillow's does not."""
    fonts = [ImageFont.load_default(size)]
    for name in FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    for font in fonts:
        box = bytes(font.getmask("\uffff"))  # what the font draws for a character that it lacks
        if all(bytes(font.getmask(c)) != box for c in text if not c.isspace()):
            return font
    return fonts[0]

def row_of(pictures):
    """Pictures side by side."""
    return arrange([enlarge(picture) for picture in pictures], len(pictures))

def titled(image, title, height=24, colour=BLACK, size=16):
    """A Pillow image below a title."""
    whole = Image.new("RGB", (image.width, image.height + height), "white")
    whole.paste(image, (0, height))
    ImageDraw.Draw(whole).text((4, 2), title, colour, find_font(title, size))
    return whole

def captioned_grid(pictures, captions, correct, columns=6):
    """Pictures below their captions. The caption is red where the picture is not correct."""
    tiles = []
    for picture, caption, is_correct in zip(pictures, captions, correct):
        tile = enlarge(picture)
        lines = textwrap.wrap(caption, tile.width // 6, max_lines=2, placeholder=" ...")
        tiles.append(titled(tile, "\n".join(lines), 32, BLACK if is_correct else RED, 11))
    return arrange(tiles, columns, gap=12)

def mask_picture(mask, names, is_patch, cell=24, margin=64):
    """A boolean attention mask (T, T): one row per query, coloured where it attends to the key, red
    within an image.
    """
    side = margin + cell * len(names)
    picture, font = Image.new("RGB", (side, side), "white"), ImageFont.load_default(12)
    pen = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        y = margin + cell * i
        pen.text((margin - 6, y + cell / 2), name, BLACK, font, anchor="rm")
        label = Image.new("RGB", (margin - 6, cell), "white")
        ImageDraw.Draw(label).text((0, cell / 2), name, BLACK, font, anchor="lm")
        picture.paste(label.rotate(90, expand=True), (y, 0))
        for j in range(len(names)):
            colour = RED if is_patch[i] and is_patch[j] else BLUE
            x = margin + cell * j
            corners = (x, y, x + cell - 3, y + cell - 3)
            pen.rectangle(corners, fill=colour if mask[i][j] else GREY)
    return picture

def save_gif(pictures, path):
    """Write pictures as an animation, and hold the last one for a moment."""
    frames = [enlarge(picture, 256) for picture in pictures]
    durations = [40] * (len(frames) - 1) + [1500]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)

COLOURS = [
    (31, 119, 180), (214, 80, 40), (44, 150, 44), (148, 80, 190), (200, 160, 0), (90, 90, 90),
    (230, 120, 180), (0, 170, 190),
]

def learning_curves(lines, title, width=640, height=320):
    """A chart of {label: [(xs, ys) of each seed]}: a line per seed, in the colour of its label.

    The vertical axis runs from 0 to 1 if all values fit, or else to the largest.
    """
    left, top, right, bottom = 48, 30, width - 190, height - 30
    x_max = max(xs[-1] for curves in lines.values() for xs, _ in curves)
    y_max = max(1, *(max(ys) for curves in lines.values() for _, ys in curves))
    chart, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(12)
    pen = ImageDraw.Draw(chart)
    pen.text((left, 6), title, BLACK, font)
    for fraction in (0, 0.25, 0.5, 0.75, 1):  # a grid, and the numbers on both axes
        x, y = left + (right - left) * fraction, bottom - (bottom - top) * fraction
        pen.line((left, y, right, y), GREY)
        pen.text((left - 6, y), f"{y_max * fraction:.3g}", BLACK, font, anchor="rm")
        pen.text((x, bottom + 6), f"{x_max * fraction:.1e}", BLACK, font, anchor="mt")
    for i, (label, curves) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        for xs, ys in curves:
            across = left + (right - left) * np.array(xs) / x_max
            up = bottom - (bottom - top) * np.array(ys) / y_max
            pen.line(list(zip(across.tolist(), up.tolist())), colour, 2)
        y = top + 20 * i
        pen.rectangle((right + 12, y, right + 24, y + 10), fill=colour)
        pen.text((right + 30, y + 5), label, BLACK, font, anchor="lm")
    return chart
