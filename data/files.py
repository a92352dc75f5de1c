"""Reading pictures of any kind, and writing files so that nobody ever finds half of one."""

import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

def load_picture(file, size):
    """uint8 (size, size, 3) from any picture file: the middle square, scaled by averaging, on white.

    Raises ValueError with one sentence if there is no such file, or if it is not a picture that can be read.
    """
    try:
        with Image.open(file) as image:
            image = image.convert("RGBA")
    except FileNotFoundError:
        raise ValueError(f"There is no picture at {file}.") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError) as error:
        raise ValueError(f"{file} is not a picture that can be read: {error}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(ImageOps.fit(image, (size, size), Image.BOX))

def write_atomically(path, write):
    """Call write(temporary path) and then move the file to its place."""
    temporary = path.with_name("writing-" + path.name)
    write(temporary)
    os.replace(temporary, path)

def save_png(picture, path):
    """Write a Pillow image."""
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))
