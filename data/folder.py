"""Your own pictures and captions: train.py --data FOLDER

Captions come from metadata.jsonl or metadata.csv (columns file_name and text), as in the
ImageFolder convention. If there is none, they come from a .txt file of the same name beside each
picture, or else from the name of its subfolder. A folder with train/ and validation/ (or val/,
valid/, dev/ or test/) has its own split. Otherwise a tenth of the pictures is held out.
"""

import csv
import hashlib
import io
import json
import os
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from transfusion import Tokenizer

HELD_OUT = 0.1  # share of the pictures
FEWEST = 20  # the smallest number of pictures worth training on
LONGEST = 1000  # the most bytes of a caption
SPLITS = ("validation", "val", "valid", "dev", "test")  # names of the held-out part
OTHER_FORMATS = {".avif", ".heic", ".heif", ".jxl", ".svg"}  # of which Pillow may not read some

def load_folder(folder, size):
    """Returns (training pairs, held-out pairs), each a list of (caption, picture).

    Pictures are uint8 (size, size, 3). Prints where the captions come from, and what is not used.
    Raises ValueError, with a one-sentence message, if the folder cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    held_out_names = [name for name in SPLITS if (folder / name).is_dir()]
    if (folder / "train").is_dir() and held_out_names:
        names = ["train", held_out_names[0]]
        check_rest(folder, names)
        train, held_out = [load_pairs(folder / name, size) for name in names]
    else:
        train, held_out = split_by_content(load_pairs(folder, size))
    n_pairs = len(train) + len(held_out)
    if n_pairs < FEWEST:
        raise ValueError(f"{folder} has {n_pairs} readable pictures with captions, but needs at "
                         f"least {FEWEST}. The caption of cat.png is in cat.txt beside it, in "
                         f"metadata.csv or metadata.jsonl, or it is the name of its subfolder.")
    if min(len(train), len(held_out)) < 2:
        raise ValueError(f"{folder} needs at least 2 different pictures to train on and 2 to hold "
                         f"out, but has {len(train)} and {len(held_out)}.")
    return train, held_out

# ---- Find the files ------------------------------------------------------------------------------

def find_files(folder):
    """All files in a folder and its subfolders, also linked ones. Hidden files and the output
    directories of train.py are left out.
    """
    files, seen = [], set()
    for path, subfolders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in seen or "run.json" in names:
            subfolders.clear()  # a link in a circle, or an output directory
            continue
        seen.add(os.path.realpath(path))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(path, name) for name in sorted(names) if not name.startswith(".")]
    return files

def has_captions(file):
    return file.stem == "metadata" or file.suffix.lower() in (".txt", ".caption")

def check_rest(folder, names):
    """What is outside train/ and validation/ is not used. Captions there are a mistake."""
    rest = [file for file in find_files(folder) if file.relative_to(folder).parts[0] not in names]
    for file in rest:
        if has_captions(file) and file.relative_to(folder).parts[0] not in SPLITS:
            raise ValueError(f"{folder} has {' and '.join(names)}, so {file} is not used; "
                             f"each of them needs its own captions.")
    if rest:
        print(f"{len(rest)} files in {folder} are outside {' and '.join(names)}, and not used.")

# ---- Pair pictures with captions -----------------------------------------------------------------

def find_captions(folder):
    """A list of (path of a picture, caption or the .txt file with its caption)."""
    files, formats = find_files(folder), Image.registered_extensions()
    pictures = [file for file in files if file.suffix.lower() in formats]
    sources = [file for file in files if has_captions(file)]
    metadata = {file.parent: file for file in sources if file.name in READERS}
    texts = {file for file in sources if file.suffix == ".txt"}
    with_text = [(path, path.with_suffix(".txt")) for path in pictures
                 if path.with_suffix(".txt") in texts]
    if metadata:
        origin, used = "metadata", list(metadata.values())
        pairs = [
            named_picture(file, row) for file in used for row in READERS[file.name](file)
        ]
    elif with_text:
        origin, used, pairs = ".txt files", texts, with_text
    else:
        origin, used = "the names of the subfolders", []
        pairs = [
            (path, path.parent.name.replace("_", " ")) for path in pictures if path.parent != folder
        ]
    unused = [file for file in sources if file not in used]
    if unused:
        raise ValueError(f"{unused[0]} is not used, since captions come from {origin}. Remove it, "
                         f"or rename it: the caption of cat.png is in cat.txt beside it.")
    named = {path for path, _ in pairs}
    print(f"{folder}: captions of {len(named)} pictures from {origin}.")
    left_out = {
        "pictures without a caption": sum(path not in named for path in pictures),
        "pictures of a format that this Pillow cannot read (.heic, .svg, ...)":
            sum(file.suffix.lower() in OTHER_FORMATS - formats.keys() for file in files),
        ".txt files without a picture": len(texts) - len(with_text),
    }
    for what, n in left_out.items():
        if n > 0:
            print(f"  {n} {what}: not used")
    return pairs

def read_jsonl(file):
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise ValueError(f"Line {number} of {file} is not valid JSON.") from None
    return rows

def read_csv(file):
    try:
        return list(csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{file} is not valid CSV: {error}.") from None

READERS = {"metadata.csv": read_csv, "metadata.jsonl": read_jsonl}

def read_text(file):
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8: {error}.") from None

def named_picture(metadata, row):
    """(path, caption) from one row of metadata. Rejects files outside the folder."""
    is_dict = isinstance(row, dict)
    names = [row.get(column) for column in ("file_name", "text")] if is_dict else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{metadata} needs file_name and text in every row, "
                         f"but one row is {str(row)[:80]}.")
    if None in row:  # csv puts surplus columns there
        raise ValueError(f"{metadata} has too many commas in a row; "
                         f"a text with commas needs quotation marks: {names[1][:80]}, ...")
    path = Path(names[0])
    if "\0" in names[0] or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{metadata} names a file outside its folder: {names[0]!r}.")
    return metadata.parent / path, names[1]

# ---- Read ----------------------------------------------------------------------------------------

def load_pairs(folder, size):
    """A list of (caption, picture). What cannot be read is skipped and listed."""
    found, notes = find_captions(folder), []
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(lambda pair: load_pair(*pair, size, notes), found)
        loaded = list(tqdm(read, "reading pictures", len(found), file=sys.stdout, disable=None))
    skipped = [pair for pair in loaded if isinstance(pair, str)]
    if skipped:
        print(f"Skipped {len(skipped)} of {len(found)} pictures:")
        for complaint in skipped[:20]:
            print(f"  {complaint}")
        if len(skipped) > 20:
            print(f"  and {len(skipped) - 20} more")
    for note, n in Counter(notes).items():
        print(f"  {n} captions: {note}")
    pairs = [pair for pair in loaded if not isinstance(pair, str)]
    for caption, _ in pairs[:: max(1, len(pairs) // 3)][:3]:
        print(f"  for example: {caption[:100]}")
    return pairs

def load_pair(path, caption, size, notes):
    """(caption, picture), or a sentence that says why the pair cannot be used."""
    try:
        if isinstance(caption, Path):
            first, *others = read_text(caption).strip().split("\n")
            caption = first
            if others:
                notes.append("only the first line of the .txt file is used")
        caption = clean(caption)
        if not caption:
            raise ValueError("its caption is empty.")
        if len(caption.encode()) > LONGEST:
            caption = caption.encode()[:LONGEST].decode(errors="ignore")
            notes.append(f"cut after {LONGEST} bytes")
        return caption, load_picture(path, size)
    except ValueError as error:
        return f"{path}: {error}"

def clean(text):
    """A caption or a prompt on one line, with single spaces. Raises ValueError if it is no text."""
    text = " ".join(text.replace("\ufeff", "").split())
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise ValueError(f"this is not text in UTF-8: {ascii(text[:40])}.")
    return text

def load_picture(file, size):
    """uint8 (size, size, 3) from any picture file, scaled by averaging, on white.

    Takes the first frame of an animation. Rotates a photo as its EXIF data says. Raises ValueError,
    with a one-sentence message, if there is no such file, or if it cannot be read.
    """
    try:
        with Image.open(file) as image:
            image.draft(None, (2 * size, 2 * size))  # does not decode all of a large JPEG
            image = to_8_bits(upright(image)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(to_square(image.convert("RGB"), size))
    except FileNotFoundError:
        raise ValueError(f"There is no picture at {file}.") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise ValueError(f"{file} is not a picture that can be read: {error}") from None

def upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF data are damaged, but the picture may be good
        return image

def to_8_bits(image):
    """Scale 16-bit, 32-bit and float values by the smallest usual range that holds all of them."""
    ranges = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    if image.mode[0] not in "FI":
        return image
    values = np.asarray(image)
    highest = [top for top in ranges if values.max() <= top]
    if values.min() < 0 or not highest:
        raise ValueError(f"its values go from {values.min()} to {values.max()}")
    return Image.fromarray((values * (255 / highest[0])).round().astype(np.uint8))

def to_square(image, size):
    """The middle square. Where that would cut off much, the whole picture, with bars beside it."""
    width, height = image.size
    if max(width, height) <= 4 / 3 * min(width, height):
        return ImageOps.fit(image, (size, size), Image.BOX)
    corners = {image.getpixel((x, y)) for x in (0, width - 1) for y in (0, height - 1)}
    background = corners.pop() if len(corners) == 1 else "white"
    return ImageOps.pad(image, (size, size), Image.BOX, background)

# ---- Split ---------------------------------------------------------------------------------------

def split_by_content(pairs):
    """The hash of a picture decides whether it is held out. So exact copies stay together, and no
    picture changes sides when others come or go.
    """
    split = {False: [], True: []}
    for caption, picture in pairs:
        digest = hashlib.sha256(picture.tobytes()).digest()
        is_held_out = int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32
        split[is_held_out].append((caption, picture))
    return split[False], split[True]

# ---- Words ---------------------------------------------------------------------------------------

def frequent_words(captions, fewest=3, most=4000):
    """The words that become tokens. All others are encoded as bytes."""
    counts = Counter(word for caption in captions for word in caption_words(caption))
    return sorted(word for word, n in counts.most_common(most) if n >= fewest)

def caption_words(caption):
    """The pieces of a caption that can be tokens: words after a space, and punctuation."""
    words = []
    for piece in Tokenizer.split(caption):
        is_word = piece[0] == " " and len(piece) > 1
        if is_word or piece in ".,;:!?":
            words.append(piece.strip())
    return words
