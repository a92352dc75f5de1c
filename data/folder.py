"""Your own pictures and captions: train.py --data FOLDER

Captions come from metadata.jsonl or metadata.csv (columns file_name and text), as in the
ImageFolder convention. If there is none, they come from a .txt file of the same name beside each
picture, or else from the name of its subfolder. A folder with train/ and validation/ has its own
split. Otherwise 5 % of the pictures are held out.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from transfusion import Tokenizer

HELD_OUT = 0.05  # share of the pictures
FEWEST = 20  # the smallest number of pictures worth training on
LONGEST = 1000  # the most characters in a caption

def load_folder(folder, size):
    """Returns (training pairs, held-out pairs), each a list of (caption, picture).

    Pictures are uint8 (size, size, 3). Prints which pictures were skipped, and why. Raises
    ValueError, with a one-sentence message, if the folder cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    has_split = (folder / "train").is_dir() and (folder / "validation").is_dir()
    parts = [folder / "train", folder / "validation"] if has_split else [folder]
    for name in ("metadata.jsonl", "metadata.csv"):
        if has_split and (folder / name).exists():
            raise ValueError(f"{folder} has train/ and validation/, "
                             f"so each of them needs its own {name}.")
    pairs = [load_pairs(find_captions(part), size) for part in parts]
    n_pairs = sum(map(len, pairs))
    if n_pairs < FEWEST:
        raise ValueError(f"{folder} has {n_pairs} readable pictures with captions, "
                         f"but needs at least {FEWEST}.")
    train, held_out = pairs if has_split else split_by_content(pairs[0])
    if min(len(train), len(held_out)) < 2:
        raise ValueError(f"{folder} needs at least 2 different pictures to train on and 2 to hold "
                         f"out, but has {len(train)} and {len(held_out)}.")
    return train, held_out

# ---- Which captions belong to which pictures? ----------------------------------------------------

def find_captions(folder):
    """A list of (path of a picture, caption or the file with its caption)."""
    for name, read in (("metadata.jsonl", read_jsonl), ("metadata.csv", read_csv)):
        if (folder / name).is_file():
            return [named_picture(folder, name, row) for row in read(folder / name)]
    suffixes = Image.registered_extensions()  # of all file formats that Pillow knows
    pictures = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file()
    )
    with_text = [
        (path, path.with_suffix(".txt")) for path in pictures if path.with_suffix(".txt").is_file()
    ]
    if with_text:
        n_without = len(pictures) - len(with_text)
        if n_without > 0:
            print(f"{n_without} of {len(pictures)} pictures in {folder} have no .txt file.")
        return with_text
    return [
        (path, path.parent.name.replace("_", " ")) for path in pictures if path.parent != folder
    ]

def read_jsonl(file):
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise ValueError(f"Line {number} of {file} is not valid JSON.") from None
    return rows

def read_csv(file):
    try:
        return list(csv.DictReader(io.StringIO(read_text(file), newline="")))
    except csv.Error as error:
        raise ValueError(f"{file} is not valid CSV: {error}.") from None

def read_text(file):
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8: {error}.") from None

def named_picture(folder, metadata, row):
    """(path, caption) from one row of metadata. Rejects files outside the folder."""
    is_dict = isinstance(row, dict)
    names = [row.get(column) for column in ("file_name", "text")] if is_dict else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / metadata} needs file_name and text in every row, "
                         f"but one row is {str(row)[:80]}.")
    if None in row:  # csv puts surplus columns there
        raise ValueError(f"{folder / metadata} has too many commas in a row; "
                         f"a text with commas needs quotation marks: {names[1][:80]}, ...")
    path = folder / names[0]
    if "\0" in names[0] or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder / metadata} names a file outside its folder: {names[0]!r}.")
    return path, names[1]

# ---- Reading the pictures ------------------------------------------------------------------------

def load_pairs(found, size):
    """A list of (caption, picture), read in parallel.

    Pictures that cannot be read are skipped and listed.
    """
    with ThreadPoolExecutor() as pool:
        read = pool.map(lambda pair: load_pair(*pair, size), found)
        loaded = list(tqdm(read, "reading pictures", len(found), disable=None))
    skipped = [pair for pair in loaded if isinstance(pair, str)]
    if skipped:
        print(f"Skipped {len(skipped)} of {len(found)} pictures:")
        for complaint in skipped[:20]:
            print(f"  {complaint}")
        if len(skipped) > 20:
            print(f"  and {len(skipped) - 20} more")
    return [pair for pair in loaded if not isinstance(pair, str)]

def load_pair(path, caption, size):
    """(caption, picture), or a sentence that says why the pair cannot be used."""
    try:
        caption = read_text(caption) if isinstance(caption, Path) else caption
        caption = " ".join(caption.split())
        if not 0 < len(caption) <= LONGEST:
            return (f"{path}: its caption has {len(caption)} characters, "
                    f"but must have 1 to {LONGEST}.")
        caption.encode()  # JSON can have half a surrogate pair
        return caption, load_picture(path, size)
    except UnicodeEncodeError as error:
        return f"{path}: its caption is not valid Unicode: {error}."
    except ValueError as error:
        return str(error)

def load_picture(file, size):
    """uint8 (size, size, 3) from any picture file.

    The middle square, scaled by averaging, on white. Takes the first frame of an animation. Rotates
    a photo as its EXIF data says. Raises ValueError, with a one-sentence message, if there is no
    such file, or if it is not a picture that can be read.
    """
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # 16-bit greyscale, which Pillow would clip to 255
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert("RGBA")
    except FileNotFoundError:
        raise ValueError(f"There is no picture at {file}.") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise ValueError(f"{file} is not a picture that can be read: {error}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(ImageOps.fit(image, (size, size), Image.BOX))

def split_by_content(pairs):
    """Hold out the pictures with the smallest hashes.

    Exact copies have the same hash, so they stay together.
    """
    hashes = [hashlib.sha256(picture.tobytes()).hexdigest() for _, picture in pairs]
    distinct = sorted(set(hashes))
    last = distinct[min(len(distinct), max(2, round(HELD_OUT * len(distinct)))) - 1]
    train = [pair for pair, of_picture in zip(pairs, hashes) if of_picture > last]
    held_out = [pair for pair, of_picture in zip(pairs, hashes) if of_picture <= last]
    return train, held_out

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
