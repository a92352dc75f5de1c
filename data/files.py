"""Reading pictures of any kind, and writing files so that a half-written file is never seen."""

import os

import numpy as np
from PIL import Image, ImageOps

def load_picture(file, size):
    """uint8 (size, size, 3) from any picture file: the middle square, scaled by averaging, on white.

    Takes the first frame of an animation. Rotates a photo as its EXIF data says. Raises ValueError, with a one-sentence
    message, if there is no such file, or if it is not a picture that can be read.
    """
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # 16-bit greyscale, which Pillow would clip to 255
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            image = image.convert("RGB").convert("RGBA") if image.mode == "CMYK" else image.convert("RGBA")
    except FileNotFoundError:
        raise ValueError(f"There is no picture at {file}.") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise ValueError(f"{file} is not a picture that can be read: {error}") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(ImageOps.fit(image, (size, size), Image.BOX))

def write_atomically(path, write):
    """Call write(temporary path) and then rename the file to path."""
    temporary = path.with_name("writing-" + path.name)
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None

def save_png(picture, path):
    """Write a Pillow image."""
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG"))
