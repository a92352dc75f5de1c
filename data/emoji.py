"""A folder of pictures with captions to train on: the emoji of a font, with their Unicode names.

    python -m data.emoji emoji                      about 2,000 pictures, to emoji/
    python train.py --data emoji

The font is Noto Color Emoji, under the SIL Open Font License (Debian's package
fonts-noto-color-emoji).
"""

import csv
import sys
import unicodedata
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

FONT = "NotoColorEmoji.ttf"  # Pillow searches the font directories of the system
FONT_SIZE, PICTURE_SIZE = 109, (136, 128)  # in pixels; the font has only this size
SKIN_TONES = {
    "\U0001F3FB": "light", "\U0001F3FC": "medium light", "\U0001F3FD": "medium",
    "\U0001F3FE": "medium dark", "\U0001F3FF": "dark",
}

def all_emoji(font):
    """Pairs of (text, caption), for every emoji of one character, in each of its skin tones."""
    for character in map(chr, [*range(0x2000, 0x3300), *range(0x1F000, 0x1FB00)]):
        name = unicodedata.name(character, "").lower()
        is_flag_part, is_skin_tone = "regional indicator" in name, "fitzpatrick" in name
        if name and not is_flag_part and not is_skin_tone and is_one_picture(character, font):
            yield character, name
            for tone, of_tone in SKIN_TONES.items():
                if is_one_picture(character + tone, font):
                    yield character + tone, f"{name}, {of_tone} skin tone"

def is_one_picture(text, font):
    """Does the font have this text as one picture?

    Text that it lacks is drawn as nothing, or as several pictures.
    """
    try:
        return font.getbbox(text) == (0, 0, *PICTURE_SIZE)
    except RuntimeError:  # Pillow cannot lay out some characters
        return False

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder for the pictures and metadata.csv")
    parser.add_argument("--font", default=FONT, help="font file [%(default)s]")
    args = parser.parse_args(argv)
    try:
        font = ImageFont.truetype(args.font, FONT_SIZE)
    except OSError as error:
        sys.exit(f"The font {args.font} was not found, or is not a font ({error}): "
                 "install Noto Color Emoji, or name its file with --font.")
    if not is_one_picture("\U0001F600", font):
        sys.exit(f"The font {args.font} has no emoji of {PICTURE_SIZE} pixels.")
    try:
        args.folder.mkdir(parents=True)
    except OSError as error:
        sys.exit(f"{args.folder} must be a new folder: {error}.")
    rows = []
    for text, caption in tqdm(all_emoji(font), "drawing", disable=None):
        picture = Image.new("RGB", PICTURE_SIZE, "white")
        ImageDraw.Draw(picture).text((0, 0), text, font=font, embedded_color=True)
        rows.append((f"{len(rows):04d}.png", caption))
        picture.save(args.folder / rows[-1][0])
    with open(args.folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])
    print(f"{len(rows)} pictures with captions are in {args.folder}.")

if __name__ == "__main__":
    main()
