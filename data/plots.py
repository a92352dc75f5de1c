"""All pictures for human readers: rows, grids, the mask, charts, GIFs, and pictures in a terminal.

A picture is uint8 (H, W, 3). Functions return a Pillow image, unless a docstring says otherwise.
"""

import math
import textwrap
from itertools import cycle

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RED, BLACK = (200, 0, 0), (0, 0, 0)

def enlarge(picture, height=128):
    """Enlarge a picture by the largest whole number (at least 1) that fits the height."""
    picture = Image.fromarray(picture)
    scale = max(1, height // picture.height)
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)

def row_of(pictures, gap=4):
    """Pictures in a row, with a white gap to the right of and below each."""
    width, height = enlarge(pictures[0]).size
    row = Image.new("RGB", (len(pictures) * (width + gap), height + gap), "white")
    for i, picture in enumerate(pictures):
        row.paste(enlarge(picture), (i * (width + gap), 0))
    return row

def stack(top, bottom):
    """One Pillow image below another."""
    both = Image.new("RGB", (max(top.width, bottom.width), top.height + bottom.height), "white")
    both.paste(top, (0, 0))
    both.paste(bottom, (0, top.height))
    return both

def beside(left, right, gap=24):
    """Two Pillow images side by side, each centred vertically."""
    both = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), "white")
    both.paste(left, (0, (both.height - left.height) // 2))
    both.paste(right, (left.width + gap, (both.height - right.height) // 2))
    return both

def titled(image, title):
    """A Pillow image below a line of text."""
    label = Image.new("RGB", (image.width, 24), "white")
    ImageDraw.Draw(label).text((4, 2), title, BLACK, ImageFont.load_default(16))
    return stack(label, image)

def captioned_grid(pictures, captions, correct, columns=6):
    """Pictures above their captions. The caption is red where the picture is not correct."""
    width, height = enlarge(pictures[0]).size
    cell_width, cell_height = width + 16, height + 40
    n_rows = math.ceil(len(pictures) / columns)
    grid = Image.new("RGB", (columns * cell_width, n_rows * cell_height), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, (picture, caption, is_correct) in enumerate(zip(pictures, captions, correct)):
        x, y = i % columns * cell_width + 8, i // columns * cell_height + 4
        grid.paste(enlarge(picture), (x, y))
        words = caption.split()
        half = (len(words) + 1) // 2
        lines = " ".join(words[:half]), " ".join(words[half:])
        text = "\n".join(textwrap.shorten(line, width // 5, placeholder=" ...") for line in lines)
        pen.text((x, y + height + 3), text, BLACK if is_correct else RED, font)
    return grid

def mask_picture(mask, names, is_patch, cell=24, margin=64):
    """A boolean attention mask (T, T): one row per query, coloured where it attends to the key, red within an image."""
    side = margin + cell * len(names)
    picture = Image.new("RGB", (side, side), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for i, name in enumerate(names):
        y = margin + cell * i
        pen.text((margin - 6, y + cell / 2), name, BLACK, font, anchor="rm")
        label = Image.new("RGB", (margin - 6, cell), "white")
        ImageDraw.Draw(label).text((0, cell / 2), name, BLACK, font, anchor="lm")
        picture.paste(label.rotate(90, expand=True), (y, 0))
        for j in range(len(names)):
            if not mask[i][j]:
                colour = (225, 225, 225)
            elif is_patch[i] and is_patch[j]:
                colour = (225, 90, 60)
            else:
                colour = (80, 120, 210)
            x = margin + cell * j
            pen.rectangle((x, y, x + cell - 3, y + cell - 3), fill=colour)
    return picture

def save_gif(pictures, path):
    """Write pictures as an animation, and hold the last one for a moment."""
    frames = [enlarge(picture, 256) for picture in pictures]
    durations = [40] * (len(frames) - 1) + [1500]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)

def terminal_picture(picture):
    """A picture as a string of coloured half blocks: each character shows an upper and a lower pixel."""
    lines = []
    for upper, lower in zip(picture[::2].tolist(), picture[1::2].tolist()):
        cells = (f"\033[38;2;{a};{b};{c}m\033[48;2;{d};{e};{f}m▀" for (a, b, c), (d, e, f) in zip(upper, lower))
        lines.append("".join(cells) + "\033[0m")
    return "\n".join(lines)

LINE_COLOURS = [(31, 119, 180), (214, 80, 40), (44, 150, 44), (148, 80, 190), (200, 160, 0), (90, 90, 90),
                (230, 120, 180), (0, 170, 190)]

def learning_curves(lines, title, width=640, height=320):
    """{label: [(xs, ys) of each seed]} -> a chart with a thin line per seed and a thick line for their mean.

    The vertical axis runs from 0 to 1 if all values fit, or else from the smallest to the largest.
    """
    left, top, right, bottom = 48, 30, width - 190, height - 30
    x_max = max(xs[-1] for curves in lines.values() for xs, _ in curves)
    values = [y for curves in lines.values() for _, ys in curves for y in ys]
    y_min, y_max = (0, 1) if min(values) >= 0 and max(values) <= 1 else (min(values), max(values))
    y_range = max(y_max - y_min, 1e-6)
    chart = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(chart), ImageFont.load_default(12)
    pen.text((left, 6), title, BLACK, font)
    for i in range(5):  # a grid, and the numbers on both axes
        x, y = left + (right - left) * i / 4, bottom - (bottom - top) * i / 4
        pen.line((left, y, right, y), (225, 225, 225))
        pen.text((left - 6, y), f"{y_min + y_range * i / 4:.3g}", BLACK, font, anchor="rm")
        pen.text((x, bottom + 6), f"{x_max * i / 4:.1e}", BLACK, font, anchor="mt")
    for i, ((label, curves), colour) in enumerate(zip(lines.items(), cycle(LINE_COLOURS))):
        pale = tuple((value + 2 * 255) // 3 for value in colour)
        n_points = min(len(xs) for xs, _ in curves)
        mean = np.mean([(xs[:n_points], ys[:n_points]) for xs, ys in curves], axis=0)
        for (xs, ys), ink, thickness in [*((curve, pale, 1) for curve in curves), (mean, colour, 3)]:
            across = left + (right - left) * np.asarray(xs) / x_max
            up = bottom - (bottom - top) * (np.asarray(ys) - y_min) / y_range
            pen.line(list(zip(across.tolist(), up.tolist())), ink, thickness, joint="curve")
        pen.rectangle((right + 12, top + 20 * i, right + 24, top + 20 * i + 10), fill=colour)
        pen.text((right + 30, top + 20 * i + 5), label, BLACK, font, anchor="lm")
    return chart
